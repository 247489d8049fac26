"""Tables of private records in files: CSV and JSON lines, plain or packed, and Parquet.

They are read in batches, so that a table may be larger than memory. A message about a file names
the row, and never repeats what stands in it: rows are private.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any

from common.config import DataSource
from common.dialect import Dialect, separator_of
from common.errors import ConfigError
from common.packing import DAMAGE, packing_of, unpacked
from common.progress import Told, untold

Column = Sequence[Any]
"""(n,) values of one column of a batch, as they stand in the file."""

PLAIN = Dialect()
FEW_ZEROS = 50
"""A text may have a byte of 0 among so many; of UTF-16 every other is, of an image several are."""
HEAD_BYTES = 512
"""Of a file that are looked at before it is read."""
BATCH_ROWS = 1024
"""Rows that are in memory at a time."""

_Batch = tuple[Mapping[str, Column], float]
"""Columns by name, all of the table or at least those asked for; the share of the file so far."""
_Reader = Callable[[Path, str, list[str], Dialect], Iterator[_Batch]]


def read_batches(
    source: DataSource,
    path: str,
    name: str,
    columns: dict[str, str],
    told: Told = untold,
    *,
    dialect: Dialect = PLAIN,
) -> Iterator[list[Column]]:
    """The columns asked for, in that order, a batch of rows at a time; one batch at least.

    Args: name: the setting that gave the path; columns: column names by the settings that gave
    them, for messages; told: hears how far the file is read; dialect: how a CSV file is spelled.
    Raises: ConfigError if the file is not of that kind, or a column is not there; rows before the
    fault were yielded by then.
    """
    asked = [*columns.values()]
    place, where = Path(path).expanduser(), f"{name}={path}"
    for found, share in _READERS[source](place, where, asked, dialect):
        for setting, column in columns.items():
            if column not in found:
                # Not by name: in a file without a header the "names" are its first record.
                raise ConfigError(
                    f"{setting}={column}: no such column among the {len(found)} of {path}; "
                    f"{_parted_otherwise(found, column) or _WHERE_NAMES_STAND[source]}"
                )
        told(f"reading {name}", share)
        yield [found[column] for column in asked]


def texts_of(column: Column, setting: str, where: str, *, first: int = 1) -> list[str]:
    """A column of texts, without surplus white space; empty where nothing stands.

    Args: first: the number of its first row, from 1.
    Raises: ConfigError naming the row that is no text.
    """
    texts = []
    for row, value in enumerate(column, start=first):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: row {row} has no text in {setting}; it must be a string")
        text = " ".join((value or "").split())
        if not text.isascii() and not is_unicode(text):
            raise ConfigError(
                f"{where}: row {row} has half a character in {setting}, an escape \\ud800 to "
                "\\udfff alone; write the whole character"
            )
        texts.append(text)
    return texts


def names_of(column: Column) -> list[str | None]:
    """A column of names or ids: whole numbers as their digits, anything else that is no text None.

    >>> names_of(["a", 3, True, 2.5, None])
    ['a', '3', None, None, None]
    """
    return [
        value if isinstance(value, str) else str(value) if type(value) is int else None
        for value in column
    ]


def is_unicode(text: str) -> bool:
    """Whether a text has whole characters only, which JSON does not assure."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parted_otherwise(found: Collection[str], column: str) -> str:
    """The remedy where the first line has the name, between other separators."""
    only = next(iter(found)) if len(found) == 1 else ""
    separator = separator_of(only, column)
    return f"give data.separator={separator.name}" if separator else ""


def _read_csv(path: Path, where: str, asked: list[str], dialect: Dialect) -> Iterator[_Batch]:
    """All columns: told of some only, pandas passes over rows that have too many fields."""
    import pandas as pd  # noqa: PLC0415 - half a second, for CSV only

    try:
        encoding, errors = _spelling(path, where, dialect)
        _check_names(path, where, asked, dialect)
        with unpacked(path, where) as (content, file), ExitStack() as stack:
            chunks = stack.enter_context(
                pd.read_csv(
                    content,
                    dtype=str,
                    keep_default_na=False,
                    chunksize=BATCH_ROWS,
                    compression=None,
                    sep=dialect.separator.value,
                    encoding=encoding,
                    encoding_errors=errors,
                )
            )
            for table in chunks:
                _check_fields(table)
                read = {name: table[name].tolist() for name in table.columns if name in asked}
                yield {**dict.fromkeys(table.columns, ()), **read}, _share(file)
    except UnicodeError as error:  # its text tells the byte
        raise ConfigError(
            f"{where}: its characters are not spelled as {dialect.encoding or 'utf-16'}; "
            "give the file's own data.encoding"
        ) from error
    except (OSError, ValueError, *DAMAGE) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            _surplus(path, where, dialect) or f"{where}: not a readable CSV file ({reason})"
        ) from error


def _spelling(path: Path, where: str, dialect: Dialect) -> tuple[str, str]:
    """See `Dialect.spelling`. Raises: ConfigError if the file begins as no text does."""
    with unpacked(path, where) as (content, _):
        head = content.read(HEAD_BYTES)
    encoding, errors = dialect.spelling(head)
    if encoding == "utf-8" and head.count(0) * FEW_ZEROS > len(head):
        raise ConfigError(
            f"{where}: begins with bytes of 0, as no text in UTF-8 does; of a table in UTF-16 "
            "give data.encoding=utf-16-le or utf-16-be"
        )
    return encoding, errors


def _raw_rows(path: Path, where: str, dialect: Dialect) -> Iterator[list[str]]:
    """Fields as they stand, the names first, without blank lines.

    Raises: OSError, ValueError, csv.Error, or one of `DAMAGE`.
    """
    encoding, errors = _spelling(path, where, dialect)
    with unpacked(path, where) as (content, _):
        plain = "utf-8-sig" if encoding == "utf-8" else encoding
        text = io.TextIOWrapper(content, plain, errors, newline="")
        lines = csv.reader(text, delimiter=dialect.separator.value)
        yield from (fields for fields in lines if len(fields) > 1 or "".join(fields).strip())


def _check_names(path: Path, where: str, asked: list[str], dialect: Dialect) -> None:
    """Raises: ConfigError if a column asked for stands there twice: pandas would take the first."""
    try:
        names = next(_raw_rows(path, where, dialect), [])
    except (ValueError, csv.Error):  # of the texts: pandas says what it is
        return
    if twice := [name for name in asked if names.count(name) > 1]:
        raise ConfigError(
            f"{where}: its first line names {twice[0]} {names.count(twice[0])} times; rename those "
            "that are not meant"
        )


def _check_fields(table: Any) -> None:
    """Raises: ValueError if pandas took a surplus field of the first row for the name of each."""
    import pandas as pd  # noqa: PLC0415 - as `_read_csv`

    if not isinstance(table.index, pd.RangeIndex):
        fault = "rows have more fields than the first line names"
        raise ValueError(fault)  # noqa: TRY004 - of the file


def _surplus(path: Path, where: str, dialect: Dialect) -> str:
    """What is wrong with the first row that has more fields than the first line names; empty where
    there is none. pandas counts lines, blank ones and those of a header too.
    """
    try:
        rows = _raw_rows(path, where, dialect)
        names = len(next(rows, []))
        for number, fields in enumerate(rows, start=1):
            if len(fields) > names:
                return (
                    f"{where}: row {number} has {len(fields)} fields, and the first line names "
                    f"{names}; quote the texts that hold a {dialect.separator.name}"
                )
    except (OSError, ValueError, csv.Error, *DAMAGE):  # a fault of another kind came first
        pass
    return ""


def _read_jsonl(path: Path, where: str, asked: list[str], _dialect: Dialect) -> Iterator[_Batch]:
    names: set[str] = set()
    try:
        with unpacked(path, where) as (content, file):
            numbered = enumerate(_lines(content), start=1)
            while lines := list(islice(numbered, BATCH_ROWS)):
                objects = [_object(line, f"{where}: line {number}") for number, line in lines]
                names = names or {*objects[0]}
                for (number, _), fields in zip(lines, objects, strict=True):
                    if fields.keys() != names:
                        raise ConfigError(
                            f"{where}: line {number} has other names than the first line"
                        )
                yield _columns(names, asked, objects), _share(file)
            if not names:
                yield {}, 1.0
    except (OSError, UnicodeDecodeError, *DAMAGE) as error:
        raise ConfigError(f"{where}: not a readable file of JSON lines") from error


def _columns(names: set[str], asked: list[str], objects: list[dict[str, Any]]) -> dict[str, Column]:
    """Values of those asked for; of the others the names."""
    read = {name: [fields[name] for fields in objects] for name in asked if name in names}
    return {**dict.fromkeys(names, ()), **read}


def _lines(content: IO[bytes]) -> Iterator[str]:
    """Lines that are not blank."""
    with io.TextIOWrapper(content, encoding="utf-8") as text:
        yield from (line for line in text if line.strip())


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} is not a JSON object") from None
    return fields


def _read_parquet(path: Path, where: str, asked: list[str], _dialect: Dialect) -> Iterator[_Batch]:
    import pyarrow as pa  # noqa: PLC0415 - for Parquet only
    from pyarrow import parquet  # noqa: PLC0415 - the same

    try:
        with parquet.ParquetFile(path) as file:
            names, total, done = file.schema_arrow.names, file.metadata.num_rows, 0
            if not total or not {*asked} <= {*names}:
                yield dict.fromkeys(names, ()), 1.0
            for batch in file.iter_batches(BATCH_ROWS, columns=[n for n in names if n in asked]):
                done += batch.num_rows
                read = {n: batch.column(n).to_pylist() for n in batch.schema.names}
                yield {**dict.fromkeys(names, ()), **read}, done / total
    except (OSError, ValueError, pa.ArrowException) as error:
        packing = packing_of(path) if path.is_file() else None
        remedy = f"; it is packed by {packing.name}: unpack it" if packing else ""
        raise ConfigError(f"{where}: not a readable Parquet file{remedy}") from error


def _share(file: IO[bytes]) -> float:
    """How much of a file was read; all, once its end has closed it."""
    return 1.0 if file.closed else file.tell() / max(os.fstat(file.fileno()).st_size, 1)


_READERS: dict[DataSource, _Reader] = {
    DataSource.csv: _read_csv,
    DataSource.jsonl: _read_jsonl,
    DataSource.parquet: _read_parquet,
}
_WHERE_NAMES_STAND = {
    DataSource.csv: "its first line must name them",
    DataSource.jsonl: "every line must be an object with the same names",
    DataSource.parquet: "its schema names them",
}
