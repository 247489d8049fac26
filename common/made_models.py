"""Small models that no hub is needed for: built from a configuration, the same on every side.

Their weights are not trained. A run of `tuning=full` trains them from scratch; what keeps them
frozen reads random features, which do for a small task.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers  # which imports a kind of model when it is named, and that is when one is made
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from common.errors import ConfigError
from common.word_pieces import END, PAD, WORD_PIECES, word_pieces

PREFIX = "made/"
"""What the names of these models begin with."""
SEED = "coterie made models, first edition"
"""Public. Another seed makes other models, and so other results under the same name."""


@dataclass(frozen=True)
class MadeModel:
    """How one is built."""

    encoder: Callable[[], PreTrainedModel]
    processor: Callable[[], Any]
    gains: Mapping[str, float] = field(default_factory=dict)
    """By which weights whose name ends so are larger than by `_initial`."""
    family: Any = AutoModel
    """The Auto class of transformers that would open it from a folder."""


def _vit_digits() -> PreTrainedModel:
    """For gray images of 8 x 8, in four patches: 68,544 parameters."""
    return transformers.ViTModel(
        transformers.ViTConfig(
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


def _digits_processor() -> Any:
    """To 8 x 8 pixels in [-1, 1]."""
    return transformers.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]
    )


def _wav2vec2_tiny() -> PreTrainedModel:
    """For sounds at 16 kHz: a state every 20 ms. No masking, no skipped layers."""
    return transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
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


def _sound_processor() -> Any:
    """Each sound to mean 0 and variance 1."""
    return transformers.Wav2Vec2FeatureExtractor()  # type: ignore[no-untyped-call]


def _gpt2_tiny() -> PreTrainedModel:
    """GPT-2 of two blocks, its output layer the transposed embeddings: 173,824 parameters."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORD_PIECES,
            n_positions=128,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=END,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )


def _t5_tiny() -> PreTrainedModel:
    """T5 of a block a side, its output layer the transposed embeddings: 148,160 parameters."""
    config = transformers.T5Config(
        vocab_size=WORD_PIECES,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    config.decoder_start_token_id = PAD
    return transformers.T5ForConditionalGeneration(config)


MADE: dict[str, MadeModel] = {
    "made/vit-digits": MadeModel(
        _vit_digits,
        _digits_processor,
        # Beside the positions, which are the same in every image, an image would weigh little.
        {"embeddings.patch_embeddings.projection.weight": 3.0},
    ),
    "made/wav2vec2-tiny": MadeModel(
        _wav2vec2_tiny,
        _sound_processor,
    ),
    "made/gpt2-tiny": MadeModel(
        _gpt2_tiny,
        word_pieces,
        # Of GPT-2's matrices the first axis is what is summed; the output begins near even.
        {"wte.weight": 0.3, "wpe.weight": 0.03, "c_attn.weight": 3**0.5, "c_fc.weight": 2.0}
        | {"attn.c_proj.weight": 0.5, "mlp.c_proj.weight": 0.25},
        AutoModelForCausalLM,
    ),
    "made/t5-tiny": MadeModel(
        _t5_tiny,
        lambda: word_pieces(ends=True),
        # T5 does not divide what queries and keys agree in by the root of their width.
        {"shared.weight": 8.0, ".q.weight": 0.25},
        AutoModelForSeq2SeqLM,
    ),
}
"""By `model.name`."""


def make_encoder(name: str, family: Any = AutoModel) -> PreTrainedModel:
    """The model of this name.

    Guarantee: the same weights on every machine and with every version of torch, for they come
    from a hash and not from a generator of torch's.
    Args: family: the Auto class that would open it. Raises: ConfigError if there is no such model.
    """
    made = _made(name)
    if made.family is not family:
        known = [each for each, other in MADE.items() if other.family is family]
        raise ConfigError(
            f"model.name={name}: is no model of this task; of the made ones it reads "
            f"{', '.join(known)}"
        )
    encoder: PreTrainedModel
    with torch.random.fork_rng(devices=[]):  # what the class draws is overwritten
        encoder = made.encoder()
    with torch.no_grad():
        for each, parameter in encoder.named_parameters():
            gains = [gain for ending, gain in made.gains.items() if each.endswith(ending)]
            parameter.copy_(math.prod(gains) * _initial(f"{SEED}/{name}/{each}", parameter))
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
