"""A whole deployment on one machine: `make deploy-demo`, and what tests and benchmarks start.

Nothing in it is simulated: keys and certificates, Flower's stock SuperLink with TLS and node
authentication, a node process for each site on a file and a ledger of its own, a run that is
submitted and followed, books that are exported and verified. Only the distances are short.
"""

import contextlib
import csv
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from common.certificates import Authority, make_authority, make_node_key
from common.cli import ENVIRONMENT
from common.config import DataConfig, DataSource
from common.data import load_splits
from common.errors import CoterieError, FederationError, VerificationError
from common.keys import generate_key
from common.privacy.chain import public_hex
from common.records import Records
from server.control import ROOT, Address, Link
from server.report import read_report

HOST = "127.0.0.1"
READY_S = 120.0
"""How long a process may take until it is ready: a node imports torch and loads its records."""
STOP_S = 30.0
"""How long one may take to end, before it is killed."""
POLL_S = 0.2
READY = "waiting for instructions"
"""What a node says once it is ready."""
COTERIE = (sys.executable, "-c", "import sys; from common.cli import main; sys.exit(main())")
"""The command of this very program, wherever it is installed."""
SITES, ROUNDS, DELTA, CAP = 3, 5, 1e-4, 8.0
LABELS = ("business", "entertainment", "politics", "sports", "tech")
DEMO = ("tuning=head", "privacy.epsilon=3", f"privacy.delta={DELTA}", f"federation.rounds={ROUNDS}")
"""What the demonstration's run differs in from the main job."""


@dataclass(frozen=True)
class SiteFiles:
    """What one site has, in a folder of its own."""

    name: str
    folder: Path

    @property
    def records(self) -> Path:
        """Its private records: a CSV file of text and label."""
        return self.folder / "records.csv"

    @property
    def key(self) -> Path:
        """The private key of its node."""
        return self.folder / "node.key"

    @property
    def log(self) -> Path:
        """What its node says."""
        return self.folder / "node.log"

    @property
    def ledger(self) -> Path:
        """Its books."""
        return self.folder / "books.db"


@dataclass
class Running:
    """A process in a session of its own, whose output goes to a file."""

    command: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = field(repr=False)
    process: subprocess.Popen[bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Starts it, or starts it again; its output is added to what is there."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(  # noqa: S603 - our own command, and no shell
                self.command,
                env=dict(self.environment),
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """All that it wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def check_alive(self) -> None:
        """Raises: FederationError, with the end of its log, if it has ended."""
        if self.process.poll() is not None:
            tail = " ".join(self.said.split())[-400:]
            raise FederationError(f"{self.log}: it ended with {self.process.returncode}: {tail}")

    def stop(self) -> int:
        """Asks it to end, and kills whatever is left of its session; returns its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return self.kill()
        finally:
            self._sweep()

    def kill(self) -> int:
        """Ends it without asking, as a power cut would. What Flower's processes started in sessions
        of their own ends by itself, once it misses them.
        """
        self._sweep()
        return self.process.wait()

    def _sweep(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Deployment:
    """A SuperLink and its sites, as processes of this machine.

    Guarantee: what it started has ended when its context has.
    """

    def __init__(self, folder: Path, names: Sequence[str], host: str = HOST) -> None:
        """Makes keys and certificates in `folder`; starts nothing yet.

        Args: host: the address, of this machine, at which the SuperLink listens.
        """
        self.folder, self.host, self.port = folder, host, free_port(host)
        self.officer = public_hex(generate_key(folder / "officer.key"))
        self.sites = [SiteFiles(name, folder / name) for name in names]
        for site in self.sites:
            site.folder.mkdir(parents=True)
        self.bin = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": str(ROOT),
            "PATH": f"{self.bin}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(folder / "flower"),
        }
        self.authority: Authority
        self._superlink_command: tuple[str, ...]
        self.superlink: Running | None = None
        self.nodes: dict[str, Running] = {}
        self._provision()

    def _provision(self) -> None:
        """Makes what the coordinator has: an authority, a certificate, a command that starts it."""
        self.authority = make_authority(self.folder / "authority")
        own = self.authority.issue("superlink", [self.host, "localhost"])
        self._superlink_command = (
            *(str(self.bin / "coterie"), "superlink"),
            *("--host", self.host, "--port", str(self.port)),
            *("--ssl-certfile", str(own.certificate), "--ssl-keyfile", str(own.key)),
            *("--ssl-ca-certfile", str(self.authority.certificate)),
            *("--enable-supernode-auth", "--database", str(self.folder / "state.db")),
            "--disable-runtime-dependency-installation",
        )

    @property
    def address(self) -> str:
        """HOST:PORT of the SuperLink."""
        return f"{self.host}:{self.port}"

    @property
    def entrance(self) -> str:
        """Where nodes come in, in words."""
        return "No door stands before it."

    @property
    def link(self) -> Link:
        """What runs are submitted through."""
        return Link(Address(self.address, self.authority.certificate))

    @property
    def submitted_to(self) -> tuple[str, ...]:
        """The settings of `coterie submit` that lead here."""
        return (
            f"superlink.address={self.address}",
            f"superlink.ca={self.authority.certificate}",
        )

    def start_superlink(self) -> None:
        """Returns once it answers; started again, it has its state of before."""
        if self.superlink is None:
            log = self.folder / "superlink.log"
            self.superlink = Running(self._superlink_command, log, self.environment)
        else:
            self.superlink.start()
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        with httpx.Client(verify=context, timeout=2.0) as client:
            for _ in until(READY_S, "the SuperLink does not answer"):
                self.superlink.check_alive()
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"https://{self.address}/health").is_success:
                        return

    def enrol(self, site: SiteFiles, *, cap: float, delta: float, dataset: str) -> str:
        """A key that the SuperLink knows by the site's name, and books; returns their public key.

        The officer's key is one for all sites here, in the deployment's folder.
        """
        self.link.register(make_node_key(site.key), site.name)
        answer = self.coterie(
            *("ledger", "init", str(site.ledger), "--cap", str(cap), "--delta", str(delta)),
            *("--dataset", dataset, "--site", site.name, "--officer-key", self.officer),
        )
        return str(answer["site_key"])

    def enrol_all(self, *, cap: float, delta: float, dataset: str) -> dict[str, str]:
        """All sites, at once; their public keys by name."""
        with ThreadPoolExecutor() as pool:
            keys = pool.map(
                lambda site: self.enrol(site, cap=cap, delta=delta, dataset=dataset), self.sites
            )
            return dict(zip((site.name for site in self.sites), keys, strict=True))

    def start_node(
        self, site: SiteFiles, *settings: str, command: Sequence[str] = (*COTERIE, "node")
    ) -> None:
        """Starts the node of a site; see `wait_for_nodes`.

        Args: settings: beyond its files'; command: what takes the place of `coterie node`.
        """
        own = (
            *(f"name={site.name}", f"superlink={self.address}", f"key={site.key}"),
            *(f"authority={self.authority.certificate}", f"ledger={site.ledger}"),
            *("data=csv", f"data.path={site.records}", "threads=1"),
        )
        whole = (*command, *own, *settings)
        site.log.unlink(missing_ok=True)  # what an earlier one said
        self.nodes[site.name] = Running(whole, site.log, self.environment)

    def wait_for_nodes(self) -> None:
        """Returns once all nodes are ready. Raises: FederationError if one ends, or takes long."""
        for _ in until(READY_S, "the nodes are not ready"):
            for node in self.nodes.values():
                node.check_alive()
            if all(READY in node.said for node in self.nodes.values()):
                return

    def coterie(self, *arguments: str) -> dict[str, Any]:
        """What `coterie ARGUMENTS --json` answers. Raises: CoterieError with what it said."""
        done = subprocess.run(  # noqa: S603 - our own command, and no shell
            [*COTERIE, *arguments, "--json"],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise FederationError(f"coterie {arguments[0]}: code {done.returncode}: {said[-1]}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def submit(self, run_dir: Path, *settings: str) -> int:
        """Runs `coterie submit` to its end, on this process's own output; returns its code."""
        arguments = ("submit", *self.submitted_to, f"run_dir={run_dir}", *settings)
        return subprocess.run(  # noqa: S603 - as above
            [*COTERIE, *arguments], env=self.environment, cwd=self.folder, check=False
        ).returncode

    def verify_books(self, run_dir: Path, keys: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Exports each site's ledger and verifies the file, down to the head that the run's report
        names; the verdicts by site. Args: keys: the sites' public keys.

        Raises: FederationError naming the site whose books are not as they must be.
        """
        report, _ = read_report(run_dir)
        heads = {site["name"]: site["ledger_head"] for site in report["sites"]}

        def verdict(site: SiteFiles) -> dict[str, Any]:
            exported = str(site.folder / "books.ledger")
            self.coterie("ledger", "export", str(site.ledger), "--output", exported)
            pinned = ("--key", keys[site.name], "--head", heads[site.name])
            return self.coterie("ledger", "verify", exported, *pinned)

        with ThreadPoolExecutor() as pool:
            there = [site for site in self.sites if site.name in heads]
            return dict(zip((site.name for site in there), pool.map(verdict, there), strict=True))

    def stop(self) -> None:
        """Ends everything, nodes first."""
        processes = [*self.nodes.values(), *([self.superlink] if self.superlink else [])]
        for node in self.nodes.values():
            node.process.terminate()
        for process in processes:
            process.stop()

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def free_port(host: str = HOST) -> int:
    """One that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def deal(folder: Path, sites: Sequence[SiteFiles]) -> tuple[Path, int]:
    """BBC News as files: a share of the private part for each site, and the public hold-out.

    Returns: the public file, and the number of private records.
    """
    splits = load_splits(
        DataConfig(
            source=DataSource.bbc_news,
            path="",
            labels=[*LABELS],
            holdout_fraction=0.2,
            validation_fraction=0.1,
            split_seed=1,
        )
    )
    for place, site in enumerate(sites):
        write_records(site.records, splits.train, range(place, len(splits.train), len(sites)))
    public = folder / "public.csv"
    write_records(public, splits.holdout, range(len(splits.holdout)))
    return public, len(splits.train)


def write_records(path: Path, records: Records, places: Sequence[int]) -> None:
    """Some records as a CSV file of text and label."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for place in places:
            writer.writerow([records.contents[place], LABELS[records.labels[place]]])


def until(seconds: float, what: str) -> Iterator[None]:
    """Once every `POLL_S`. Raises: FederationError with `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(POLL_S)
    raise FederationError(f"{what} within {seconds:g} s")


def demonstrate(folder: Path, settings: Sequence[str], console: Console) -> Path:
    """The whole of a deployment, step by step; returns the path of the run's report.

    Args: settings: of the run, that differ from `DEMO`.
    Raises: CoterieError of the step that went wrong; everything that was started has ended.
    """
    names = [f"site-{number}" for number in range(1, SITES + 1)]
    with _arranged(folder, names, console) as deployment:
        public, declared = deal(folder, deployment.sites)
        console.print(f"2. BBC News: {declared} private records in {SITES} files, one per site.")
        deployment.start_superlink()
        console.print(f"3. Flower's SuperLink at {deployment.address}: TLS, known nodes only.")
        console.print(f"   {deployment.entrance}")
        keys = deployment.enrol_all(cap=CAP, delta=DELTA, dataset="bbc-news")
        for site in deployment.sites:
            deployment.start_node(site, f"data.labels=[{','.join(LABELS)}]")
        deployment.wait_for_nodes()
        console.print(f"4. {SITES} nodes, each with its own records, ledger (cap {CAP:g}) and key.")
        run_dir = folder / "run"
        console.print("5. A run, submitted and followed:")
        code = deployment.submit(
            run_dir,
            *("data=csv", f"data.test_path={public}", f"data.labels=[{','.join(LABELS)}]"),
            *(f"data.declared_records={declared}", f"federation.sites={SITES}"),
            *(*DEMO, *settings),
        )
        if code:
            raise FederationError(f"coterie submit ended with {code}; logs are in {folder}")
        console.print("6. The sites' books, exported, and verified from the files alone:")
        for name, verdict in deployment.verify_books(run_dir, keys).items():
            if not (verdict["key_pinned"] and verdict["head_pinned"]):
                raise VerificationError(f"{name}: its books were verified against nothing")
            epsilon, entries = verdict["epsilon"]["proved"], verdict["entries"]
            console.print(f"   {name}: nothing wrong in {entries} entries; epsilon {epsilon:.3f}")
    console.print("7. Everything that was started has ended.")
    return run_dir / "report.json"


def _arranged(folder: Path, names: Sequence[str], console: Console) -> Deployment:
    """From kits, behind a door, where there is a program for one; and otherwise said loudly."""
    # It is built on this module.
    from simulations.provisioned import Provisioned, find_nginx  # noqa: PLC0415

    if find_nginx() is not None:
        console.print("1. Provisioned: a sealed kit for each site, and one for the coordinator.")
        return Provisioned(folder, names, cap=CAP, delta=DELTA)
    console.print(
        "!!! nginx is not installed: this demonstration runs WITHOUT THE COORDINATOR'S DOOR.\n"
        "!!! Nodes reach the SuperLink itself, and so could whoever wants to run code on it.\n"
        "!!! apt-get install nginx-light, and run it again.",
        style="bold red",
    )
    console.print("1. Keys and certificates: an authority, the coordinator's, a key per node.")
    return Deployment(folder, names)


def main(arguments: Sequence[str]) -> int:
    """`python -m simulations.deployment [NAME=VALUE ...]`: settings are those of the run."""
    console = Console(markup=False, highlight=False)
    os.environ.update({**ENVIRONMENT, **os.environ})
    folder = Path(tempfile.mkdtemp(prefix="coterie-demo-"))  # it stays, for whoever looks into it
    try:
        report = demonstrate(folder, arguments, console)
    except CoterieError as error:
        print(f"deploy-demo: {error}", file=sys.stderr)
        return error.exit_code
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
