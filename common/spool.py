"""Spool: contents in a file without a name, mapped into memory, read when asked for.

A table, or a folder of images, may be larger than memory: its texts, or what its files hold, are
written once, in batches, as Arrow IPC, and the pages of that file are the system's to drop. The
file has no name from its first byte on, so nobody opens it by path, and the system frees it when
the last process that holds it ends, however it ends. It lies in the folder for temporary files
(`TMPDIR`). See decisions 0013 and 0041.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from multiprocessing.reduction import DupFd
from operator import eq
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Row = str | tuple[str, ...] | NDArray[Any]
"""A text, several, or an array."""
Rows = NDArray[np.int64]
Array = NDArray[Any]

BLOCK = 1024
"""Rows of texts that are read together."""
ARRAYS = 8
"""Arrays that are: one may be megabytes."""
GIVEN_BACK = 64
"""Blocks after which the pages read so far are handed back to the system."""
WRITTEN_BYTES = 8 << 20
"""Bytes of arrays that are written together, by the last of them more."""


class Kind(Enum):
    """What a row is."""

    text = "text"
    texts = "texts"
    array = "array"


class Spool:
    """The mapped file. Read-only; any number of threads may read."""

    def __init__(self, handle: int, kind: Kind) -> None:
        """Args: handle: of a finished file, which the spool closes."""
        self.handle, self.kind = handle, kind
        weakref.finalize(self, os.close, handle)
        self._mapped = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._mapped)))
        self._batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process is given the open file, by multiprocessing, and not what is in it."""
        return _reopened, (DupFd(self.handle), self.kind)

    def read(self, rows: Rows) -> list[Row]:
        """The rows asked for, in that order."""
        found: list[Row] = []
        places = np.searchsorted(self._starts, rows, side="right") - 1
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(places)) + 1):
            if len(run):
                place = places[run[0]]
                taken = self._batches[place].take(pa.array(rows[run] - self._starts[place]))
                columns = [column.to_pylist() for column in taken.columns]
                found += columns[0] if self.kind is Kind.text else map(_ROWS[self.kind], *columns)
        return found

    def content(self) -> bytes:
        """The whole file, for who cannot be given it open: another machine."""
        return self._mapped[:]

    def give_back(self) -> None:
        """Pages that were read stay in the system's cache and no longer count as this process's."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


def _array(content: bytes, kind: str, shape: list[int]) -> Array:
    """A copy: what libraries are given they may write to."""
    return np.frombuffer(content, dtype=kind).reshape(shape).copy()


_ROWS: dict[Kind, Any] = {Kind.texts: lambda *texts: texts, Kind.array: _array}
"""What makes a row of the values of its columns."""


class Spooled(Sequence[Row]):
    """Rows of a spool, as a sequence that holds none of their contents.

    Guarantee: equal, element by element, to the tuple of the same rows. To another process it goes
    as an open file and row numbers. Its repr shows no content.
    """

    __hash__ = None  # type: ignore[assignment] # as of a list: equal to what hashes otherwise

    def __init__(self, spool: Spool, rows: Rows | None = None) -> None:
        """Args: rows: which, in what order; None: all."""
        self._spool = spool
        self._rows = np.arange(len(spool), dtype=np.int64) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def kind(self) -> Kind:
        """What a row is."""
        return self._spool.kind

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Spooled": ...
    def __getitem__(self, index: int | slice) -> "Row | Spooled":
        if isinstance(index, slice):
            return Spooled(self._spool, self._rows[index])
        return self._spool.read(self._rows[[index]])[0]

    def __iter__(self) -> Iterator[Row]:
        block = ARRAYS if self.kind is Kind.array else BLOCK
        for number, start in enumerate(range(0, len(self), block), start=1):
            yield from self._spool.read(self._rows[start : start + block])
            if number % GIVEN_BACK == 0:
                self._spool.give_back()
        self._spool.give_back()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str) or len(self) != len(other):
            return False
        same = np.array_equal if self.kind is Kind.array else eq
        return all(same(mine, theirs) for mine, theirs in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"<{len(self)} spooled rows>"

    def layout(self) -> Rows:
        """(N,) in which order they are quickest to read: that of the file."""
        return np.argsort(self._rows, kind="stable")

    def chosen(self, at: Rows) -> "Spooled":
        """Those at `at`, in that order."""
        return Spooled(self._spool, self._rows[at])


def spooled(batches: Iterable[Sequence[Sequence[str]]], columns: int, *, kind: Kind) -> Spooled:
    """Writes batches of columns of texts to a new spool.

    Args: columns: how many each batch has; kind: `texts` where rows are tuples, as a question and
    its context.
    Raises: OSError if the folder for temporary files has no room; UnicodeEncodeError at a text
    that is no Unicode.
    """
    schema = pa.schema([(str(number), pa.large_string()) for number in range(columns)])
    return _written(schema, batches, kind)


def spooled_arrays(arrays: Iterable[Array]) -> Spooled:
    """Writes arrays, one at a time as they come, to a new spool. Raises: OSError as `spooled`."""
    return _written(_ARRAYS, _batches_of(arrays), Kind.array)


_ARRAYS = pa.schema(
    [
        ("content", pa.large_binary()),
        ("type", pa.string()),
        ("shape", pa.list_(pa.int64())),
    ]
)


def _batches_of(arrays: Iterable[Array]) -> Iterator[list[list[Any]]]:
    """Columns of some arrays at a time, as many as `WRITTEN_BYTES` hold."""
    batch: list[tuple[bytes, str, tuple[int, ...]]] = []
    size = 0
    for array in arrays:
        batch.append((array.tobytes(), array.dtype.str, array.shape))
        size += array.nbytes
        if size >= WRITTEN_BYTES:
            yield [*map(list, zip(*batch, strict=True))]
            batch, size = [], 0
    if batch:
        yield [*map(list, zip(*batch, strict=True))]


def _written(schema: Any, batches: Iterable[Sequence[Sequence[Any]]], kind: Kind) -> Spooled:
    # O_TMPFILE where there is such a thing, else unlinked before the first byte; mode 0600.
    with tempfile.TemporaryFile() as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                arrays = [
                    pa.array(column, field.type)
                    for column, field in zip(batch, schema, strict=True)
                ]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
        file.flush()
        pa.default_memory_pool().release_unused()  # Arrow keeps what it freed, as long as it likes
        return Spooled(Spool(os.dup(file.fileno()), kind))


def _reopened(handle: Any, kind: Kind) -> Spool:
    return Spool(handle.detach(), kind)
