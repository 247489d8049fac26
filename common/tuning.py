"""What is trained: adapters, biases, top blocks or everything, below whatever head a task adds."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.config import Config, TaskName, TuningConfig, TuningMethod
from common.errors import ConfigError, first_line
from common.model import FineTuned
from common.prefix import NoPrefixError, find_blocks

if TYPE_CHECKING:
    from peft import PeftModel

QUERY_AND_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"))
"""What models call the projections that adapters usually sit on, for kinds that peft knows not."""
TABLE = "relative_attention_bias"


def tune(model: FineTuned, config: Config, probe: Mapping[str, Tensor]) -> FineTuned:
    """Freezes the pretrained part of `model` and makes trainable what the config says, in place.

    Guarantee: the initial trainable parameters depend on `config.seed` and nothing else; no
    trainable parameter is left that has no part in the output.
    Args: probe: two made records of full size, as the model reads them.
    Raises: ConfigError if the model cannot read them, has no such modules, or would train nothing.
    """
    encoder = model.encoder
    encoder.requires_grad_(requires_grad=False)
    _disable_dropout(model)
    if config.tuning.method is TuningMethod.lora:
        model.adopt(_add_adapters(encoder, config.tuning, config.seed))
        if config.tuning.freeze_a:
            _freeze_a(encoder)
    else:
        _unfreeze(encoder, config.tuning)
        _freeze_tables(model)
    for parameter in model.pooler_parameters():
        parameter.requires_grad = True
    _check_reads(model, config, probe)
    _freeze_unused(model, probe)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"tuning.method={config.tuning.method.name}: would train nothing, as "
            f"task={config.task.name.name} puts no head on the model; choose tuning=lora, "
            "last_layers, bitfit or full"
        )
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
        for block in _top_blocks(encoder, "tuning.k", tuning.k):
            block.requires_grad_(requires_grad=True)


def _top_blocks(encoder: PreTrainedModel, name: str, wanted: int) -> list[nn.Module]:
    """The encoder's last `wanted` blocks, which `name` asks for. Raises: ConfigError."""
    try:
        blocks = list(find_blocks(encoder)[2])
    except NoPrefixError as error:
        raise ConfigError(f"{name}={wanted}: {error}; choose tuning=head or tuning=full") from error
    if wanted > len(blocks):
        raise ConfigError(
            f"{name}={wanted}: must be at most {len(blocks)}, the number of blocks of the model"
        )
    return blocks[len(blocks) - wanted :]


def _freeze_tables(model: FineTuned) -> None:
    """Freezes T5's tables of relative positions, some hundred numbers, for the engine's sake."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.split(".")[-2:-1] == [TABLE]:
            parameter.requires_grad = False
            model.tables.append(name)


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


def _add_adapters(encoder: PreTrainedModel, tuning: TuningConfig, seed: int) -> "PeftModel":
    """Puts LoRA matrices into the top blocks of `encoder`, in place. Raises: ConfigError."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - a second, for adapters only

    adapters = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        # One pattern of full names: a list would be matched by endings, and a lower block's
        # module may end in an upper one's name.
        target_modules="|".join(re.escape(name) for name in _places(encoder, tuning)),
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft 0.21 asks transformers 5 for a name that transformers 6 will drop.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # It sets the flag that GPT-2's transposed matrices need itself, and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set", UserWarning)
        wrapped: PeftModel = get_peft_model(encoder, adapters)
    return wrapped


def _freeze_a(encoder: PreTrainedModel) -> None:
    """Freezes A of every adapter: it comes from the public seed, and so needs no privacy."""
    for name, parameter in encoder.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad = False


def _places(encoder: PreTrainedModel, tuning: TuningConfig) -> list[str]:
    """Full names of the linear modules that get adapters. Raises: ConfigError if none do."""
    kind = encoder.config.model_type
    top = (
        _top_blocks(encoder, "tuning.last_layers", tuning.last_layers)
        if tuning.last_layers
        else [encoder]
    )
    inside = {module for block in top for module in block.modules()}
    # A pooler belongs to the head that reads it, or to nothing.
    modules = [(n, m) for n, m in encoder.named_modules() if not n.startswith("pooler.")]
    linear = {name: module for name, module in modules if _linear(module)}
    for targets in [tuning.targets] if tuning.targets else _usual(kind):
        endings = tuple(f".{target}" for target in targets)
        places = [n for n, each in linear.items() if each in inside and f".{n}".endswith(endings)]
        if places:
            return places
    names = sorted({name.split(".")[-1] for name in linear})
    usual = "" if tuning.targets else f"; none is usual for a {kind}"
    raise ConfigError(
        f"tuning.targets={list(tuning.targets)}: the model's linear modules are "
        f"{', '.join(names)}{usual}"
    )


def _usual(kind: str) -> list[Sequence[str]]:
    """Names to look for in a model of this kind: those of peft, then a query's and a value's."""
    from peft.utils import (  # noqa: PLC0415 - the same
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS,
    )

    return [USUAL_TARGETS.get(kind, ()), *QUERY_AND_VALUE]


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _disable_dropout(model: nn.Module) -> None:
    """Sets every dropout rate to zero, in modules and in the attributes some models keep."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
