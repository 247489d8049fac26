"""`coterie sweep-report`: what the runs of a sweep say together, as a table and as a picture."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from common.canonical import canonical_json
from common.cli import Invocation, emit_json, run_typer
from common.config import Config, to_canonical
from common.durable import write_atomic
from common.errors import ConfigError
from common.privacy.accounting import number, shown
from common.privacy.mechanism import NOT_PRIVATE
from common.tasks import TASKS
from server.documents import render
from simulations.finished import Finished, price_together, read_finished
from simulations.frontier import Curve, frontier_of
from simulations.left_out import show_summary, summary

UNVARIED = frozenset(
    {
        *("seed", "run_dir", "ledger", "heads", "resume"),
        *("data.declared_records", "data.records_counted"),
    }
)
"""Settings that name no row: seeds are averaged over, and the others change no result."""
PLANNED = ("privacy.noise_multiplier", "tuning.head_learning_rate", "tuning.raised")
"""Settings that a plan fills in from others; they name a row only where these do not tell it."""
ADVICE = "give the run_dir of a sweep: coterie simulate -m privacy.epsilon=1,3 run_dir=runs/sweep"


@dataclass(frozen=True)
class Row:
    """The runs that differ in nothing but their seed."""

    settings: dict[str, Any]
    """What this row has and others have otherwise, by dotted name."""
    runs: tuple[Finished, ...]

    @property
    def epsilon(self) -> float:
        """What one of these runs costs: the most that any did."""
        return max(float(run.report["privacy"]["bound"]) for run in self.runs)

    def values(self, metric: str) -> list[float]:
        """The metric of each run, on its public records. Raises: ConfigError."""
        try:
            return [float(run.report["evaluation"][metric]) for run in self.runs]
        except KeyError as error:
            shared = set.intersection(*(set(run.report["evaluation"]) for run in self.runs))
            raise ConfigError(
                f"--metric={metric}: not every run measured it; all have "
                f"{', '.join(sorted(shared)) or 'none'}"
            ) from error


def sweep_report(invocation: Invocation) -> None:
    """Show the runs of a sweep as one table, and draw what privacy costs."""

    def command(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="run_dir of a sweep.")],
        metric: Annotated[
            str, typer.Option(help="What to compare; without it, the first of the task's.")
        ] = "",
    ) -> None:
        """Prints one row for each setting, seeds averaged, and what the whole sweep cost.

        DIR is the run_dir of a sweep; sweep.json, sweep.html and frontier.svg are written there.

        Example: coterie sweep-report runs/sweep --metric macro_f1
        """
        content = write_sweep(folder, metric)
        if invocation.json:
            emit_json(content)
        else:
            show_sweep(content, folder, Console(markup=False))

    run_typer(command, invocation)


def write_sweep(folder: Path, metric: str = "") -> dict[str, Any]:
    """Writes `sweep.json`, `frontier.svg` and `sweep.html` about the runs below `folder`.

    Returns: the content of `sweep.json`.
    Raises: ConfigError if there is no finished run, or they cannot be compared.
    """
    finished, unfinished = find_runs(folder)
    content = sweep_object(finished, metric) | {"unfinished": unfinished}
    picture = frontier_of(_curves(content), content["metric"])
    write_atomic(folder / "frontier.svg", picture)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / "sweep.json", text + "\n")
    page = render(
        "sweep.html.jinja",
        sweep=content,
        picture=Markup(picture[picture.index("<svg") :]),  # noqa: S704 - escaped by matplotlib
        folder=folder.resolve().name,
        sentence=price_sentence(content),
    )
    write_atomic(folder / "sweep.html", page)
    return content


def find_runs(folder: Path) -> tuple[list[Finished], list[str]]:
    """The finished runs right below `folder`, and the names of those that never finished.

    Raises: ConfigError if nothing finished there; VerificationError for a damaged report.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; {ADVICE}")
    begun = sorted(folder.glob("*/config.yaml"), key=lambda path: _natural(path.parent.name))
    done = [path.parent for path in begun if (path.parent / "report.json").exists()]
    if not done:
        raise ConfigError(f"{folder}: holds no finished run; {ADVICE}")
    unfinished = [path.parent.name for path in begun if path.parent not in done]
    return [read_finished(run) for run in done], unfinished


def sweep_object(finished: Sequence[Finished], metric: str = "") -> dict[str, Any]:
    """The content of `sweep.json`: a row for each setting, and the price of all together.

    Spread is the sample standard deviation over seeds, absent where there is one run.
    Raises: ConfigError if the runs have not one task, or not that metric.
    """
    tasks = {run.config.task.name for run in finished}
    if len(tasks) > 1:
        names = ", ".join(sorted(task.name for task in tasks))
        raise ConfigError(f"the runs have several tasks ({names}), whose metrics do not compare")
    chosen = metric or next(iter(finished[0].report["evaluation"]))
    rows = _rows(finished)
    return {
        "metric": chosen,
        "lower_is_better": TASKS[next(iter(tasks))].LOWER_IS_BETTER,
        "settings": list(rows[0].settings),
        "rows": [_row_object(row, chosen) for row in rows],
        "runs": len(finished),
        "epsilon_together": number(price_together(finished)),
        "delta": max(run.config.privacy.delta for run in finished),
        "private": all(run.report["privacy"]["private"] for run in finished),
        **({"leave_one_site_out": left_out} if (left_out := summary(finished)) else {}),
    }


def show_sweep(content: dict[str, Any], folder: Path, console: Console) -> None:
    """The table, for a person."""
    table = Table(title=f"{content['metric']} over {content['runs']} runs", title_justify="left")
    for name in (*content["settings"], content["metric"], "runs", "epsilon", "seconds"):
        table.add_column(name, justify="right")
    for row in content["rows"]:
        settings = [_told(row["settings"].get(name, "")) for name in content["settings"]]
        spread = f" ± {row['spread']:.4f}" if "spread" in row else ""
        measured = f"{row['mean']:.4f}{spread}"
        table.add_row(
            *settings, measured, str(row["n"]), shown(row["epsilon"]), f"{row['seconds']:.0f}"
        )
    console.print(table)
    if "leave_one_site_out" in content:
        show_summary(content["leave_one_site_out"], console)
    console.print(price_sentence(content), highlight=False)
    for name in content["unfinished"]:
        console.print(f"{name}: did not finish, and is in no row", highlight=False)
    console.print(f"{folder / 'sweep.html'} has the picture", highlight=False)


def price_sentence(content: dict[str, Any]) -> str:
    """What a record paid in all runs of a sweep, which no single run's report can say."""
    if not content["private"]:
        return f"{NOT_PRIVATE} as a whole: at least one of these runs had no protection."
    return (
        f"All {content['runs']} runs looked at the same records: against whoever saw what they "
        f"sent, one record has epsilon {shown(content['epsilon_together'])} (delta "
        f"{content['delta']:g}) over the whole sweep, and not that of a row."
    )


def _rows(finished: Sequence[Finished]) -> list[Row]:
    """Runs that differ in their seed alone stand together, in the order in which they came."""
    flat = [_flat(run.config) for run in finished]
    named = _naming(flat)
    return [
        Row(
            {name: flat[members[0]][name] for name in named if name in flat[members[0]]},
            tuple(finished[index] for index in members),
        )
        for members in _alike(flat, named)
    ]


def _naming(flat: list[dict[str, Any]]) -> list[str]:
    """The settings that differ between runs, without those that follow from the others."""
    every = sorted({name for each in flat for name in each} - UNVARIED)
    differ = [name for name in every if len(_alike(flat, [name])) > 1]
    named = [name for name in differ if name not in PLANNED]
    for name in (name for name in PLANNED if name in differ):
        if len(_alike(flat, [*named, name])) > len(_alike(flat, named)):
            named.append(name)
    return named


def _alike(flat: list[dict[str, Any]], names: list[str]) -> list[list[int]]:
    """Numbers of the runs, those together that have the same values of `names`."""
    grouped: dict[str, list[int]] = {}
    for index, each in enumerate(flat):
        grouped.setdefault(canonical_json([each.get(name) for name in names]), []).append(index)
    return list(grouped.values())


def _row_object(row: Row, metric: str) -> dict[str, Any]:
    values = row.values(metric)
    spread = {"spread": round(stdev(values), 6)} if len(values) > 1 else {}
    return {
        "settings": row.settings,
        "epsilon": number(row.epsilon),
        "n": len(values),
        "mean": round(fmean(values), 6),
        **spread,
        "values": values,
        "seeds": [run.config.seed for run in row.runs],
        "seconds": round(fmean(float(run.report["timing"]["total_s"]) for run in row.runs), 2),
    }


def _curves(content: dict[str, Any]) -> list[Curve]:
    """A curve for each combination of everything but the epsilon that was asked for."""
    curves: dict[str, Curve] = {}
    for row in content["rows"]:
        others = {
            name: value
            for name, value in row["settings"].items()
            if name not in ("privacy.epsilon", "privacy.mode")
        }
        label = ", ".join(f"{name}={_told(value)}" for name, value in others.items())
        epsilon = math.inf if row["epsilon"] == "inf" else float(row["epsilon"])
        curve = curves.setdefault(label, Curve(label, []))
        curve.points.append((epsilon, row["mean"], row.get("spread", 0.0)))
    return list(curves.values())


def _flat(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            flat[prefix] = value

    walk("", json.loads(to_canonical(config)))
    return flat


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _natural(name: str) -> tuple[int, str]:
    """job-2 before job-10."""
    digits = "".join(filter(str.isdigit, name))
    return (int(digits or 0), name)
