"""A tiny real model for each task, and a config that trains it on the task's toy examples."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from common.config import TaskName

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,  # different inputs get different features
}


@dataclass(frozen=True)
class Toy:
    """What a tiny config of a task changes in the suite's own."""

    labels: tuple[str, ...]
    model: Callable[[], PreTrainedModel] | None = None
    """None: the suite's tiny BERT does."""
    processor: Callable[[], object] | None = None
    task: tuple[tuple[str, float], ...] = ()
    targets: tuple[str, ...] = ("query", "value")


def tiny_vit() -> PreTrainedModel:
    return ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, **SMALL))


def tiny_image_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])


def tiny_wav2vec2() -> PreTrainedModel:
    return Wav2Vec2Model(
        Wav2Vec2Config(
            conv_dim=(16, 16),
            conv_kernel=(40, 8),
            conv_stride=(20, 8),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            layerdrop=0.0,
            **SMALL,
        )
    )


PROJECTIONS = ("q_proj", "v_proj")
TINY: dict[TaskName, Toy] = {
    TaskName.text_classification: Toy(("sport", "money")),
    TaskName.image_classification: Toy(
        ("down", "across"), tiny_vit, tiny_image_processor, targets=PROJECTIONS
    ),
    TaskName.audio_classification: Toy(
        ("low", "high"),
        tiny_wav2vec2,
        Wav2Vec2FeatureExtractor,
        task=(("max_seconds", 0.3),),
        targets=PROJECTIONS,
    ),
}


def toy_config(task: TaskName, tiny_config, folder: Path):
    """The tiny private run, of this task, on a model in `folder` where the task needs another."""
    toy, model = TINY[task], tiny_config.model
    if toy.model is not None and toy.processor is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            toy.model().save_pretrained(folder)
        toy.processor().save_pretrained(folder)
        model = replace(model, name=str(folder))
    return replace(
        tiny_config,
        task=replace(tiny_config.task, name=task, **dict(toy.task)),
        data=replace(tiny_config.data, labels=[*toy.labels]),
        model=model,
        tuning=replace(tiny_config.tuning, targets=[*toy.targets]),
    )
