"""`coterie export`: a run's model in the form its user needs, held against the original."""

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from common import parameters
from common.canonical import canonical_json
from common.cli import Invocation, emit_json, run_typer
from common.config import Config, TaskName, TuningMethod, from_yaml
from common.durable import folder_atomic
from common.errors import ConfigError, VerificationError
from common.model import FineTuned, read_of
from common.prefix import Inputs
from common.privacy.mechanism import is_private
from common.tasks import TASKS, build_model
from common.tasks.question_answering import FAR
from server import adapter, graph
from server.checkpoint import read_last
from server.documents import render
from server.release import load_released

CARD, RECORD = "README.md", "export.json"
MADE = 8
"""Made records on which an export is held against the original."""
USE = "\n## Use\n"
"""Where the card of a run ends that is true of its model in any form."""


class Format(StrEnum):
    """What an export is."""

    merged = "merged"
    adapter = "adapter"
    onnx = "onnx"
    int8 = "int8"


BOUNDS = {Format.merged: 1e-4, Format.adapter: 1e-4, Format.onnx: 1e-3, Format.int8: 0.1}
"""Largest error of an output that is let through, as a share of the largest one, or of 1 where
that is smaller."""

Answers = Callable[[Inputs], Tensor]
"""Outputs, as the task's model gives them, of what it reads."""


@dataclass(frozen=True)
class FinishedRun:
    """What an export needs of a run's folder."""

    folder: Path
    config: Config
    card: str
    """The model's card, which states the guarantee, or that there is none."""

    @classmethod
    def opened(cls, folder: Path) -> "FinishedRun":
        """Raises: VerificationError if the folder is not that of a finished run."""
        try:
            config = from_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
            card = (folder / "model" / CARD).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise VerificationError(f"{folder}: not the folder of a finished run") from error
        except ConfigError as error:
            raise VerificationError(f"{folder}: its config.yaml is malformed: {error}") from error
        if USE not in card:
            raise VerificationError(f"{folder}: its model has no card that states its privacy")
        return cls(folder, config, card)

    @property
    def model(self) -> Path:
        """The released folder."""
        return self.folder / "model"

    def released(self) -> FineTuned:
        """The model that the run released, adapters merged. Raises: VerificationError."""
        return load_released(self.model)[0]

    def rebuilt(self) -> FineTuned:
        """The model as training left it: the pretrained one under the last checkpoint.

        Raises: ConfigError if the pretrained model is not there; VerificationError.
        """
        model = build_model(self.config)
        parameters.load(model, read_last(self.folder / "checkpoints"))
        return model.eval()


@dataclass(frozen=True)
class Comparison:
    """An export beside the original, on made records."""

    max_abs_error: float
    largest_output: float
    agreement: float
    """Share of the answers, classes, tokens or ends of spans, that are the same."""

    def within(self, share: float) -> bool:
        """Whether no output is off by more than this share of the largest, or of 1."""
        return self.max_abs_error <= share * max(1.0, self.largest_output)


def export(invocation: Invocation) -> None:
    """Write a run's model merged, as an adapter, as ONNX or in 8 bits; compare it first."""

    def command(
        run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
        to: Annotated[
            Path | None,
            typer.Option(help="Folder to write, new or empty; by default RUN/exports/FORMAT."),
        ] = None,
        form: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.merged,
        max_error: Annotated[
            float | None,
            typer.Option(help="Largest error of an output, as a share of the largest, or of 1."),
        ] = None,
    ) -> None:
        """Writes the model of a finished run, opens it again, and holds its outputs against the
        original's on made records; with an error above the bound nothing is left.

        Example: coterie export runs/demo --to exports/demo --format onnx
        """
        to = to or run / "exports" / form.value
        record = export_run(run, to, form, max_error)
        if invocation.json:
            emit_json(record)
            return
        print(
            f"{to}: {form.value}, {record['bytes'] / 1e6:.1f} MB; outputs off by at most "
            f"{record['max_abs_error']:.1e} of {record['largest_output']:.3g}, "
            f"{record['agreement']:.1%} of the answers the same, on {MADE} made records"
        )

    run_typer(command, invocation)


def export_run(
    folder: Path, to: Path, form: Format, max_error: float | None = None
) -> dict[str, Any]:
    """Writes one export, whole or not at all, and returns what its `export.json` says.

    Raises: ConfigError if the run or this machine cannot give it; VerificationError if the folder
    is no run's, or what was written answers otherwise than the original.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to={to}: is not an empty folder; choose another")
    if max_error is not None and not 0 < max_error < 1:
        raise ConfigError(f"--max-error={max_error:g}: must be above 0 and below 1")
    if to.resolve() == Path.cwd():
        raise ConfigError(f"--to={to}: is the folder you are in; name one below it")
    run = FinishedRun.opened(folder)
    if to.resolve().is_relative_to(run.model.resolve()):
        raise ConfigError(f"--to={to}: is inside the model that is exported; choose another")
    if form is Format.adapter and run.config.tuning.method is not TuningMethod.lora:
        raise ConfigError(
            f"--format=adapter: the run has tuning={run.config.tuning.method.name}, and only "
            "tuning=lora has adapters; choose merged"
        )
    bound = max_error or BOUNDS[form]
    with folder_atomic(to) as temporary:
        found = _WRITERS[form](run, temporary)
        if not found.within(bound):
            raise VerificationError(
                f"--format={form.value}: an output is off by {found.max_abs_error:.1e} where the "
                f"largest is {found.largest_output:.3g}, above the bound of {bound:g} of it, or "
                "of 1; nothing was written"
            )
        record = _record(run, form, found, bound)
        (temporary / CARD).write_text(_card(run, form, record), encoding="utf-8")
        record["bytes"] = sum(f.stat().st_size for f in temporary.rglob("*") if f.is_file())
        (temporary / RECORD).write_text(canonical_json(record) + "\n", encoding="utf-8")
    return record


def _merged(run: FinishedRun, folder: Path) -> Comparison:
    """The released folder, held against the checkpoint."""
    shutil.copytree(run.model, folder, dirs_exist_ok=True)
    return _compared(run.config, run.rebuilt(), _of(load_released(folder)[0]))


def _adapter(run: FinishedRun, folder: Path) -> Comparison:
    """The adapter on the pretrained model, held against the released one."""
    adapter.write(run.rebuilt(), run.config, folder)
    _copy_processor(run, folder)
    return _compared(run.config, run.released(), _of(adapter.restore(folder, run.config)))


def _onnx(run: FinishedRun, folder: Path) -> Comparison:
    """The graph in onnxruntime, held against the released model."""
    graph.write(run.released(), _made(run.config), folder)
    return _compared_graph(run, folder)


def _int8(run: FinishedRun, folder: Path) -> Comparison:
    """The graph with weights of 8 bits, held against the released model."""
    graph.write(run.released(), _made(run.config), folder)
    graph.quantise(folder)
    return _compared_graph(run, folder)


_WRITERS: dict[Format, Callable[[FinishedRun, Path], Comparison]] = {
    Format.merged: _merged,
    Format.adapter: _adapter,
    Format.onnx: _onnx,
    Format.int8: _int8,
}


def _compared_graph(run: FinishedRun, folder: Path) -> Comparison:
    _copy_processor(run, folder)
    shutil.copy(run.model / "config.json", folder)
    return _compared(run.config, run.released(), graph.restore(folder))


def _copy_processor(run: FinishedRun, folder: Path) -> None:
    """What the model's input is prepared by, in its own files."""
    of_model = {CARD, "config.json", "generation_config.json", "model.safetensors.index.json"}
    for path in run.model.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in of_model:
            shutil.copy(path, folder)


def _made(config: Config) -> Inputs:
    """What the model reads of made records."""
    task = TASKS[config.task.name]
    return read_of(task.made(task.load_processor(config.model), MADE, config))


def _of(model: FineTuned) -> Answers:
    return lambda inputs: model.eval()(**inputs)


@torch.inference_mode()
def _compared(config: Config, original: FineTuned, exported: Answers) -> Comparison:
    """Both on the same made records; padding, of which no answer is read, is left out."""
    inputs = _made(config)
    expected, found = original.eval()(**inputs), exported(dict(inputs))
    read = expected != FAR
    error = (expected - found).abs()[read].nan_to_num(torch.inf).max()
    # Of a question the answers are the ends, which are found along the tokens.
    axis = 1 if config.task.name is TaskName.question_answering else -1
    same = expected.argmax(axis) == found.argmax(axis)
    largest = float(expected.abs()[read].max())
    return Comparison(float(error), largest, float(same.float().mean()))


def _record(run: FinishedRun, form: Format, found: Comparison, bound: float) -> dict[str, Any]:
    used = ["torch", "transformers"]
    used += {Format.adapter: ["peft"], Format.merged: []}.get(form, ["onnx", "onnxruntime"])
    return {
        "format": form.value,
        "task": run.config.task.name.name,
        "model": run.config.model.name,
        "tuning": run.config.tuning.method.name,
        "private": is_private(run.config),
        "made_records": MADE,
        "max_abs_error": found.max_abs_error,
        "largest_output": found.largest_output,
        "bound": bound,
        "agreement": found.agreement,
        "versions": {name: importlib.metadata.version(name) for name in used},
    }


def _card(run: FinishedRun, form: Format, record: dict[str, Any]) -> str:
    """The run's own card, with what is true of this form only in place of how it is used."""
    stated, _, use = run.card.partition(USE)
    return render(
        "export_card.md.jinja",
        stated=stated.rstrip("\n"),
        use=use,
        record=record,
        task=run.config.task,
        labels=len(run.config.data.labels),
        host=adapter.host_family(run.config),
    )
