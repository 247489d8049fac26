"""One file a task; `TASKS` is the list."""

from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.config import TaskName
from common.prefix import Inputs
from common.tasks import text_classification


class Task(Protocol):
    """What a task's module provides."""

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, max_tokens: int
    ) -> Inputs:
        """Model inputs of some records, padded to `max_tokens`."""

    def made(self, tokenizer: PreTrainedTokenizerBase, records: int, *, max_tokens: int) -> Inputs:
        """Model inputs of made records: the same on every call, of full length, some padded."""

    def loss_vector(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,) loss of each record, from nothing but that record."""

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,) whether each record is right, from nothing but that record."""

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Metrics of public records, by name."""


TASKS: dict[TaskName, Task] = {TaskName.text_classification: text_classification}
