"""Privacy losses of steps of the sampled Gaussian mechanism, rounded up to a grid.

Of one step it is what dp-accounting's `from_gaussian_mechanism` makes, by its own parts, but for
one: there each of the grid's points (a hundred thousand, or millions where there is little noise)
is a call in Python, here they are arrays. Source: Doroshenko et al. (2022), arXiv:2207.04380,
algorithm 1. `common.privacy.accounting` imports this late: dp-accounting takes a second.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from dp_accounting import get_epsilon_gaussian
from dp_accounting.pld import pld_pmf
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from numpy.typing import NDArray

from common.privacy.accounting import REPORT_INTERVAL, Event

Floats = NDArray[np.float64]
REMEMBERED_SIGMA = 0.5
"""Of less noise the losses of a step take many megabytes, and are made anew for each price."""


def epsilon_of_gaussians(history: Sequence[Event], delta: float) -> float:
    """Of steps that nothing samples, which are one Gaussian mechanism: exact, to rounding.

    Source: Balle and Wang (2018), arXiv:1805.06530.
    """
    with np.errstate(divide="ignore"):  # the logarithm of a delta of 0
        return float(get_epsilon_gaussian(_joined(history), delta))


def composed(history: Sequence[Event], interval: float) -> PrivacyLossDistribution:
    """What the steps of a history lose together."""
    together = pld.identity(interval)
    if whole := [event for event in history if event.sample_rate == 1]:
        together = losses_of_step(_joined(whole), 1.0, interval)
    for event in history:
        if event.sample_rate < 1:
            small = event.deviation >= REMEMBERED_SIGMA and interval >= REPORT_INTERVAL
            made = _remembered if small else losses_of_step
            step = made(event.deviation, event.sample_rate, interval)
            together = together.compose(step.self_compose(event.steps))
    return together


def composed_of_group(
    history: Sequence[Event], size: int, interval: float
) -> PrivacyLossDistribution:
    """The same for `size` records that come and go together, each drawn by itself."""
    together = pld.identity(interval)
    for event in history:
        q, sizes = event.sample_rate, range(size + 1)
        step = pld.from_mixture_gaussian_mechanism(
            standard_deviation=event.deviation,
            sensitivities=list(sizes),
            sampling_probs=[math.comb(size, j) * q**j * (1 - q) ** (size - j) for j in sizes],
            value_discretization_interval=interval,
        )
        together = together.compose(step.self_compose(event.steps))
    return together


def _joined(history: Sequence[Event]) -> float:
    """Deviation of the one Gaussian that these are: their precisions add up."""
    return 1 / math.sqrt(sum(event.steps / event.deviation**2 for event in history))


def losses_of_step(
    deviation: float, sample_rate: float, interval: float
) -> PrivacyLossDistribution:
    """Of a record that comes or goes, both ways, at a rate in (0, 1].

    Guarantee: no delta of one step is below the mechanism's own at that epsilon by more than 1e-15.
    Composing adds noise of Fourier transforms; see `common.privacy.accounting.NOISE`.

    >>> round(losses_of_step(1.0, 0.02, 1e-3).self_compose(100).get_epsilon_for_delta(1e-5), 3)
    1.427
    """
    removed = _on_grid(deviation, sample_rate, AdjacencyType.REMOVE, interval)
    if sample_rate == 1:
        return PrivacyLossDistribution(removed)
    added = _on_grid(deviation, sample_rate, AdjacencyType.ADD, interval)
    return PrivacyLossDistribution(removed, added)


_remembered = lru_cache(maxsize=8)(losses_of_step)
"""Most of the time of a price, and the same for every round of a run."""


def _on_grid(deviation: float, rate: float, side: AdjacencyType, interval: float) -> pld_pmf.PLDPmf:
    step = GaussianPrivacyLoss(deviation, sampling_prob=rate, adjacency_type=side)
    bounds = step.connect_dots_bounds()
    lowest = math.floor(bounds.epsilon_lower / interval)
    highest = math.ceil(bounds.epsilon_upper / interval)
    deltas = deltas_of(step, deviation, np.arange(lowest, highest + 1) * interval)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, lowest, highest, deltas)


def deltas_of(step: GaussianPrivacyLoss, deviation: float, losses: Floats) -> Floats:
    """The delta of a step of that deviation at some epsilons: `get_delta_for_epsilon`, at once."""
    rate, removes = step.sampling_prob, step.adjacency_type is AdjacencyType.REMOVE
    inside = np.full(losses.shape, fill_value=True)
    deltas = np.zeros_like(losses)
    if rate < 1:  # the loss of a step is bounded on one side
        edge = math.log1p(-rate)
        inside = losses > edge if removes else losses < -edge
        if removes:
            deltas[~inside] = -np.expm1(losses[~inside])
    cutoffs = _cutoffs(step, deviation, losses[inside])
    deltas[inside] = step.mu_upper_cdf(cutoffs) - np.exp(
        losses[inside] + step.mu_lower_log_cdf(cutoffs)
    )
    return np.clip(deltas, 0, 1)


def _cutoffs(step: GaussianPrivacyLoss, deviation: float, losses: Floats) -> Floats:
    """Where the privacy loss is as large as each of these: it falls as the output grows."""
    removes = step.adjacency_type is AdjacencyType.REMOVE
    whole = losses
    if step.sampling_prob < 1:
        whole = _unsampled(losses if removes else -losses, step.sampling_prob)
        whole = whole if removes else -whole
    return (-0.5 if removes else 0.5) - whole * deviation**2


def _unsampled(losses: Floats, rate: float) -> Floats:
    """log(1 + (exp(loss) - 1) / rate): the loss of a record that is drawn in every step; minus
    infinity at the edge, where rounding may have gone beyond it.
    """
    scaled = losses - math.log(rate)
    with np.errstate(divide="ignore"):
        return scaled + np.log1p(-np.minimum(np.exp(math.log(1 / rate - 1) - scaled), 1.0))
