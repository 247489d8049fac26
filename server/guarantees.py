"""One run, several honest numbers: against whom, for which unit, and what must hold for each."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from common.privacy.accounting import (
    LIVE_INTERVAL,
    Event,
    coalesce,
    epsilon_of_group,
    epsilon_pld,
    number,
)
from server.plan import RunPlan, is_private
from server.record import RoundLine
from server.spending import Spending

GROUP = 2
"""Records of one person that a report prices as an example."""


@dataclass(frozen=True)
class Guarantee:
    """One number, and the sentence it cannot be read without."""

    against: str
    unit: str
    epsilon: float | str
    sentence: str


def guarantees(
    run_plan: RunPlan, lines: Sequence[RoundLine], spent: dict[str, Spending]
) -> list[dict[str, Any]]:
    """The trust models of a report, strongest claim first; none for a run that protects nothing.

    Each epsilon is of whichever sites are worst in it, at the run's delta, on the coarse grid,
    which is above.
    """
    if not is_private(run_plan.config):
        return []
    unit, delta = run_plan.config.privacy.unit, run_plan.config.privacy.delta
    rows = [_everything(spent, unit), _models_only(run_plan, lines)]
    if unit == "record":  # of persons the first row covers every record that was used
        rows.append(_two_records(spent, delta))
    return [asdict(row) for row in (*rows, _two_sites(spent, delta, unit))]


def _everything(spent: dict[str, Spending], unit: str) -> Guarantee:
    return Guarantee(
        "the coordinator, the other sites, whoever sees every update",
        f"one {unit}",
        number(max(each.bound for each in spent.values())),
        "Nobody outside the site is trusted: clipping and noise happen beside the data.",
    )


def _models_only(run_plan: RunPlan, lines: Sequence[RoundLine]) -> Guarantee:
    """With one step a round, a new model is one noisy sum: the noise of m sites adds up to
    sqrt(m) of one. With several, later steps of a site depend on its own noise alone.
    """
    config, event = run_plan.config, run_plan.event
    answered = [len(set(line.asked) - set(line.refused)) for line in lines]
    if event.steps > 1:
        averaged = [event] * len(lines)
        why = "With several local steps a round, no smaller number is proved."
    else:
        averaged = [
            replace(event, noise_multiplier=event.noise_multiplier * math.sqrt(sites))
            for sites in answered
        ]
        why = "The noise of all sites protects each."
    return Guarantee(
        "whoever sees the models of this run and nothing else",
        f"one {config.privacy.unit}",
        number(epsilon_pld(averaged, config.privacy.delta, LIVE_INTERVAL)),
        f"Holds if the coordinator shows nobody a single update and every site is honest. {why}",
    )


def _two_records(spent: dict[str, Spending], delta: float) -> Guarantee:
    epsilon = max(epsilon_of_group(each.history, GROUP, delta) for each in spent.values())
    return Guarantee(
        "the coordinator, the other sites, whoever sees every update",
        f"{GROUP} records of one person at one site",
        number(epsilon),
        "By PLD, for settings fixed in advance: sampling may draw both records in one step.",
    )


def _two_sites(spent: dict[str, Spending], delta: float, unit: str) -> Guarantee:
    """Of each mechanism the two highest numbers of steps: above what any two were charged."""
    steps: dict[tuple[float, float], list[int]] = {}
    for spending in spent.values():
        for event in coalesce(spending.history):
            steps.setdefault((event.noise_multiplier, event.sample_rate), []).append(event.steps)
    both = [Event(sigma, q, sum(sorted(each)[-GROUP:])) for (sigma, q), each in steps.items()]
    return Guarantee(
        "the coordinator, the other sites, whoever sees every update",
        "one record at each of two sites" if unit == "record" else "one person at two sites",
        number(epsilon_pld(both, delta, LIVE_INTERVAL)),
        "By PLD, for settings fixed in advance. That records at different sites are of different "
        "people is an assumption: no site can see another's.",
    )
