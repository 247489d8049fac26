"""What a run leaves to read: `report.json`, `report.html`, and a line per round."""

import json
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import UndefinedError
from rich.console import Console
from rich.table import Table

from common.cli import Invocation, emit_json, run_typer
from common.config import Config, DataSource, PrivacyMode, config_hash
from common.durable import write_atomic
from common.errors import ConfigError, VerificationError
from common.privacy.accounting import epsilon_object, number, shown
from common.privacy.mechanism import count_event
from server.count import Counted
from server.documents import named, render
from server.guarantees import guarantees
from server.plan import (
    NOT_PRIVATE,
    RELATION,
    RunPlan,
    is_private,
    not_private_reason,
    unit_facts,
)
from server.plots import plots_of
from server.record import RoundLine, read_lines
from server.spending import Spending, rounds_asked, spendings

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
SELECTION_REASON = (
    "if settings were chosen by looking at earlier runs on these records, what those runs revealed "
    "is not in epsilon"
)
SELECTION_REASONS = {
    DataSource.bbc_news: "the default hyperparameters were chosen by earlier runs on these "
    "training records, judged on a public validation split; what those runs revealed is not in "
    "epsilon",
    DataSource.digits: "the settings of experiment=digits were chosen by earlier runs on these "
    "training records, judged on a public validation split; what those runs revealed is not in "
    "epsilon",
    DataSource.toy: "made examples, of nobody",
}
"""Where more is known than `SELECTION_REASON` says."""


@dataclass(frozen=True)
class RunFacts:
    """What is known only once a run is over."""

    run_id: str
    total_s: float
    evaluation_records: int
    coordinator_key: str = ""
    """That signed the sites' ledger heads; empty where there are none."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """What the metrics of the public records do not say: by class, by group, texts written."""
    left_out: Mapping[str, Any] | None = None
    """How the model does at the site that did not train, if one was left out."""
    sections: Mapping[str, Any] = field(default_factory=dict)
    """What a simulation knows of the run beside, by section."""
    resumed_after: tuple[int, ...] = ()
    """Rounds after which the run was interrupted and taken up again."""


@dataclass(frozen=True)
class OfficerCall:
    """What was asked for on the command line; empty where nothing was."""

    given: tuple[str, ...]
    output: Path | None
    key: str
    officer: str
    head: str
    witness: str
    witness_pass: Path | None
    sign: Path | None
    check: Path | None


def build_report(
    run_plan: RunPlan, lines: list[RoundLine], facts: RunFacts, counted: Counted | None = None
) -> dict[str, Any]:
    """The content of `report.json`.

    Guarantee: a site's epsilon is that of everything it was *asked*, answered or not, all
    composed together; the three accountants agree. Raises: VerificationError if they do not.
    """
    config, count = run_plan.config, count_event(run_plan.config)
    asked = rounds_asked(run_plan, lines)
    if counted is not None and count is not None:
        asked.append(counted.question(count))
    spent = spendings(run_plan, asked)
    return {
        "run_id": facts.run_id,
        "coordinator_key": facts.coordinator_key,
        "task": config.task.name.name,
        "model": config.model.name,
        "tuning": config.tuning.method.name,
        "strategy": config.strategy.name.name,
        "rounds": len(lines),
        **({"resumed_after": list(facts.resumed_after)} if facts.resumed_after else {}),
        "engine": config.engine.name.name,
        "privacy": _privacy_section(run_plan, lines, spent),
        "sites": [_site_section(name, spent[name], run_plan, lines, counted) for name in spent],
        "evaluation": dict(lines[-1].metrics),
        "evaluation_split": config.evaluation.split.name,
        "evaluation_records": facts.evaluation_records,
        "evaluation_detail": dict(facts.detail),
        **({"evaluation_left_out": dict(facts.left_out)} if facts.left_out else {}),
        **({"evaluation_private": counted.section()} if counted and counted.books else {}),
        **facts.sections,
        **_cost_sections(lines, facts),
        "config_hash": config_hash(config),
        "seed": config.seed,
    }


def _cost_sections(lines: list[RoundLine], facts: RunFacts) -> dict[str, Any]:
    train_s = sum(line.sites_s for line in lines)
    return {
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
    }


def _privacy_section(
    run_plan: RunPlan, lines: list[RoundLine], spent: dict[str, Spending]
) -> dict[str, Any]:
    config = run_plan.config
    worst = max((spending.price for spending in spent.values()), key=lambda price: price.pld)
    bound = max(spending.bound for spending in spent.values())
    return {
        "mode": config.privacy.mode.name,
        **unit_facts(config),
        "relation": RELATION,
        "delta": config.privacy.delta,
        "epsilon": epsilon_object(worst),
        "bound": number(bound),
        "private": is_private(config),
        "private_reason": _private_reason(run_plan) + (LATE if bound > worst.pld else ""),
        "scope": "ledger" if config.books_last else "this_run",
        "selection_charged": False,
        "selection_reason": SELECTION_REASONS.get(config.data.source, SELECTION_REASON),
        "mechanism": asdict(run_plan.event),
        "clip_norm": config.privacy.clip_norm,
        "records": "counted" if config.data.records_counted else "declared",
        "guarantees": guarantees(run_plan, lines, spent),
    }


def _site_section(
    name: str,
    spent: Spending,
    run_plan: RunPlan,
    lines: list[RoundLine],
    counted: Counted | None,
) -> dict[str, Any]:
    """`epsilon` is of the whole ledger, where it lasts, and by the accountant that this ledger may
    use; without one there is no cap.
    """
    attempts = sum(line.asked.count(name) for line in lines)
    rounds, books = sum(name in line.asked for line in lines), spent.books
    return {
        "name": name,
        "epsilon": number(spent.bound),
        "cap": books["cap"] if books else "inf",
        "rounds": rounds,
        "repeated": attempts - rounds,
        "steps": attempts * run_plan.event.steps,
        "noise_multiplier": run_plan.of(name).event.noise_multiplier,
        "ledger_head": books["head"] if books else "",
        **_late(name, run_plan.config, lines),
        "not_answered": {
            **{str(line.round): line.refused[name] for line in lines if name in line.refused},
            **({"count": counted.refused[name]} if counted and name in counted.refused else {}),
        },
    }


def _late(name: str, config: Config, lines: list[RoundLine]) -> dict[str, int]:
    """How many updates of a site came after their round had closed without them."""
    if config.federation.enough == 1:
        return {}
    return {"late": sum(line.late.count(name) for line in lines)}


def write_report(run_dir: Path, report: dict[str, Any], lines: list[RoundLine]) -> None:
    """Writes `report.html`, then `report.json`: whole each, and the last that a run leaves."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(run_dir / "report.html", render_html(report, lines))
    write_atomic(run_dir / "report.json", text + "\n")


def read_report(run_dir: Path) -> tuple[dict[str, Any], list[RoundLine]]:
    """Reads back what a run wrote. Raises: VerificationError if it is missing or malformed."""
    try:
        report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
        lines = read_lines(run_dir)
    except (OSError, ValueError, TypeError) as error:
        raise VerificationError(f"{run_dir}: {NO_RUN}") from error
    if not isinstance(report, dict) or REPORT_FIELDS - set(report) or not lines:
        raise VerificationError(f"{run_dir}: {NO_RUN}")
    return report, lines


def report(invocation: Invocation) -> None:
    """Show a finished run again, or report to a privacy officer from the sites' ledgers."""

    def command(  # noqa: PLR0917 - options, which are given by name
        given: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="RUN|LEDGER...",
                help="Folder of a finished run; for an officer, exported ledgers or FILE[#SITE].",
            ),
        ] = None,
        baseline: Annotated[
            Path | None, typer.Option(help="Folder of the same run with privacy=none.")
        ] = None,
        reader: Annotated[
            str, typer.Option("--for", help="Whom it is for: officer, or nobody in particular.")
        ] = "",
        output: Annotated[
            Path | None, typer.Option(help="Officer: folder to write to; else RUN, or LEDGER's.")
        ] = None,
        key: Annotated[
            str, typer.Option(help="Officer: the site's public key; of --check: the signer's.")
        ] = "",
        officer: Annotated[str, typer.Option(help="Officer: your own public key.")] = "",
        head: Annotated[
            str, typer.Option(help="Officer: SEQ:HASH that the one ledger must contain.")
        ] = "",
        witness: Annotated[str, typer.Option(help="Officer: HOST:PORT of a witness.")] = "",
        witness_pass: Annotated[
            Path | None, typer.Option("--pass", help="Folder that `coterie witness admit` made.")
        ] = None,
        sign: Annotated[
            Path | None, typer.Option(help="Officer: private key file that signs page and JSON.")
        ] = None,
        check: Annotated[
            Path | None, typer.Option(help="Check a signature that --sign made, and nothing else.")
        ] = None,
    ) -> None:
        """Prints the closing table of a run and writes its report.html anew; or, for an officer,
        writes officer-report.html and .json from the ledgers alone, and signs them.

        RUN is the folder of a finished run. For an officer, ledgers alone will do; of a deployed
        run give the sites' exports beside RUN.

        Example: coterie report runs/demo --baseline runs/baseline

        Example: coterie report --for officer runs/demo --sign officer.key

        Example: coterie report --for officer ward-1.ledger --key 3b6a... --output reports

        Example: coterie report --check runs/demo/officer-report.sig --key 90c5...
        """
        if reader not in {"", "officer"}:
            raise ConfigError(f"--for={reader}: must be officer, or left out")
        if check is not None or reader:
            asked = OfficerCall(
                tuple(given or ()),
                output=output,
                key=key,
                officer=officer,
                head=head,
                witness=witness,
                witness_pass=witness_pass,
                sign=sign,
                check=check,
            )
            _for_officer(invocation, asked)
            return
        if given is None or len(given) != 1:
            raise ConfigError("RUN: give the folder of one finished run")
        _again(invocation, Path(given[0]), baseline)

    run_typer(command, invocation)


def _for_officer(invocation: Invocation, asked: OfficerCall) -> None:
    from server.officer_files import answer  # noqa: PLC0415 - imports this module

    answer(invocation, asked)


def _again(invocation: Invocation, run: Path, baseline: Path | None) -> None:
    content, lines = read_report(run)
    if baseline is not None:
        content["baseline"] = _baseline(baseline, content)
    try:
        write_report(run, content, lines)
        if not invocation.json:
            show_report(content, run, Console(markup=False))
    except (KeyError, TypeError, ValueError, UndefinedError) as error:
        raise VerificationError(f"{run}: its report.json is not one of ours") from error
    if invocation.json:
        emit_json(content)


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
            console.print(f"{site['name']}: {reason} ({count} times)", highlight=False)
    if "faults" in content:
        console.print(_faults_sentence(content["faults"]), highlight=False)
    metrics = _metrics(content["evaluation"])
    console.print(f"{metrics} on {content['evaluation_records']} public records", highlight=False)
    if "evaluation_private" in content:
        console.print(_counted_sentence(content["evaluation_private"]), highlight=False)
    if "evaluation_left_out" in content:
        console.print(_left_out_sentence(content["evaluation_left_out"]), highlight=False)
    if groups := content.get("evaluation_detail", {}).get("groups"):
        console.print(_groups_sentence(groups), highlight=False)
    if "baseline" in content:
        beside = _metrics(content["baseline"]["evaluation"])
        console.print(f"without privacy: {beside}", highlight=False)
    console.print(f"{privacy['private_reason']}", highlight=False)
    _show_guarantees(privacy.get("guarantees", []), console)
    if resumed := content.get("resumed_after"):
        console.print(f"{_resumed_sentence(resumed)}", highlight=False)
    console.print(
        f"{content['timing']['total_s']:.0f} s; everything is in {run_dir}", highlight=False
    )


def _resumed_sentence(rounds: list[int]) -> str:
    return (
        f"interrupted, and taken up again, after round {', '.join(map(str, rounds))}; the time "
        "lost by that is not counted"
    )


def _counted_sentence(counted: dict[str, Any]) -> str:
    return (
        f"right on {counted['accuracy']:.4f} (standard error of the noise "
        f"{counted['standard_error']:.4f}) of the sites' own training records, as "
        f"{counted['sites']} sites counted"
    )


def _left_out_sentence(found: dict[str, Any]) -> str:
    return (
        f"{_metrics(found['metrics'])} on {found['records']} records of {found['site']} "
        f"({NOT_PRIVATE}: {found['reason']})"
    )


def _faults_sentence(faults: dict[str, Any]) -> str:
    """What went wrong on purpose, and what that came to."""
    kinds = ", ".join(f"{name} {count}" for name, count in faults["counts"].items())
    heard = Counter(
        hit["outcome"] if hit["outcome"] in ("accepted", "repeated") else "not in its round"
        for hit in faults["injected"]
    )
    came = ", ".join(f"{count} {outcome}" for outcome, count in sorted(heard.items()))
    return (
        f"faults injected: {kinds or 'none'}{f' ({came})' if came else ''}; "
        f"{faults['clock_s']:.0f} s by the simulated clock"
    )


def _groups_sentence(groups: dict[str, Any]) -> str:
    """For whom the model works worst, as far as there are records enough to say."""
    if groups["worst"] is None:
        return (
            f"by {groups['column']}: fewer than two groups of {groups['fewest']} public records, "
            "none is compared"
        )
    values = {each["group"]: each["value"] for each in groups["groups"]}
    worst, best = groups["worst"], groups["best"]
    return (
        f"by {groups['column']}: {groups['metric']} worst for {named(worst)} "
        f"({values[worst]:.4f}), {groups['gap']:.4f} from {named(best)} ({values[best]:.4f})"
    )


def _show_guarantees(rows: list[dict[str, Any]], console: Console) -> None:
    if not rows:
        return
    table = Table(title="Against whom, and what", title_justify="left", show_lines=True)
    table.add_column("epsilon", justify="right")
    table.add_column("protects")
    table.add_column("against")
    table.add_column("because, and if")
    for row in rows:
        table.add_row(shown(row["epsilon"]), row["unit"], row["against"], row["sentence"])
    console.print(table)


def _metrics(evaluation: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in evaluation.items())


def render_html(content: dict[str, Any], lines: list[RoundLine]) -> str:
    """One self-contained page: no script, no address outside the file."""
    return render("report.html.jinja", report=content, lines=lines, plots=plots_of(content, lines))


def _private_reason(run_plan: RunPlan) -> str:
    config = run_plan.config
    if not is_private(config):
        return not_private_reason(config)
    counted = (
        " The number of records was counted and sets the divisor: it is released, outside epsilon."
    )
    return (
        f"{config.privacy.unit.capitalize()}-level DP-SGD inside each site, noise and sampling "
        "from OS entropy, composed over all rounds. Each site's own ledger charged every round "
        "before its data were read, and would have refused one beyond its cap."
        f"{_of_persons(config)}{counted if config.data.records_counted else ''}"
        f"{_of_closing(config)}"
    )


def _of_persons(config: Config) -> str:
    """What a bound for persons rests on."""
    if config.privacy.mode is not PrivacyMode.person:
        return ""
    return (
        f" A person takes part with at most {config.privacy.max_records_per_person} records, all "
        "or none of them in a step, and the noise covers them together. Assumed, and not checked: "
        "nobody has records at two sites, or under two ids; such a person's bounds add up."
    )


def _of_closing(config: Config) -> str:
    """Who pays where rounds ask more sites than they wait for."""
    if config.federation.enough == 1:
        return ""
    return (
        f" A round closed with the first updates (federation.enough={config.federation.enough:g}): "
        "every site that was asked is charged for it, whether its update was used or not."
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
