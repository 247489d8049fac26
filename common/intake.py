"""Intake: a table of the user's own becomes records, read once, in batches.

What is long, the texts, passes through to a spool; what is small for each record, a label, a
digest, the ids of a person and a site, stays in memory.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from common.config import DataConfig
from common.digests import Digests, rows_of
from common.errors import ConfigError
from common.progress import Told
from common.records import Content, Records, hashed
from common.spool import Spooled, spooled
from common.tables import Column, names_of, read_batches, texts_of


def read_file(config: DataConfig, path: str, name: str, told: Told) -> tuple[Records, Digests]:
    """The records of one file, and the digests of their contents, as `Records.digests` has them.

    Args: name: the setting that gave the path; told: hears how far the file is read.
    Raises: ConfigError naming the row that is not as it must be.
    """
    intake = _Intake(config, f"{name}={path}")
    batches = read_batches(config.source, path, name, intake.columns, told)
    try:
        several = bool(config.columns)
        contents = spooled(map(intake.take, batches), len(intake.texts), several=several)
    except OSError as error:  # of the spool: what is wrong with the table is a ConfigError
        raise ConfigError(
            f"{name}={path}: no room for its texts in the folder for temporary files "
            f"({error.strerror}); name a folder on a larger disk in TMPDIR"
        ) from error
    return intake.records(contents), rows_of(intake.digests)


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
        self._taken = 0

    def take(self, batch: list[Column]) -> list[list[str]]:
        """Its texts, checked; the rest of it is kept. Raises: ConfigError naming the row."""
        first, where = self._taken + 1, self._where
        read = dict(zip(self.columns, batch, strict=True))
        texts = [texts_of(read[at], name, where, first=first) for at, name in self.texts.items()]
        contents: Iterator[str | tuple[str, ...]] = (
            zip(*texts, strict=True) if self._config.columns else iter(texts[0])
        )
        for content in contents:
            self.digests += hashed(content)
        self._taken += len(texts[0])
        facts = {setting: read[setting] for setting in self._facts}
        taken = records_of(self._config, where, texts[0], facts, first=first)
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


def records_of(
    config: DataConfig,
    where: str,
    contents: Sequence[Content],
    facts: dict[str, Column],
    *,
    first: int = 1,
) -> Records:
    """Contents with what columns say of them.

    Args: facts: columns by the settings that name them; first: the number of their first row.
    Raises: ConfigError naming the row that is not as it must be.
    """
    labels = facts.get("data.label_column")
    rows = len(contents)
    return Records(
        contents,
        np.zeros(rows, np.int64) if labels is None else _labels(labels, config, where, first),
        _ids(facts.get("data.person_column"), config.person_column, where, first),
        _ids(facts.get("data.site_column"), config.site_column, where, first),
        _groups(facts.get("data.group_column")),
    )


def _labels(column: Column, config: DataConfig, where: str, first: int) -> NDArray[np.int64]:
    index: dict[str | None, int] = {label: at for at, label in enumerate(config.labels)}
    labels = [index.get(name) for name in names_of(column)]
    if None in labels:
        row = first + labels.index(None)
        raise ConfigError(f"{where}: row {row} has a label that is not one of data.labels")
    return np.array(labels, dtype=np.int64)


def _groups(column: Column | None) -> tuple[str, ...] | None:
    """The groups in a column; it refuses nothing, as rows that are private stand in it, too."""
    if column is None:
        return None
    return tuple(" ".join((each or "").split()) for each in names_of(column))


def _ids(column: Column | None, name: str, where: str, first: int) -> tuple[str, ...] | None:
    """The ids in a column; no message repeats one. Raises: ConfigError if one is empty."""
    if column is None:
        return None
    ids = tuple((each or "").strip() for each in names_of(column))
    if "" in ids:
        raise ConfigError(f"{where}: row {first + ids.index('')} has an empty {name}")
    return ids
