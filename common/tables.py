"""Tables of private records in files: CSV, JSON lines and Parquet, plain or packed by gzip.

A message about a file names the row, and never repeats what stands in it: rows are private.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from common.config import DataSource
from common.dialect import Dialect, separator_of
from common.errors import ConfigError

Column = Sequence[Any]
"""(N,) values of one column, as they stand in the file."""
PLAIN = Dialect()


def read_table(
    source: DataSource, path: str, name: str, columns: dict[str, str], dialect: Dialect = PLAIN
) -> list[Column]:
    """The columns asked for, in that order, all of one length.

    Args: name: the setting that gave the path; columns: column names by the settings that gave
    them, for messages; dialect: how a CSV file is spelled.
    Raises: ConfigError if the file is not of that kind, or a column is not there.
    """
    table = _READERS[source](Path(path).expanduser(), f"{name}={path}", dialect)
    found = table.columns if isinstance(table, pd.DataFrame) else table
    for setting, column in columns.items():
        if column not in found:
            # Not by name: in a file without a header the "names" are its first record.
            raise ConfigError(
                f"{setting}={column}: no such column among the {len(found)} of {path}; "
                f"{_parted_otherwise(found, column) or _WHERE_NAMES_STAND[source]}"
            )
    return [list(table[column]) for column in columns.values()]


def texts_of(column: Column, setting: str, where: str) -> list[str]:
    """A column of texts, without surplus white space; empty where nothing stands.

    Raises: ConfigError naming the row that is no text.
    """
    texts = []
    for row, value in enumerate(column, start=1):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: row {row} has no text in {setting}; it must be a string")
        texts.append(" ".join((value or "").split()))
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


def _parted_otherwise(found: Collection[str], column: str) -> str:
    """The remedy where the first line has the name, between other separators."""
    only = next(iter(found)) if len(found) == 1 else ""
    separator = separator_of(only, column)
    return f"give data.separator={separator.name}" if separator else ""


def _read_csv(path: Path, where: str, dialect: Dialect) -> pd.DataFrame:
    try:
        table: pd.DataFrame = pd.read_csv(
            path, dtype=str, keep_default_na=False, **dialect.arguments(path)
        )
    except UnicodeError as error:  # its text tells the byte
        raise ConfigError(
            f"{where}: its characters are not spelled as {dialect.encoding or 'utf-16'}; "
            "give the file's own data.encoding"
        ) from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"{where}: not a readable CSV file ({reason})") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas made a row label of the surplus field
        raise ConfigError(
            f"{where}: rows have more fields than the first line names; "
            "quote the texts that hold commas"
        )
    return table


def _read_jsonl(path: Path, where: str, _: Dialect) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    try:
        for number, line in enumerate(_lines(path), start=1):
            fields = _object(line, f"{where}: line {number}")
            columns = columns or {name: [] for name in fields}
            if fields.keys() != columns.keys():
                raise ConfigError(f"{where}: line {number} has other names than the first line")
            for name, values in columns.items():
                values.append(fields[name])
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not a readable file of JSON lines") from error
    return columns


def _lines(path: Path) -> Iterator[str]:
    """Lines that are not blank."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        yield from (line for line in file if line.strip())


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} is not a JSON object") from None
    return fields


def _read_parquet(path: Path, where: str, _: Dialect) -> dict[str, list[Any]]:
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"{where}: not a readable Parquet file") from error
    return {name: table[name].to_pylist() for name in table.column_names}


_READERS: dict[DataSource, Callable[[Path, str, Dialect], pd.DataFrame | dict[str, list[Any]]]] = {
    DataSource.csv: _read_csv,
    DataSource.jsonl: _read_jsonl,
    DataSource.parquet: _read_parquet,
}
_WHERE_NAMES_STAND = {
    DataSource.csv: "its first line must name them",
    DataSource.jsonl: "every line must be an object with the same names",
    DataSource.parquet: "its schema names them",
}
