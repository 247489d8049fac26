"""What is trained: adapters, biases, top blocks or everything, below whatever head a task adds."""

import re
import warnings
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config import Config, TaskName, TuningConfig, TuningMethod
from common.errors import ConfigError
from common.model import FineTuned
from common.prefix import NoPrefixError, find_blocks
from common.pretrained import first_line


def tune(model: FineTuned, config: Config, probe: Mapping[str, Tensor]) -> FineTuned:
    """Freezes the pretrained part of `model` and makes trainable what the config says, in place.

    Guarantee: the initial trainable parameters depend on `config.seed` and nothing else; no
    trainable parameter is left that has no part in the output.
    Args: probe: two made records of full size, as the model reads them.
    Raises: ConfigError if the model cannot read them, or has no such modules.
    """
    encoder = model.encoder
    encoder.requires_grad_(requires_grad=False)
    _disable_dropout(encoder)
    if config.tuning.method is TuningMethod.lora:
        model.adopt(_add_adapters(encoder, config.tuning, config.seed))
    else:
        _unfreeze(encoder, config.tuning)
    _check_reads(model, config, probe)
    _freeze_unused(model, probe)
    model.cut_frozen_prefix()
    return model


_ADVICE = {
    TaskName.image_classification: "choose another model",
    TaskName.audio_classification: "choose another model, or raise task.max_seconds",
}
_ADVICE_TEXT = "choose another model, or lower task.max_tokens"


def _unfreeze(encoder: PreTrainedModel, tuning: TuningConfig) -> None:
    """Makes trainable what `tuning.method` says, below the head. Raises: ConfigError."""
    if tuning.method is TuningMethod.full:
        encoder.requires_grad_(requires_grad=True)
    elif tuning.method is TuningMethod.bitfit:
        biases = [p for name, p in encoder.named_parameters() if name.split(".")[-1] == "bias"]
        if not biases:
            raise ConfigError("tuning.method=bitfit: the model has no biases; choose lora or full")
        for parameter in biases:
            parameter.requires_grad = True
    elif tuning.method is TuningMethod.last_layers:
        blocks = _blocks(encoder, "tuning.k", tuning.k)
        for block in blocks[len(blocks) - tuning.k :]:
            block.requires_grad_(requires_grad=True)


def _blocks(encoder: PreTrainedModel, name: str, wanted: int) -> list[nn.Module]:
    """The encoder's blocks, of which `wanted` are to be tuned. Raises: ConfigError."""
    try:
        blocks = list(find_blocks(encoder)[2])
    except NoPrefixError as error:
        raise ConfigError(f"{name}={wanted}: {error}; choose tuning=head or tuning=full") from error
    if wanted > len(blocks):
        raise ConfigError(
            f"{name}={wanted}: must be at most {len(blocks)}, the number of blocks of the model"
        )
    return blocks


def _freeze_unused(model: FineTuned, probe: Mapping[str, Tensor]) -> None:
    """Freezes parameters that have no part in the output: they would be released as pure noise."""
    if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
        return
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    model.eval()
    total = model(**{name: tensor[:1] for name, tensor in probe.items()}).sum()
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        total, [p for _, p in named], allow_unused=True
    )
    for (name, parameter), gradient in zip(named, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad = False
            model.unused.append(name)


@torch.no_grad()
def _check_reads(model: FineTuned, config: Config, probe: Mapping[str, Tensor]) -> None:
    """Shows the model two made inputs of full size. Raises: ConfigError if it cannot."""
    sizes = ", ".join(f"{name} {tuple(tensor.shape[1:])}" for name, tensor in probe.items())
    try:
        output = model(**probe)
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"model.name={config.model.name}: cannot read what task={config.task.name.name} gives "
            f"it, {sizes} ({first_line(error)}); {_ADVICE.get(config.task.name, _ADVICE_TEXT)}"
        ) from error
    assert len(output) == len(next(iter(probe.values())))


def _add_adapters(encoder: PreTrainedModel, tuning: TuningConfig, seed: int) -> PeftModel:
    """Puts LoRA matrices into the top blocks of `encoder`, in place. Raises: ConfigError."""
    blocks = encoder.config.num_hidden_layers
    if tuning.last_layers > blocks:
        raise ConfigError(
            f"tuning.last_layers={tuning.last_layers}: must be at most {blocks}, "
            "the number of blocks of the model"
        )
    adapters = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        target_modules=_adapted_modules(
            encoder, tuning, range(blocks - tuning.last_layers, blocks)
        ),
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():
                # peft 0.21 asks transformers 5 for a name that transformers 6 will drop.
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                wrapped: PeftModel = get_peft_model(encoder, adapters)
        except ValueError as error:
            raise _no_targets(encoder, tuning) from error
    return wrapped


def _adapted_modules(encoder: PreTrainedModel, tuning: TuningConfig, chosen: range) -> list[str]:
    """Full names of the targets in the chosen blocks; peft's own choice by number misses blocks
    that hang from the encoder itself, as ViT's. Raises: ConfigError if there are none.
    """
    names = [
        name
        for name, _ in encoder.named_modules()
        if (block := re.search(r"(?:^|\.)(\d+)\.", name))
        and int(block[1]) in chosen
        and any(f".{name}".endswith(f".{target}") for target in tuning.targets)
    ]
    if not names:
        raise _no_targets(encoder, tuning)
    return names


def _no_targets(encoder: PreTrainedModel, tuning: TuningConfig) -> ConfigError:
    names = sorted({n.split(".")[-1] for n, m in encoder.named_modules() if _linear(m)})
    return ConfigError(
        f"tuning.targets={list(tuning.targets)}: the model's linear modules are {', '.join(names)}"
    )


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _disable_dropout(encoder: PreTrainedModel) -> None:
    """Sets every dropout rate to zero, in modules and in the attributes some models keep."""
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
