"""The adapters of a LoRA run, and its head, as peft itself saves and opens them."""

import re
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForQuestionAnswering, PreTrainedModel

from common.classes import ClassTask, load_native
from common.config import Config, HeadName, TaskName
from common.generation import GenerativeTask
from common.model import Classifier, FineTuned, NativeClassifier
from common.pretrained import load_encoder
from common.tasks import TASKS
from common.tasks.question_answering import HEAD, SpanFinder

WEIGHTS, HEAD_FILE = "adapter_model.safetensors", "head.safetensors"
WITHIN = "base_model.model."
"""What peft puts before the name of a weight."""


def write(model: FineTuned, config: Config, folder: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    A head that transformers has is among the latter, by `modules_to_save`; that of a mean-pooled
    classifier, which it has not, is in `head.safetensors`.
    Args: model: one with adapters, not merged.
    """
    assert model.adapters is not None
    weights = get_peft_model_state_dict(model.adapters)
    settings = model.adapters.peft_config["default"]
    assert isinstance(settings, LoraConfig)
    prefix, heads = _head(model)
    if prefix:
        stem = WITHIN + prefix + "."
        weights = {stem + name.removeprefix(WITHIN): t for name, t in weights.items()}
        settings.target_modules = f"{re.escape(prefix)}\\.(?:{settings.target_modules})"
    for name, module in heads.items():
        for each, tensor in module.state_dict(prefix=f"{WITHIN}{name}.").items():
            weights[each] = tensor
    settings.modules_to_save = sorted({name.split(".")[-1] for name in heads}) or None
    settings.base_model_name_or_path = config.model.name
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    save_file(_contiguous(weights), folder / WEIGHTS, metadata={"format": "pt"})
    if isinstance(model, Classifier):
        head = model.classifier.state_dict(prefix="classifier.")
        save_file(_contiguous(head), folder / HEAD_FILE, metadata={"format": "pt"})


def restore(folder: Path, config: Config) -> FineTuned:
    """Opens what `write` wrote, on the pretrained model, as its user would.

    Raises: ConfigError if the pretrained model is not there.
    """
    opened = opened_by_peft(_host(config), folder)
    merged: PreTrainedModel = opened.merge_and_unload()
    task = TASKS[config.task.name]
    if isinstance(task, GenerativeTask):
        return task.MODEL(merged)
    if config.task.name is TaskName.question_answering:
        encoder = merged.base_model
        assert isinstance(encoder, PreTrainedModel)
        finder = SpanFinder(encoder)
        finder.qa_outputs = getattr(merged, HEAD)
        return finder
    labels = list(config.data.labels)
    if config.model.head is HeadName.native:
        return NativeClassifier(merged, labels=labels)
    classifier = Classifier(merged, labels=labels, feature_scale=config.model.feature_scale)
    head = load_file(folder / HEAD_FILE)
    classifier.classifier.load_state_dict(
        {name.removeprefix("classifier."): tensor for name, tensor in head.items()}
    )
    return classifier


def opened_by_peft(host: PreTrainedModel, folder: Path) -> PeftModel:
    """`PeftModel.from_pretrained`, without what it says of transformers 6."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(host, folder)


def host_family(config: Config) -> str:
    """Name of the Auto class that opens the pretrained model under the adapter."""
    task = TASKS[config.task.name]
    if isinstance(task, GenerativeTask):
        return str(task.FAMILY.__name__)
    if config.task.name is TaskName.question_answering:
        return str(AutoModelForQuestionAnswering.__name__)
    if isinstance(task, ClassTask) and config.model.head is HeadName.native:
        return str(task.FAMILY.__name__)
    return str(AutoModel.__name__)


def _host(config: Config) -> PreTrainedModel:
    """The pretrained model that carries the adapter; what the adapter brings is drawn anew."""
    task = TASKS[config.task.name]
    if isinstance(task, GenerativeTask):
        return load_encoder(config.model, task.FAMILY)
    if config.task.name is TaskName.question_answering:
        encoder = load_encoder(config.model)
        family: Any = AutoModelForQuestionAnswering  # untyped in transformers
        host: PreTrainedModel = family.from_config(encoder.config)
        host.base_model.load_state_dict(encoder.state_dict(), strict=False)
        return host
    if isinstance(task, ClassTask) and config.model.head is HeadName.native:
        return load_native(config, task.FAMILY)
    return load_encoder(config.model)


def _head(model: FineTuned) -> tuple[str, dict[str, nn.Module]]:
    """Where the encoder hangs in the model that carries the adapter, and that model's own layers
    beside it, by name; a pooler that they read is one of them.
    """
    if isinstance(model, SpanFinder):
        return model.encoder.base_model_prefix, {HEAD: model.qa_outputs}
    if not isinstance(model, NativeClassifier):
        return "", {}
    prefix = model.encoder.base_model_prefix
    heads = {
        name: module
        for name, module in model.native.named_children()
        if name != prefix and any(True for _ in module.parameters())
    }
    if model.pooler_parameters():
        heads[f"{prefix}.pooler"] = model.encoder.get_submodule("pooler")
    return prefix, heads


def _contiguous(weights: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in weights.items()}
