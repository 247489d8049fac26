"""Privacy losses of one step of the sampled Gaussian mechanism, rounded up to a grid.

What dp-accounting's `from_gaussian_mechanism` makes, by its own parts, but for one: there each of
the grid's points (a hundred thousand, or millions where there is little noise) is a call in Python,
here they are arrays. Source: Doroshenko et al. (2022), arXiv:2207.04380, algorithm 1.
"""

import math

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from numpy.typing import NDArray

Floats = NDArray[np.float64]


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
