"""What the books cost: reservations, openings, verification, and a thousand sites at once.

    python -m benchmarks.ledger --json FILE [--quick] [--folder FOLDER]

Wall-clock milliseconds, with CPU beside them: what is between the two is the disk's. The folder
must be on the disk that is meant, and not in memory; by default it is a temporary one.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from client.commitment import Commitment, commit_to
from client.ledger import Ledger, Store, Terms
from common.privacy import accounting
from common.privacy.accounting import Event
from common.privacy.verification import verify
from common.records import Records

HASH = "ab" * 32
TERMS = Terms("letters", 8.0, 1e-5, HASH)
FIRST = Event(40.0, 0.01, 20)
"""Of the run that fills a chain."""


@dataclass
class Row:
    """One thing that was timed, `count` times."""

    what: str
    median_ms: float
    worst_ms: float
    goal_ms: float | None
    count: int
    cpu_ms: float
    """Median of the CPU time."""


@dataclass
class Clock:
    """Times what is done inside `once`."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """One more time."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall.append(1e3 * (time.perf_counter() - wall))
        self.cpu.append(1e3 * (time.process_time() - cpu))

    def row(self, what: str, goal_ms: float | None = None) -> Row:
        """What it came to."""
        row = Row(
            what,
            round(statistics.median(self.wall), 2),
            round(max(self.wall), 2),
            goal_ms,
            len(self.wall),
            round(statistics.median(self.cpu), 2),
        )
        goal = "" if goal_ms is None else f"goal {goal_ms:8.0f} ms"
        print(
            f"{what:58} median {row.median_ms:9.2f} ms  worst {row.worst_ms:9.2f} ms  "
            f"cpu {row.cpu_ms:9.2f} ms  n={row.count:<4} {goal}",
            flush=True,
        )
        return row


def main() -> None:
    """Measures, prints a table and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write the rows to")
    parser.add_argument("--quick", action="store_true", help="a tenth of all sizes and counts")
    parser.add_argument("--folder", type=Path, help="where the ledgers are made")
    options = parser.parse_args()
    scale = 10 if options.quick else 1
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for part in (reservations, long_chain, many_sites):
            rows += part(folder, scale)
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def reservations(folder: Path, scale: int) -> list[Row]:
    """One at a time, in a chain that has a history; of one run, and of many that differ."""
    rows = []
    entries, times = 1000 // scale, 500 // scale
    with contextlib.closing(Store.create(folder / "short")) as store:
        ledger = store.open("one run", TERMS)
        commit(ledger, "first", FIRST, 10**4)
        fill(ledger, entries)
        rows += rounds(ledger, [("first", FIRST)], times, f"chain of {entries}, one run")
        ledger = store.open("many runs", TERMS)
        commit(ledger, "first", FIRST, 10**4)
        fill(ledger, entries)
        runs = [(f"run {n}", Event(40.0 + n, 0.01 + n / 1e4, 20 + n)) for n in range(50)]
        clock = Clock()
        for run, event in runs:
            with clock.once():
                commit(ledger, run, event, 100)
        rows.append(clock.row(f"commit of another run, chain of {entries}"))
        rows += rounds(ledger, runs, times, f"chain of {entries}, 50 runs that differ")
        content, clock = ledger.export().encode(), Clock()
        for _ in range(3):
            forget_prices()
            with clock.once():
                verify(content)
        rows.append(clock.row("verification of that chain", 5000))
    rows.append(opening(folder / "short", "opening of both chains", 5))
    return rows


def rounds(ledger: Ledger, runs: list[tuple[str, Event]], times: int, where: str) -> list[Row]:
    """Whole rounds of runs in turn, each step timed."""
    reserve, prepare, release = Clock(), Clock(), Clock()
    content = bytes(400_000)  # of 100 000 parameters
    done = sum(r.run == runs[0][0] for r in ledger.books.reservations.values())
    for number in range(times):
        run, event = runs[number % len(runs)]
        with reserve.once():
            reservation = ledger.reserve(run, done + 1 + number // len(runs), event)
        with prepare.once():
            ledger.prepare(reservation, content, steps=event.steps)
        with release.once():
            ledger.release(reservation)
    return [
        reserve.row(f"reservation, {where}", 10),
        prepare.row(f"preparation of 400 kB, {where}"),
        release.row(f"release, {where}"),
    ]


def long_chain(folder: Path, scale: int) -> list[Row]:
    """Everything that reads a whole chain."""
    entries, path = 10_000 // scale, folder / "long"
    with contextlib.closing(Store.create(path)) as store:
        ledger = store.open("site", TERMS)
        commit(ledger, "first", FIRST, 10**4)
        fill(ledger, entries)
        taken, verified = Clock(), Clock()
        for _ in range(3):
            with taken.once():
                content = ledger.export().encode()
        for _ in range(5):
            forget_prices()
            with verified.once():
                verify(content)
        rows = [
            taken.row(f"export of {entries} entries"),
            verified.row(f"verification of {entries} entries ({len(content) >> 20} MB)", 5000),
        ]
        clock = Clock()
        for number in range(100 // scale):
            with clock.once():
                ledger.reserve("first", 9000 + number, FIRST)
        rows.append(clock.row(f"reservation, chain of {entries}", 10))
    return [opening(path, f"opening of {entries} entries, alone", 5), *rows]


def many_sites(folder: Path, scale: int) -> list[Row]:
    """A simulation's rounds: every site in one transaction."""
    count, path, times = 1000 // scale, folder / "many", 10
    sites = [f"site {number}" for number in range(count)]
    genesis, first, later = Clock(), Clock(), Clock()
    bound, again, rotated = Clock(), Clock(), Clock()
    with contextlib.closing(Store.create(path)) as store:
        with genesis.once(), store.together():
            for site in sites:
                store.open(site, TERMS)
        records = {site: of_one_site(site, store.secret) for site in sites}
        for clock in (bound, again):
            with clock.once(), store.together():
                for site in sites:
                    store.ledger(site).bind(records[site])
        with first.once(), store.together():
            for site in sites:
                commit(store.ledger(site), "first", FIRST, 100)
                store.ledger(site).reserve("first", 1, FIRST)
        for number in range(2, 2 + times):
            with later.once(), store.together():
                for site in sites:
                    store.ledger(site).reserve("first", number, FIRST)
        with rotated.once():
            store.rotate()
    what = f"of {count} sites, one transaction"
    return [
        genesis.row(f"opening of the chains {what}"),
        bound.row(f"binding to 100 records each {what}"),
        again.row(f"the same again {what}"),
        first.row(f"commitment and first reservation {what}", 2000),
        later.row(f"reservation {what}", 2000),
        rotated.row(f"a new key {what}"),
        opening(path, f"opening of {count} chains of {5 + times} entries, alone", 3),
    ]


def of_one_site(site: str, secret: bytes) -> Commitment:
    """To a hundred records that are nobody else's, as long as a short report."""
    texts = tuple(f"{site}, record {number}: {'some words ' * 80}" for number in range(100))
    return commit_to(Records(texts, np.zeros(len(texts), dtype=np.int64)), secret)


def opening(path: Path, what: str, times: int) -> Row:
    """By whoever is alone: all chains are checked. A store left reservations is recovered once."""
    Store(path).close()
    clock = Clock()
    for _ in range(times):
        forget_prices()
        with clock.once():
            Store(path).close()
    return clock.row(what)


def forget_prices() -> None:
    """As a new process would find it."""
    accounting._epsilon_pld.cache_clear()
    accounting._epsilon_rdp.cache_clear()


def commit(ledger: Ledger, run: str, event: Event, count: int) -> None:
    """A run of so many rounds, and no spare one."""
    ledger.commit(run, event, rounds=count, spare_rounds=0, plan=HASH, model="tiny", unit="record")


def fill(ledger: Ledger, entries: int) -> None:
    """Rounds that are released, until the chain has this many entries or a few more."""
    number = 0
    while ledger.head.seq < entries:
        number += 1
        with ledger._store.together():  # one flush a round: this is not what is timed
            reservation = ledger.reserve("first", number, FIRST)
            ledger.prepare(reservation, b"update", steps=FIRST.steps)
            ledger.release(reservation)


if __name__ == "__main__":
    main()
