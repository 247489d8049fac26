"""Local training: the warm model of one process, on which sites take turns."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.private_step import LossOf, ParameterGroup, plain_steps, private_steps
from client.site import Site
from common import parameters
from common.config import Config, NoiseSource, PrivacyMode
from common.model import build_classifier, load_tokenizer
from common.parameters import Layout, Vector
from common.prefix import Inputs
from common.privacy.mechanism import Mechanism, mechanism_of
from common.privacy.noise import Randomness
from common.tasks import TASKS

PLACEHOLDER, REHEARSED = "a made record", 2
"""Text and number of the records a rehearsal is made of."""


class Trainer:
    """A model built once from a config, and the steps any site can take on it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._task = TASKS[config.task.name]
        self._tokenizer = load_tokenizer(config.model)
        self._model = build_classifier(config)
        self.layout = Layout.of(self._model)
        self._groups = [
            ParameterGroup(
                tuple(self._model.classifier.parameters()), config.tuning.head_learning_rate
            )
        ]
        self._inputs: dict[str, Inputs] = {}
        """Prepared inputs by site: a trainer is one per config, as what is prepared must be."""
        adapters = tuple(p for p in self._model.encoder.parameters() if p.requires_grad)
        if adapters:
            self._groups.append(ParameterGroup(adapters, config.tuning.adapter_learning_rate))

    def train(self, site: Site, vector: Vector, *, round_number: int) -> Vector:
        """The round's local steps at `site`, from the global parameters `vector`.

        Guarantee: in `privacy.mode=record` the result is a post-processing of `vector` and of
        `local_steps` runs of the config's mechanism on the site's records.
        Raises: VerificationError if `vector` does not fit; PrivacyRefusedError.
        """
        parameters.load(self._model, vector)
        loss_of = self._loss_of(self._prepared(site), site.labels)
        config = self._config
        private = config.privacy.mode is PrivacyMode.record
        steps = private_steps if private else plain_steps
        steps(
            self._model,
            self._groups,
            loss_of,
            mechanism=mechanism_of(config),
            randomness=_randomness(config, site.name, round_number),
            records=len(site.records),
            steps=config.federation.local_steps,
            physical_batch=config.engine.physical_batch,
        )
        return parameters.flatten(self._model)

    def rehearse(self) -> None:
        """Takes one step of size zero on two made records.

        Guarantee: what this model cannot do fails here, before anything is charged, the same at
        every site, and so tells nothing about records.
        Raises: ConfigError if the model cannot read its input; PrivacyRefusedError if it cannot
        be trained privately.
        """
        inputs = self._prepare([PLACEHOLDER] * REHEARSED)
        loss_of = self._loss_of(inputs, torch.zeros(REHEARSED, dtype=torch.long))
        private_steps(
            self._model,
            [replace(group, learning_rate=0.0) for group in self._groups],
            loss_of,
            mechanism=Mechanism(1.0, self._config.privacy.clip_norm, 1.0, REHEARSED),
            randomness=Randomness.from_entropy(),
            records=REHEARSED,
            steps=1,
            physical_batch=REHEARSED,
        )

    def _loss_of(self, prepared: Inputs, labels: Tensor) -> LossOf:
        def loss_of(indices: NDArray[np.int64]) -> Tensor:
            inputs = {name: tensor[indices] for name, tensor in prepared.items()}
            return self._task.loss_vector(self._model(**inputs), labels[indices])

        return loss_of

    def _prepared(self, site: Site) -> Inputs:
        """Tokenises and runs the frozen prefix, the first time a site trains."""
        if site.name not in self._inputs and len(site.records):
            self._inputs[site.name] = self._prepare(list(site.records.texts))
        return self._inputs.get(site.name, {})

    @torch.no_grad()
    def _prepare(self, texts: list[str]) -> Inputs:
        encoded = self._task.encode(self._tokenizer, texts, max_tokens=self._config.task.max_tokens)
        return self._model.prepare(encoded, batch=self._config.engine.physical_batch)


def _randomness(config: Config, site: str, round_number: int) -> Randomness:
    """Fresh from the operating system; from labels only in a run stamped NOT PRIVATE."""
    if config.privacy.noise is NoiseSource.entropy:
        return Randomness.from_entropy()
    return Randomness.seeded(config.seed, site, round_number)
