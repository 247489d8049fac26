"""Evaluation by the coordinator, on public records only."""

import torch

from common import parameters
from common.config import Config
from common.model import FineTuned
from common.parameters import Vector
from common.prepared import PreparedRecords, runs
from common.records import Records
from common.tasks import TASKS


class Evaluator:
    """Measures parameters on a public split; what training cannot change is computed once."""

    def __init__(self, config: Config, model: FineTuned, public: Records) -> None:
        self._config, self._model, self._task = config, model, TASKS[config.task.name]
        self._public, self._processor = public, self._task.load_processor(config.model)
        self._prepared = PreparedRecords(
            public,
            config,
            model,
            self._processor,
            declared=len(public),
            batch=config.engine.physical_batch,
        )

    @torch.inference_mode()
    def measure(self, vector: Vector) -> dict[str, float]:
        """Metrics of the task, by name, with `vector` loaded into the model."""
        parameters.load(self._model, vector)
        self._model.eval()
        scores = [
            self._task.score(self._model, self._prepared.rows(indices))
            for indices in runs(len(self._public), self._config.engine.physical_batch)
        ]
        whole = {name: torch.cat([score[name] for score in scores]) for name in scores[0]}
        return self._task.metrics(whole, self._public, self._processor, self._config)
