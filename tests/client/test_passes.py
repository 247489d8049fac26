"""The bet on shuffled records: it seldom wins against sound coins, and soon against a shuffle."""

import math

import numpy as np
import pytest

from client.passes import Passes

SOUND = [(0, 0.5), (1, 0.5), (3, 1.0), (5, 0.9), (30, 1 / 30), (42, 0.5), (300, 0.01), (300, 0.5)]


@pytest.mark.parametrize(("units", "rate"), SOUND)
def test_against_sound_coins_a_fortune_is_as_rare_as_it_is_large(units, rate):
    """Over whole histories, at any time: of 400 at odds of 1/20 at most 20 are expected, and 36
    would be seen once in two thousand tries; seeds are fixed.
    """
    won = 0
    for trial in range(400):
        draw, passes, least = np.random.default_rng([units, trial]), Passes(rate), 1.0
        for _ in range(30):
            passes.read(np.flatnonzero(draw.random(units) < rate), units=units)
            least = min(least, passes.odds)
        won += least <= 0.05
    assert won < 36


@pytest.mark.parametrize(("units", "rate"), [(4, 0.3), (3, 0.4)])
def test_no_bet_wins_on_the_average(units, rate):
    """Exactly: over all samples of two steps the fortune's mean is at most one."""
    subsets = [np.flatnonzero([at >> bit & 1 for bit in range(units)]) for at in range(1 << units)]

    def odds_of(sample):
        return rate ** len(sample) * (1 - rate) ** (units - len(sample))

    mean = 0.0
    for first in subsets:
        for second in subsets:
            for third in subsets:
                passes = Passes(rate)
                for sample in (first, second, third):
                    passes.read(sample, units=units)
                fortune = (math.exp(passes._sizes) + math.exp(passes._passes)) / 2
                mean += odds_of(first) * odds_of(second) * odds_of(third) * fortune
    assert mean <= 1 + 1e-9
    assert mean > 0.1  # and it does bet


def test_a_rate_of_one_draws_everybody_and_nobody_else_may_come():
    passes = Passes(1.0)
    for _ in range(50):
        passes.read(np.arange(7), units=7)
    assert passes.odds == 1.0
    passes.read(np.arange(6), units=7)
    passes.read(np.arange(6), units=7)
    assert passes.odds == 0.0


def test_the_remainder_of_a_pass_is_known_beforehand():
    """Ten in batches of four: the last two of a pass follow from the others."""
    draw, passes, odds = np.random.default_rng(0), Passes(0.4), []
    for _ in range(3):
        order = draw.permutation(10)
        for at in (0, 4, 8):
            passes.read(order[at : at + 4], units=10)
            odds.append(passes.odds)
    assert odds[2] < 0.05 * odds[1]
    assert odds[-1] < 1e-8


def test_other_records_begin_a_pass_of_their_own():
    passes = Passes(0.5)
    for units in (10, 12, 10):
        passes.read(np.arange(units // 2), units=units)
    assert passes.odds > 0.001
