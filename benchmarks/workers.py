"""The simulation engine: what messages cost, how soon the first round is there, what workers gain.

    python -m benchmarks.workers sites|loop|first|speedup|books|interrupt --json FILE [--repeats 3]
        [--peers PYTHON]

Each figure is of a process of its own (`benchmarks.workers_run`), one after the other; what is
compared takes turns. Wall times depend on what else the machine does, which `load` tells: the
system's mean number of running processes before a measurement.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.simulation import installed

QUIET = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
TELLING = """
import sys
from common.cli import importing, main

with importing():
    from simulations.grid import LocalGrid

pull = LocalGrid.pull_messages


def telling(grid, ids):
    if replies := pull(grid, ids):
        print("first reply", flush=True)
        LocalGrid.pull_messages = pull
    return replies


LocalGrid.pull_messages = telling
sys.exit(main())
"""
"""The command, which also says when the first reply of a site is there."""
PEERS = "COTERIE_BENCHMARK_PEERS"
"""Where the environment names the interpreter of peers."""
WORK = ("digits", "lora")
"""See `benchmarks.workers_run`."""
READY_S = 25.0
"""After which processes that are started together have all read their records."""
IMPORTS = "from common.cli import importing\nwith importing(): import simulations.run"
"""What the command imports before it does anything, as it does."""
INTERRUPTIBLE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from common.cli import main; sys.exit(main())"
)
"""The command as a terminal runs it: what is started in the background ignores Ctrl-C."""
INTERRUPTED, LATEST_S = 4, 75.0
"""Runs that are interrupted, of each kind and repeat, and after how many seconds at most: starting,
preparing or training. Beside other work the first round is not over by then."""
Found = dict[str, float]


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*MEASUREMENTS])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default=sys.executable, help="an interpreter that has Ray")
    arguments = parser.parse_args()
    os.environ.update(QUIET | {PEERS: arguments.peers})
    rows = [*MEASUREMENTS[arguments.what](arguments.repeats)]
    text = "\n".join(json.dumps({"what": arguments.what, **row}) for row in rows)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


def measured(kind: str, *settings: object) -> Found:
    """One figure, of a process of its own."""
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "benchmarks.workers_run", kind, *map(str, settings)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(answer.stdout.splitlines()[-1]), "load": load}


def middle(found: list[Found], **facts: object) -> dict[str, Any]:
    """The median of each figure, and all of them."""
    medians = {name: round(statistics.median(each[name] for each in found), 4) for name in found[0]}
    return {**facts, **medians, "all": found}


def sites(repeats: int) -> Iterator[dict[str, Any]]:
    """CPU of the whole path of a message, with training left out."""
    cases = [(workers, count) for workers in (1, 2) for count in (100, 1000)]
    found = [[measured("echo", count, workers) for workers, count in cases] for _ in range(repeats)]
    for place, (workers, count) in enumerate(cases):
        yield middle([each[place] for each in found], sites=count, workers=workers)


def loop(repeats: int) -> Iterator[dict[str, Any]]:
    """Rounds of ten sites with LoRA, beside the same calls of the trainer alone."""
    yield middle([measured("loop") for _ in range(repeats)])


def first(repeats: int) -> Iterator[dict[str, Any]]:
    """From the start of the command to the first reply of a site, and of the imports alone; where
    Ray is, also of the same command and ClientApp with `engine=ray`.
    """
    cases: dict[str, Callable[[], float]] = {
        "imports": _import_seconds,
        "1 worker": lambda: _first_reply_seconds(1),
        "2 workers": lambda: _first_reply_seconds(2),
    }
    if "ray" in installed(os.environ[PEERS]):
        cases["1 actor of Ray"] = lambda: _first_reply_seconds(1, "engine=ray")
        cases["2 actors of Ray"] = lambda: _first_reply_seconds(2, "engine=ray")
    found: list[dict[str, Found]] = []
    for _ in range(repeats):
        turn = {}
        for name, seconds in cases.items():
            load = os.getloadavg()[0]
            turn[name] = {"seconds": seconds(), "load": load}
        found.append(turn)
    for name in cases:
        yield middle([each[name] for each in found], until=name)


def speedup(repeats: int) -> Iterator[dict[str, Any]]:
    """One worker's seconds over those of two, one thread each; and what the machine allows: how
    much more two processes at once train than one alone, without any engine.
    """
    found: dict[str, list[Found]] = {work: [] for work in WORK}
    for _ in range(repeats):
        for work, rows in found.items():
            one, two = measured("rounds", work, 1), measured("rounds", work, 2)
            times = {"one_s": one["round_s"], "two_s": two["round_s"]}
            gain = {"speedup": one["round_s"] / two["round_s"], "ceiling": _ceiling(work)}
            rows.append({**times, **gain, "load": one["load"]})
    for work, rows in found.items():
        yield middle(rows, work=work)


def books(_: int) -> Iterator[dict[str, Any]]:
    """A thousand sites, twenty private rounds, each site's own ledger; and half as many."""
    for count, workers in ((500, 1), (1000, 1), (1000, 2)):
        yield {"sites": count, "workers": workers, **measured("books", count, workers)}


def interrupt(repeats: int) -> Iterator[dict[str, Any]]:
    """Seconds from Ctrl-C, at moments drawn anew, until no process of the run is left.

    `code` is 130 where the command had begun to listen, and -2 while Python was starting.
    """
    draw = random.Random(0)  # noqa: S311 - moments, not secrets
    for workers in (1, 2):
        found = [
            _interrupted(workers, draw.uniform(2.0, LATEST_S)) for _ in range(INTERRUPTED * repeats)
        ]
        worst = max(each["seconds"] for each in found)
        yield middle(found, workers=workers, worst_s=round(worst, 3))


def _interrupted(workers: int, after_s: float) -> Found:
    """One main job, in a session of its own, as a terminal gives it."""
    with tempfile.TemporaryDirectory() as name:
        run = [sys.executable, "-c", INTERRUPTIBLE, "simulate", f"run_dir={name}/run"]
        settings = ["federation.rounds=50", "privacy.epsilon=50", f"engine.workers={workers}"]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([*run, *settings], start_new_session=True, **silent) as process:
            time.sleep(after_s)
            load, started = os.getloadavg()[0], time.perf_counter()
            os.killpg(process.pid, signal.SIGINT)
            while _alive(process.pid):
                time.sleep(0.01)
            seconds = time.perf_counter() - started
        rounds = Path(name, "run", "metrics.jsonl")
        whole = rounds.read_bytes().count(b"\n") if rounds.exists() else 0
        code = float(process.returncode)
        return {"seconds": seconds, "after_s": after_s, "rounds": whole, "code": code, "load": load}


def _alive(session: int) -> bool:
    """Whether a process of this session is there that is not only waiting to be collected."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = path.read_text().rpartition(") ")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(its) == session and state != "Z":
            return True
    return False


def _ceiling(work: str) -> float:
    alone, together = (sum(_bare(work, processes)) for processes in (1, 2))
    return together / alone


def _bare(work: str, processes: int) -> list[float]:
    """Sites a second of so many processes at once."""
    command = [sys.executable, "-m", "benchmarks.workers_run", "bare", work]
    start_at = str(time.time() + READY_S)
    started = [
        subprocess.Popen([*command, start_at], stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    answers = [process.communicate()[0].splitlines()[-1] for process in started]
    return [json.loads(answer)["sites_per_s"] for answer in answers]


def _import_seconds() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - started


def _first_reply_seconds(workers: int, *engine: str) -> float:
    python = os.environ[PEERS] if engine else sys.executable
    settings = [*engine, *measured_settings(workers)]
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", TELLING, "simulate", *settings, f"run_dir={folder}/run"]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("first reply"):
                    break
            else:
                raise RuntimeError(f"no reply came: {' '.join(command[3:])}")
            spent = time.perf_counter() - started
            for pid in processes.family(process.pid):  # Ray's own among them
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    return spent


def measured_settings(workers: int) -> list[str]:
    """Overrides of a small run, found by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.workers_run", "settings", str(workers)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    settings: list[str] = json.loads(answer.stdout.splitlines()[-1])
    return settings


MEASUREMENTS: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "sites": sites,
    "loop": loop,
    "first": first,
    "speedup": speedup,
    "books": books,
    "interrupt": interrupt,
}

if __name__ == "__main__":
    main()
