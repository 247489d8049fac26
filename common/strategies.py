"""The strategies: how the updates of a round become the next global parameters, and what each asks.

Names and options only: both sides read them, and the sites need one, FedProx's. What they do is in
`server/strategy.py`, by Flower's own classes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from enum import Enum

OVER_TRIM = 0.5
"""A share that is trimmed at both ends leaves nothing from here on."""
KRUM_MARGIN = 3
"""Krum needs 2 f + 3 updates to tolerate f. Source: Blanchard et al. (2017), arXiv:1703.02757."""
MEDIAN_LEAST = 3
"""Of fewer updates a median tolerates none."""


class StrategyName(Enum):
    """One of Flower's strategies, by Flower's name for it."""

    fedavg = "FedAvg"
    fedprox = "FedProx"
    fedavgm = "FedAvgM"
    fedadam = "FedAdam"
    fedyogi = "FedYogi"
    fedadagrad = "FedAdagrad"
    fedmedian = "FedMedian"
    fedtrimmedavg = "FedTrimmedAvg"
    krum = "Krum"
    multikrum = "MultiKrum"


@dataclass(frozen=True)
class StrategyConfig:
    """How the updates of a round become the next global parameters.

    Whatever it is, it reads what sites released after their noise: no choice here changes a
    guarantee. An option that a strategy has no use for must be left out.
    """

    name: StrategyName = StrategyName.fedavg
    """Of conf/strategy."""
    server_learning_rate: float | None = None
    """Step size of the coordinator, on the change that the mean of the updates makes: fedavgm (1 is
    the mean itself), fedadam, fedyogi, fedadagrad (in units of parameter)."""
    momentum: float | None = None
    """Share of the last round's step that is taken again, in [0, 1): fedavgm."""
    beta_1: float | None = None
    """Decay of the mean of changes, in [0, 1): fedadam, fedyogi."""
    beta_2: float | None = None
    """Decay of the mean of squared changes, in [0, 1): fedadam, fedyogi."""
    tau: float | None = None
    """What is added to the root of that mean, in units of parameter: fedadam, fedyogi, fedadagrad.
    """
    proximal_mu: float | None = None
    """Pull of a site's parameters towards the round's global ones, after each step: fedprox."""
    trim_fraction: float | None = None
    """Share of the updates that is cut off at either end, value by value: fedtrimmedavg."""
    faulty_sites: int | None = None
    """f, the sites whose updates may be anything: krum, multikrum."""
    selected_sites: int | None = None
    """Updates that are averaged, those with the closest neighbours: multikrum."""

    @property
    def is_mean(self) -> bool:
        """Whether nothing but the mean of the updates is needed."""
        return self.name not in _ROBUST

    @property
    def fewest_updates(self) -> int:
        """Updates a round must have for what the strategy promises."""
        faulty = self.faulty_sites or 0
        if self.name is StrategyName.fedmedian:
            return MEDIAN_LEAST
        if self.name is StrategyName.fedtrimmedavg:
            least = math.ceil(1 / (self.trim_fraction or 1))
            return least + (self.tolerated(least) == 0)  # 1 / x * x may be below 1
        if self.name is StrategyName.krum:
            return 2 * faulty + KRUM_MARGIN
        if self.name is StrategyName.multikrum:
            return max(2 * faulty + KRUM_MARGIN, (self.selected_sites or 1) + faulty + 2)
        return 1

    def tolerated(self, updates: int) -> int:
        """How many of so many updates may be anything, and the others still bound the result."""
        if self.name is StrategyName.fedmedian:
            return max(0, (updates - 1) // 2)
        if self.name is StrategyName.fedtrimmedavg:
            return int((self.trim_fraction or 0) * updates)
        return self.faulty_sites or 0


_ROBUST = {
    StrategyName.fedmedian,
    StrategyName.fedtrimmedavg,
    StrategyName.krum,
    StrategyName.multikrum,
}
"""Strategies that compare the updates of a round with each other."""

_Rule = tuple[str, Callable[[float], bool]]
_RATE: _Rule = ("a finite number above 0", lambda value: 0 < value < math.inf)
_DECAY: _Rule = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_PULL: _Rule = ("a finite number above 0; 0 is strategy=fedavg", _RATE[1])
_TRIM: _Rule = ("above 0 and below 0.5", lambda value: 0 < value < OVER_TRIM)
_COUNT: _Rule = ("at least 1", lambda value: value >= 1)
_ADAPTIVE = {"server_learning_rate": _RATE, "tau": _RATE}
_DECAYING = {**_ADAPTIVE, "beta_1": _DECAY, "beta_2": _DECAY}

OPTIONS: dict[StrategyName, dict[str, _Rule]] = {
    StrategyName.fedavg: {},
    StrategyName.fedprox: {"proximal_mu": _PULL},
    StrategyName.fedavgm: {"server_learning_rate": _RATE, "momentum": _DECAY},
    StrategyName.fedadam: _DECAYING,
    StrategyName.fedyogi: _DECAYING,
    StrategyName.fedadagrad: _ADAPTIVE,
    StrategyName.fedmedian: {},
    StrategyName.fedtrimmedavg: {"trim_fraction": _TRIM},
    StrategyName.krum: {"faulty_sites": _COUNT},
    StrategyName.multikrum: {"faulty_sites": _COUNT, "selected_sites": _COUNT},
}
"""The options of each strategy, which must all be given, and what they must be."""


def faults(strategy: StrategyConfig, updates: int | None) -> Iterator[str]:
    """One clause for each rule that an option breaks.

    Args: updates: the fewest that a round may have and still count; None: not known.
    """
    options, chosen = OPTIONS[strategy.name], f"strategy={strategy.name.name}"
    wrong = False
    for each in fields(strategy):
        value = getattr(strategy, each.name)
        if each.name == "name" or (value is None and each.name not in options):
            continue
        if each.name not in options:
            yield f"strategy.{each.name}={value}: must be left out with {chosen}"
        elif value is None or not options[each.name][1](value):
            wrong = True
            yield f"strategy.{each.name}={value}: must be {options[each.name][0]}"
    if not wrong and updates is not None and updates < strategy.fewest_updates:
        yield (
            f"{chosen}: must have {strategy.fewest_updates} updates in every round, to tolerate "
            f"{strategy.tolerated(strategy.fewest_updates)} of them being anything; "
            f"federation.sites and federation.quorum promise {updates}"
        )
