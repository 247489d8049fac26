"""Does a deployment keep what it takes? A hundred rounds, and each process looked at every ten.

    python -m benchmarks.soak --json F

A SuperLink over TLS and three nodes that train a tiny model privately, books on. Of the SuperLink,
of what it starts, and of each node: memory that no file is behind, and open file handles, after the
first round, the tenth, and so on; and by a line through those from the tenth on, how much a round
adds. Linux only: it reads /proc.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults import NAMES, Follower
from benchmarks.processes import anonymous_of, command_of, family, handles_of
from benchmarks.tiny import NODE, make_job
from simulations.deployment import Deployment

EVERY = 10
FLAT = 1.05
"""What is flat: the last value is at most this many times that after the tenth round."""
Sample = dict[str, dict[str, float]]


def sample(deployment: Deployment) -> Sample:
    """Memory in MB and open handles of each process now, by what it is."""
    assert deployment.superlink is not None
    processes = {name: node.process.pid for name, node in deployment.nodes.items()}
    for pid in family(deployment.superlink.process.pid):
        processes[command_of(pid)] = pid
    return {
        name: {"mb": round(anonymous_of(pid), 1), "handles": handles_of(pid)}
        for name, pid in processes.items()
    }


def soaked(folder: Path, rounds: int, *settings: str) -> dict[str, Any]:
    """One run of so many rounds; what each process took, and which of it grew."""
    with Deployment(folder, NAMES) as deployment:
        job = make_job(folder / "job", [each.records for each in deployment.sites], rounds=rounds)
        deployment.start_superlink()
        keys = deployment.enrol_all(cap=100.0, delta=1e-3, dataset="tiny")
        for site in deployment.sites:
            deployment.start_node(site, *NODE)
        deployment.wait_for_nodes()
        run = Follower(deployment, "soak", *job.settings, "privacy.noise=entropy", *settings)
        samples: dict[int, Sample] = {}
        for number in (1, *range(EVERY, rounds, EVERY)):
            run.until_over(number)
            samples[len(run.lines)] = sample(deployment)
        run.until_over(rounds)
        samples[rounds] = sample(deployment)
        assert run.end() == 0, run.said
        books = deployment.verify_books(run.run_dir, keys)
        ends = [line.elapsed_s for line in run.lines]
    return {
        "rounds": rounds,
        "round_s_of_the_first_half": round(ends[rounds // 2 - 1] / (rounds // 2), 3),
        "round_s_of_the_second_half": round(
            (ends[-1] - ends[rounds // 2 - 1]) / (rounds - rounds // 2), 3
        ),
        "processes": _series(samples),
        "books_verified": sorted(books),
    }


def _series(samples: dict[int, Sample]) -> dict[str, dict[str, Any]]:
    """Of each process and measure: after the first sample, the tenth round and at the end."""
    numbers = sorted(samples)
    first, tenth = numbers[:2]
    # The ServerApp may be gone at the end: what it took is what it took when last seen.
    names = samples[tenth].keys()
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(names):
        seen = [number for number in numbers if name in samples[number]]
        found[name] = {"seen_in_rounds": [first, tenth, seen[-1]]}
        for what in ("mb", "handles"):
            series = [samples[number][name][what] for number in seen]
            then = samples[tenth][name][what]
            found[name][what] = {
                "first": samples[first].get(name, {}).get(what),
                "tenth": then,
                "last": series[-1],
                "all": series,
                "a_round_adds": _slope(
                    [number for number in seen if number >= tenth],
                    [samples[number][name][what] for number in seen if number >= tenth],
                ),
                "flat": series[-1] <= FLAT * then,
            }
    return found


def _slope(rounds: list[int], values: list[float]) -> dict[str, float]:
    """By least squares, with its standard error; of fewer than three values none is known."""
    if len(rounds) < 3:  # noqa: PLR2004 - two points leave no error
        return {}
    away = np.array(rounds) - np.mean(rounds)
    slope = float(away @ values / (away @ away))
    rest = np.array(values) - np.mean(values) - slope * away
    error = float(np.sqrt(rest @ rest / (len(rounds) - 2) / (away @ away)))
    return {"slope": round(slope, 4), "error": round(error, 4)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each process; 1 if one grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("settings", nargs="*", help="of the run, that differ")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="coterie-soak-"))
    row = soaked(folder, options.rounds, *options.settings)
    processes = row["processes"]
    for name, each in processes.items():
        print(name, json.dumps({what: each[what] for what in ("mb", "handles")}))
    print(json.dumps({name: value for name, value in row.items() if name != "processes"}))
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n")
    flat = [each[what]["flat"] for each in processes.values() for what in ("mb", "handles")]
    return int(not all(flat))


if __name__ == "__main__":
    sys.exit(main())
