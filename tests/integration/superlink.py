"""Real processes on loopback: Flower's stock SuperLink with TLS and node authentication, and nodes.

Nothing is faked: certificates are made, keys registered, runs submitted by `flwr`. What a test
leaves running is killed at the end of its block, by its id.
"""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import httpx

from client.ledger import Store, Terms
from common.certificates import Authority, make_authority, make_node_key
from common.cli import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
COTERIE = (sys.executable, "-c", "import sys; from common.cli import main; sys.exit(main())")
READY_S, STEP_S = 60.0, 0.1
SUPERVISED = """
import os, signal, sys
import client.service
from common.cli import main
{}
while True:
    child = os.fork()
    if not child:
        os._exit(main(sys.argv[1:]))
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        if not os.path.exists("again") or os.path.getsize("again"):
            sys.exit(os.WEXITSTATUS(status))
        open("again", "w").write(str(os.WEXITSTATUS(status)))
"""
"""Starts the command again whenever a signal kills it, without the seconds that imports take; and
once when it ends by itself, where there is an empty file `again`: its exit code is then in it.
"""
TRIAL = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "trial"
version = "0.1.0"
description = "A bundle of the test suite."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "coterie"

[tool.flwr.app.components]
serverapp = "trial.coordinator:app"
clientapp = "trial.site:app"

[tool.flwr.app.config]
settings = ""
"""


def free_port() -> int:
    """One that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    holds: Callable[[], bool], what: str, seconds: float = READY_S, *, step_s: float = STEP_S
) -> None:
    """Returns once something holds. Raises: AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(step_s)


def descendants(pid: int) -> list[int]:
    """Processes that one started, and that these started."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


class Process(AbstractContextManager["Process"]):
    """A process in a session of its own, whose output goes to a file."""

    def __init__(self, command: tuple[str, ...], log: Path, environment: dict[str, str]) -> None:
        self._command, self.log, self._environment = command, log, environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, or starts it again; what it says is added to the same file."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                cwd=self.log.parent,
                start_new_session=True,
            )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The one that was started last."""
        assert self._process is not None
        return self._process

    @property
    def said(self) -> str:
        """All that it wrote."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = READY_S, *, times: int = 1) -> None:
        """Returns once it has written a text so often. Raises: AssertionError if it ends before."""

        def holds() -> bool:
            if self.said.count(text) >= times:
                return True
            assert self.process.poll() is None, f"it ended before {text!r}:\n{self.said[-2000:]}"
            return False

        try:
            wait_until(holds, text, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said[-2000:]}") from None

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to it alone."""
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = READY_S) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """As when the machine stops: no handler runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __exit__(self, *_: object) -> None:
        below = [] if self._process is None else descendants(self._process.pid)
        self.kill()
        for each in below:  # a ServerApp, in a session of its own, waits for its SuperLink
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)


class SuperLink(Process):
    """Flower's own coordinator process, its certificate, and whoever submits to it.

    Names: the connection of `flwr` is `lab`.
    """

    def __init__(self, folder: Path, *, authentication: bool = True, tls: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.authority: Authority = make_authority(folder / "authority")
        self.tls = tls
        self.environment = environment(folder / "flower", self.address, self.authority)
        command = [str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--database", str(folder / "state.db")]
        if tls:
            own = self.authority.issue("superlink", ["localhost", "127.0.0.1"])
            command += ["--ssl-certfile", str(own.certificate), "--ssl-keyfile", str(own.key)]
            command += ["--ssl-ca-certfile", str(self.authority.certificate)]
        else:
            command += ["--insecure"]
        command += ["--enable-supernode-auth"] if authentication else []
        super().__init__(tuple(command), folder / "superlink.log", self.environment)

    def start(self) -> None:
        """Returns once it answers; on the same port and state as before, if it was killed."""
        super().start()
        verify: ssl.SSLContext | bool = False
        if self.tls:
            verify = ssl.create_default_context(cafile=str(self.authority.certificate))
        url = f"{'https' if self.tls else 'http'}://{self.address}/health"
        with httpx.Client(verify=verify, timeout=2.0) as client:

            def answers() -> bool:
                assert self.process.poll() is None, self.said[-2000:]
                with suppress(httpx.TransportError):
                    return client.get(url).is_success
                return False

            wait_until(answers, "the SuperLink answers")

    def __enter__(self) -> "SuperLink":
        self.start()
        return self

    def flwr(self, *words: str) -> dict[str, Any]:
        """What `flwr WORDS lab --format json` answers."""
        done = subprocess.run(
            [str(BIN / "flwr"), *words, "--format", "json"],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=READY_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        assert answer.get("success", True), answer
        return answer

    def register(self, public_key: Path, name: str) -> int:
        """Lets a node in; the node id that Flower gives it."""
        answer = self.flwr("supernode", "register", str(public_key), "lab", "--name", name)
        return int(answer["node-id"])

    def submit(self, bundle: Path, settings: str) -> int:
        """Starts a run of a bundle; its number. Args: settings: of its run config, one text."""
        config = f'settings="{settings}"'
        answer = self.flwr("run", str(bundle), "lab", "--run-config", config)
        return int(answer["run-id"])

    def status(self, run: int) -> str:
        """Of a run, as `flwr list` says: finished:completed, ..."""
        answer = self.flwr("list", "lab", "--run-id", str(run))
        return str(answer["runs"][0]["status"])


def environment(home: Path, address: str, authority: Authority) -> dict[str, str]:
    """For Flower's processes: a home of their own, and nothing that calls out."""
    home.mkdir(parents=True, exist_ok=True)
    connection = f'address = "{address}"\nroot-certificates = "{authority.certificate}"\n'
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "lab"\n\n[superlink.lab]\n{connection}'
    )
    return {
        **os.environ,
        **ENVIRONMENT,
        "FLWR_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
    }


class NodeProcess(Process):
    """`coterie node`, with a key, a ledger and records of its own in a folder of its own."""

    def __init__(
        self,
        superlink: SuperLink,
        name: str,
        data: Path,
        *settings: str,
        cap: float = 100.0,
        before: str = "",
    ) -> None:
        """Args: data: a CSV file of text and label; settings: that differ, NAME=VALUE; before: of
        a program that is run again whenever it is killed, what stands before the command.
        """
        folder = superlink.folder / name
        folder.mkdir()
        self.key, self.ledger, self.name = folder / "node.key", folder / "books.db", name
        public = make_node_key(self.key)
        self.node_id = superlink.register(public, name)
        shutil.copy(data, folder / "records.csv")
        with Store.create(self.ledger) as store:
            store.open(name, Terms("trial", cap, 1e-3, "1" * 64))
        own = {
            "name": name,
            "superlink": superlink.address,
            "authority": superlink.authority.certificate,
            "key": self.key,
            "ledger": self.ledger,
            "data.path": folder / "records.csv",
            "data.labels": "[sport,money]",
            "node": "open",
            "threads": 1,
            **dict(setting.split("=", 1) for setting in settings),
        }
        words = tuple(f"{setting}={value}" for setting, value in own.items())
        program = (sys.executable, "-c", SUPERVISED.format(before)) if before else COTERIE
        super().__init__((*program, "node", *words), folder / "node.log", superlink.environment)

    def __enter__(self) -> "NodeProcess":
        self.start()
        return self


def write_bundle(folder: Path, coordinator: str, site: str = "") -> Path:
    """A Flower app of two modules, by their source; `site` is what a stock node would run."""
    package = folder / "trial"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(TRIAL)
    (package / "__init__.py").write_text("")
    (package / "coordinator.py").write_text(coordinator)
    (package / "site.py").write_text(
        site or "from flwr.clientapp import ClientApp\napp = ClientApp()\n"
    )
    return folder
