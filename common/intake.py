"""Intake: a table of the user's own becomes records, read once, in batches.

What is long, the texts, passes through to a spool; what is small for each record, a label, a
digest, the ids of a person and a site, stays in memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from common.config import DataConfig, EmptyTexts
from common.digests import Digests, rows_of
from common.errors import ConfigError
from common.labels import labels_of
from common.progress import Told
from common.records import Content, Records, hashed
from common.spool import Kind, Spooled, spooled
from common.tables import Column, is_unicode, names_of, read_batches, texts_of


@runtime_checkable
class ReadsRows(Protocol):
    """A task that reads more than a text in the last of `data.columns`."""

    UNFIT: str
    """What messages say a row has that is left out for its last column."""
    BLANK: str
    """What messages say of rows whose last text is empty, which are kept."""

    def read_last(self, values: Sequence[Any]) -> str | None:
        """The last of a row's columns as one text, which may be empty; None if it does not fit the
        others. Args: values: of all columns, as they stand in the table.

        Raises: ValueError, saying what it is, if it is of a shape that the task does not know.
        """


@dataclass(frozen=True)
class Tally:
    """How many rows a table has of some kinds: private, and told by simulations and to the
    operator of a site alone.
    """

    empty: int = 0
    """Left out because a text of theirs is empty."""
    unfit: int = 0
    """Left out because their last text does not fit the others, see `ReadsRows`."""
    blank: int = 0
    """Kept, with an empty last text, which means something to their task."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.empty + other.empty, self.unfit + other.unfit, self.blank + other.blank)

    def told(self, task: ReadsRows | None) -> list[str]:
        """What there is to say of it, in words."""
        parts = [f"{self.empty} without a text left out"] if self.empty else []
        if task is not None and self.unfit:
            parts.append(f"{self.unfit} left out that have {task.UNFIT}")
        if task is not None and self.blank:
            parts.append(f"{self.blank} {task.BLANK}")
        return parts


NONE = Tally()
"""Of what knows no such rows."""


@dataclass(frozen=True)
class Taken:
    """A table, taken in."""

    records: Records
    digests: Digests
    """(N, 32) of their contents, as `Records.digests` has them."""
    tally: Tally


def read_file(
    config: DataConfig, path: str, name: str, told: Told, task: ReadsRows | None = None
) -> Taken:
    """The records of one file.

    Args: name: the setting that gave the path; told: hears how far the file is read; task: as
    `take_in`. Raises: ConfigError naming the row that is not as it must be.
    """
    columns = {**text_columns(config), **fact_columns(config)}
    batches = read_batches(config.source, path, name, columns, told, dialect=config.dialect)
    return take_in(config, batches, f"{name}={path}", task)


def take_in(
    config: DataConfig,
    batches: Iterable[list[Column]],
    where: str,
    task: ReadsRows | None = None,
) -> Taken:
    """The records of a table of texts.

    Args: batches: `text_columns` and `fact_columns`, in that order, some rows at a time; where:
    what messages call it; task: reads the last column, if that is no text.
    Raises: ConfigError naming the row that is not as it must be.
    """
    intake = _Intake(config, where, task)
    kind = Kind.texts if config.columns else Kind.text
    with room_for(where, "texts"):
        contents = spooled(map(intake.take, batches), len(intake.texts), kind=kind)
    return Taken(intake.records(contents), rows_of(intake.digests), intake.tally)


@contextmanager
def room_for(where: str, what: str) -> Iterator[None]:
    """Raises: ConfigError if the spool has no room: what is wrong with data is one already."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{where}: no room for its {what} in the folder for temporary files "
            f"({error.strerror}); name a folder on a larger disk in TMPDIR"
        ) from error


class _Intake:
    """What is kept of the batches that passed."""

    def __init__(self, config: DataConfig, where: str, task: ReadsRows | None) -> None:
        self._config, self._where, self._task = config, where, task
        self.texts, self._facts = text_columns(config), fact_columns(config)
        self.digests = bytearray()
        self.tally = Tally()
        self._labels: list[NDArray[np.int64]] = []
        self._names: dict[str, list[str]] = {setting: [] for setting in self._facts}
        self._known: dict[str, str] = {}
        """Each name once, however often it stands there."""
        self._seen = 0

    def take(self, batch: list[Column]) -> list[list[str]]:
        """Its texts, checked; the rest of it is kept. Raises: ConfigError naming the row."""
        first, where = self._seen + 1, self._where
        read = dict(zip([*self.texts, *self._facts], batch, strict=True))
        self._seen += len(batch[0])
        columns = [read[setting] for setting in self.texts]
        rows, texts = self._rows_of(columns, first)
        contents: Iterator[str | tuple[str, ...]] = (
            zip(*texts, strict=True) if self._config.columns else iter(texts[0])
        )
        for content in contents:
            self.digests += hashed(content)
        facts = {setting: [read[setting][row] for row in rows] for setting in self._facts}
        numbers = [first + row for row in rows]
        taken = records_of(self._config, where, texts[0], facts, numbers)
        self._labels.append(taken.labels)
        for setting, names in _named(taken).items():
            self._names[setting] += [self._known.setdefault(name, name) for name in names]
        return texts

    def _rows_of(self, columns: list[Column], first: int) -> tuple[list[int], list[list[str]]]:
        """Places, from 0, of the rows that are records, and their texts by columns; the others are
        counted.
        """
        names, task = [*self.texts.values()], self._task
        plain = columns if task is None else columns[:-1]
        whole: list[Sequence[str | None]] = [
            texts_of(column, name, self._where, first=first)
            for column, name in zip(plain, names, strict=False)
        ]
        if task is not None:
            whole.append(_last_of(task, columns, names[-1], self._where, first))
        rows, texts = [], []
        for row, each in enumerate(zip(*whole, strict=True)):
            fault = self._fault(each, names)
            if fault is None:
                rows.append(row)
                texts.append(each)
            elif self._config.empty is EmptyTexts.refuse:
                raise ConfigError(
                    f"{self._where}: row {first + row} has {fault}; data.empty=skip leaves it out"
                )
        if task is not None:
            self.tally += Tally(blank=sum(not each[-1] for each in texts))
        return rows, [[each[at] or "" for each in texts] for at in range(len(names))]

    def _fault(self, texts: tuple[str | None, ...], names: list[str]) -> str | None:
        """What a row has that makes it no record, once it is counted; None if it is one."""
        needed = texts if self._task is None else texts[:-1]
        if not all(needed):
            self.tally += Tally(empty=1)
            return f"an empty {names[needed.index('')]}"
        if self._task is not None and texts[-1] is None:
            self.tally += Tally(unfit=1)
            return self._task.UNFIT
        return None

    def records(self, contents: Spooled) -> Records:
        """All that were taken."""
        names = (
            tuple(self._names[setting]) if setting in self._names else None for setting in _NAMES
        )
        return Records(contents, np.concatenate(self._labels), *names)


def _last_of(
    task: ReadsRows, columns: list[Column], name: str, where: str, first: int
) -> list[str | None]:
    """The last column as the task reads it. Raises: ConfigError naming the row that it cannot."""
    lasts = []
    for row, values in enumerate(zip(*columns, strict=True), start=first):
        try:
            last = task.read_last(values)
        except ValueError as error:
            raise ConfigError(f"{where}: row {row} has {error}, in {name}") from None
        if last and not is_unicode(last):
            raise ConfigError(
                f"{where}: row {row} has half a character in {name}, an escape \\ud800 to "
                "\\udfff alone; write the whole character"
            )
        lasts.append(last)
    return lasts


_NAMES = ("data.person_column", "data.site_column", "data.group_column")
"""What names something of a record, in the order of the fields of `Records`."""


def _named(records: Records) -> dict[str, tuple[str, ...]]:
    names = zip(_NAMES, (records.persons, records.homes, records.groups), strict=True)
    return {setting: each for setting, each in names if each is not None}


def text_columns(config: DataConfig) -> dict[str, str]:
    """Columns that hold texts, by the settings that name them."""
    several = {f"data.columns[{n}]": column for n, column in enumerate(config.columns)}
    return several or {"data.text_column": config.text_column}


def fact_columns(config: DataConfig) -> dict[str, str]:
    """Columns that say more about a record, by the settings that name them."""
    named = {
        "data.label_column": config.label_column if config.labels else "",
        "data.person_column": config.person_column,
        "data.site_column": config.site_column,
        "data.group_column": config.group_column,
    }
    return {setting: column for setting, column in named.items() if column}


def records_of(
    config: DataConfig,
    where: str,
    contents: Sequence[Content],
    facts: Mapping[str, Column],
    rows: Sequence[int],
) -> Records:
    """Contents with what columns say of them.

    Args: facts: columns by the settings that name them; rows: (N,) the number of each row.
    Raises: ConfigError naming the row that is not as it must be.
    """
    labels = facts.get("data.label_column")
    return Records(
        contents,
        np.zeros(len(contents), np.int64)
        if labels is None
        else labels_of(labels, config.labels, where, rows),
        _ids(facts.get("data.person_column"), config.person_column, where, rows),
        _ids(facts.get("data.site_column"), config.site_column, where, rows),
        _groups(facts.get("data.group_column")),
    )


def _groups(column: Column | None) -> tuple[str, ...] | None:
    """The groups in a column; it refuses nothing, as rows that are private stand in it, too."""
    if column is None:
        return None
    return tuple(" ".join((each or "").split()) for each in names_of(column))


def _ids(
    column: Column | None, name: str, where: str, rows: Sequence[int]
) -> tuple[str, ...] | None:
    """The ids in a column; no message repeats one. Raises: ConfigError if one is empty."""
    if column is None:
        return None
    ids = tuple((each or "").strip() for each in names_of(column))
    if "" in ids:
        raise ConfigError(f"{where}: row {rows[ids.index('')]} has an empty {name}")
    return ids
