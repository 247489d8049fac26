"""One run, several honest numbers: against whom, for which unit, and what must hold for each."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from common.privacy.accounting import (
    LIVE_INTERVAL,
    Event,
    coalesce,
    epsilon_of_group,
    epsilon_pld,
    number,
)
from common.privacy.mechanism import is_private
from server.plan import RunPlan
from server.record import RoundLine
from server.spending import Spending

GROUP = 2
"""Records of one person that a report prices as an example."""
FEW = 6
"""Different histories of which every pair is priced."""


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
    """With one step a round, the mean of updates is one noisy sum, whose noise is that of all. With
    several, later steps of a site depend on its own noise alone; and where updates are compared
    instead, a new model may be that of one site.
    """
    config, delta = run_plan.config, run_plan.config.privacy.delta
    if not config.strategy.is_mean:
        epsilon = _alone(run_plan, lines)
        why = "Where updates are compared and not averaged, no smaller number is proved."
    elif run_plan.event.steps > 1:
        epsilon = _alone(run_plan, lines)
        why = "With several local steps a round, no smaller number is proved."
    else:
        epsilon = epsilon_pld(_averaged(run_plan, lines), delta, LIVE_INTERVAL)
        why = "The noise of all sites protects each."
    return Guarantee(
        "whoever sees the models of this run and nothing else",
        f"one {config.privacy.unit}",
        number(epsilon),
        f"Holds if the coordinator shows nobody a single update and every site is honest. {why}",
    )


def _alone(run_plan: RunPlan, lines: Sequence[RoundLine]) -> float:
    """Of the worst site, each round once: what is sent again is the same, or was never seen."""
    rounds = Counter(name for line in lines for name in set(line.asked))
    histories = {
        replace(event, steps=event.steps * number_of)
        for name, number_of in rounds.items()
        for event in [run_plan.of(name).event]
    }
    delta = run_plan.config.privacy.delta
    return max(epsilon_pld([history], delta, LIVE_INTERVAL) for history in histories)


def _averaged(run_plan: RunPlan, lines: Sequence[RoundLine]) -> list[Event]:
    """A history that is no better than that of any site.

    In a mean with weights w, the noise of a round has a deviation of sqrt(sum of (w sigma)^2), and
    a record of a site moves it by that site's w: the least ratio of a round is that of the largest
    w. A site in k rounds has no worse than the k least of these.
    """
    heard = [set(line.asked) - set(line.refused) for line in lines]
    rounds = Counter(name for names in heard for name in names)
    ratios = []
    for names in heard:
        weights = {name: run_plan.weight_of(name) for name in sorted(names)}
        noise = [w * run_plan.of(name).event.noise_multiplier for name, w in weights.items()]
        ratios.append(math.hypot(*noise) / max(weights.values(), default=1.0))
    most = max(rounds.values(), default=len(lines))
    return [replace(run_plan.event, noise_multiplier=ratio) for ratio in sorted(ratios)[:most]]


def _two_records(spent: dict[str, Spending], delta: float) -> Guarantee:
    epsilon = max(epsilon_of_group(each.history, GROUP, delta) for each in spent.values())
    return Guarantee(
        "the coordinator, the other sites, whoever sees every update",
        f"{GROUP} records of one person at one site",
        number(epsilon),
        "By PLD, for settings fixed in advance: sampling may draw both records in one step.",
    )


def _two_sites(spent: dict[str, Spending], delta: float, unit: str) -> Guarantee:
    return Guarantee(
        "the coordinator, the other sites, whoever sees every update",
        "one record at each of two sites" if unit == "record" else "one person at two sites",
        number(_of_two([coalesce(each.history) for each in spent.values()], delta)),
        "By PLD, for settings fixed in advance. That records at different sites are of different "
        "people is an assumption: no site can see another's.",
    )


def _of_two(histories: Sequence[tuple[Event, ...]], delta: float) -> float:
    """Of the two sites that are worst together; of many different histories something above."""
    if len(histories) > 1 and len(set(histories)) <= FEW:
        twice = sorted(each for each, sites in Counter(histories).items() for _ in range(sites)[:2])
        pairs = {(*one, *other) for one, other in combinations(twice, 2)}
        return max(epsilon_pld(pair, delta, LIVE_INTERVAL) for pair in pairs)
    # Of each mechanism the two highest numbers of steps.
    steps: dict[tuple[float, float], list[int]] = {}
    for history in histories:
        for event in history:
            steps.setdefault((event.noise_multiplier, event.sample_rate), []).append(event.steps)
    both = [Event(sigma, q, sum(sorted(each)[-GROUP:])) for (sigma, q), each in steps.items()]
    return epsilon_pld(both, delta, LIVE_INTERVAL)
