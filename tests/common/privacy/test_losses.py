"""Losses of a step are those of dp-accounting, whose own way is a call for each grid point."""

import math

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy.losses import deltas_of, losses_of_step

SIDES = st.sampled_from([AdjacencyType.ADD, AdjacencyType.REMOVE])
DEVIATIONS, RATES = st.floats(0.3, 50), st.floats(1e-4, 1 - 1e-9) | st.just(1.0)


@settings(max_examples=60, deadline=None)
@given(DEVIATIONS, RATES, SIDES)
def test_every_delta_is_the_librarys(deviation, rate, side):
    step = GaussianPrivacyLoss(deviation, sampling_prob=rate, adjacency_type=side)
    bounds = step.connect_dots_bounds()
    losses = np.linspace(bounds.epsilon_lower - 0.1, bounds.epsilon_upper + 0.1, 301)
    if rate < 1:  # where a loss ends, and a hair beside it
        edge = math.log1p(-rate)
        near = np.array([edge, np.nextafter(edge, 1), np.nextafter(edge, -1), edge + 1e-9])
        losses = np.concatenate([losses, near, -near])
    theirs = step.get_delta_for_epsilon(losses)
    assert deltas_of(step, deviation, losses) == pytest.approx(theirs, rel=1e-9, abs=1e-14)


@settings(max_examples=15, deadline=None)
@given(DEVIATIONS, RATES, st.integers(1, 200), st.sampled_from([1e-2, 1e-3]))
def test_what_steps_lose_together_is_the_librarys(deviation, rate, steps, interval):
    whole = from_gaussian_mechanism(
        deviation, sampling_prob=rate, value_discretization_interval=interval
    ).self_compose(steps)
    ours = losses_of_step(deviation, rate, interval).self_compose(steps)
    for delta in (1e-3, 1e-6):
        theirs = whole.get_epsilon_for_delta(delta)
        assert ours.get_epsilon_for_delta(delta) == pytest.approx(theirs, rel=1e-7, abs=1e-7)
    for epsilon in (0.1, 1.0, 8.0):
        theirs = whole.get_delta_for_epsilon(epsilon)
        assert ours.get_delta_for_epsilon(epsilon) == pytest.approx(theirs, rel=1e-7, abs=1e-10)
