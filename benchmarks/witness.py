"""What a witness costs: one head after the other by gRPC with TLS, kept on disk, signed.

    python -m benchmarks.witness --heads 10000 --json F

A witness of its own process on loopback, its database on this machine's disk. Entries are made
beforehand. Of the process: seconds until it listens, and resident memory after all heads.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.processes import resident_of
from common.privacy import chain
from common.privacy.chain import EMPTY, Entry, Head, Kind
from common.privacy.witness import Pass, WitnessLine, steps_after
from server.witness import Folder, admit_to, make_witness

NAME = "bench/site-1"
COMMAND = "import sys; from common.cli import main; sys.exit(main())"


def entries_of(heads: int) -> list[Entry]:
    """A chain of `heads` entries beyond its first."""
    key = Ed25519PrivateKey.generate()
    genesis = {
        **{"version": chain.VERSION, "site": "site-1", "dataset": "bench", "unit": "record"},
        **{"dataset_root": "0" * 64, "relation": "add_or_remove_one", "cap": 1.0, "delta": 1e-5},
        **{"filter_order": 8, "site_key": chain.public_hex(key), "officer_key": "1" * 64},
    }
    entries = [chain.write_entry(Kind.GENESIS, genesis, after=EMPTY, key=key)]
    for _ in range(heads):
        after = Head(entries[-1].seq, entries[-1].hash)
        body = {"dataset_root": "0" * 64}
        entries.append(chain.write_entry(Kind.DATASET, body, after=after, key=key))
    return entries


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int, float]]:
    """`coterie witness serve`: its address, its process, and the seconds until it listened."""
    words = ["witness", "serve", str(folder), "--listen", "127.0.0.1:0", "--json"]
    started = perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        address = json.loads(process.stdout.readline())["address"]
        yield address, process.pid, perf_counter() - started
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def measured(heads: int, folder: Path) -> dict[str, Any]:
    """The figures, with everything in `folder`."""
    place = folder / "witness"
    make_witness(place, ["127.0.0.1"], 30)
    admit_to(Folder(place), "site-1", folder / "pass", 30)
    entries, times = entries_of(heads), []
    with Folder(place).book() as book:
        book.enrol(NAME, "site-1", entries[:1])
    with served(place) as (address, pid, first_s):
        line = WitnessLine(address, Pass(folder / "pass"))
        for before, entry in pairwise(entries):
            (step,) = steps_after(NAME, Head(before.seq, before.hash), [entry])
            began = perf_counter()
            line.advance(step)
            times.append(perf_counter() - began)
        line.close()
        mb = resident_of(pid)
    with served(place) as (address, _, again_s):  # after kill -9
        line = WitnessLine(address, Pass(folder / "pass"))
        assert line.latest(NAME).head == Head(entries[-1].seq, entries[-1].hash)
        line.close()
    return {
        "heads": heads,
        "ms_median": round(1e3 * statistics.median(times), 2),
        "ms_p99": round(1e3 * sorted(times)[int(0.99 * len(times))], 2),
        "total_s": round(sum(times), 1),
        "start_s": round(first_s, 2),
        "start_after_kill_s": round(again_s, 2),
        "mb": round(mb, 1),
        "database_mb": round(os.path.getsize(place / "witness.db") / 1e6, 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--heads", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(given.heads, Path(folder))
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
