"""Evaluation by the coordinator, on public records only."""

import torch

from common import parameters
from common.config import Config
from common.data import Records
from common.model import Classifier, load_tokenizer
from common.parameters import Vector
from common.tasks import TASKS


class Evaluator:
    """Measures parameters on a public split; what training cannot change is computed once."""

    def __init__(self, config: Config, model: Classifier, public: Records) -> None:
        self._task, self._model, self._records = TASKS[config.task.name], model, public
        self._batch = config.engine.physical_batch
        tokenizer = load_tokenizer(config.model)
        encoded = self._task.encode(
            tokenizer, list(public.texts), max_tokens=config.task.max_tokens
        )
        self._inputs = model.prepare(encoded, batch=self._batch)

    @torch.inference_mode()
    def measure(self, vector: Vector) -> dict[str, float]:
        """Metrics of the task, by name, with `vector` loaded into the model."""
        parameters.load(self._model, vector)
        self._model.eval()
        pieces = [
            self._model(**{n: t[start : start + self._batch] for n, t in self._inputs.items()})
            for start in range(0, len(self._records), self._batch)
        ]
        return self._task.metrics(torch.cat(pieces), torch.from_numpy(self._records.labels))
