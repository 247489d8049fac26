"""Local training: the warm model of one process, on which sites take turns."""

import logging
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.clipping.engines import ClippingEngine, LossOf
from client.measurements import Measurements
from client.meters import Meters
from client.preflight import Verdict, preflight, refusal
from client.private_step import ParameterGroup, plain_steps, private_steps, sgd
from client.site import Site
from common import parameters
from common.config import Config, NoiseSource, PrivacyMode
from common.model import build_classifier, load_tokenizer
from common.parameters import Layout, Vector
from common.prefix import Inputs
from common.privacy.mechanism import Mechanism, mechanism_of
from common.privacy.noise import Randomness
from common.tasks import TASKS

log = logging.getLogger(__name__)

REHEARSED = 2
"""Made records of a rehearsed step."""
BEYOND = 1e6
"""A made record's loss is multiplied by this many clip bounds: its gradient is far too long."""


class Trainer:
    """A model built once from a config, and the steps any site can take on it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._task = TASKS[config.task.name]
        self._tokenizer = load_tokenizer(config.model)
        self._model = build_classifier(config)
        self.layout = Layout.of(self._model)
        self.parameters = sum(parameter.numel() for parameter in self._model.parameters())
        """Of the whole model, frozen ones included."""
        self.adapted = tuple(
            f"{name}: frozen, the output does not depend on it" for name in self._model.unused
        )
        """What building the model changed in it, in words."""
        self._groups = [
            ParameterGroup(
                tuple(self._model.classifier.parameters()), config.tuning.head_learning_rate
            )
        ]
        self._engine: ClippingEngine | None = None
        self._meters: dict[str, Meters] = {}
        """What each site drew and added so far; private, and stays in this process."""
        self._inputs: dict[str, Inputs] = {}
        """Prepared inputs by site: a trainer is one per config, as what is prepared must be."""
        adapters = tuple(p for p in self._model.encoder.parameters() if p.requires_grad)
        if adapters:
            self._groups.append(ParameterGroup(adapters, config.tuning.adapter_learning_rate))

    def train(
        self, site: Site, vector: Vector, *, round_number: int
    ) -> tuple[Vector, Measurements | None]:
        """The round's local steps at `site`, from the global parameters `vector`.

        Guarantee: in `privacy.mode=record` the result is a post-processing of `vector` and of
        `local_steps` runs of the config's mechanism on the site's records.
        Returns: new parameters, and what the meters saw of noise and coins; None without privacy.
        Raises: VerificationError if `vector` does not fit; PrivacyRefusedError.
        """
        parameters.load(self._model, vector)
        loss_of = self._loss_of(self._prepared(site), site.labels)
        randomness = randomness_of(self._config, site.name, round_number)
        measured = None
        if self._config.privacy.mode is PrivacyMode.none:
            self._plain_steps(loss_of, randomness, len(site.records))
        else:
            mechanism = mechanism_of(self._config)
            measured = self._private_steps(
                loss_of,
                mechanism,
                randomness,
                groups=self._groups,
                records=len(site.records),
                steps=self._config.federation.local_steps,
                meters=self._meters.setdefault(site.name, Meters(mechanism)),
            )
            log.info("%s, round %d: %s", site.name, round_number, measured)
        return parameters.flatten(self._model), measured

    @torch.inference_mode()
    def count_correct(self, site: Site, vector: Vector) -> int:
        """How many records of `site` the model with these parameters gets right: private.

        Guarantee: one record more changes it by one at most. Each is prepared and judged alone:
        in a batch of another size sums round otherwise, and a coordinator can choose parameters
        at which that turns the answers of many.
        """
        parameters.load(self._model, vector)
        self._model.eval()
        count = 0
        for text, label in zip(site.records.texts, site.labels, strict=True):
            answer = self._task.correct(self._model(**self._prepare([text])), label.view(1))
            count += int(answer.sum())
        return count

    def preflight(self, *, precision: torch.dtype = torch.float32) -> Verdict:
        """Tries the model on made records; see `client.preflight`."""
        verdict = preflight(self._model, self._made, precision=precision)
        self._engine = verdict.engine
        return verdict

    def rehearse(self) -> None:
        """Picks a clipping engine and takes steps of size zero: on two made records, one, nobody.

        Guarantee: what this model cannot do fails here, before anything is charged, the same at
        every site, and so tells nothing about records. The gradients of the made records are far
        beyond the clip bound, and that of one alone is held against it.
        Raises: ConfigError if the model cannot read its input; PrivacyRefusedError if it cannot
        be trained privately.
        """
        verdict = self.preflight()
        if verdict.engine is None:
            raise refusal(self._config.model.name, verdict)
        still = [replace(group, learning_rate=0.0) for group in self._groups]
        made, clip_norm = self._made(REHEARSED), self._config.privacy.clip_norm
        for records in (REHEARSED, 1, 0):
            self._private_steps(
                lambda indices: made(indices) * (BEYOND * clip_norm),
                Mechanism(1.0, clip_norm, 1.0, REHEARSED),
                Randomness.from_entropy(),
                groups=still,
                records=records,
                steps=1,
            )

    def _private_steps(
        self,
        loss_of: LossOf,
        mechanism: Mechanism,
        randomness: Randomness,
        *,
        groups: list[ParameterGroup],
        records: int,
        steps: int,
        meters: Meters | None = None,
    ) -> Measurements:
        if self._engine is None:
            self.rehearse()
        assert self._engine is not None
        return private_steps(
            self._engine,
            sgd(groups),
            loss_of,
            mechanism=mechanism,
            randomness=randomness,
            records=records,
            steps=steps,
            physical_batch=self._config.engine.physical_batch,
            meters=meters,
        )

    def _plain_steps(self, loss_of: LossOf, randomness: Randomness, records: int) -> None:
        self._model.eval()
        plain_steps(
            sgd(self._groups),
            loss_of,
            mechanism=mechanism_of(self._config),
            randomness=randomness,
            records=records,
            steps=self._config.federation.local_steps,
            physical_batch=self._config.engine.physical_batch,
        )

    @torch.no_grad()
    def _made(self, records: int) -> LossOf:
        """Losses of made records of full length, some of them padded."""
        encoded = self._task.made(self._tokenizer, records, max_tokens=self._config.task.max_tokens)
        inputs = self._model.prepare(encoded, batch=self._config.engine.physical_batch)
        return self._loss_of(inputs, torch.arange(records) % len(self._config.data.labels))

    def _loss_of(self, prepared: Inputs, labels: Tensor) -> LossOf:
        def loss_of(indices: NDArray[np.int64]) -> Tensor:
            dtype = self._model.classifier.weight.dtype
            inputs = {
                name: tensor[indices].to(dtype) if tensor.is_floating_point() else tensor[indices]
                for name, tensor in prepared.items()
            }
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


def randomness_of(config: Config, site: str, use: int | str) -> Randomness:
    """Fresh from the operating system; from labels only in a run stamped NOT PRIVATE."""
    if config.privacy.noise is NoiseSource.entropy:
        return Randomness.from_entropy()
    return Randomness.seeded(config.seed, site, use)
