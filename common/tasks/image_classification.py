"""Image classification: one label per image."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForImageClassification

from common.classes import ClassTask, build_classifier, class_targets, likeliest
from common.config import Config, ModelConfig, TaskConfig
from common.errors import ConfigError
from common.media import COLOURS, File, image_of, read_image, with_channels
from common.model import FineTuned, read_of
from common.prefix import Inputs
from common.pretrained import load_image_processor
from common.records import Content, Records
from common.spool import Array

PIXELS = "pixel_values"
TOY_SIZE = 8


class ImageClassification(ClassTask):
    """One label per image; a record's content is (H, W, C) of uint8, C of 1 or 3."""

    FAMILY = AutoModelForImageClassification

    def load_processor(self, model: ModelConfig) -> Any:
        """The model's image processor. Raises: ConfigError if it gives images of no one size."""
        processor = load_image_processor(model)
        if _size(processor) is None:
            raise ConfigError(
                f"model.name={model.name}: its image processor fixes no size in pixels; "
                "give it a size with height and width, and save it"
            )
        return processor

    def build(self, config: Config) -> FineTuned:
        """Image encoder with a head. Raises: ConfigError."""
        processor = self.load_processor(config.model)
        return build_classifier(config, read_of(self.made(processor, 2, config)), self.FAMILY)

    def read(self, _processor: Any, file: File, where: str) -> Array:
        """(H, W, C) as in the file: gray or colours, whatever the model reads."""
        return image_of(file, where)

    def encode(self, processor: Any, records: Records, task: TaskConfig) -> Inputs:
        """(N, C, H, W) pixels of the processor's size. Raises: ConfigError if one is no image."""
        return {**_read(processor, records.contents), **class_targets(records)}

    def toy_examples(self, count: int) -> Records:
        """Stripes across or down, at any phase and contrast, under noise."""
        draw = random.Random(0)  # noqa: S311 - made images, no secret
        labels = [0] * count
        images: list[Content] = []
        for index in range(count):
            labels[index] = draw.randrange(2)
            across = np.arange(TOY_SIZE) // 2 % 2 == draw.randrange(2)
            stripes = np.tile(across * draw.uniform(120, 220), (TOY_SIZE, 1))
            noise = [draw.uniform(0, 30) for _ in range(TOY_SIZE**2)]
            image = (stripes if labels[index] else stripes.T) + np.reshape(noise, stripes.shape)
            images.append(image[..., None].astype(np.uint8))
        return Records(tuple(images), np.array(labels, dtype=np.int64))

    def made(self, processor: Any, records: int, config: Config) -> Inputs:
        """(N, C, H, W) random pixels; an image has no padding."""
        size = _size(processor)
        assert size is not None
        draw = np.random.default_rng(0)
        shape = (*size, _channels(processor))
        images = tuple(draw.integers(0, 256, shape, dtype=np.uint8) for _ in range(records))
        labels: Tensor = torch.arange(records) % len(config.data.labels)
        return {**_read(processor, images), "target_labels": labels}

    def answer(
        self, model: FineTuned, processor: Any, asked: list[str], task: TaskConfig
    ) -> list[dict[str, Any]]:
        """Label and probability of each image file. Raises: ConfigError if one is none."""
        images = tuple(read_image(path, channels=_channels(processor)) for path in asked)
        return likeliest(model, model(**_read(processor, images)), asked, kind="file")


def _read(processor: Any, contents: Sequence[Content]) -> Inputs:
    """(N, C, H, W) pixels, each image processed alone. Raises: ConfigError."""
    channels, size = _channels(processor), _size(processor)
    assert size is not None
    rows = torch.zeros((len(contents), channels, *size))
    for row, content in enumerate(contents):
        image = _checked(content, row + 1, channels)
        given = processor([image], input_data_format="channels_last", return_tensors="pt")[PIXELS]
        if given.shape[1:] != rows.shape[1:]:  # a processor that resizes nothing
            raise ConfigError(
                f"record {row + 1}: is an image of {image.shape[0]} x {image.shape[1]} pixels, and "
                f"the model reads {size[0]} x {size[1]}"
            )
        rows[row] = given[0]
    return {PIXELS: rows}


def _checked(content: Content, number: int, channels: int) -> NDArray[np.uint8]:
    """(H, W, C) with the channels that the model reads, 1 or 3. Raises: ConfigError."""
    if not isinstance(content, np.ndarray) or content.dtype != np.uint8:
        raise ConfigError(f"record {number}: must hold an image, uint8 (height, width, channels)")
    dimensions = (*content.shape, *[1] * (3 - content.ndim))
    if len(dimensions) != len("HWC") or 0 in dimensions:
        raise ConfigError(f"record {number}: must hold an image, and has shape {content.shape}")
    image = content.reshape(dimensions)
    if image.shape[2] not in COLOURS:
        raise ConfigError(f"record {number}: has {image.shape[2]} channels; an image has 1 or 3")
    return with_channels(image, channels)


def _size(processor: Any) -> tuple[int, int] | None:
    """Height and width of what it gives, or None if they depend on the image."""
    cropped = getattr(processor, "do_center_crop", False)
    size = dict(getattr(processor, "crop_size" if cropped else "size", None) or {})
    height, width = size.get("height"), size.get("width")
    return (int(height), int(width)) if height and width else None


def _channels(processor: Any) -> int:
    """How many an image must have: as many as there are means to subtract."""
    means = getattr(processor, "image_mean", None)
    return len(means) if isinstance(means, list | tuple) and len(means) in COLOURS else 3
