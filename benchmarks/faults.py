"""What a deployment makes of what goes wrong: one row for each fault, on real processes.

    python -m benchmarks.faults --json F
    python -m benchmarks.faults --only hang --only network

A SuperLink over TLS, three nodes and a run of seeded noise on tiny records, so that weights are
compared to the bit with those of the same run without a fault. Each site's ledger is exported and
verified after each fault. Linux; a full disk needs the right to mount one, a line that is really
cut that to make a network namespace (root): without it a relay holds bytes back, and the row says
so.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.faulty_node import AFTER_PREPARE, AFTER_RESERVE, AHEAD, BEFORE_RESERVE, FAULT
from benchmarks.lines import Cable, NoNamespaceError, Relay
from benchmarks.processes import STOPPED, family, state_of
from benchmarks.tiny import NODE, Job, make_job
from client.ledger import Store
from common.privacy.verification import verify
from server.checkpoint import read_checkpoint
from server.record import RoundLine, whole_lines
from server.report import read_report
from simulations.deployment import COTERIE, HOST, Deployment, SiteFiles

NAMES = ("site-1", "site-2", "site-3")
SMALL, HIT, FAR = range(3)
"""Sites: on a disk of its own, killed and stopped, behind a line that can be cut."""
ROUNDS, BEFORE = 8, 2
"""Of a run; and how many are over when something goes wrong."""
GOES_ON = ("federation.quorum=0.6", "federation.round_timeout_s=8")
"""Of runs that do without one site."""
ENOUGH = ("federation.quorum=0.6", "federation.enough=0.6")
"""Of runs whose rounds close with two of three updates."""
CUT_S = 30.0
CALL_S = 30
"""Longest that a call may take on a busy machine."""
AHEAD_S = 600.0
DISK_MB = 32
WAIT_S = 900.0
"""How long anything may take, beside other people's work."""
FAULTY = (sys.executable, "-m", "benchmarks.faulty_node")


class SkippedError(Exception):
    """This fault cannot be made here; the text says why."""


@dataclass(frozen=True)
class Row:
    """What became of one fault."""

    fault: str
    happened: str
    exit_code: int
    rounds: int
    taken_up_again: int
    """How often the run was interrupted and went on."""
    without_it: tuple[int, ...]
    """Rounds that closed without the site that was hit."""
    charged: int
    """Attempts in the ledger of the site that was hit."""
    reported: int
    """The same as the coordinator's report says, rounds and what it had repeated: never fewer."""
    spares_used: int
    same_weights: bool
    """As the run without a fault, to the bit."""
    under_counted: tuple[str, ...]
    """Sites whose ledger holds less than was accepted of them, or the report less than it."""
    seconds: float
    seconds_lost: float
    """Against the run without a fault."""


class Ground:
    """A deployment on which things go wrong, and what its run ends with if nothing does."""

    def __init__(self, folder: Path) -> None:
        """Starts all of it, and runs once."""
        self._stack = ExitStack()
        try:
            self._set_up(folder)
        except BaseException:
            self._stack.close()
            raise

    def _set_up(self, folder: Path) -> None:
        cable = self._cable()
        self.deployment = self._stack.enter_context(
            Deployment(folder, NAMES, host=cable.host if cable else HOST)
        )
        self.sites = self.deployment.sites
        self.no_disk = ""
        try:
            self._stack.enter_context(small_disk(self.sites[SMALL].folder))
            self._stack.enter_context(small_disk(folder / "small"))
            # Nodes end before the disk does that they write to.
            self._stack.callback(self.deployment.stop)
        except SkippedError as error:
            self.no_disk = str(error)
        self.job: Job = make_job(
            folder / "job", [site.records for site in self.sites], rounds=ROUNDS
        )
        self.deployment.start_superlink()
        self.keys = self.deployment.enrol_all(cap=1000.0, delta=1e-3, dataset="tiny")
        self.line: Cable | Relay = cable or self._relay()
        for place, site in enumerate(self.sites):
            inside, by = (self.line.inside, self.line.by) if place == FAR else ((), ())
            self.deployment.start_node(site, *NODE, *by, command=(*inside, *FAULTY))
        self.deployment.wait_for_nodes()
        whole = Follower(self.deployment, "whole", *self.job.settings)
        assert whole.end() == 0, whole.said
        self.expected, self.whole_s = whole.state.vector, whole.seconds

    def _cable(self) -> Cable | None:
        try:
            cable = Cable()
        except NoNamespaceError as error:
            print(f"no network namespace: {error}; a relay stands for the line", flush=True)
            return None
        self._stack.callback(cable.close)
        return cable

    def _relay(self) -> Relay:
        relay = Relay(self.deployment.port)
        self._stack.callback(relay.close)
        return relay

    def __enter__(self) -> "Ground":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


class Follower:
    """One run, from its submission to its report, however often it was taken up again."""

    def __init__(
        self, deployment: Deployment, name: str, *settings: str, folder: str = "runs"
    ) -> None:
        self._deployment, self.run_dir = deployment, deployment.folder / folder / name
        self._log = deployment.folder / f"{name}.log"
        self._began, self._ended = time.monotonic(), 0.0
        self._submit(*deployment.submitted_to, *settings)

    def _submit(self, *settings: str) -> None:
        command = [*COTERIE, "submit", f"run_dir={self.run_dir}", *settings]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=self._deployment.environment,
                cwd=self._deployment.folder,
                stdout=log,
                stderr=log,
            )

    @property
    def lines(self) -> list[RoundLine]:
        """Of the rounds that are over."""
        return whole_lines(self.run_dir) if self.run_dir.is_dir() else []

    @property
    def said(self) -> str:
        """What `coterie submit` printed."""
        return self._log.read_text()

    @property
    def seconds(self) -> float:
        """From the submission to the end."""
        return self._ended - self._began

    @property
    def state(self) -> Any:
        """The last checkpoint."""
        return read_checkpoint(self.run_dir / "checkpoints", len(self.lines))

    def until(self, holds: Callable[[list[RoundLine]], bool], what: str) -> None:
        """Returns once something holds of its lines. Raises: AssertionError if it ends before."""
        wait(lambda: holds(self.lines) or self.process.poll() is not None, what)
        assert holds(self.lines), f"it ended before: {what}: {self.said[-2000:]}"

    def until_over(self, rounds: int) -> None:
        """Returns once so many rounds are over."""
        self.until(lambda lines: len(lines) >= rounds, f"round {rounds}")

    def until_before(self) -> None:
        """Returns once so many rounds are over that something may go wrong."""
        self.until_over(BEFORE)

    def until_without(self, name: str) -> None:
        """Returns once a round has closed without a site."""
        self.until(
            lambda lines: any(name in line.refused for line in lines), f"a round without {name}"
        )

    def end(self) -> int:
        """Waits for the end; the exit code."""
        code = self.process.wait(WAIT_S)
        self._ended = time.monotonic()
        return code

    def leave(self) -> None:
        """Nobody follows it any longer."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(WAIT_S)

    def go_on(self) -> int:
        """Takes it up again, and waits for the end; the exit code."""
        self._submit("resume=auto")
        return self.end()


def wait(holds: Callable[[], bool], what: str, seconds: float = WAIT_S) -> None:
    """Returns once something holds. Raises: TimeoutError."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """An empty disk of a few megabytes at `folder`. Raises: SkippedError where none may be made."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "coterie", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SkippedError("there is no mount here") from error
    if done.returncode:
        raise SkippedError(f"mounting is not allowed here ({done.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)  # noqa: S607 - root's


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """No byte more fits on this disk inside."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


def killed(ground: Ground, run: Follower) -> str:
    """A node that dies in a phase of its third answer, and is started again."""
    site = ground.sites[HIT]
    node = ground.deployment.nodes[site.name]
    wait(lambda: node.process.poll() is not None, f"{site.name} dies")
    node.start()
    assert run.end() == 0, run.said
    return "started again at once; it went on from its disk"


def hang(ground: Ground, run: Follower) -> str:
    """A node that stops in the middle of its third answer, beyond the round's deadline."""
    site = ground.sites[HIT]
    run.until_without(site.name)
    os.kill(ground.deployment.nodes[site.name].process.pid, signal.SIGCONT)
    assert run.end() == 0, run.said
    wait(lambda: "not sent" in ground.deployment.nodes[site.name].said, "its late answer", 30)
    return "the round closed at its deadline; the late answer was charged there and not taken"


def late(ground: Ground, run: Follower) -> str:
    """A node that stops in the middle of its second answer, where two updates close a round."""
    name, node = ground.sites[HIT].name, ground.deployment.nodes[ground.sites[HIT].name]
    wait(lambda: state_of(node.process.pid) == STOPPED, f"{name} stops")
    run.until_over(len(run.lines) + 1)
    os.kill(node.process.pid, signal.SIGCONT)
    run.until(lambda lines: any(name in line.late for line in lines), f"{name}'s late update")
    assert run.end() == 0, run.said
    return "rounds closed with the other two; its update came later, was counted and not used"


def network(ground: Ground, run: Follower) -> str:
    """A node that nobody can reach for half a minute."""
    run.until_before()
    with ground.line.cut():
        time.sleep(CUT_S)
    assert run.end() == 0, run.said
    return f"the round waited {CUT_S:g} s for it ({ground.line.what})"


def node_disk(ground: Ground, run: Follower) -> str:
    """A node whose disk is full for some rounds."""
    site = ground.sites[SMALL]
    node = ground.deployment.nodes[site.name]
    before = node.process.pid
    run.until_before()
    with full(site.folder):
        run.until_without(site.name)
    assert run.end() == 0, run.said
    node.check_alive()
    assert node.process.pid == before
    return "it refused as a local failure, stayed up, and took part again once there was room"


def coordinator_disk(ground: Ground, run: Follower) -> str:
    """The disk of the run folder is full."""
    run.until_before()
    with full(ground.deployment.folder / "small"):
        code = run.end()
    assert code, run.said
    assert run.go_on() == 0, run.said
    return f"the run ended with {code}, and went on by resume=auto once there was room"


def superlink(ground: Ground, run: Follower) -> str:
    """The SuperLink is killed, which takes its ServerApp with it."""
    run.until_before()
    running = ground.deployment.superlink
    assert running is not None
    running.kill()
    run.leave()
    ground.deployment.start_superlink()
    assert run.go_on() == 0, run.said
    return "started again with its database; went on by resume=auto"


def serverapp(ground: Ground, run: Follower) -> str:
    """The ServerApp is killed."""
    run.until_before()
    (pid,) = serverapps(ground.deployment)
    os.kill(pid, signal.SIGKILL)
    run.leave()
    assert run.go_on() == 0, run.said
    return "went on by resume=auto"


def clock(ground: Ground, run: Follower) -> str:
    """A node whose clock jumps ten minutes ahead, and is set right again."""
    site = ground.sites[HIT]
    run.until_before()
    wrong = site.folder / AHEAD
    wrong.write_text(str(AHEAD_S))
    try:
        run.until_without(site.name)
    finally:
        wrong.unlink()
    assert run.end() == 0, run.said
    said = ground.deployment.nodes[site.name].said
    named = re.search(r"clock is (\d+) s ahead", said)  # with the time that the call itself took
    assert named is not None, said[-2000:]
    assert abs(int(named[1]) - AHEAD_S) < CALL_S, named[0]
    return "its calls were refused and its log named the clock; back once that was right"


@dataclass(frozen=True)
class Fault:
    """One row to be."""

    words: str
    hit: int
    happen: Callable[[Ground, Follower], str]
    settings: tuple[str, ...] = ()
    order: str = ""
    """Told to the node beforehand; see `faulty_node`."""
    disk: bool = False
    folder: str = "runs"


def _killed(words: str, phase: str) -> Fault:
    order = f"{phase} {signal.SIGKILL.name} {BEFORE + 1}"
    return Fault(words, HIT, killed, order=order)


FAULTS = {
    "before-reserve": _killed("node killed before RESERVE", BEFORE_RESERVE),
    "after-reserve": _killed("node killed after RESERVE", AFTER_RESERVE),
    "after-prepare": _killed("node killed after PREPARE", AFTER_PREPARE),
    "superlink": Fault("SuperLink killed", HIT, superlink),
    "serverapp": Fault("ServerApp killed", HIT, serverapp),
    "hang": Fault(
        *("node hangs (SIGSTOP) past the deadline", HIT, hang, GOES_ON),
        order=f"{AFTER_RESERVE} {signal.SIGSTOP.name} {BEFORE + 1}",
    ),
    "late": Fault(
        *("node hangs (SIGSTOP), two of three updates are enough", HIT, late, ENOUGH),
        order=f"{AFTER_RESERVE} {signal.SIGSTOP.name} {BEFORE}",
    ),
    "network": Fault(f"a node's network gone for {CUT_S:g} s", FAR, network),
    "node-disk": Fault("disk full at a node", SMALL, node_disk, GOES_ON, disk=True),
    "coordinator-disk": Fault(
        "disk full at the coordinator", HIT, coordinator_disk, disk=True, folder="small"
    ),
    "clock": Fault("a node's clock jumps 10 minutes ahead", HIT, clock, GOES_ON),
}


def make(ground: Ground, name: str) -> Row:
    """Lets one fault happen. Raises: SkippedError where it cannot be made, AssertionError or
    TimeoutError where it did not end as it must.
    """
    fault = FAULTS[name]
    if fault.disk and ground.no_disk:
        raise SkippedError(ground.no_disk)
    site = ground.sites[fault.hit]
    if fault.order:
        (site.folder / FAULT).write_text(fault.order)
    settings = (*ground.job.settings, *fault.settings)
    run = Follower(ground.deployment, name, *settings, folder=fault.folder)
    try:
        happened = fault.happen(ground, run)
    finally:
        if run.process.poll() is None:
            run.process.kill()
        _mend(ground, site)
    return _row(ground, run, fault, happened)


def _mend(ground: Ground, site: SiteFiles) -> None:
    """Leaves the next fault a whole deployment, also where this one did not end as it must."""
    (site.folder / FAULT).unlink(missing_ok=True)
    for node in ground.deployment.nodes.values():
        if node.process.poll() is None:
            os.kill(node.process.pid, signal.SIGCONT)
        else:
            node.start()


def _row(ground: Ground, run: Follower, fault: Fault, happened: str) -> Row:
    lines, state, site = run.lines, run.state, ground.sites[fault.hit]
    report, _ = read_report(run.run_dir)
    reported = {each["name"]: each["rounds"] + each["repeated"] for each in report["sites"]}
    charged = {each.name: _charged(ground, each, state.run_id) for each in ground.sites}
    assert [line.round for line in lines] == [*range(1, ROUNDS + 1)]
    return Row(
        fault=fault.words,
        happened=happened,
        exit_code=run.process.returncode,
        rounds=len(lines),
        taken_up_again=len(report.get("resumed_after", ())),
        without_it=tuple(line.round for line in lines if site.name in line.refused),
        charged=sum(map(len, charged[site.name].values())),
        reported=reported[site.name],
        spares_used=ground.job.spares - state.spares[site.name],
        same_weights=bool(np.array_equal(state.vector, ground.expected)),
        under_counted=tuple(
            name
            for name, attempts in charged.items()
            if reported[name] < sum(map(len, attempts.values()))
            or any(
                "released" not in attempts.get(line.round, ())
                for line in lines
                if name in line.asked and name not in line.refused
            )
        ),
        seconds=round(run.seconds, 1),
        seconds_lost=round(run.seconds - ground.whole_s, 1),
    )


def _charged(ground: Ground, site: SiteFiles, run_id: str) -> dict[int, list[str]]:
    """The state of each attempt of a run, by round, of a ledger whose export is verified."""
    with Store(site.ledger) as store:
        ledger = store.ledger(site.name)
        verify(ledger.export().encode(), key=ground.keys[site.name])
        books = ledger.books
        return {
            number: [books.reservations[attempt].state for attempt in attempts]
            for (run, number), attempts in books.attempts.items()
            if run == run_id
        }


def serverapps(deployment: Deployment) -> list[int]:
    """Processes that the SuperLink's own children started for ServerApps, by id."""
    assert deployment.superlink is not None
    mine = family(deployment.superlink.process.pid)
    arguments = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in mine}
    return [pid for pid, words in arguments.items() if b"flwr-serverapp" in words]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each fault; 1 if one did not end as it must."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=FAULTS, action="append")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix="coterie-faults-"))
    with Ground(folder) as ground:
        print(f"no fault: {ground.whole_s:.1f} s", flush=True)
        for name in options.only or FAULTS:
            try:
                rows.append(asdict(make(ground, name)))
            except SkippedError as error:
                rows.append({"fault": FAULTS[name].words, "skipped": str(error)})
            except (AssertionError, TimeoutError) as error:
                rows.append({"fault": FAULTS[name].words, "failed": f"{error}; see {folder}"})
            print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
