"""The released model: a Hugging Face folder with a card, and `coterie predict`."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import parameters
from common.cli import Invocation, emit_json, run_typer
from common.config import Config, ModelConfig, TaskConfig, TaskName
from common.durable import folder_atomic
from common.errors import ConfigError, VerificationError
from common.model import Classifier, load_encoder, load_tokenizer
from common.parameters import Vector
from common.tasks import TASKS
from server.documents import render
from server.plan import is_private

HEAD_WEIGHT, HEAD_BIAS = "classifier.weight", "classifier.bias"
WEIGHTS = "model.safetensors"
COTERIE_KEY = "coterie"
"""Entry of `config.json` that says how the head reads the encoder."""


def write_model(
    folder: Path, model: Classifier, vector: Vector, config: Config, report: dict[str, Any]
) -> None:
    """Writes encoder (adapters merged), head, tokenizer and model card, whole or not at all.

    `AutoModel` and `AutoTokenizer` open the folder without Coterie. `model` is used up.
    """
    parameters.load(model, vector)
    encoder = model.merged_encoder()
    encoder.config.id2label = dict(enumerate(config.data.labels))
    encoder.config.label2id = {label: index for index, label in enumerate(config.data.labels)}
    head = {
        "pooling": "mean",
        "feature_scale": config.model.feature_scale,
        "max_tokens": config.task.max_tokens,
        "task": config.task.name.name,
        "private": is_private(config),
    }
    setattr(encoder.config, COTERIE_KEY, head)
    prefix = encoder.base_model_prefix
    weights = {f"{prefix}.{name}": t.contiguous() for name, t in encoder.state_dict().items()}
    weights[HEAD_WEIGHT] = model.classifier.weight.detach().contiguous()
    weights[HEAD_BIAS] = model.classifier.bias.detach().contiguous()
    with folder_atomic(folder) as temporary:
        encoder.config.save_pretrained(temporary)
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        load_tokenizer(config.model).save_pretrained(temporary)
        (temporary / "README.md").write_text(
            render("model_card.md.jinja", report=report, head=head)
        )


def load_released(folder: Path) -> tuple[Classifier, TaskConfig]:
    """Opens what `write_model` wrote. Raises: VerificationError if it is something else."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        head = settings[COTERIE_KEY]
        labels = [settings["id2label"][str(i)] for i in range(len(settings["id2label"]))]
        task = TaskConfig(TaskName[head["task"]], int(head["max_tokens"]))
        scale = float(head["feature_scale"])
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            weight, bias = file.get_tensor(HEAD_WEIGHT), file.get_tensor(HEAD_BIAS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise VerificationError(f"{folder}: not a model released by coterie") from error
    try:
        encoder = load_encoder(ModelConfig(str(folder.resolve()), scale))
    except ConfigError as error:
        raise VerificationError(str(error)) from error
    model = Classifier(encoder, labels=labels, feature_scale=scale)
    if weight.shape != model.classifier.weight.shape or bias.shape != model.classifier.bias.shape:
        raise VerificationError(f"{folder}: its head does not fit its encoder")
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(bias)
    return model.eval(), task


def predict(invocation: Invocation) -> None:
    """Answer with the model of a finished run."""

    def command(
        run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
        texts: Annotated[list[str], typer.Argument(help="One or more texts.", metavar="TEXT...")],
    ) -> None:
        """Labels texts with the model of a run. RUN is the folder of a finished run.

        Example: coterie predict runs/demo "The striker scored twice in the final"
        """
        answers = classify(run / "model", texts)
        if invocation.json:
            emit_json({"predictions": answers})
            return
        for answer in answers:
            print(f"{answer['label']} ({answer['probability']:.0%}): {answer['text']}")

    run_typer(command, invocation)


@torch.inference_mode()
def classify(folder: Path, texts: list[str]) -> list[dict[str, Any]]:
    """Label and probability of each text, by the model in `folder`."""
    model, task = load_released(folder)
    tokenizer = load_tokenizer(ModelConfig(str(folder.resolve()), model.feature_scale))
    inputs = TASKS[task.name].encode(tokenizer, texts, max_tokens=task.max_tokens)
    probabilities = model(**inputs).softmax(1)
    best = probabilities.max(1)
    return [
        {"text": text, "label": model.labels[int(index)], "probability": round(float(value), 4)}
        for text, value, index in zip(texts, best.values, best.indices, strict=True)
    ]
