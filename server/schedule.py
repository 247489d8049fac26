"""The schedule: which sites each round asks, drawn before the run from public coins.

The coordinator sees who takes part, so drawing sites amplifies nothing against it, and no number
here claims that it does: a site's price is that of the rounds in which it is asked, each in full.
What the schedule gives is that this number of rounds is known before the first of them.
"""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from common.config import Config, FederationConfig, share_of
from common.errors import ConfigError

LABEL = 0x5C4ED
"""Keeps these coins apart from those that deal records by the same seed."""
COLUMNS = (("site", "round"), ("site", "from", "to"))
"""What the header of a file of availability may be."""

Spans = Mapping[str, Sequence[tuple[int, int]]]
"""When sites are there: first and last round of each stay."""


@dataclass(frozen=True)
class Schedule:
    """Who is asked when."""

    cohorts: tuple[tuple[str, ...], ...]
    """The sites of each round, by the names they have in the plan, in the plan's order."""

    def cohort(self, number: int) -> tuple[str, ...]:
        """The sites of a round, the first being 1."""
        return self.cohorts[number - 1]

    @cached_property
    def rounds_of(self) -> Counter[str]:
        """In how many rounds each site is asked."""
        return Counter(name for cohort in self.cohorts for name in cohort)

    @property
    def questions(self) -> int:
        """Instructions of the whole run, repeated attempts apart."""
        return sum(map(len, self.cohorts))


def training_names(federation: FederationConfig) -> tuple[str, ...]:
    """What a plan calls the sites that train."""
    return tuple(name for name in federation.site_names if name != federation.leave_out)


def draw_schedule(config: Config) -> Schedule:
    """The cohort of every round.

    Guarantee: a function of `seed`, of settings and of the file of availability. Without such a
    file any two sites were asked equally often after every round, or one of them once more; with
    one, a round takes those that are there and were asked least so far.
    Raises: ConfigError if nobody is there in some round, or the file is none, or another than the
    one the run was planned with.
    """
    federation, names = config.federation, training_names(config.federation)
    if federation.participation == 1 and not federation.availability:
        return Schedule((names,) * federation.rounds)
    spans = _spans(federation) if federation.availability else {}
    most = share_of(len(names), federation.participation)
    coins, asked = np.random.default_rng([config.seed, LABEL]), dict.fromkeys(names, 0)
    cohorts = []
    for number in range(1, federation.rounds + 1):
        there = [name for name in names if _is_there(spans, name, number)]
        if not there:
            raise ConfigError(
                f"federation.availability={federation.availability}: no site is there in round "
                f"{number}; lower federation.rounds, or correct the file"
            )
        drawn = dict(zip(there, coins.permutation(len(there)).tolist(), strict=True))
        chosen = set(sorted(there, key=lambda name: (asked[name], drawn[name]))[:most])
        for name in chosen:
            asked[name] += 1
        cohorts.append(tuple(name for name in there if name in chosen))
    return Schedule(tuple(cohorts))


def digest_of(path: Path) -> str:
    """SHA-256 of a file of availability. Raises: ConfigError if it cannot be read."""
    return hashlib.sha256(_read(path)).hexdigest()


def _is_there(spans: Spans, name: str, number: int) -> bool:
    return name not in spans or any(first <= number <= last for first, last in spans[name])


def _spans(federation: FederationConfig) -> Spans:
    """Reads the file of availability, if it is the one of the plan. Raises: ConfigError."""
    setting = f"federation.availability={federation.availability}"
    content = _read(Path(federation.availability).expanduser())
    planned = federation.availability_digest
    if planned and hashlib.sha256(content).hexdigest() != planned:
        raise ConfigError(
            f"{setting}: is not the file that this run was planned with; put that one back, or "
            "leave federation.availability_digest empty for a new run"
        )
    spans: dict[str, list[tuple[int, int]]] = {}
    for name, span in _rows(content, setting, federation):
        spans.setdefault(name, []).append(span)
    return spans


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"federation.availability={path}: cannot be read ({error.strerror}); give a CSV file"
        ) from error


def _rows(
    content: bytes, setting: str, federation: FederationConfig
) -> Iterator[tuple[str, tuple[int, int]]]:
    try:
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        header = tuple(name.strip() for name in next(rows, []))
        if header not in COLUMNS:
            raise ConfigError(f"{setting}: its first line must be site,round or site,from,to")
        known = set(federation.site_names)
        for row in rows:
            if row:
                yield _span(row, len(header), known, f"{setting}, line {rows.line_num}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{setting}: is no CSV file in UTF-8") from error


def _span(row: list[str], columns: int, known: set[str], at: str) -> tuple[str, tuple[int, int]]:
    """One stay of a site. Raises: ConfigError naming the line."""
    name, *rounds = (value.strip() for value in row)
    if len(row) != columns or not all(each.isascii() and each.isdigit() for each in rounds):
        raise ConfigError(f"{at}: must be a site and {columns - 1} whole number(s)")
    if name not in known:
        raise ConfigError(f"{at}: {name} is none of site-1 to site-{len(known)}")
    first, last = int(rounds[0]), int(rounds[-1])
    if not 1 <= first <= last:
        raise ConfigError(f"{at}: must be rounds from 1 on, the first not after the last")
    return name, (first, last)
