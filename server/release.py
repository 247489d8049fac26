"""The released model: a Hugging Face folder with a card, and `coterie predict`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError

from common import parameters
from common.classes import COTERIE_KEY
from common.cli import Invocation, emit_json, run_typer
from common.config import Config, HeadName, ModelConfig, TaskConfig, TaskName
from common.durable import folder_atomic
from common.errors import ConfigError, VerificationError
from common.model import FineTuned
from common.parameters import Vector
from common.privacy.mechanism import is_private
from common.tasks import TASKS, FileTask
from server.documents import render


def write_model(
    folder: Path, model: FineTuned, vector: Vector, config: Config, report: dict[str, Any]
) -> None:
    """Writes weights (adapters merged), processor and model card, whole or not at all.

    Plain transformers opens the folder without Coterie. `model` is used up.
    """
    parameters.load(model, vector)
    task = TASKS[config.task.name]
    facts = {
        "feature_scale": config.model.feature_scale,
        "max_tokens": config.task.max_tokens,
        "max_seconds": config.task.max_seconds,
        "max_target_tokens": config.task.max_target_tokens,
        "task": config.task.name.name,
        "private": is_private(config),
    }
    with folder_atomic(folder) as temporary:
        task.save(model, temporary, facts)
        task.load_processor(config.model).save_pretrained(temporary)
        (temporary / "README.md").write_text(
            render(
                "model_card.md.jinja",
                report=report,
                head=facts,
                native=config.model.head is HeadName.native,
            )
        )


def load_released(folder: Path) -> tuple[FineTuned, TaskConfig]:
    """Opens what `write_model` wrote. Raises: VerificationError if it is something else."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = settings[COTERIE_KEY]
        task = TaskConfig(TaskName[facts["task"]], int(facts["max_tokens"]))
        # Older folders, of classes of texts only, know of neither.
        known = {"max_target_tokens": int, "max_seconds": float}
        task = replace(
            task, **{name: of(facts[name]) for name, of in known.items() if name in facts}
        )
        model = TASKS[task.name].restore(folder, settings)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise VerificationError(f"{folder}: not a model released by coterie") from error
    except ConfigError as error:
        raise VerificationError(str(error)) from error
    return model.eval(), task


def predict(invocation: Invocation) -> None:
    """Answer with the model of a finished run."""

    def command(
        run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
        asked: Annotated[
            list[str],
            typer.Argument(help="One or more texts, or files of what the model reads."),
        ],
    ) -> None:
        """Answers texts, or image or sound files, with the model of a run, a finished run's folder.

        Example: coterie predict runs/demo "The striker scored twice in the final"
        """
        answers = answers_of(run / "model", asked)
        if invocation.json:
            emit_json({"predictions": answers})
            return
        for answer in answers:
            print(answer["sentence"])

    run_typer(command, invocation)


@torch.inference_mode()
def answers_of(folder: Path, asked: list[str]) -> list[dict[str, Any]]:
    """What the model in `folder` answers to each.

    Raises: VerificationError; ConfigError if something asked is not what the model reads.
    """
    model, config = load_released(folder)
    task = TASKS[config.name]
    if not isinstance(task, FileTask):
        _check_unicode(asked)
    return task.answer(
        model, task.load_processor(ModelConfig(str(folder.resolve()))), asked, config
    )


def _check_unicode(texts: list[str]) -> None:
    """Bytes on a command line that are no UTF-8 come as halves of characters.

    Raises: ConfigError.
    """
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"text {number}: is no UTF-8; write it in a UTF-8 terminal"
            ) from error
