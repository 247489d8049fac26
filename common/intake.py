"""Intake: a table of the user's own becomes records, read once, in batches.

What is long, the texts, passes through to a spool; what is small for each record, a label, a
digest, the ids of a person and a site, stays in memory.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from common.config import DataConfig, EmptyTexts
from common.digests import Digests, rows_of
from common.errors import ConfigError
from common.labels import labels_of
from common.progress import Told
from common.records import Content, Records, hashed
from common.spool import Spooled, spooled
from common.tables import Column, names_of, read_batches, texts_of


def read_file(config: DataConfig, path: str, name: str, told: Told) -> tuple[Records, Digests, int]:
    """The records of one file, the digests of their contents, as `Records.digests` has them, and
    how many rows were left out for want of a text.

    Args: name: the setting that gave the path; told: hears how far the file is read.
    Raises: ConfigError naming the row that is not as it must be.
    """
    intake = _Intake(config, f"{name}={path}")
    batches = read_batches(config.source, path, name, intake.columns, told, dialect=config.dialect)
    try:
        several = bool(config.columns)
        contents = spooled(map(intake.take, batches), len(intake.texts), several=several)
    except OSError as error:  # of the spool: what is wrong with the table is a ConfigError
        raise ConfigError(
            f"{name}={path}: no room for its texts in the folder for temporary files "
            f"({error.strerror}); name a folder on a larger disk in TMPDIR"
        ) from error
    return intake.records(contents), rows_of(intake.digests), intake.empty


class _Intake:
    """What is kept of the batches that passed."""

    def __init__(self, config: DataConfig, where: str) -> None:
        self._config, self._where = config, where
        self.texts, self._facts = text_columns(config), fact_columns(config)
        self.columns = {**self.texts, **self._facts}
        """All columns that are read, by the settings that name them."""
        self.digests = bytearray()
        self._labels: list[NDArray[np.int64]] = []
        self._names: dict[str, list[str]] = {setting: [] for setting in self._facts}
        self._known: dict[str, str] = {}
        """Each name once, however often it stands there."""
        self._seen = 0
        self.empty = 0
        """Rows left out because a text of theirs is empty."""

    def take(self, batch: list[Column]) -> list[list[str]]:
        """Its texts, checked; the rest of it is kept. Raises: ConfigError naming the row."""
        first, where = self._seen + 1, self._where
        read = dict(zip(self.columns, batch, strict=True))
        whole = {
            name: texts_of(read[at], name, where, first=first) for at, name in self.texts.items()
        }
        rows = rows_with_texts(self._config, whole, where, first=first)
        seen = len(next(iter(whole.values())))
        self._seen, self.empty = self._seen + seen, self.empty + seen - len(rows)
        texts = [[column[row] for row in rows] for column in whole.values()]
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

    def records(self, contents: Spooled) -> Records:
        """All that were taken."""
        names = (
            tuple(self._names[setting]) if setting in self._names else None for setting in _NAMES
        )
        return Records(contents, np.concatenate(self._labels), *names)


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


def rows_with_texts(
    config: DataConfig, texts: dict[str, list[str]], where: str, *, first: int = 1
) -> list[int]:
    """Places, from 0, of the rows that have all their texts; the others are left out.

    Args: texts: columns by their names; first: the number of their first row.
    Raises: ConfigError naming the first row that lacks one, with `data.empty=refuse`.
    """
    rows = []
    for row, each in enumerate(zip(*texts.values(), strict=True)):
        if all(each):
            rows.append(row)
        elif config.empty is EmptyTexts.refuse:
            name = [*texts][each.index("")]
            raise ConfigError(
                f"{where}: row {first + row} has an empty {name}; data.empty=skip leaves it out"
            )
    return rows


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
