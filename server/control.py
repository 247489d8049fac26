"""A SuperLink's control API, by Flower's own program `flwr`: runs started, listed, stopped, read.

Its command line and its JSON are documented and versioned, while the modules below it are not, so
this is the only place that knows either; what it costs is a process of a second for each call.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from common.cli import ENVIRONMENT
from common.errors import ConfigError, FederationError
from server.documents import BUNDLED, templates

PATIENCE_S = 60.0
"""How long one call may take: Flower's own requests give up after 30 seconds."""
ROOT = Path(__file__).resolve().parent.parent
"""Where the bundle is made from."""
PACKAGES = ("common", "server", "client")
NAME = "coterie"
"""Of the connection, in a configuration that is made for each call."""
FINISHED, STOPPED = "finished", ":stopped"
"""How the status of a run that is over begins; and ends, if somebody stopped it."""


@dataclass(frozen=True)
class Address:
    """Where a SuperLink is, and who vouches for it."""

    address: str
    ca: Path
    """The authority's certificate."""

    @classmethod
    def checked(cls, address: str, ca: str) -> "Address":
        """Raises: ConfigError if either cannot be one: plain HTTP is not spoken."""
        host, _, port = address.rpartition(":")
        if not host or "/" in host or not port.isdigit():
            raise ConfigError(f"superlink.address={address}: must be HOST:PORT")
        path = Path(ca).expanduser().resolve()
        if not ca or not path.is_file():
            raise ConfigError(
                f"superlink.ca={ca or repr(ca)}: must be the certificate of the authority that "
                "signed the SuperLink's; without TLS nothing is submitted"
            )
        return cls(address, path)


@dataclass(frozen=True)
class Link:
    """A SuperLink, as who submits runs sees it."""

    address: Address

    def start(self, run_config: Mapping[str, str]) -> int:
        """Starts a run of the bundle made from this program; returns Flower's number of it.

        Raises: FederationError if the SuperLink cannot be reached, or takes no run.
        """
        with tempfile.TemporaryDirectory(prefix="coterie-bundle-") as folder:
            bundle = Path(folder) / NAME
            write_bundle(bundle)
            overrides = Path(folder) / "run-config.toml"
            overrides.write_bytes(tomli_w.dumps(run_config).encode())
            arguments = ("run", str(bundle), NAME, "--run-config", str(overrides))
            answer = self._asked(*arguments, doing="start a run")
        return int(answer["run-id"])

    def status(self, flower_run: int) -> str:
        """Of a run: "pending", "starting", "running", or "finished:" and how."""
        answer = self._asked("list", NAME, "--run-id", str(flower_run), doing="list runs")
        return str(answer["runs"][0]["status"])

    def nodes(self) -> dict[int, str]:
        """Status of each registered node ("online", "offline", "registered"), by its number."""
        answer = self._asked("supernode", "list", NAME, doing="list nodes")
        return {int(node["node-id"]): str(node["status"]) for node in answer["nodes"]}

    def register(self, public_key: Path, name: str) -> int:
        """Lets in whoever has the private half of a node's key; returns the node's number."""
        arguments = ("supernode", "register", str(public_key), NAME, "--name", name)
        return int(self._asked(*arguments, doing="register a node")["node-id"])

    def unregister(self, node: int) -> None:
        """Lets a node in no longer. Args: node: Flower's number of it."""
        self._asked("supernode", "unregister", str(node), NAME, doing="take out a node")

    def stop(self, flower_run: int) -> None:
        """Ends a run, wherever it is."""
        self._asked("stop", str(flower_run), NAME, doing="stop a run")

    def log(self, flower_run: int) -> str:
        """What the ServerApp of a run has printed so far."""
        with self._environment() as environment:
            done = _run(("log", str(flower_run), NAME, "--show"), environment)
        if done.returncode:
            raise FederationError(self._refused("read a log", done.stderr or done.stdout))
        return done.stdout

    def _asked(self, *arguments: str, doing: str) -> dict[str, Any]:
        with self._environment() as environment:
            done = _run((*arguments, "--format", "json"), environment)
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = {}
        if done.returncode or not isinstance(answer, dict) or not answer.get("success"):
            told = answer.get("error-message") if isinstance(answer, dict) else None
            raise FederationError(self._refused(doing, told or done.stderr or done.stdout))
        return answer

    def _refused(self, doing: str, reason: str) -> str:
        # What the command printed comes first, and its error last.
        lines = [line for line in str(reason).splitlines() if line.strip()] or ["it said nothing"]
        text = " ".join(lines[-1].replace("Error:", " ").split())
        return f"superlink.address={self.address.address}: could not {doing}: {text[:400]}"

    @contextmanager
    def _environment(self) -> Iterator[dict[str, str]]:
        """With a Flower home of its own, which names this SuperLink alone."""
        with tempfile.TemporaryDirectory(prefix="coterie-flower-") as home:
            known = {"address": self.address.address, "root-certificates": str(self.address.ca)}
            connection = tomli_w.dumps({"superlink": {"default": NAME, NAME: known}})
            (Path(home) / "config.toml").write_bytes(connection.encode())
            yield {**os.environ, **ENVIRONMENT, "FLWR_HOME": home, "COLUMNS": "1000"}


def write_bundle(folder: Path) -> None:
    """What goes to the SuperLink: the packages of both sides, and what they are called.

    Guarantee: the same files give the same bundle.
    """
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for package in PACKAGES:
        for source in sorted((ROOT / package).rglob("*.py")):
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    (folder / "server" / BUNDLED).write_text(json.dumps(dict(templates())), encoding="utf-8")


def _run(
    arguments: tuple[str, ...], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Raises: FederationError if it takes too long; ConfigError if Flower is not installed."""
    program = Path(sys.executable).with_name("flwr")
    if not program.is_file():
        raise ConfigError(f"{program}: Flower's command is not installed beside this Python")
    try:
        return subprocess.run(  # noqa: S603 - our own arguments, and no shell
            [str(program), *arguments],
            env=dict(environment),
            cwd=environment["FLWR_HOME"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FederationError(
            f"flwr {arguments[0]}: no answer within {PATIENCE_S:g} s; is the SuperLink there?"
        ) from error
