"""Prepared records: what a model reads of them, computed once and kept, or anew at each use.

Which of the two depends on the configuration and the model alone, never on records.
"""

from collections.abc import Iterator

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


class PreparedRecords:
    """Rows of what `model.prepare` makes of the task's encoding of some records.

    Guarantee: rows are those of the same records, to the bit, whether they are kept or not: all go
    through the frozen prefix in batches of one shape.
    """

    def __init__(
        self,
        records: Records,
        config: Config,
        model: FineTuned,
        processor: Processor,
        *,
        declared: int,
        batch: int,
    ) -> None:
        """Args: declared: the public number of records of this process that decides whether they
        are kept, see `are_kept`; batch: rows that go through the frozen prefix at a time.
        """
        self._records, self._config, self._model, self._batch = records, config, model, batch
        self._task, self._processor = TASKS[config.task.name], processor
        kept = are_kept(config, model, processor, declared)
        self._kept = self._all() if kept and len(records) else None

    def __len__(self) -> int:
        return len(self._records)

    @property
    def kept(self) -> bool:
        """Whether the rows are in memory."""
        return self._kept is not None

    def rows(self, indices: NDArray[np.int64]) -> Inputs:
        """(B, ...) of the records at `indices`, in that order, on the CPU."""
        if self._kept is None:
            return self._prepare(indices)
        return {name: tensor[indices] for name, tensor in self._kept.items()}

    def _all(self) -> Inputs:
        whole: Inputs = {}
        whole_batches = -(-AT_ONCE // self._batch) * self._batch
        for indices in runs(len(self), whole_batches):
            for name, tensor in self._prepare(indices).items():
                if name not in whole:
                    whole[name] = tensor.new_empty((len(self), *tensor.shape[1:]))
                whole[name][torch.from_numpy(indices)] = tensor
        return whole

    @torch.no_grad()
    def _prepare(self, indices: NDArray[np.int64]) -> Inputs:
        records = self._records.subset(indices)
        encoded = self._task.encode(self._processor, records, self._config.task)
        return self._model.prepare(encoded, batch=self._batch)


def are_kept(config: Config, model: FineTuned, processor: Processor, declared: int) -> bool:
    """Whether so many records fit into `engine.cache_mb`, by the size of a made one: a record's
    size depends on the config alone.
    """
    return declared * row_bytes(config, model, processor) <= config.engine.cache_mb * MIB


@torch.no_grad()
def row_bytes(config: Config, model: FineTuned, processor: Processor) -> int:
    """Bytes that one record takes once it is prepared."""
    made = TASKS[config.task.name].made(processor, 1, config)
    return sum(map(_bytes, model.prepare(made, batch=1).values()))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def runs(records: int, size: int) -> Iterator[NDArray[np.int64]]:
    """All indices in order, `size` at a time."""
    for start in range(0, records, size):
        yield np.arange(start, min(start + size, records))
