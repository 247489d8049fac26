"""Simulators side by side: the same work, round by round in turn, on one machine.

    python -m benchmarks.simulation --json FILE [--quick] [--peers PYTHON] [--case NAME ...]

Arms: `local` is Coterie's LocalGrid, `loop` a bare loop over the same training (the limit), `ray`
Flower's own simulation with the same ClientApp, `pfl` pfl-research, `flare` NVIDIA FLARE's
simulator. Peers run where the interpreter given by `--peers` (default: this one) has them.

Each arm is a process of its own. `first_reply_s` is from its start, imports included, to the first
site's answer (FLARE's: to that of the first round); times and CPU seconds are medians over turns in
which arms alternate, CPU of all of an arm's processes; memory is the peak over one further turn of
what all of them hold, shared pages once. After every turn each arm's global parameters must be
those of the loop (of an echo: what was sent), so none skips work.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import processes
from benchmarks.arms.pace import GO, LARGE, SAID, WEIGHTS, Case

LORA, TINY = 75_000, 10
"""Floats of a message: 300 kB, 40 bytes."""
SMALL_MLP, MLP = 2_410, 75_130
SLOWEST_S = 900.0
"""For a turn, or for a first reply."""
WARM = 1
"""Turns after the first before those that count."""
LOG = "log"
SAMPLED_S = 0.05
"""Between two looks at an arm's memory."""
PEERS = {"ray": "ray", "pfl": "pfl", "flare": "nvflare"}
"""Module that an arm needs."""
TOLERANCE = 1e-4
"""By which parameters of two arms may differ: sums in another order, over tens of rounds."""

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What every arm finds in its environment."""


@dataclass(frozen=True)
class Plan:
    """One case, and who takes part."""

    case: Case
    arms: tuple[tuple[str, int], ...]
    """Names, with numbers of processes that answer."""
    rounds: int
    """Of a turn: as many as make it measurable."""
    turns: int


ALONE, BOTH = ("local", 1), ("local", 2)
PLANS = {
    "echo-tiny-10": Plan(Case("echo", 10, TINY), (ALONE, BOTH, ("ray", 2)), 20, 5),
    "echo-tiny-200": Plan(Case("echo", 200, TINY), (ALONE, BOTH, ("ray", 2)), 2, 5),
    "echo-tiny-1000": Plan(Case("echo", 1000, TINY), (ALONE, BOTH, ("ray", 2)), 1, 3),
    "echo-lora-10": Plan(Case("echo", 10, LORA), (ALONE, BOTH, ("ray", 2)), 20, 5),
    "echo-lora-100": Plan(Case("echo", 100, LORA), (ALONE, BOTH, ("ray", 2)), 2, 5),
    "echo-large-10": Plan(Case("echo", 10, LARGE), (ALONE, BOTH, ("ray", 2)), 1, 5),
    "mlp-small-10": Plan(
        Case("mlp", 10, SMALL_MLP), (("loop", 1), ALONE, BOTH, ("pfl", 1), ("ray", 2)), 20, 5
    ),
    "mlp-flare-10": Plan(Case("mlp", 10, SMALL_MLP), (("loop", 1), ALONE, ("flare", 10)), 2, 3),
    "mlp-small-100": Plan(
        Case("mlp", 100, SMALL_MLP), (("loop", 1), ALONE, BOTH, ("pfl", 1), ("ray", 2)), 5, 5
    ),
    "mlp-small-1000": Plan(
        Case("mlp", 1000, SMALL_MLP), (("loop", 1), ALONE, BOTH, ("pfl", 1)), 1, 7
    ),
    "mlp-1000": Plan(Case("mlp", 1000, MLP), (("loop", 1), ALONE, BOTH, ("pfl", 1)), 1, 7),
}
QUICK = {
    "quick-echo": Plan(Case("echo", 20, TINY), (ALONE, BOTH, ("ray", 2)), 5, 3),
    "quick-mlp": Plan(Case("mlp", 50, SMALL_MLP), (("loop", 1), ALONE, BOTH, ("pfl", 1)), 2, 3),
    "quick-flare": Plan(Case("mlp", 2, SMALL_MLP), (("loop", 1), ("flare", 2)), 2, 2),
}


def main() -> None:
    """Measures the cases asked for, and writes what it has after each."""
    known = PLANS | QUICK
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="small cases, in a few minutes")
    parser.add_argument("--peers", default=sys.executable, help="an interpreter that has them")
    parser.add_argument("--case", nargs="+", choices=known, help="these alone")
    parser.add_argument("--arms", nargs="+", choices=["local", "loop", *PEERS], help="these alone")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.case or (QUICK if options.quick else PLANS):
        plan, here = known[name], {"local", "loop", *installed(options.peers)}
        arms = [a for a in plan.arms if a[0] in here & {*(options.arms or here)}]
        if plan.case.work == "mlp" and ("loop", 1) not in arms:
            arms.insert(0, ("loop", 1))
        rows += [{"case": name} | row for row in measured(plan, arms, options.peers)]
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows[-len(arms) :]:
            print(json.dumps(row), flush=True)


def installed(python: str) -> list[str]:
    """Peers that an interpreter can import."""
    code = (
        "import sys; from importlib.util import find_spec; print(*filter(find_spec, sys.argv[1:]))"
    )
    command = [python, "-c", code, *PEERS.values()]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return [arm for arm, module in PEERS.items() if module in found]


def measured(plan: Plan, arms: list[tuple[str, int]], peers: str) -> list[dict[str, Any]]:
    """A row for each arm of a case."""
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                Arm(name, plan, workers, peers if name in PEERS else sys.executable)
            )
            for name, workers in arms
        ]
        for turn in range(WARM + plan.turns):
            for arm in running:
                arm.take_turn(plan.rounds, counts=turn >= WARM)
            check_agreement(running, expected_of(plan.case, running))
        for arm in running:
            arm.measure_memory()
        return [arm.row() for arm in running]


@dataclass
class Arm:
    """One process that takes turns, from this side."""

    name: str
    plan: Plan
    workers: int
    python: str
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    first_reply_s: float = 0.0
    first_cpu_s: float = 0.0
    round_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    idle_s: float = 0.0
    peak_mb: float = 0.0
    peaks_mb: float = 0.0

    def __enter__(self) -> "Arm":
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        for pipe in (GO, SAID):
            os.mkfifo(self.folder / pipe)
        # Both for reading and writing: neither end then waits for the other to open.
        self._go = os.open(self.folder / GO, os.O_RDWR)
        self._said = os.fdopen(os.open(self.folder / SAID, os.O_RDWR), "rb", buffering=0)
        case = self.plan.case
        asked = Case(case.work, case.sites, case.values, self.workers, case.mode)
        command = [self.python, "-m", f"benchmarks.arms.{self.name}", str(self.folder)]
        log = self._stack.enter_context((self.folder / LOG).open("w"))
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [*command, asked.text()], stdout=log, stderr=log, env=os.environ | QUIET
        )
        try:
            self._turn(self.plan.rounds)  # alone: nobody else's start is in its first reply
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._go, b"end\n")
        members = processes.family(self._process.pid)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._process.wait()
        os.close(self._go)
        self._said.close()
        self._stack.close()

    @property
    def vector(self) -> NDArray[np.float32]:
        """Global parameters after its last turn; of an echo, what came back."""
        os.write(self._go, b"show\n")
        assert self._heard()["event"] == "shown"
        vector: NDArray[np.float32] = np.load(self.folder / WEIGHTS)
        return vector

    def take_turn(self, rounds: int, *, counts: bool) -> None:
        """Has it run some rounds. Args: counts: whether what they took is noted."""
        before = processes.cpu_s(self._process.pid)
        said = self._turn(rounds)
        if counts:
            spent_s = processes.cpu_s(self._process.pid) - before
            self.cpu_s.append(spent_s / rounds / self.plan.case.sites)
            self.round_s.append(said["round_s"])

    def measure_memory(self) -> None:
        """One more turn, and what its processes hold meanwhile."""
        ended, pid = threading.Event(), self._process.pid

        def look() -> None:
            while not ended.wait(SAMPLED_S):
                self.peak_mb = max(self.peak_mb, processes.resident_mb(pid))

        looking = threading.Thread(target=look)
        looking.start()
        self._turn(self.plan.rounds)
        ended.set()
        looking.join()
        self.peak_mb = max(self.peak_mb, processes.resident_mb(pid))
        self.peaks_mb = processes.peak_mb(pid)

    def row(self) -> dict[str, Any]:
        """What was found."""
        case = self.plan.case
        return {
            "engine": self.name,
            "work": case.work,
            "mode": case.mode,
            "sites": case.sites,
            "payload_bytes": 4 * case.values,
            "workers": self.workers,
            "round_s": round(statistics.median(self.round_s), 5),
            "cpu_s_per_site": round(statistics.median(self.cpu_s), 7),
            "first_reply_s": round(self.first_reply_s, 2),
            "first_reply_cpu_s": round(self.first_cpu_s, 2),
            "peak_rss_mb": round(self.peak_mb),
            "sum_of_peaks_mb": round(self.peaks_mb),
            "processes": len(processes.family(self._process.pid)),
            "median_of": len(self.round_s),
            "rounds_each": self.plan.rounds,
            "round_s_range": [round(min(self.round_s), 5), round(max(self.round_s), 5)],
            "cpu_s_per_site_range": [round(min(self.cpu_s), 7), round(max(self.cpu_s), 7)],
            "load_at_start": round(self.load, 1),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"),
            "date": time.strftime("%Y-%m-%d"),
        }

    def _turn(self, rounds: int) -> dict[str, Any]:
        os.write(self._go, f"rounds {rounds}\n".encode())
        while True:
            said = self._heard()
            if said["event"] == "turn":
                return said
            self.first_reply_s = time.monotonic() - self._started
            self.first_cpu_s = processes.cpu_s(self._process.pid)

    def _heard(self) -> dict[str, Any]:
        """What it says next. Raises: RuntimeError with the end of its log if it says nothing."""
        deadline = time.monotonic() + SLOWEST_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if select([self._said], [], [], 1.0)[0]:
                said: dict[str, Any] = json.loads(self._said.readline())
                return said
        log = (self.folder / LOG).read_text()[-3000:]
        raise RuntimeError(f"{self.name} ended, or was too slow:\n{log}")


def check_agreement(arms: list[Arm], expected: NDArray[np.float32]) -> None:
    """Raises: AssertionError if the global parameters of an arm are not those."""
    for arm in arms:
        apart = float(np.abs(arm.vector - expected).max())
        assert apart <= TOLERANCE, f"{arm.name} is {apart:g} from what it must be"


def expected_of(case: Case, arms: list[Arm]) -> NDArray[np.float32]:
    """The loop's parameters; of an echo, what was sent."""
    if case.work == "echo":
        return np.concatenate([array.ravel() for array in case.arrays().values()])
    return next(arm.vector for arm in arms if arm.name == "loop")


if __name__ == "__main__":
    main()
