"""Audio classification: one label per sound."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForAudioClassification

from common.classes import ClassTask, build_classifier, class_targets, likeliest
from common.config import Config, ModelConfig, TaskConfig
from common.errors import ConfigError
from common.media import File, read_sound, sound_of
from common.model import FineTuned, read_of
from common.prefix import Inputs
from common.pretrained import load_feature_extractor
from common.records import Content, Records
from common.spool import Array

SAMPLES = "input_values"
TOY_RATE = 16_000
PITCHES = (300.0, 1200.0)
"""Hz, of the two kinds of toy example."""


class AudioClassification(ClassTask):
    """One label per sound; a record's content is (samples,) of float32, mono, at the rate of the
    model's processor. Longer ones are cut to `task.max_seconds`, shorter ones padded with zeros.
    """

    FAMILY = AutoModelForAudioClassification

    def load_processor(self, model: ModelConfig) -> Any:
        """The model's feature extractor. Raises: ConfigError."""
        return load_feature_extractor(model)

    def build(self, config: Config) -> FineTuned:
        """Sound encoder with a head. Raises: ConfigError."""
        processor = self.load_processor(config.model)
        return build_classifier(config, read_of(self.made(processor, 2, config)), self.FAMILY)

    def read(self, processor: Any, file: File, where: str) -> Array:
        """(samples,) at the processor's rate."""
        return sound_of(file, where, rate=int(processor.sampling_rate))

    def encode(self, processor: Any, records: Records, task: TaskConfig) -> Inputs:
        """(N, samples) of `max_seconds`. Raises: ConfigError if one is no sound."""
        return {**_read(processor, records.contents, task), **class_targets(records)}

    def toy_examples(self, count: int) -> Records:
        """Low tones and high ones of a fifth to two fifths of a second, under noise."""
        draw = random.Random(0)  # noqa: S311 - made sounds, no secret
        labels = [0] * count
        sounds: list[Content] = []
        for index in range(count):
            labels[index] = draw.randrange(2)
            pitch = PITCHES[labels[index]] * draw.uniform(0.9, 1.1)
            time = np.arange(draw.randint(TOY_RATE // 5, TOY_RATE * 2 // 5)) / TOY_RATE
            noise = np.random.default_rng(draw.randrange(2**32)).normal(size=len(time))
            tone = np.sin(2 * np.pi * (pitch * time + draw.random()))
            sounds.append((0.5 * tone + 0.02 * noise).astype(np.float32))
        return Records(tuple(sounds), np.array(labels, dtype=np.int64))

    def made(self, processor: Any, records: int, config: Config) -> Inputs:
        """(N, samples) noise; every second sound is padded from its middle on."""
        length = _length(processor, config.task)
        draw = np.random.default_rng(0)
        sounds = tuple(
            draw.normal(size=(length + 1) // 2 if index % 2 else length).astype(np.float32)
            for index in range(records)
        )
        labels: Tensor = torch.arange(records) % len(config.data.labels)
        return {**_read(processor, sounds, config.task), "target_labels": labels}

    def answer(
        self, model: FineTuned, processor: Any, asked: list[str], task: TaskConfig
    ) -> list[dict[str, Any]]:
        """Label and probability of each sound file. Raises: ConfigError if one is none."""
        rate = int(processor.sampling_rate)
        sounds = tuple(read_sound(path, rate=rate) for path in asked)
        return likeliest(model, model(**_read(processor, sounds, task)), asked, kind="file")


def _length(processor: Any, task: TaskConfig) -> int:
    """Samples kept of each sound."""
    return max(1, round(task.max_seconds * int(processor.sampling_rate)))


def _read(processor: Any, contents: Sequence[Content], task: TaskConfig) -> Inputs:
    """(N, samples); every sound is processed alone, and padded before it is normalised, so that
    silence at its end is what the model hears. Raises: ConfigError.
    """
    length, rate = _length(processor, task), int(processor.sampling_rate)
    rows = torch.zeros((len(contents), length))
    for row, content in enumerate(contents):
        sound = _checked(content, row + 1)[:length]
        padded = np.pad(sound, (0, length - len(sound)))
        rows[row] = processor(padded, sampling_rate=rate, return_tensors="pt")[SAMPLES][0]
    return {SAMPLES: rows}


def _checked(content: Content, number: int) -> NDArray[np.float32]:
    """(samples,) float32. Raises: ConfigError."""
    if not isinstance(content, np.ndarray) or content.dtype != np.float32 or content.ndim != 1:
        raise ConfigError(f"record {number}: must hold a sound, float32 (samples,)")
    if not len(content):
        raise ConfigError(f"record {number}: holds an empty sound")
    if not np.isfinite(content).all():
        raise ConfigError(f"record {number}: holds a sound with samples that are no numbers")
    return content
