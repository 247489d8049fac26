"""Events in, epsilon out. Events are the truth; an epsilon is computed, never added or stored.

Three accountants: PLD (Google's dp-accounting, the headline), RDP (dp-accounting, always an
upper bound and never crashes), PRV (Opacus, an independent code base, the cross-check).
Opacus's GDP accountant reports less than the truth and is not used.
Neighbours differ by adding or removing one record.
"""

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING

import numpy as np
from absl import logging as absl_logging

from common.errors import ConfigError, VerificationError

if TYPE_CHECKING:  # a second to import, which whoever prices nothing does not wait for
    from dp_accounting.dp_event import DpEvent

LIVE_INTERVAL = 1e-3
"""PLD discretisation while a run is planned; coarser is larger, never smaller."""
REPORT_INTERVAL = 1e-4
"""PLD discretisation of reported numbers."""
FINE_INTERVAL = 1e-5
"""PLD discretisation for very long histories, where even the report's grid drifts upwards."""
HOPELESS, MANY_EVENTS, MANY_STEPS = 300.0, 50, 10**7
"""An epsilon by RDP, different events, and steps of all of them, beyond which no grid is asked:
it would take minutes and gigabytes."""
COARSE_INTERVAL, FEW_STEPS = 1e-2, 100
"""PLD discretisation of a mixture, which is slow, of so few steps: above by 0.003 at most where
it was measured."""
HOPELESS_MIXTURE = 60.0
"""The same for a mixture, whose losses take ten times as long."""
SIGMA_DIGITS = 4
"""Decimals of a solved noise multiplier, rounded up."""
NEAR = 1e-5
"""Share of a sigma to which it is found before it is rounded up."""
FAR = 1e9
"""Prices so many times too high or too low are all the same to who looks for the right one."""
REMEMBERED_LENGTHS = range(2, 34)
"""Short transforms, more than scipy remembers."""
ROUNDING = 1e-9
"""Above an epsilon that is exact, for what floating point and its search may be off."""
NOISE, NOISE_OF_STEP = 5e-13, 1e-16
"""What a delta may be off by where losses are composed, by Fourier transforms: the larger of the
one, and of the other for each step. At most 2e-13 was seen, up to 10,000 steps; either way."""
MIN_SIGMA, MAX_SIGMA = 1e-3, 1e6
"""Below the one an epsilon is called infinite, above the other noise is priced as if it were it:
both on the safe side, and within what the libraries can compute.
"""

# dp-accounting warns of fractional RDP orders it drops; fewer orders only loosen the bound.
absl_logging.set_verbosity(absl_logging.ERROR)


@dataclass(frozen=True, order=True)
class Event:
    """`steps` steps of the Poisson-subsampled Gaussian mechanism."""

    noise_multiplier: float
    """Sigma in units of the clip bound; 0 means no noise."""
    sample_rate: float
    """Poisson rate q in [0, 1]."""
    steps: int
    """How often."""

    def __post_init__(self) -> None:
        """Refuses what no accountant can price. Raises: ConfigError."""
        if math.isnan(self.noise_multiplier) or self.noise_multiplier < 0:
            raise ConfigError(f"noise_multiplier={self.noise_multiplier}: must be 0 or more")
        if not 0 <= self.sample_rate <= 1:
            raise ConfigError(f"sample_rate={self.sample_rate}: must be between 0 and 1")
        if self.steps < 0:
            raise ConfigError(f"steps={self.steps}: must be 0 or more")

    @property
    def deviation(self) -> float:
        """Of the noise, as the libraries can compute with it."""
        return min(self.noise_multiplier, MAX_SIGMA)


@dataclass(frozen=True)
class Epsilons:
    """One history priced three ways. `prv` is None where Opacus's accountant failed."""

    pld: float
    rdp: float
    prv: float | None


def coalesce(events: Iterable[Event]) -> tuple[Event, ...]:
    """Equal mechanisms joined, free ones dropped, in a fixed order: what the price depends on.

    >>> coalesce([Event(1.0, 0.1, 2), Event(2.0, 0.1, 1), Event(1.0, 0.1, 3), Event(1.0, 0.0, 9)])
    (Event(noise_multiplier=1.0, sample_rate=0.1, steps=5), \
Event(noise_multiplier=2.0, sample_rate=0.1, steps=1))
    """
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        if event.sample_rate > 0 and event.steps > 0 and math.isfinite(event.noise_multiplier):
            steps[event.noise_multiplier, event.sample_rate] += event.steps
    return tuple(Event(sigma, q, count) for (sigma, q), count in sorted(steps.items()))


def epsilon_pld(events: Iterable[Event], delta: float, interval: float = REPORT_INTERVAL) -> float:
    """Upper bound of epsilon from privacy loss distributions; inf where nothing is private.

    Of a history without sampling, which is one Gaussian mechanism, it is exact but for `ROUNDING`.
    That of RDP where it is hopeless: others choose what is priced here, and must not choose
    how long it takes.

    >>> rounds = [Event(1.0, 0.02, 20)] * 5
    >>> round(epsilon_pld(rounds, 1e-5), 3), round(epsilon_pld(rounds[:1], 1e-5), 3)
    (1.427, 0.897)

    Source: Koskela et al. (2020), arXiv:1906.03049; of one Gaussian, Balle and Wang (2018),
    arXiv:1805.06530; Google dp-accounting.
    """
    history = coalesce(events)
    _check_delta(delta)
    if not history or _unprotected(history):
        return math.inf if history else 0.0
    if _hopeless(history, delta):
        return _epsilon_rdp(history, delta, None)
    return _epsilon_pld(history, delta, interval)


@functools.lru_cache(maxsize=1024)
def _epsilon_pld(history: tuple[Event, ...], delta: float, interval: float) -> float:
    from common.privacy import losses  # noqa: PLC0415 - imports dp-accounting: a second

    if all(event.sample_rate == 1 for event in history):
        return losses.epsilon_of_gaussians(history, delta) + ROUNDING
    surely = delta - _noise(history)
    if surely <= 0:  # below what such sums can tell
        return _epsilon_rdp(history, delta, None)
    with _transforms_forgotten():
        return float(losses.composed(history, interval).get_epsilon_for_delta(surely))


def _noise(history: tuple[Event, ...]) -> float:
    """By how much the delta of a history that is composed on a grid may be too small."""
    return max(NOISE, NOISE_OF_STEP * sum(event.steps for event in history))


def deltas_pld(events: Iterable[Event], epsilons: Sequence[float]) -> list[float]:
    """Upper bounds of the delta of a history at each of some epsilons, on the coarse grid.

    >>> [round(delta, 4) for delta in deltas_pld([Event(1.0, 1.0, 1)], [0.0, 1.0, 2.0])]
    [0.3829, 0.1269, 0.0209]

    Raises: ConfigError for a history that nothing protects.
    """
    history = coalesce(events)
    if not history or _unprotected(history):
        raise ConfigError("events: none, or without noise; there is no curve")
    from common.privacy import losses  # noqa: PLC0415 - imports dp-accounting: a second

    with _transforms_forgotten():
        together = losses.composed(history, LIVE_INTERVAL)
        deltas = [float(together.get_delta_for_epsilon(epsilon)) for epsilon in epsilons]
    return [min(1.0, delta + _noise(history)) for delta in deltas]


def epsilon_rdp(events: Iterable[Event], delta: float, order: float | None = None) -> float:
    """Upper bound of epsilon from Renyi divergences; inf where nothing is private.

    Args: order: the one order to use; by default whichever of a grid is best for this history.
    Source: Mironov et al. (2019), arXiv:1908.10530; Google dp-accounting.
    """
    history = coalesce(events)
    _check_delta(delta)
    if not history or _unprotected(history):
        return math.inf if history else 0.0
    return _epsilon_rdp(history, delta, order)


@functools.lru_cache(maxsize=4096)
def _epsilon_rdp(history: tuple[Event, ...], delta: float, order: float | None) -> float:
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415 - a second

    accountant = RdpAccountant() if order is None else RdpAccountant([order])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # overflow at orders that do not win
        for event in history:
            accountant.compose(_as_dp_event(event), event.steps)
        return float(accountant.get_epsilon(delta))


def epsilon_prv(events: Iterable[Event], delta: float) -> float | None:
    """Opacus's upper bound from privacy random variables; None where that code fails.

    Its discretisation is known to fail at some settings (microsoft/prv_accountant 42), so
    None is a warning and never a verdict. Source: Gopi et al. (2021), arXiv:2106.02848.
    """
    history = coalesce(events)
    _check_delta(delta)
    if not history or _unprotected(history):
        return math.inf if history else 0.0
    if _hopeless(history, delta):
        return None
    from opacus.accountants import PRVAccountant  # noqa: PLC0415 - imports torch: seconds

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sample_rate, e.steps) for e in history]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            epsilon = float(accountant.get_epsilon(delta))
    except (RuntimeError, ValueError, OverflowError, ZeroDivisionError, MemoryError):
        return None
    return epsilon if math.isfinite(epsilon) else None


def epsilon_of_group(events: Iterable[Event], size: int, delta: float) -> float:
    """Upper bound of epsilon for `size` records that come and go together, on the coarse grid.

    Each is drawn by itself, so a step may see any number of them: the sum moves by j clip bounds
    with the binomial probability of j.

    >>> history = [Event(1.1, 0.01, 1000)]
    >>> [round(epsilon_of_group(history, size, 1e-5), 2) for size in (1, 2)]
    [1.52, 3.29]

    Source: Google dp-accounting, `MixtureOfGaussiansDpEvent`; Choquette-Choo et al. (2024),
    arXiv:2310.15526.
    """
    history = coalesce(events)
    _check_delta(delta)
    if not history or _unprotected(history):
        return math.inf if history else 0.0
    alone = [replace(event, noise_multiplier=event.noise_multiplier / size) for event in history]
    # As if all were always drawn together with the chance that any is: above the mixture.
    likely = [replace(each, sample_rate=1 - (1 - each.sample_rate) ** size) for each in alone]
    above = epsilon_rdp(likely, delta)
    if above > HOPELESS_MIXTURE or _hopeless(history, delta):
        return above
    try:
        return min(above, _epsilon_of_group(history, size, delta))
    except RecursionError:  # losses too small for the library, which bisects them
        return above


@functools.lru_cache(maxsize=64)
def _epsilon_of_group(history: tuple[Event, ...], size: int, delta: float) -> float:
    from common.privacy import losses  # noqa: PLC0415 - imports dp-accounting: a second

    surely = delta - _noise(history)
    if surely <= 0:
        return math.inf
    few = sum(event.steps for event in history) <= FEW_STEPS
    interval = COARSE_INTERVAL if few else LIVE_INTERVAL
    with _transforms_forgotten():
        return float(
            losses.composed_of_group(history, size, interval).get_epsilon_for_delta(surely)
        )


def epsilons(events: Iterable[Event], delta: float) -> Epsilons:
    """Prices a history with all three accountants, at report precision."""
    return _epsilons(coalesce(events), delta)


@functools.lru_cache(maxsize=64)
def _epsilons(history: tuple[Event, ...], delta: float) -> Epsilons:
    pld, prv = epsilon_pld(history, delta), epsilon_prv(history, delta)
    if prv is not None and pld > prv:  # many steps: the grid's rounding up has added up
        pld = min(pld, epsilon_pld(history, delta, FINE_INTERVAL))
    return Epsilons(pld, epsilon_rdp(history, delta), prv)


def check_agreement(priced: Epsilons) -> None:
    """Refuses numbers of which one must be wrong.

    Rule: RDP >= PLD, PLD <= PRV + 0.001, and PRV - PLD <= 0.02 + 0.001 epsilon, where PRV
    could be computed. Raises: VerificationError.
    """
    pld, rdp, prv = priced.pld, priced.rdp, priced.prv
    if math.isinf(pld):
        agree = math.isinf(rdp) and (prv is None or math.isinf(prv))
    else:
        agree = rdp >= pld - 1e-6
        if prv is not None:
            agree = agree and pld <= prv + 1e-3 and prv - pld <= 0.02 + 1e-3 * pld
    if not agree:
        raise VerificationError(f"the accountants disagree: {priced}; no number can be trusted")


def epsilon_object(priced: Epsilons) -> dict[str, float | str]:
    """JSON form of a price: infinity is "inf", a failed cross-check is "unavailable"."""
    return {
        "pld": number(priced.pld),
        "rdp": number(priced.rdp),
        "prv": "unavailable" if priced.prv is None else number(priced.prv),
    }


def number(value: float) -> float | str:
    """A JSON number, or "inf"."""
    return "inf" if math.isinf(value) else value


def shown(epsilon: float | str) -> str:
    """An epsilon as people read it: rounded up, so that it is never too small.

    >>> shown(2.99911), shown(0.5), shown(math.inf), shown("unavailable")
    ('3.000', '0.500', 'inf', 'unavailable')
    """
    if isinstance(epsilon, str) or math.isinf(epsilon):
        return str(epsilon)
    return str(Decimal(epsilon).quantize(Decimal("0.001"), rounding=ROUND_CEILING))


def within(events: Sequence[Event], *, epsilon: float, delta: float) -> bool:
    """Whether a history costs at most `epsilon`; the fine grid is asked only if the coarse one
    says no, since either is an upper bound.
    """
    return any(
        epsilon_pld(events, delta, interval) <= epsilon
        for interval in (LIVE_INTERVAL, REPORT_INTERVAL)
    )


PRICED_ROUNDS = 100
"""Rounds of a run that are priced each by itself: of more the prices would take minutes."""


def epsilon_by_round(event: Event, rounds: int, delta: float) -> tuple[float, ...]:
    """Epsilon spent after each of `rounds` rounds that cost `event` each, on the coarse grid.

    Of more than `PRICED_ROUNDS` rounds so many are priced, the last one among them; between, the
    price of the next one stands, which is no smaller.

    >>> [round(e, 3) for e in epsilon_by_round(Event(1.0, 0.02, 20), 5, 1e-5)]
    [0.897, 1.074, 1.209, 1.324, 1.427]
    """
    prices: list[float] = []
    for number in range(1, min(rounds, PRICED_ROUNDS) + 1):
        done = number * rounds // min(rounds, PRICED_ROUNDS)
        price = epsilon_pld([replace(event, steps=event.steps * done)], delta, LIVE_INTERVAL)
        prices.extend([price] * (done - len(prices)))
    return tuple(prices)


@functools.lru_cache(maxsize=1024)
def solve_noise_multiplier(
    epsilon: float, delta: float, sample_rate: float, steps: int, beside: tuple[Event, ...] = ()
) -> float:
    """The smallest sigma, rounded up, at which `steps` steps cost at most `epsilon`, together
    with whatever is released `beside` them.

    Guarantee: epsilon_pld at LIVE or REPORT precision is <= `epsilon`, and within 1 % of it
    unless the rounding of sigma is coarser than that.

    >>> solve_noise_multiplier(3.0, 1e-4, 0.25, 40)
    2.1742

    Raises: ConfigError if no finite noise is enough.
    """

    def price(sigma: float, interval: float) -> float:
        return epsilon_pld([Event(sigma, sample_rate, steps), *beside], delta, interval)

    high = 1.0
    while price(high, LIVE_INTERVAL) > epsilon:
        high *= 2
        if high > MAX_SIGMA:
            raise ConfigError(f"privacy.epsilon={epsilon:g}: no noise reaches it in {steps} steps")
    low = high / 2
    while low > MIN_SIGMA and price(low, LIVE_INTERVAL) <= epsilon:
        low, high = low / 2, low
    known = _Prices(lambda s: price(s, LIVE_INTERVAL), epsilon)
    known.close_in(low, high)
    sigma = _bisect(known.enough, low, high)
    if price(sigma, LIVE_INTERVAL) > epsilon:  # prices rose with sigma somewhere, by rounding
        sigma = _bisect(lambda s: price(s, LIVE_INTERVAL) <= epsilon, low, high)
    # A grid rounds the loss of a step up by one interval at most, and may give too much away.
    rounded_up = (steps + sum(each.steps for each in beside)) * LIVE_INTERVAL
    close = 0.99 * epsilon
    if price(sigma, LIVE_INTERVAL) - rounded_up < close and price(sigma, REPORT_INTERVAL) < close:
        sigma = _bisect(lambda s: price(s, REPORT_INTERVAL) <= epsilon, sigma / 2, sigma, 1e-3)
    return sigma


class _Prices:
    """Which sigma is enough, priced only where no price so far tells: they fall as sigma grows."""

    def __init__(self, price: Callable[[float], float], epsilon: float) -> None:
        self._price, self._epsilon = price, epsilon
        self._too_little, self._enough = 0.0, math.inf

    def enough(self, sigma: float) -> bool:
        """Whether the price of `sigma` is at most epsilon."""
        if self._too_little < sigma < self._enough:
            self._priced(sigma)
        return sigma >= self._enough

    def close_in(self, low: float, high: float) -> None:
        """Prices a few between, until those that tell are `NEAR` each other.

        In logarithms the price is nearly a line, so that Brent's method (1973) needs half a dozen
        where halving needs fourteen.
        """

        def beyond(exponent: float) -> float:
            share = self._priced(math.exp(exponent)) / self._epsilon
            return math.log(min(max(share, 1 / FAR), FAR))  # neither 0 nor inf

        if self.enough(low):
            return
        from scipy import optimize  # noqa: PLC0415 - half a second

        found: float = optimize.brentq(beyond, math.log(low), math.log(high), xtol=NEAR)
        for beside in (found - NEAR, found + NEAR):
            self.enough(math.exp(beside))

    def _priced(self, sigma: float) -> float:
        price = self._price(sigma)
        if price <= self._epsilon:
            self._enough = min(self._enough, sigma)
        else:
            self._too_little = max(self._too_little, sigma)
        return price


def _bisect(
    enough: Callable[[float], bool], low: float, high: float, relative: float = 1e-4
) -> float:
    """Smallest sigma in (low, high] that is `enough`, rounded up; `enough(high)` must hold."""
    while high - low > relative * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    scale = 10.0**SIGMA_DIGITS
    return math.ceil(high * scale) / scale


def _as_dp_event(event: Event) -> "DpEvent":
    """One step of it, as dp-accounting names it."""
    from dp_accounting import dp_event  # noqa: PLC0415 - a second

    noise = dp_event.GaussianDpEvent(event.deviation)
    if event.sample_rate == 1:
        return noise
    return dp_event.PoissonSampledDpEvent(event.sample_rate, noise)


@contextmanager
def _transforms_forgotten() -> Iterator[None]:
    """Afterwards scipy keeps nothing of the transforms made inside.

    It keeps tables for the last 16 lengths of each kind, and a price has lengths of its own: 4 MB
    for every round of a run. Short ones take their place.
    """
    from scipy import fft  # noqa: PLC0415 - whoever prices nothing does not wait for it

    try:
        yield
    finally:
        for length in REMEMBERED_LENGTHS:
            fft.fft(np.zeros(length, np.complex128))
            fft.rfft(np.zeros(length))


def _hopeless(history: tuple[Event, ...], delta: float) -> bool:
    many = len(history) > MANY_EVENTS or sum(event.steps for event in history) > MANY_STEPS
    # One order is quick, and never below the best of all.
    bounds = (_epsilon_rdp(history, delta, order) for order in (2.0, None))
    return many or all(bound > HOPELESS for bound in bounds)


def _unprotected(history: tuple[Event, ...]) -> bool:
    return any(event.noise_multiplier < MIN_SIGMA for event in history)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta}: must be between 0 and 1, both excluded")
