"""Prepared records: what a model reads of them, computed once and kept, or anew at each use.

Which of the two depends on the configuration and the model alone, never on records.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config import Config
from common.model import FineTuned
from common.prefix import Inputs
from common.records import Records
from common.tasks import TASKS, Processor

MIB = 1 << 20
AT_ONCE = 240
"""Records that are encoded together while all are prepared, rounded up to whole batches."""


TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Preparation:
    """How records are prepared: found out once, for all sites that a model serves."""

    config: Config
    model: FineTuned
    processor: Processor
    batch: int
    """Rows that go through the frozen prefix at a time."""

    @torch.no_grad()
    def of(self, records: Records) -> Inputs:
        """What `model.prepare` makes of the task's encoding of some records."""
        encoded = TASKS[self.config.task.name].encode(self.processor, records, self.config.task)
        return self.model.prepare(encoded, batch=self.batch)

    def keeps(self, declared: int) -> bool:
        """Whether so many records fit into `engine.cache_mb`, by the size of a made one: a
        record's size depends on the config alone.
        """
        return declared * self.row_bytes <= self.config.engine.cache_mb * MIB

    @cached_property
    def row_bytes(self) -> int:
        """Bytes that one record takes once it is prepared."""
        with torch.no_grad():
            made = TASKS[self.config.task.name].made(self.processor, 1, self.config)
            return sum(map(_bytes, self.model.prepare(made, batch=1).values()))

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all that decides what a record's rows are: task, processor, the model's
        settings and frozen weights, shape. Not by the model's name: its folder may have changed
        since another run.
        """
        config, model = self.config, self.model
        whole = hashlib.sha256(repr((config.task, config.model, type(model), self.batch)).encode())
        whole.update(model.encoder.config.to_json_string().encode())
        whole.update(_digest_of(self.processor))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            whole.update(name.encode())
            if not tensor.requires_grad:
                whole.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return whole.digest()


class PreparedRecords:
    """Rows of what a preparation makes of some records.

    Guarantee: rows are those of the same records, to the bit, whether they are kept or not, and
    whoever kept them: all go through the frozen prefix in batches of one shape.
    """

    def __init__(self, records: Records, preparation: Preparation, *, declared: int) -> None:
        """Args: declared: the public number of records of this process that decides whether they
        are kept, see `Preparation.keeps`.
        """
        self._records, self._preparation = records, preparation
        self._shelf: Shelf | None = None
        self._chunk: Inputs | None = None
        """What they all lie in, where they lie together."""
        self._places: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        """(N,) where each record's rows are: on the shelf, or in the chunk."""
        if len(records) and preparation.keeps(declared):
            keys, most = _keys(records), preparation.config.engine.cache_mb * MIB
            self._shelf = shelf_of(preparation.digest, keys, preparation.row_bytes, most)
            self._chunk, self._places = self._shelf.found(self._put(keys, self._shelf))

    def __len__(self) -> int:
        return len(self._records)

    @property
    def kept(self) -> bool:
        """Whether the rows are in memory."""
        return self._shelf is not None

    def rows(self, indices: NDArray[np.int64]) -> Inputs:
        """(B, ...) of the records at `indices`, in that order, on the CPU."""
        if self._shelf is None:
            return self._prepare(indices)
        if self._chunk is None:
            return self._shelf.rows(self._places[indices].tolist())
        at = torch.from_numpy(self._places[indices])
        return {name: tensor.index_select(0, at) for name, tensor in self._chunk.items()}

    def lent(self, indices: NDArray[np.int64]) -> Inputs:
        """As `rows`, in memory that the borrower must not write: of all in order, as they lie."""
        whole = self._whole
        return self.rows(indices) if whole is None or not _is_all(indices, len(self)) else whole

    @cached_property
    def _whole(self) -> Inputs | None:
        """The chunk, where it is these records in their order, and nothing else."""
        if self._chunk is None or not _is_all(self._places, len(self)):
            return None
        return self._chunk if len(next(iter(self._chunk.values()))) == len(self) else None

    def _put(self, keys: list[bytes], shelf: "Shelf") -> list[int]:
        """Prepares the records that nobody did before; where each record's rows are then."""
        new = {key: at for at, key in enumerate(keys) if key not in shelf}
        missing = np.array([*new.values()], dtype=np.int64)
        batch = self._preparation.batch
        whole_batches = -(-AT_ONCE // batch) * batch
        for chosen in runs(len(missing), whole_batches):
            at = missing[chosen]
            shelf.put([keys[index] for index in at], self._prepare(at))
        return [shelf.place(key) for key in keys]

    def _prepare(self, indices: NDArray[np.int64]) -> Inputs:
        return self._preparation.of(self._records.subset(indices))


class Shelf:
    """Prepared rows of one frozen model, by what they were made of, in this process's memory.

    Runs of one process find there what an earlier one prepared, as the jobs of a sweep do.
    """

    def __init__(self) -> None:
        self._places: dict[bytes, int] = {}
        self._chunks: list[Inputs] = []
        self._at: list[tuple[int, int]] = []
        self.bytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def place(self, key: bytes) -> int:
        """Where the rows of a record are. Raises: KeyError."""
        return self._places[key]

    def put(self, keys: list[bytes], rows: Inputs) -> None:
        """Keeps the rows of some records, each there for the first time."""
        for row, key in enumerate(keys):
            self._places[key] = len(self._at)
            self._at.append((len(self._chunks), row))
        self._chunks.append(rows)
        self.bytes += sum(map(_bytes, rows.values()))

    def found(self, places: list[int]) -> tuple[Inputs | None, NDArray[np.int64]]:
        """The chunk that all of these places are in, as those of a site that was prepared by
        itself, and where in it; without such a chunk, the places.
        """
        at = [self._at[place] for place in places]
        if len({chunk for chunk, _ in at}) != 1:
            return None, np.array(places, dtype=np.int64)
        return self._chunks[at[0][0]], np.array([row for _, row in at], dtype=np.int64)

    def rows(self, places: list[int]) -> Inputs:
        """(B, ...) of the records at some places."""
        found = [self._at[place] for place in places]
        names = self._chunks[0] if self._chunks else {}
        return {name: torch.stack([self._chunks[c][name][r] for c, r in found]) for name in names}


_SHELVES: dict[bytes, Shelf] = {}
"""The shelves of this process, the one used last at the end."""


def shelf_of(prepares: bytes, keys: list[bytes], row: int, most: int) -> Shelf:
    """The shelf of what prepares rows, with room for the rows of some records.

    Guarantee: what lies on shelves is no more than `most` bytes; others are given up for it, the
    one not used for longest first. Rows that somebody holds stay where they are.
    Args: row: bytes that one record takes.
    """
    shelf = _SHELVES.pop(prepares, None) or Shelf()
    room = row * sum(key not in shelf for key in {*keys})
    while _SHELVES and sum(each.bytes for each in _SHELVES.values()) + shelf.bytes + room > most:
        del _SHELVES[next(iter(_SHELVES))]
    if shelf.bytes + room > most:
        shelf = Shelf()
    _SHELVES[prepares] = shelf
    return shelf


def _keys(records: Records) -> list[bytes]:
    """(N,) what each record's rows are found by: its content and its label."""
    return [
        digest.tobytes() + int(label).to_bytes(8, "big", signed=True)
        for digest, label in zip(records.digests(), records.labels, strict=True)
    ]


def _digest_of(processor: Processor) -> bytes:
    """SHA-256 of what it saves, which is all that it knows."""
    whole = hashlib.sha256()
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.name == TOKENIZER:  # how its last call padded stands there, too
                known = {**json.loads(content), "padding": None, "truncation": None}
                content = json.dumps(known).encode()
            whole.update(path.name.encode() + content)
    return whole.digest()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_all(indices: NDArray[np.int64], records: int) -> bool:
    return len(indices) == records and bool((indices == np.arange(records)).all())


def runs(records: int, size: int) -> Iterator[NDArray[np.int64]]:
    """All indices in order, `size` at a time."""
    for start in range(0, records, size):
        yield np.arange(start, min(start + size, records))
