"""What each experiment's metric costs at each epsilon: whole runs, one after the other, as a table.

    python -m benchmarks.experiments FOLDER
    python -m benchmarks.experiments FOLDER --experiments bbc_lm --epsilons none 8 --seeds 0 1 2
    python -m benchmarks.experiments FOLDER --split validation --settings engine.threads=1
    python -m benchmarks.experiments FOLDER --unigram

Writes one run folder per experiment, epsilon and seed (a finished one is not run again) and
FOLDER/table.md. Settings are chosen on `--split validation`; the hold-out is for the table. Nothing
of a private run is clipped away in a run without privacy, and other step sizes suit it:
`WITHOUT_PRIVACY` has them, by experiment. `--unigram` runs nothing: it says what perplexity a
model has that knows only how frequent each piece is in the public validation texts.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from common.composition import CONF
from common.config import from_composed, register_schemas
from common.data import load_splits
from common.generation import IGNORED, TARGET_IDS
from common.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
RUN = (sys.executable, "-c", "import sys; from common.cli import main; sys.exit(main())")
NONE = "none"
WITHOUT_PRIVACY: dict[str, tuple[str, ...]] = {
    "bbc_news": (),
    "bbc_lm": (),
    "digits": ("tuning.head_learning_rate=1", "tuning.adapter_learning_rate=0.1"),
    "questions": (),
    "summaries": ("tuning.adapter_learning_rate=0.5",),
    "tones": ("tuning.head_learning_rate=5",),
}
"""By experiment, what `privacy=none` changes besides; how they were chosen: docs/experiments.md."""
HEADLINE = {"summaries": "rouge_l"}
"""Where it is not the task's first metric: BLEU of targets under four words says nothing."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    experiment: str
    epsilon: str
    """A number, or `none`."""
    seed: int

    def overrides(self) -> list[str]:
        """What the command line of this run says."""
        privacy = (
            ["privacy=none", *WITHOUT_PRIVACY[self.experiment]]
            if self.epsilon == NONE
            else [f"privacy.epsilon={self.epsilon}"]
        )
        return [f"+experiment={self.experiment}", *privacy, f"seed={self.seed}"]

    def folder(self, below: Path, split: str) -> Path:
        """Where the run is."""
        return below / split / self.experiment / f"epsilon-{self.epsilon}-seed-{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a run's report says."""

    cell: Cell
    metrics: dict[str, float]
    """The headline first."""
    epsilon: float | None
    """What was spent, by the PLD accountant; None without privacy."""
    seconds: float
    records: int
    """Public ones that were measured."""
    split: str


def main() -> None:
    """Runs what is missing and prints the table."""
    options = _options()
    if options.unigram:
        print(json.dumps({"unigram_perplexity": unigram_of("+experiment=bbc_lm")}))
        return
    folder = options.folder.expanduser().resolve()
    cells = [
        Cell(experiment, epsilon, seed)
        for experiment in options.experiments
        for seed in options.seeds
        for epsilon in options.epsilons
    ]
    outcomes = [run(cell, folder, options.split, options.settings) for cell in cells]
    shown = table(outcomes)
    (folder / "table.md").write_text(shown)
    if options.json:
        print(json.dumps({"machine": machine(), "rows": [*rows(outcomes)]}))
    else:
        print(f"{shown}\n{machine()}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    known = sorted(WITHOUT_PRIVACY)
    parser.add_argument("--experiments", nargs="+", choices=known, default=known)
    parser.add_argument("--epsilons", nargs="+", default=[NONE, "8", "3", "1"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=["holdout", "validation"], default="holdout")
    parser.add_argument("--unigram", action="store_true", help="of bbc_lm's hold-out, and no run")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--settings", nargs="+", default=[], help="of every run, as NAME=VALUE")
    return parser.parse_args()


def run(cell: Cell, below: Path, split: str, overrides: list[str]) -> Outcome:
    """Runs one cell, unless its report is there. Raises: CalledProcessError if it fails."""
    folder = cell.folder(below, split)
    if not (folder / "report.json").exists():
        settings = [*cell.overrides(), f"evaluation.split={split}", f"run_dir={folder}"]
        command = [*RUN, "simulate", *settings, *overrides, "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return outcome(cell, json.loads((folder / "report.json").read_text()))


def outcome(cell: Cell, report: dict[str, Any]) -> Outcome:
    """What a table needs of a report.

    Raises: ValueError if the report is not of a run like this cell's, so that no number can stand
    in a row that it is not of.
    """
    spent = report["privacy"]["epsilon"]["pld"]
    without = report["privacy"]["mode"] == NONE
    if without != (cell.epsilon == NONE) or report["seed"] != cell.seed:
        raise ValueError(f"{cell}: the report is of another run")
    if not without and not 0.9 * float(cell.epsilon) <= spent <= float(cell.epsilon):
        raise ValueError(f"{cell}: the report says that epsilon {spent} was spent")
    return Outcome(
        cell,
        _headline_first(cell.experiment, report["evaluation"]),
        None if without else float(spent),
        float(report["timing"]["total_s"]),
        int(report["evaluation_records"]),
        str(report["evaluation_split"]),
    )


def _headline_first(experiment: str, metrics: dict[str, float]) -> dict[str, float]:
    first = HEADLINE.get(experiment, next(iter(metrics)))
    return {first: metrics[first], **metrics}


def rows(outcomes: list[Outcome]) -> Iterator[dict[str, Any]]:
    """One for each experiment and epsilon: mean, standard deviation and n of every metric."""
    for experiment, epsilon in dict.fromkeys((o.cell.experiment, o.cell.epsilon) for o in outcomes):
        same = [o for o in outcomes if (o.cell.experiment, o.cell.epsilon) == (experiment, epsilon)]
        yield {
            "experiment": experiment,
            "epsilon": epsilon,
            "spent": max((o.epsilon or 0.0 for o in same), default=0.0),
            "n": len(same),
            "seeds": [o.cell.seed for o in same],
            "split": same[0].split,
            "records": same[0].records,
            "metrics": {name: _spread(name, same) for name in same[0].metrics},
            "median_s": statistics.median(o.seconds for o in same),
        }


def _spread(name: str, same: list[Outcome]) -> dict[str, Any]:
    values = [o.metrics[name] for o in same]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "sd": deviation, "by_seed": values}


def table(outcomes: list[Outcome]) -> str:
    """Markdown, one row for each experiment and epsilon."""
    lines = [
        "| experiment | epsilon | metric | mean (sd) | by seed | n | also | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(outcomes):
        (name, first), *others = row["metrics"].items()
        also = ", ".join(f"{other} {_shown(spread['mean'])}" for other, spread in others)
        by_seed = ", ".join(map(_shown, first["by_seed"]))
        spread = "" if first["sd"] is None else f" ({_shown(first['sd'])})"
        lines.append(
            f"| {row['experiment']} | {row['epsilon']} | {name} | {_shown(first['mean'])}{spread} "
            f"| {by_seed} | {row['n']} | {also} | {row['median_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _shown(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"  # noqa: PLR2004 - digits that tell


def unigram_of(*overrides: str) -> float:
    """Perplexity on the hold-out of the frequencies in the validation texts, both public."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = from_composed(compose("simulate", [*overrides]))
    task, splits = TASKS[config.task.name], load_splits(config.data)
    tokenizer = task.load_processor(config.model)
    known, asked = (
        task.encode(tokenizer, part, config.task)[TARGET_IDS]
        for part in (splits.validation, splits.holdout)
    )
    return unigram_perplexity(known, asked, pieces=len(tokenizer))


def unigram_perplexity(known: Tensor, asked: Tensor, *, pieces: int) -> float:
    """Exp of the mean loss of the next tokens of `asked`, by how often each piece is in `known`.

    Each is counted once more than it was seen, or an unseen one would be impossible.
    Args: known, asked: (N, T) ids, `IGNORED` where there is none; pieces: V, how many there are.
    """
    counts = torch.bincount(known[known != IGNORED], minlength=pieces).double() + 1
    following = asked[:, 1:]
    own = following[following != IGNORED]
    return float((-(counts / counts.sum()).log()[own].mean()).exp())


def machine() -> str:
    """Date, commit and machine, in a line."""
    asked = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    cores = len(os.sched_getaffinity(0))
    return (
        f"{datetime.now().astimezone():%Y-%m-%d}, commit {commit.stdout.strip() or 'unknown'}, "
        f"{cores} cores, {platform.machine()}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
