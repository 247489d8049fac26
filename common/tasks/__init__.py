"""One file a task; `TASKS` is the list. How to add one: docs/adding-a-task.md."""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from common.config import Config, ModelConfig, TaskConfig, TaskName
from common.data import Reading
from common.intake import ReadsRows
from common.media import File
from common.model import FineTuned
from common.prefix import Inputs
from common.records import Records
from common.spool import Array

Processor = Any
"""What turns contents into tensors: a tokenizer, or a processor of images or sounds."""


class Task(Protocol):
    """What a task is. Tensors have the records along their first axis."""

    CLASSES: bool
    """Whether records carry one of `data.labels`."""
    LOWER_IS_BETTER: bool
    """Whether the first of its metrics is better where it is lower."""

    def load_processor(self, model: ModelConfig) -> Processor:
        """What belongs to the model. Raises: ConfigError if it has none."""

    def build(self, config: Config) -> FineTuned:
        """The model with what is tuned in it; the same on every side. Raises: ConfigError."""

    def encode(self, processor: Processor, records: Records, task: TaskConfig) -> Inputs:
        """What the model reads and, under names with `TARGET`, what it should have answered; of
        a size that depends on the config alone.
        """

    def toy_examples(self, count: int) -> Records:
        """Made records that can be learned, the same on every call: for tests and examples."""

    def made(self, processor: Processor, records: int, config: Config) -> Inputs:
        """The same of made records: equal on every call, of full size, some of them padded."""

    def loss_vector(self, output: Tensor, targets: Inputs) -> Tensor:
        """(B,) loss of each record, from nothing but that record."""

    def correct(self, output: Tensor, targets: Inputs) -> Tensor:
        """(B,) whether each record is right, from nothing but that record."""

    def score(self, model: FineTuned, inputs: Inputs) -> Inputs:
        """What `metrics` needs of each of some public records, small.

        Args: inputs: what `encode`, or `model.prepare`, made of them; in no more than a bounded
        number of passes through the model.
        """

    def metrics(
        self, scores: Inputs, records: Records, processor: Processor, config: Config
    ) -> dict[str, float]:
        """Metrics of public records, by name, the headline first; all finite.

        Args: scores: of all `records`, in their order.
        """

    def save(self, model: FineTuned, folder: Path, facts: dict[str, Any]) -> None:
        """Writes the tuned model into `folder`, adapters merged, so that plain transformers opens
        it; `facts` go into its config.json. `model` is used up.
        """

    def restore(self, folder: Path, settings: dict[str, Any]) -> FineTuned:
        """Opens what `save` wrote. Args: settings: its config.json.

        Raises: OSError, ValueError, KeyError, TypeError or ConfigError where it is not that.
        """

    def answer(
        self, model: FineTuned, processor: Processor, asked: list[str], task: TaskConfig
    ) -> list[dict[str, Any]]:
        """What a person asked, a text or a file, answered: each with a `sentence` for them.

        Raises: ConfigError if a file is not what the task reads.
        """


@runtime_checkable
class FileTask(Protocol):
    """A task whose records are files, besides: without this method they are texts. One whose rows
    are more than texts is a `ReadsRows`.
    """

    def read(self, processor: Processor, file: File, where: str) -> Array:
        """What a file holds, as `encode` takes it. Args: where: what messages call the file.

        Raises: ConfigError if it holds something else.
        """


@runtime_checkable
class Detailed(Protocol):
    """A task that can say more of public records than its metrics do, for a report."""

    def detail(self, scores: Inputs, config: Config) -> dict[str, Any]:
        """What `report.json` shows beside the metrics, as plain values. Args: as `metrics`."""


@runtime_checkable
class Writes(Protocol):
    """A task whose model writes text, of which a report shows some."""

    def samples(
        self, model: FineTuned, processor: Processor, records: Records, task: TaskConfig
    ) -> list[dict[str, str]]:
        """Of each of a few public records: `prompt`, what the model has `written`, `reference`."""


def _load(name: TaskName) -> Task:
    """The task of `common/tasks/NAME.py`."""
    task: Task = getattr(import_module(f"{__name__}.{name.name}"), name.class_name)()
    return task


TASKS: dict[TaskName, Task] = {name: _load(name) for name in TaskName}
"""By name; `build_model` and the rest find them here."""


def build_model(config: Config) -> FineTuned:
    """The model of the config's task. Raises: ConfigError."""
    return TASKS[config.task.name].build(config)


def reader_of(name: TaskName, processor: Processor) -> Reading | None:
    """How the task reads one file, or one row; None if its records are texts as they stand."""
    task = TASKS[name]
    if isinstance(task, ReadsRows):
        return task
    return partial(task.read, processor) if isinstance(task, FileTask) else None
