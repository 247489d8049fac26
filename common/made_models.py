"""Small models that no hub is needed for: built from a configuration, the same on every side.

Their weights are not trained. A run of `tuning=full` trains them from scratch; what keeps them
frozen reads random features, which do for a small task.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from common.errors import ConfigError

PREFIX = "made/"
"""What the names of these models begin with."""
SEED = "coterie made models, first edition"
"""Public. Another seed makes other models, and so other results under the same name."""


@dataclass(frozen=True)
class MadeModel:
    """How one is built."""

    encoder: Callable[[], PreTrainedModel]
    processor: Callable[[], Any]
    gains: dict[str, float] = field(default_factory=dict)
    """By which weights of this name are larger than by `_initial`."""


def _vit_digits() -> PreTrainedModel:
    """For gray images of 8 x 8, in four patches: 68,544 parameters."""
    return ViTModel(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
        ),
        add_pooling_layer=False,
    )


def _digits_processor() -> ViTImageProcessorPil:
    """To 8 x 8 pixels in [-1, 1]."""
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])


def _wav2vec2_tiny() -> PreTrainedModel:
    """For sounds at 16 kHz: a state every 20 ms. No masking, no skipped layers."""
    return Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            conv_dim=(32,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            mask_time_prob=0.0,
            mask_feature_prob=0.0,
            layerdrop=0.0,
        )
    )


MADE: dict[str, MadeModel] = {
    "made/vit-digits": MadeModel(
        _vit_digits,
        _digits_processor,
        # Beside the positions, which are the same in every image, an image would weigh little.
        {"embeddings.patch_embeddings.projection.weight": 3.0},
    ),
    "made/wav2vec2-tiny": MadeModel(_wav2vec2_tiny, Wav2Vec2FeatureExtractor),
}
"""By `model.name`."""


def make_encoder(name: str) -> PreTrainedModel:
    """The model of this name.

    Guarantee: the same weights on every machine and with every version of torch, for they come
    from a hash and not from a generator of torch's. Raises: ConfigError if there is none.
    """
    made = _made(name)
    encoder: PreTrainedModel
    with torch.random.fork_rng(devices=[]):  # what the class draws is overwritten
        encoder = made.encoder()
    with torch.no_grad():
        for each, parameter in encoder.named_parameters():
            gain = made.gains.get(each, 1.0)
            parameter.copy_(gain * _initial(f"{SEED}/{name}/{each}", parameter))
        for module in encoder.modules():  # weight norm: the length is that of the direction
            if "original1" in (own := dict(module.named_parameters(recurse=False))):
                own["original0"].copy_(torch.norm_except_dim(own["original1"], 2, 2))
    return encoder


def make_processor(name: str) -> Any:
    """What prepares the model's input. Raises: ConfigError if there is no such model."""
    return _made(name).processor()


def _made(name: str) -> MadeModel:
    if name not in MADE:
        raise ConfigError(f"model.name={name}: the made models are {', '.join(MADE)}")
    return MADE[name]


def _initial(name: str, parameter: Tensor) -> Tensor:
    """Biases 0, scales 1; weights uniform, of variance one over how many are summed, which of
    positions is none.
    """
    if parameter.ndim == 1:
        return torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0)
    drawn = hashlib.shake_256(name.encode()).digest(2 * parameter.numel())
    uniform = (np.frombuffer(drawn, dtype="<u2").astype(np.float32) + 0.5) / 2**15 - 1.0
    summed = parameter[0].numel() if len(parameter) > 1 else 1
    weights: Tensor = torch.from_numpy(uniform).view_as(parameter)
    return weights * float(np.sqrt(3.0 / summed))
