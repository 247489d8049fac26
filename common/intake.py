"""Intake: a table of the user's own becomes records, read once, in batches.

What is long, the texts, passes through to a spool; what is small for each record, a label, a
digest, the ids of a person and a site, stays in memory.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from common.config import DataConfig
from common.digests import Digests, rows_of
from common.errors import ConfigError
from common.progress import Told
from common.records import Records, hashed
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
        several = {f"data.columns[{n}]": column for n, column in enumerate(config.columns)}
        self.texts = several or {"data.text_column": config.text_column}
        """Columns of texts, by the settings that name them."""
        beside = {
            "data.label_column": config.label_column if config.labels else "",
            "data.person_column": config.person_column,
            "data.site_column": config.site_column,
        }
        self.columns = {**self.texts, **{setting: name for setting, name in beside.items() if name}}
        """All columns that are read."""
        self.digests = bytearray()
        self._labels: list[NDArray[np.int64]] = []
        self._ids: dict[str, list[str]] = {"data.person_column": [], "data.site_column": []}
        self._known: dict[str, str] = {}
        """Each id once, however often it stands there."""
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
        self._labels.append(self._labels_of(read.get("data.label_column"), len(texts[0]), first))
        for setting, ids in self._ids.items():
            if setting in read:
                ids.extend(self._ids_of(read[setting], self.columns[setting], first))
        return texts

    def records(self, contents: Spooled) -> Records:
        """All that were taken."""
        persons, homes = (
            tuple(ids) if setting in self.columns else None for setting, ids in self._ids.items()
        )
        return Records(contents, np.concatenate(self._labels), persons, homes)

    def _labels_of(self, column: Column | None, rows: int, first: int) -> NDArray[np.int64]:
        if column is None:
            return np.zeros(rows, np.int64)
        index: dict[str | None, int] = {label: at for at, label in enumerate(self._config.labels)}
        labels = [index.get(name) for name in names_of(column)]
        if None in labels:
            row = first + labels.index(None)
            raise ConfigError(
                f"{self._where}: row {row} has a label that is not one of data.labels"
            )
        return np.array(labels, dtype=np.int64)

    def _ids_of(self, column: Column, name: str, first: int) -> list[str]:
        """The ids in a column; no message repeats one. Raises: ConfigError if one is empty."""
        ids = [(each or "").strip() for each in names_of(column)]
        if "" in ids:
            raise ConfigError(f"{self._where}: row {first + ids.index('')} has an empty {name}")
        return [self._known.setdefault(each, each) for each in ids]
