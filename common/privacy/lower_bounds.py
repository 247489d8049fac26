"""Lower bounds of epsilon from guesses: what an audit has shown, and at which confidence.

An audit puts *canaries* into a mechanism, each by a fair coin, and guesses from what was released
which of them were there. Guesses too good for the claimed epsilon falsify the claim; guesses that
are not show nothing, since another test might do better. No number here is an estimate of epsilon,
and none is ever proof of privacy. Neighbours differ by adding or removing one record.

| bound | holds where | source |
|---|---|---|
| `gaussian_bound` | scores of canaries are independent, and privacy is that of a Gaussian | \
Nasr et al. (2023), arXiv:2302.07956; Dong et al. (2019), arXiv:1905.02383 |
| `one_run_bound` | always: canaries of one run may disturb each other | \
Steinke, Nasr, Jagielski (2023), arXiv:2305.08846 |
| `f_dp_bound` | the same, and the claim is the curve of a Gaussian | \
Mahloujifar et al. (2024), arXiv:2410.22235 |
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from common.privacy.accounting import number

CONFIDENCE = 0.95
"""Of a result: what it says of a sound mechanism is wrong in at most one of twenty audits."""
PILOT_SHARE = 0.2
"""Of the canaries choose where to cut, and are not counted afterwards."""
THRESHOLDS = 64
"""Places at which a pilot tries to cut."""
WORTH = 0.5
"""Standard deviations by which another place must promise more than the middle."""
SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
"""Of the canaries, the surest ones, on which a guess may be dared; all where nothing promises more,
which leaves the ceiling high."""
MOST_EPSILON = 700.0
"""Beyond it exp(epsilon) is no float64; no audit of fewer than 10^100 canaries comes near."""
FALSIFIED, NOT_FALSIFIED = "FALSIFIED", "NOT FALSIFIED"
VERDICTS = (FALSIFIED, NOT_FALSIFIED)
"""There is no third: an audit never verifies."""

INDEPENDENT = ("gaussian", "f_dp")
"""Estimators for one Gaussian step, of which no canary's score disturbs another's."""
ONE_RUN = ("one_run", "f_dp")
"""For a run whose privacy the curve of a Gaussian covers closely; else `one_run` alone."""
SLACK = 1e-9
"""Delta at which a curve is cut off, and how much is granted at every epsilon instead."""
MOST_STRETCH = 1.5
"""Beyond it a cover is too wide for `f_dp` to be worth its share of the confidence."""

Scores = NDArray[np.float64]
Coins = NDArray[np.bool_]


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The delta at which the Gaussian mechanism N(mu, 1) against N(0, 1) has this epsilon.

    Source: Balle & Wang (2018), arXiv:1805.06530, theorem 8.
    """
    if mu <= 0:
        return 0.0
    over = special.ndtr(mu / 2 - epsilon / mu)
    under = math.exp(epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu)))
    return max(0.0, float(over) - under)


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Epsilon of mu-Gaussian privacy at `delta`.

    >>> round(epsilon_of_mu(1.0, 1e-5), 3), epsilon_of_mu(0.0, 1e-5)
    (4.377, 0.0)
    """
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while high < MOST_EPSILON and gaussian_delta(high, mu) > delta:
        high = min(2 * high, MOST_EPSILON)
    return _first(lambda epsilon: gaussian_delta(epsilon, mu) <= delta, 0.0, high)


@lru_cache(maxsize=4096)
def mu_of_epsilon(epsilon: float, delta: float) -> float:
    """The mu whose Gaussian privacy has this epsilon at `delta`; one over its sigma.

    >>> round(epsilon_of_mu(mu_of_epsilon(3.0, 1e-5), 1e-5), 6)
    3.0
    """
    high = 1.0
    while gaussian_delta(epsilon, high) <= delta:
        high *= 2
    return _first(lambda mu: gaussian_delta(epsilon, mu) > delta, 0.0, high)


@dataclass(frozen=True)
class Cover:
    """How a Gaussian's curve must be widened to allow all that a mechanism allows."""

    stretch: float = 1.0
    """Its mu is so many times that of the Gaussian with the same epsilon at the same delta."""
    slack: float = 0.0
    """Beside it, so much delta at every epsilon."""


EXACT = Cover()
"""Of a mechanism that is a Gaussian."""


def gaussian_cover(curve: Sequence[tuple[float, float]], epsilon: float, delta: float) -> Cover:
    """The narrowest cover that a mechanism's curve shows to be wide enough.

    Guarantee: at every epsilon from 0 on, not only at the points of the curve, the widened
    Gaussian allows at least the mechanism's delta. Both fall as epsilon grows: between two points
    the mechanism's is at most that of the first, the Gaussian's at least that of the second; and
    beyond the last point the slack, which is the delta there, is enough by itself.
    Args: curve: (epsilon, upper bound of delta) of the mechanism, both ways of neighbours, from
    epsilon 0 on in ascending order; epsilon, delta: one point of it, by which covers are named.
    Source: a curve of deltas and a trade-off function are one thing, Dong et al. (2019),
    arXiv:1905.02383, propositions 2.12 and 2.13.
    """
    assert curve[0][0] == 0.0
    slack = curve[-1][1]
    needed = [
        mu_of_epsilon(upper, own - slack) for (_, own), (upper, _) in pairwise(curve) if own > slack
    ]
    return Cover(max(1.0, max(needed, default=0.0) / mu_of_epsilon(epsilon, delta)), slack)


def clopper_pearson(errors: int, trials: int, significance: float) -> float:
    """The largest error rate at which so few errors are not rarer than `significance`.

    Source: Clopper & Pearson (1934), doi:10.1093/biomet/26.4.404.
    """
    if errors >= trials:
        return 1.0
    return float(special.betaincinv(errors + 1, trials - errors, 1.0 - significance))


def gaussian_bound(
    misses: int,
    present: int,
    false_alarms: int,
    absent: int,
    *,
    delta: float,
    significance: float,
) -> float:
    """Lower bound of epsilon from the errors of one threshold chosen beforehand.

    Args: misses: of `present` canaries that were there; false_alarms: of `absent` ones that were
    not.
    """
    rates = (
        clopper_pearson(misses, present, significance / 2),
        clopper_pearson(false_alarms, absent, significance / 2),
    )
    # Better than guessing neither bound may be one half; else there is nothing to invert.
    mu = -float(special.ndtri(rates[0]) + special.ndtri(rates[1]))
    return epsilon_of_mu(mu, delta) if math.isfinite(mu) and mu > 0 else 0.0


def one_run_odds(m: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound on how likely an (epsilon, delta) mechanism allows so many correct guesses.

    Source: Steinke, Nasr, Jagielski (2023), arXiv:2305.08846, theorem 5.2 and appendix D.
    """
    if guesses == 0:
        return 1.0
    rate = float(special.expit(epsilon))
    tail = _at_least(correct, guesses, rate)
    if delta == 0:
        return tail
    fewer = np.arange(1, correct + 1)
    between = special.bdtrc(correct - fewer - 1.0, guesses, rate) - tail
    slack = float(np.max(between / fewer, initial=0.0))
    return min(1.0, tail + slack * 2 * m * delta)


def one_run_bound(
    m: int, guesses: int, correct: int, *, delta: float, significance: float
) -> float:
    """The largest epsilon that so many correct guesses reject; 0 if none."""

    def is_likely(epsilon: float) -> bool:
        return one_run_odds(m, guesses, correct, epsilon, delta) > significance

    return _rejected(is_likely)


def f_dp_bound(
    m: int,
    guesses: int,
    correct: int,
    *,
    delta: float,
    significance: float,
    cover: Cover = EXACT,
) -> float:
    """The same, where the claim is the whole trade-off curve of a Gaussian with this epsilon.

    Args: cover: by how much that curve is widened first; what is rejected then is rejected of all
    that it covers.
    Source: Mahloujifar et al. (2024), arXiv:2410.22235, algorithm 3.
    """
    if guesses == 0 or delta == 0:
        return 0.0

    def is_likely(epsilon: float) -> bool:
        mu = cover.stretch * mu_of_epsilon(epsilon, delta)
        right, wrong = significance * correct / m, significance * (guesses - correct) / m
        for left in range(correct - 1, -1, -1):
            # What was likely under one coin can have become so little likely under the other.
            least = max(wrong, _least_likely(right, mu, cover.slack))
            if least == wrong:
                break  # neither changes any more
            right = min(1.0, right + left / (guesses - left) * (least - wrong))
            wrong = least
        return right + wrong <= guesses / m

    return _rejected(is_likely)


def _least_likely(likely: float, mu: float, slack: float) -> float:
    """How likely an event is at least under one coin that is so likely under the other, where the
    trade-off between errors is f(a + slack) - slack, f that of a Gaussian.
    """
    return float(special.ndtr(special.ndtri(max(0.0, likely - slack)) - mu)) - slack


@dataclass(frozen=True)
class Cut:
    """Where scores are cut, and how many guesses are dared: decided before they are counted."""

    threshold: float
    """Where errors are counted: a canary that scores more is held to have been there."""
    middle: float
    """Where guesses turn from one side to the other, the surest ones far from it."""
    share: float
    """Of the canaries, those farthest from the middle are guessed."""


@dataclass(frozen=True)
class Bounds:
    """What one set of canaries shows, and what it could have shown at best."""

    m: int
    """Canaries that were counted."""
    found: Mapping[str, float]
    """Lower bound by each estimator."""
    best: Mapping[str, float]
    """What each would have said had every guess been right."""

    @property
    def lower_bound(self) -> float:
        """The better of them; it holds at `CONFIDENCE`, as each holds at its share of it."""
        return max(self.found.values())

    @property
    def ceiling(self) -> float:
        """The best bound this test could have reached."""
        return max(self.best.values())


def bounds_of(
    scores: Scores,
    present: Coins,
    *,
    delta: float,
    by: Sequence[str],
    confidence: float = CONFIDENCE,
    cover: Cover = EXACT,
) -> Bounds:
    """Lower bounds from the scores of canaries, the first of which only choose where to cut.

    Guarantee: where what each estimator needs is so (see the module), the larger bound exceeds the
    true epsilon with probability at most 1 - `confidence`: the estimators share what may go wrong.
    Args: scores: (n,) larger where a canary seems to have been there; present: (n,) whether it was,
    each by a fair coin; by: names of estimators, such as `INDEPENDENT`; cover: of the mechanism,
    where it is no Gaussian, for `f_dp`.
    """
    pilot = round(PILOT_SHARE * len(scores))
    estimators = {name: _ESTIMATORS[name] for name in by}
    share = (1.0 - confidence) / len(estimators)
    chosen = _cut(scores[:pilot], present[:pilot], delta=delta, m=len(scores) - pilot)
    counted = _Counted(scores[pilot:], present[pilot:], chosen, cover)
    found = {name: estimate(counted, delta, share) for name, estimate in estimators.items()}
    ideal = _Counted(
        np.where(counted.present, 1.0, -1.0), counted.present, Cut(0.0, 0.0, chosen.share), cover
    )
    best = {name: estimate(ideal, delta, share) for name, estimate in estimators.items()}
    return Bounds(len(counted.scores), found, best)


@dataclass(frozen=True)
class _Counted:
    """Scores that are guessed by, and how the guesses did."""

    scores: Scores
    present: Coins
    cut: Cut
    cover: Cover

    @property
    def errors(self) -> tuple[int, int, int, int]:
        """Misses of so many present, false alarms of so many absent."""
        above = self.scores > self.cut.threshold
        there = self.present
        return (
            int((~above & there).sum()),
            int(there.sum()),
            int((above & ~there).sum()),
            int((~there).sum()),
        )

    @cached_property
    def guessed(self) -> tuple[int, int]:
        """How many of the surest are guessed, and how many of these guesses are right."""
        guesses = max(1, round(self.cut.share * len(self.scores)))
        surest = np.argsort(-np.abs(self.scores - self.cut.middle), kind="stable")[:guesses]
        right = (self.scores[surest] > self.cut.middle) == self.present[surest]
        return guesses, int(right.sum())


def _gaussian(counted: _Counted, delta: float, significance: float) -> float:
    return gaussian_bound(*counted.errors, delta=delta, significance=significance)


def _f_dp(counted: _Counted, delta: float, significance: float) -> float:
    return f_dp_bound(
        len(counted.scores),
        *counted.guessed,
        delta=delta,
        significance=significance,
        cover=counted.cover,
    )


def _one_run(counted: _Counted, delta: float, significance: float) -> float:
    return one_run_bound(
        len(counted.scores), *counted.guessed, delta=delta, significance=significance
    )


_Estimate = Callable[[_Counted, float, float], float]
_ESTIMATORS: dict[str, _Estimate] = {"gaussian": _gaussian, "f_dp": _f_dp, "one_run": _one_run}


def _cut(scores: Scores, present: Coins, *, delta: float, m: int) -> Cut:
    """What promises most on a pilot. Args: m: canaries that will be counted."""
    if present.all() or not present.any():
        return Cut(0.0, 0.0, 1.0)
    middle = (float(np.median(scores[present])) + float(np.median(scores[~present]))) / 2
    surest = np.argsort(-np.abs(scores - middle), kind="stable")
    right = (scores[surest] > middle) == present[surest]

    def promised(share: float) -> float:
        guesses = max(1, round(share * len(scores)))
        rate = (float(right[:guesses].sum()) + 1) / (guesses + 2)
        dared = max(1, round(share * m))
        return f_dp_bound(m, dared, round(rate * dared), delta=delta, significance=1 - CONFIDENCE)

    def separation(threshold: float) -> float:
        above = scores > threshold
        errors = ((~above & present).sum(), (above & ~present).sum())
        kinds = (present.sum(), (~present).sum())
        rates = [(float(e) + 1) / (float(n) + 2) for e, n in zip(errors, kinds, strict=True)]
        most = [clopper_pearson(round(rate * m / 2), m // 2, 1 - CONFIDENCE) for rate in rates]
        return -float(special.ndtri(most).sum())

    ordered = np.sort(scores)
    between = np.linspace(0, len(ordered) - 1, THRESHOLDS).astype(int)[:-1]
    elsewhere = max(((ordered[between] + ordered[between + 1]) / 2).tolist(), key=separation)
    # The middle is best where scores are Gaussian; a pilot alone would lose half of that by luck.
    better = separation(elsewhere) > separation(middle) + WORTH
    return Cut(elsewhere if better else middle, middle, max(SHARES, key=promised))


def _at_least(correct: int, guesses: int, rate: float) -> float:
    """P(Binomial(guesses, rate) >= correct)."""
    return float(special.bdtrc(correct - 1.0, guesses, rate)) if correct > 0 else 1.0


def _rejected(is_likely: Callable[[float], bool]) -> float:
    """The largest epsilon at which what was seen is too unlikely; 0 if it is likely at 0."""
    if is_likely(0.0):
        return 0.0
    high = 1.0
    while not is_likely(high):
        if high >= MOST_EPSILON:
            return MOST_EPSILON
        high = min(2 * high, MOST_EPSILON)
    # From below: a bound is never rounded up.
    return _first(is_likely, 0.0, high, above=False)


def _first(holds: Callable[[float], bool], low: float, high: float, *, above: bool = True) -> float:
    """Where `holds` begins, between `low`, where it does not, and `high`, to 1e-9 relative.

    Args: above: whether the end at which it holds is returned, or the other.
    """
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high if above else low


@dataclass(frozen=True)
class Audit:
    """One result of an audit, as it is printed, kept and signed."""

    design: str
    """What was tried, in a few words."""
    bounds: Bounds
    claimed_epsilon: float
    """Of what was tried, at `delta`."""
    delta: float
    confidence: float = CONFIDENCE
    site: str = ""
    """Whose release it was; empty where it was nobody's."""

    @property
    def verdict(self) -> str:
        """`FALSIFIED` or `NOT FALSIFIED`: nothing else can be said."""
        return FALSIFIED if self.bounds.lower_bound > self.claimed_epsilon else NOT_FALSIFIED

    @property
    def could_falsify(self) -> bool:
        """Whether the best result this test could have had would have."""
        return self.bounds.ceiling > self.claimed_epsilon

    def content(self) -> dict[str, Any]:
        """What `--json` gives."""
        site = {"site": self.site} if self.site else {}
        return {
            **site,
            "design": self.design,
            "lower_bound": self.bounds.lower_bound,
            "claimed_epsilon": number(self.claimed_epsilon),
            "delta": self.delta,
            "confidence": self.confidence,
            "m": self.bounds.m,
            "ceiling": self.bounds.ceiling,
            "could_falsify": self.could_falsify,
            "verdict": self.verdict,
            "bounds": dict(self.bounds.found),
            "ceilings": dict(self.bounds.best),
        }


def told(audits: Sequence[Audit]) -> str:
    """What must be said beside verdicts of tests that no result would have made others."""
    if all(audit.could_falsify for audit in audits):
        return ""
    return (
        "A ceiling is not above the claim beside it: no result of that test could have falsified "
        "it. A larger test, or one of a smaller epsilon, can say more."
    )
