"""The content of `report.json`: what a run was, and what each site paid for it."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from common.config import Config, DataSource, PrivacyMode, config_hash
from common.privacy.accounting import epsilon_object, number
from common.privacy.mechanism import count_event, is_private
from server.count import Counted
from server.guarantees import guarantees
from server.plan import RELATION, RunPlan, not_private_reason, unit_facts
from server.record import RoundLine
from server.spending import Spending, rounds_asked, spendings

LIBRARIES = ("coterie", "torch", "opacus", "flwr", "transformers", "peft", "dp-accounting")
LATE = (
    " Settings of a later run on the same books could follow what an earlier one released: the "
    "bound is the ledger's, by a Renyi filter; PLD would hold for settings fixed in advance."
)
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
    attempts = sum(line.times_asked[name] for line in lines)
    rounds, books = sum(name in line.times_asked for line in lines), spent.books
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
