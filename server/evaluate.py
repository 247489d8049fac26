"""Evaluation by the coordinator, on public records only.

`simulations/run.py` may also hand in the records of a site that is left out; decision 0015 says
what that costs, and `server/left_out.py` stamps it.
"""

from typing import Any

import torch

from common import parameters
from common.config import Config
from common.model import FineTuned
from common.parameters import Vector
from common.prefix import Inputs
from common.prepared import Preparation, PreparedRecords, runs
from common.records import Records
from common.tasks import TASKS, Detailed, Writes
from server.groups import by_group

LONGEST = 600
"""Characters that a report shows of one text, at most."""


class Evaluator:
    """Measures parameters on a public split; what training cannot change is computed once."""

    def __init__(self, config: Config, model: FineTuned, public: Records) -> None:
        self._config, self._model, self._task = config, model, TASKS[config.task.name]
        self._public, self._processor = public, self._task.load_processor(config.model)
        preparation = Preparation(config, model, self._processor, config.engine.physical_batch)
        self._prepared = PreparedRecords(public, preparation, declared=len(public))

    def measure(self, vector: Vector) -> dict[str, float]:
        """Metrics of the task, by name, with `vector` loaded into the model."""
        return self.metrics(self.score(vector))

    @torch.inference_mode()
    def score(self, vector: Vector) -> Inputs:
        """What the task's metrics need of each record, with `vector` loaded into the model."""
        parameters.load(self._model, vector)
        self._model.eval()
        scores = [
            self._task.score(self._model, self._prepared.rows(indices))
            for indices in runs(len(self._public), self._config.engine.physical_batch)
        ]
        return {name: torch.cat([score[name] for score in scores]) for name in scores[0]}

    def metrics(self, scores: Inputs) -> dict[str, float]:
        """Metrics of the task, by name."""
        return self._task.metrics(scores, self._public, self._processor, self._config)

    @torch.inference_mode()
    def detail(self, scores: Inputs) -> dict[str, Any]:
        """What a report shows beside the metrics, of the model as `score` left it: by class, by
        group, and texts that it writes, each where there are any.
        """
        return {
            **self._by_class(scores),
            **self._by_group(scores),
            **self._samples(),
        }

    def _by_class(self, scores: Inputs) -> dict[str, Any]:
        if not isinstance(self._task, Detailed):
            return {}
        return self._task.detail(scores, self._config)

    def _by_group(self, scores: Inputs) -> dict[str, Any]:
        if self._public.groups is None:
            return {}

        def measured(rows: list[int]) -> dict[str, float]:
            some = {name: tensor[rows] for name, tensor in scores.items()}
            chosen = self._public.subset(rows)
            return self._task.metrics(some, chosen, self._processor, self._config)

        column, lower = self._config.data.group_column, self._task.LOWER_IS_BETTER
        return {"groups": by_group(column, self._public.groups, measured, lower_is_better=lower)}

    def _samples(self) -> dict[str, Any]:
        if not isinstance(self._task, Writes):
            return {}
        written = self._task.samples(self._model, self._processor, self._public, self._config.task)
        return {"samples": [{name: _cut(text) for name, text in each.items()} for each in written]}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
