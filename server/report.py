"""What a run leaves to read: `report.json`, `report.html`, and a line per round."""

import base64
import io
import json
import math
import platform
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypedDict

import typer
from jinja2 import UndefinedError
from rich.console import Console
from rich.table import Table

from common.cli import Invocation, emit_json, run_typer
from common.config import DataSource, PrivacyMode, config_hash
from common.durable import write_atomic
from common.errors import ConfigError, VerificationError
from common.privacy.accounting import (
    Epsilons,
    Event,
    check_agreement,
    epsilon_object,
    epsilons,
    number,
    shown,
)
from server.documents import render
from server.plan import NOT_PRIVATE, RELATION, RunPlan, is_private, not_private_reason
from server.rounds import RoundOutcome

LIBRARIES = ("coterie", "torch", "opacus", "flwr", "transformers", "peft", "dp-accounting")
REPORT_FIELDS = {
    *("task", "model", "tuning", "rounds", "engine", "privacy", "sites", "evaluation"),
    *("timing", "communication", "versions", "config_hash", "seed"),
}
"""What every report.json holds."""
LATE = (
    " Settings of a later run on the same books could follow what an earlier one released: the "
    "bound is the ledger's, by a Renyi filter; PLD would hold for settings fixed in advance."
)
NO_RUN = "holds no finished run (report.json and metrics.jsonl)"
SELECTION_REASONS = {
    DataSource.bbc_news: "the default hyperparameters were chosen by earlier runs on these "
    "training records, judged on a public validation split; what those runs revealed is not in "
    "epsilon",
    DataSource.csv: "if settings were chosen by looking at earlier runs on these records, what "
    "those runs revealed is not in epsilon",
}


class SiteLine(TypedDict):
    """A site's ledger after a round, as plain values."""

    head: str
    cap: float
    spent: float
    charged: list[list[float]]
    """[sigma, q, steps] of each distinct event ever charged."""


@dataclass(frozen=True)
class RoundLine:
    """One line of `metrics.jsonl`."""

    round: int
    metrics: dict[str, float]
    epsilon: float | str
    """Of the site that was charged most, or "inf"."""
    asked: tuple[str, ...]
    refused: dict[str, str]
    bytes_down: int
    bytes_up: int
    sites_s: float
    private: bool
    books: dict[str, SiteLine] = field(default_factory=dict)
    """What each site that answered says of its ledger."""


@dataclass(frozen=True)
class RunFacts:
    """What is known only once a run is over."""

    run_id: str
    total_s: float
    evaluation_records: int
    coordinator_key: str = ""
    """That signed the sites' ledger heads; empty where there are none."""


def round_line(
    outcome: RoundOutcome, metrics: dict[str, float], before: list[RoundLine], run_plan: RunPlan
) -> RoundLine:
    """The line of a round that just ended, after the lines `before` it."""
    asked = [*(line.asked for line in before), outcome.asked]
    most = max(_rounds_charged(asked).values())
    epsilon = run_plan.epsilon_by_round[most - 1]
    if run_plan.config.ledger:  # other runs are in its books, too
        known = [epsilon, *(books.spent for books in outcome.books.values())]
        epsilon = max([*known, *(float(line.epsilon) for line in before)])
    return RoundLine(
        round=outcome.round,
        private=is_private(run_plan.config),
        metrics=metrics,
        epsilon=number(epsilon),
        asked=outcome.asked,
        refused=outcome.refused,
        bytes_down=outcome.bytes_down,
        bytes_up=outcome.bytes_up,
        sites_s=round(outcome.sites_s, 3),
        books={
            name: SiteLine(
                head=str(books.head),
                cap=books.cap,
                spent=books.spent,
                charged=[[e.noise_multiplier, e.sample_rate, e.steps] for e in books.charged],
            )
            for name, books in outcome.books.items()
        },
    )


def build_report(run_plan: RunPlan, lines: list[RoundLine], facts: RunFacts) -> dict[str, Any]:
    """The content of `report.json`.

    Guarantee: a site's epsilon is that of every round it was *asked* in, answered or not, all
    composed together; the three accountants agree. Raises: VerificationError if they do not.
    """
    config = run_plan.config
    charged = _rounds_charged([line.asked for line in lines])
    prices = {name: _price(run_plan, lines, name) for name in charged}
    train_s = sum(line.sites_s for line in lines)
    return {
        "run_id": facts.run_id,
        "coordinator_key": facts.coordinator_key,
        "task": config.task.name.name,
        "model": config.model.name,
        "tuning": config.tuning.method.name,
        "rounds": len(lines),
        "engine": config.engine.name.name,
        "privacy": _privacy_section(
            run_plan,
            max(prices.values(), key=lambda price: price.pld),
            bound=max(_bound(prices[name], lines, name) for name in prices),
        ),
        "sites": [
            _site_section(name, prices[name], run_plan, lines)
            for name in sorted(charged, key=_natural)
        ],
        "evaluation": dict(lines[-1].metrics),
        "evaluation_split": config.evaluation.split.name,
        "evaluation_records": facts.evaluation_records,
        "timing": {
            "total_s": round(facts.total_s, 2),
            "train_s": round(train_s, 2),
            "overhead_s": round(facts.total_s - train_s, 2),
        },
        "communication": {
            "bytes_up": sum(line.bytes_up for line in lines),
            "bytes_down": sum(line.bytes_down for line in lines),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in LIBRARIES},
        },
        "config_hash": config_hash(config),
        "seed": config.seed,
    }


def _privacy_section(run_plan: RunPlan, worst: Epsilons, *, bound: float) -> dict[str, Any]:
    config = run_plan.config
    return {
        "mode": config.privacy.mode.name,
        "unit": "record",
        "relation": RELATION,
        "delta": config.privacy.delta,
        "epsilon": epsilon_object(worst),
        "bound": number(bound),
        "private": is_private(config),
        "private_reason": _private_reason(run_plan) + (LATE if bound > worst.pld else ""),
        "scope": "ledger" if config.ledger else "this_run",
        "selection_charged": False,
        "selection_reason": SELECTION_REASONS[config.data.source],
        "mechanism": asdict(run_plan.event),
        "clip_norm": config.privacy.clip_norm,
        "records": "counted" if config.data.records_counted else "declared",
    }


def _site_section(
    name: str, price: Epsilons, run_plan: RunPlan, lines: list[RoundLine]
) -> dict[str, Any]:
    """`epsilon` is of the whole ledger, where it lasts, and by the accountant that this ledger may
    use; without one there is no cap.
    """
    attempts, books = sum(line.asked.count(name) for line in lines), _last_books(lines, name)
    rounds = sum(name in line.asked for line in lines)
    return {
        "name": name,
        "epsilon": number(_bound(price, lines, name)),
        "cap": books["cap"] if books else "inf",
        "rounds": rounds,
        "repeated": attempts - rounds,
        "steps": attempts * run_plan.event.steps,
        "ledger_head": books["head"] if books else "",
        "not_answered": {
            str(line.round): line.refused[name] for line in lines if name in line.refused
        },
    }


def write_report(run_dir: Path, report: dict[str, Any], lines: list[RoundLine]) -> None:
    """Writes `report.json` and `report.html`, each whole or not at all."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(run_dir / "report.json", text + "\n")
    write_atomic(run_dir / "report.html", render_html(report, lines))


def read_report(run_dir: Path) -> tuple[dict[str, Any], list[RoundLine]]:
    """Reads back what a run wrote. Raises: VerificationError if it is missing or malformed."""
    try:
        report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
        text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [RoundLine(**json.loads(line)) for line in text.splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise VerificationError(f"{run_dir}: {NO_RUN}") from error
    if not isinstance(report, dict) or REPORT_FIELDS - set(report) or not lines:
        raise VerificationError(f"{run_dir}: {NO_RUN}")
    return report, lines


def report(invocation: Invocation) -> None:
    """Show a finished run again, beside its baseline if there is one."""

    def command(
        run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
        baseline: Annotated[
            Path | None, typer.Option(help="Folder of the same run with privacy=none.")
        ] = None,
    ) -> None:
        """Prints the closing table of a run and writes its report.html anew.

        RUN is the folder of a finished run.

        Example: coterie report runs/demo --baseline runs/baseline
        """
        content, lines = read_report(run)
        if baseline is not None:
            content["baseline"] = _baseline(baseline, content)
        try:
            write_report(run, content, lines)
            if not invocation.json:
                show_report(content, run, Console())
        except (KeyError, TypeError, ValueError, UndefinedError) as error:
            raise VerificationError(f"{run}: its report.json is not one of ours") from error
        if invocation.json:
            emit_json(content)

    run_typer(command, invocation)


def show_report(content: dict[str, Any], run_dir: Path, console: Console) -> None:
    """The closing table."""
    privacy = content["privacy"]
    stamp = "" if privacy["private"] else f" ({NOT_PRIVATE})"
    table = Table(title=f"Result{stamp}", title_justify="left")
    for column in ("site", "rounds", "steps", "epsilon", "cap"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for site in content["sites"]:
        price = shown(site["epsilon"])
        cap = str(site["cap"])
        table.add_row(site["name"], str(site["rounds"]), str(site["steps"]), price, cap)
    console.print(table)
    for site in content["sites"]:
        for reason, count in Counter(site.get("not_answered", {}).values()).items():
            console.print(f"{site['name']}: {reason} ({count} rounds)", highlight=False)
    metrics = _metrics(content["evaluation"])
    console.print(f"{metrics} on {content['evaluation_records']} public records", highlight=False)
    if "baseline" in content:
        beside = _metrics(content["baseline"]["evaluation"])
        console.print(f"without privacy: {beside}", highlight=False)
    console.print(f"{privacy['private_reason']}", highlight=False)
    console.print(
        f"{content['timing']['total_s']:.0f} s; everything is in {run_dir}", highlight=False
    )


def _metrics(evaluation: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in evaluation.items())


def render_html(content: dict[str, Any], lines: list[RoundLine]) -> str:
    """One self-contained page: no script, no address outside the file."""
    return render("report.html.jinja", report=content, lines=lines, plots=_plots(content, lines))


def _rounds_charged(asked: list[tuple[str, ...]]) -> dict[str, int]:
    """Rounds each site was asked in: a site that fell silent may have trained all the same."""
    charged: dict[str, int] = {}
    for cohort in asked:
        for name in cohort:
            charged[name] = charged.get(name, 0) + 1
    return charged


def _price(run_plan: RunPlan, lines: list[RoundLine], name: str) -> Epsilons:
    """Of what the site's ledger held when it last answered, and every round asked since.

    Never less than all rounds of this run that it was asked in, whatever its ledger says.
    """
    if not is_private(run_plan.config):
        return Epsilons(math.inf, math.inf, math.inf)
    asked = [run_plan.event for line in lines for asked in line.asked if asked == name]
    history: list[Event] = []
    for line in lines:
        if name in line.books:
            charged = line.books[name]["charged"]
            history = [Event(sigma, q, int(steps)) for sigma, q, steps in charged]
        else:  # it may have trained, and paid, all the same
            history += [run_plan.event] * line.asked.count(name)
    priced = [epsilons(events, run_plan.config.privacy.delta) for events in (asked, history)]
    for price in priced:
        check_agreement(price)
    return max(priced, key=lambda price: price.pld)


def _bound(price: Epsilons, lines: list[RoundLine], name: str) -> float:
    """Epsilon of a site that holds: PLD, or more where plans followed outputs (Renyi filter)."""
    books = _last_books(lines, name)
    return max(price.pld, books["spent"] if books else 0.0)


def _last_books(lines: list[RoundLine], name: str) -> SiteLine | None:
    return next((line.books[name] for line in reversed(lines) if name in line.books), None)


def _private_reason(run_plan: RunPlan) -> str:
    config = run_plan.config
    if not is_private(config):
        return not_private_reason(config)
    counted = (
        " The number of records was counted and sets the divisor: it is released, outside epsilon."
    )
    return (
        "Record-level DP-SGD inside each site, noise and sampling from OS entropy, composed over "
        "all rounds. Each site's own ledger charged every round before its data were read, and "
        "would have refused one beyond its cap."
        f"{counted if config.data.records_counted else ''}"
    )


def _baseline(folder: Path, beside: dict[str, Any]) -> dict[str, Any]:
    """What a report shows of the same run without privacy. Raises: ConfigError if it is not."""
    content, _ = read_report(folder)
    same = ("task", "model", "tuning", "evaluation_split", "evaluation_records")
    differs = [name for name in same if content.get(name) != beside.get(name)]
    if content["privacy"].get("mode") != PrivacyMode.none.name:
        differs.append("privacy.mode, which must be none")
    if differs:
        raise ConfigError(f"--baseline={folder}: is not that run without privacy: {differs[0]}")
    return {
        "evaluation": content["evaluation"],
        "privacy_mode": content["privacy"]["mode"],
        "config_hash": content["config_hash"],
        "seed": content["seed"],
    }


def _plots(content: dict[str, Any], lines: list[RoundLine]) -> list[dict[str, str]]:
    rounds = [line.round for line in lines]
    name = next(iter(lines[0].metrics))
    quality = {name: [line.metrics[name] for line in lines]}
    levels = {}
    if "baseline" in content:
        levels["without privacy"] = content["baseline"]["evaluation"][name]
    spent = [math.inf if line.epsilon == "inf" else float(line.epsilon) for line in lines]
    plots = [_plot(rounds, quality, levels, f"{name} on public records")]
    if all(map(math.isfinite, spent)):
        plots.append(_plot(rounds, {"epsilon spent": spent}, {}, "epsilon spent by a site"))
    return plots


def _plot(
    rounds: list[int], curves: dict[str, list[float]], levels: dict[str, float], title: str
) -> dict[str, str]:
    """One line plot as an SVG data address, with its description for those who cannot see it."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, for this page only
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for label, values in curves.items():
        axes.plot(rounds, values, marker="o", label=label)
    for label, value in levels.items():
        axes.axhline(value, linestyle="--", color="gray", label=label)
    axes.set(xlabel="round", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if levels:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    last = "; ".join(f"{label}: {values[-1]:.4f}" for label, values in curves.items())
    return {"src": f"data:image/svg+xml;base64,{encoded}", "alt": f"{title}, last round {last}"}


def _natural(name: str) -> tuple[str, int]:
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)
