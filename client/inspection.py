"""`coterie preflight`: shows a person, or a machine, what preflight finds for a configuration."""

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from client.preflight import Verdict, refusal
from client.train import Trainer
from common.cli import Invocation, emit_json
from common.code import code_digest
from common.composition import run_job
from common.config import Config
from common.device import device_of
from common.privacy.accounting import number


def preflight(invocation: Invocation) -> None:
    """Say whether this model can be trained privately here, how exactly and how; touch no data."""

    def job(config: Config) -> None:
        trainer = Trainer(config, device_of(config.engine.device))
        verdict = trainer.preflight(precision=torch.float64)
        answer = preflight_object(config, trainer, verdict)
        if not answer["ok"]:
            refused = refusal(config.model.name, verdict)
            refused.details = answer
            raise refused
        if invocation.json:
            emit_json(answer)
        else:
            show_preflight(answer, Console(markup=False))

    run_job(job, invocation)


def preflight_object(config: Config, trainer: Trainer, verdict: Verdict) -> dict[str, Any]:
    """What `--json` prints; counts are of parameters, and no value is null."""
    return {
        "model": config.model.name,
        "tuning": config.tuning.method.name,
        "ok": verdict.engine is not None,
        "engine": verdict.engine.name.name if verdict.engine else "none",
        "adapted": [*trainer.adapted, *verdict.adapted],
        "refused": list(verdict.refused),
        "max_rel_error": number(verdict.max_rel_error),
        "trainable": trainer.layout.size,
        "frozen": trainer.parameters - trainer.layout.size,
        "code": code_digest(),
    }


def show_preflight(answer: dict[str, Any], console: Console) -> None:
    """Prints the verdict on a model that is not refused as a table for a person."""
    table = Table(title="Preflight", show_header=False, title_justify="left")
    rows = {
        "model": f"{answer['model']}, {answer['tuning']}",
        "private training": "possible",
        "engine": answer["engine"],
        "error of a clipped sum": f"{answer['max_rel_error']:.1e}, relative to a loop of batches "
        "of one in float64",
        "trains": f"{answer['trainable']:,} parameters; {answer['frozen']:,} stay as they are",
        "adapted": "\n".join(answer["adapted"]) or "nothing",
        "refused on the way": "\n".join(answer["refused"]) or "nothing",
        "code at this site": answer["code"],
    }
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)
