"""Lower bounds: valid on mechanisms whose epsilon is known, and as strong as the papers say."""

import math
from bisect import bisect_left

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from scipy import stats

from common.privacy.accounting import Event, deltas_pld, epsilon_pld
from common.privacy.lower_bounds import (
    INDEPENDENT,
    ONE_RUN,
    Audit,
    Bounds,
    Cover,
    bounds_of,
    clopper_pearson,
    epsilon_of_mu,
    f_dp_bound,
    gaussian_bound,
    gaussian_cover,
    gaussian_delta,
    mu_of_epsilon,
    one_run_bound,
    one_run_odds,
)
from simulations.run_audit import curve_of

from .games import DELTA, EPSILONS, game

ODDS = 0.05


# The Gaussian's curve.


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.7, 20.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
def test_the_epsilon_of_a_gaussian_is_that_of_another_code_base(sigma, delta):
    assert epsilon_of_mu(1 / sigma, delta) == pytest.approx(
        get_epsilon_gaussian(sigma, delta), abs=1e-6
    )


@pytest.mark.parametrize("epsilon", [0.01, *EPSILONS, 50.0])
def test_mu_and_epsilon_are_each_other_backwards(epsilon):
    assert epsilon_of_mu(mu_of_epsilon(epsilon, DELTA), DELTA) == pytest.approx(epsilon, abs=1e-6)
    assert gaussian_delta(epsilon, 0.0) == 0.0


# Each estimator.


def test_clopper_pearson_is_the_rate_at_which_so_few_errors_are_that_rare():
    for errors, trials in ((0, 100), (3, 100), (400, 1000)):
        rate = clopper_pearson(errors, trials, ODDS)
        assert stats.binom.cdf(errors, trials, rate) == pytest.approx(ODDS, abs=1e-9)
    assert clopper_pearson(5, 5, ODDS) == 1.0
    assert clopper_pearson(0, 0, ODDS) == 1.0


@pytest.mark.parametrize(("epsilon", "m"), [(1.0, 1000), (3.0, 1000), (8.0, 10**6)])
def test_randomised_response_is_rejected_at_the_promised_rate_and_not_less(epsilon, m):
    """The case in which the bound is tight: each answer is right with probability e/(1+e), by
    itself. The rate at which the truth is rejected is summed exactly from the binomial.
    """
    right = 1 / (1 + math.exp(-epsilon))
    rejected = bisect_left(
        range(m + 1),
        True,
        key=lambda v: one_run_bound(m, m, v, delta=0.0, significance=ODDS) > epsilon,
    )
    rate = stats.binom.sf(rejected - 1, m, right)
    assert 0.04 <= rate <= 0.05


def test_what_perfect_guesses_can_show_is_what_the_papers_methods_can():
    """Figures of an independent implementation, to the two digits that were kept of it."""
    best = {"delta": DELTA, "significance": ODDS / 2}
    all_right = one_run_bound(1000, 1000, 1000, delta=DELTA, significance=ODDS)
    assert all_right == pytest.approx(5.8, abs=0.05)
    assert one_run_bound(1000, 200, 200, **best) == pytest.approx(3.95, abs=0.01)
    assert f_dp_bound(1000, 200, 200, **best) == pytest.approx(6.59, abs=0.005)


def test_the_odds_of_the_one_run_bound_are_those_of_its_definition():
    """Theorem 5.2 of arXiv:2305.08846, term by term."""
    m, guesses, correct, epsilon, delta = 500, 80, 71, 1.3, 1e-3
    right = 1 / (1 + math.exp(-epsilon))
    tail = sum(stats.binom.pmf(v, guesses, right) for v in range(correct, guesses + 1))
    slack = max(
        sum(stats.binom.pmf(correct - i, guesses, right) for i in range(1, most + 1)) / most
        for most in range(1, correct + 1)
    )
    expected = tail + 2 * m * delta * slack
    assert one_run_odds(m, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)


def test_guesses_no_better_than_coins_show_nothing():
    best = {"delta": DELTA, "significance": ODDS}
    assert one_run_bound(1000, 1000, 500, **best) == 0.0
    assert f_dp_bound(1000, 1000, 500, **best) == 0.0
    assert f_dp_bound(1000, 0, 0, **best) == 0.0
    assert one_run_bound(1000, 0, 0, **best) == 0.0
    assert gaussian_bound(250, 500, 250, 500, **best) == 0.0
    assert gaussian_bound(0, 0, 0, 0, **best) == 0.0


@pytest.mark.parametrize("bound", [one_run_bound, f_dp_bound])
def test_more_right_guesses_never_show_less(bound):
    found = [bound(300, 100, v, delta=DELTA, significance=ODDS) for v in range(40, 101, 4)]
    assert found == sorted(found)
    assert found[-1] > 3


# All of it.


@pytest.mark.parametrize("by", [INDEPENDENT, ONE_RUN], ids=lambda by: by[0])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_bound_seldom_exceeds_the_truth_of_the_exact_gaussian(epsilon, by):
    """300 trials and more: `python -m benchmarks.audits`."""
    draw, trials = np.random.default_rng(int(epsilon)), 25
    bounds = [
        bounds_of(*game(epsilon, 1250, draw), delta=DELTA, by=by).lower_bound for _ in range(trials)
    ]
    over = sum(bound > epsilon for bound in bounds)
    assert over / trials <= ODDS + 3 * math.sqrt(ODDS * (1 - ODDS) / trials)
    assert max(bounds) > 0.1 * epsilon  # not by saying nothing


def test_half_the_noise_shows():
    draw = np.random.default_rng(0)
    for epsilon in EPSILONS:
        scores, present = game(epsilon, 6250, draw, noise=0.5)
        assert bounds_of(scores, present, delta=DELTA, by=INDEPENDENT).lower_bound > epsilon


def test_the_ceiling_is_above_every_bound_and_grows_with_the_canaries():
    draw = np.random.default_rng(0)
    few, many = (bounds_of(*game(8.0, n, draw), delta=DELTA, by=INDEPENDENT) for n in (1250, 6250))
    assert few.lower_bound < few.ceiling < many.ceiling
    assert (few.m, many.m) == (1000, 5000)
    assert set(few.found) == set(few.best) == {"gaussian", "f_dp"}


def test_scores_that_say_nothing_give_no_bound():
    present = np.random.default_rng(0).random(2000) < 0.5
    for scores in (np.zeros(2000), np.random.default_rng(1).normal(size=2000)):
        assert bounds_of(scores, present, delta=DELTA, by=INDEPENDENT).lower_bound < 0.2


def test_there_are_two_verdicts():
    def result(bound):
        return Audit("design", Bounds(100, {"a": bound}, {"a": 5.0}), 3.0, DELTA)

    assert result(2.9).verdict == result(3.0).verdict == "NOT FALSIFIED"
    assert result(3.1).verdict == "FALSIFIED"
    asked = {"lower_bound", "claimed_epsilon", "confidence", "m", "design", "ceiling", "verdict"}
    assert asked <= set(result(1.0).content())


EVENTS = {
    "a gaussian": (Event(1.3, 1.0, 1), 1e-5, 1.02),
    "the main job": (Event(2.9222, 0.5, 20), 1e-4, 1.05),
    "seldom drawn": (Event(1.1, 0.01, 1000), 1e-5, 1.1),
    "seldom drawn, and then hardly hidden": (Event(0.5, 0.01, 1), 1e-2, 1e3),
}


@pytest.mark.parametrize("name", EVENTS)
def test_a_cover_allows_all_that_a_run_allows_between_the_points_too(name):
    """Held against a curve twenty times as fine, up to far beyond where it was cut off."""
    event, delta, most = EVENTS[name]
    epsilon, curve = epsilon_pld([event], delta), curve_of([event])
    cover = gaussian_cover(curve, epsilon, delta)
    mu = cover.stretch * mu_of_epsilon(epsilon, delta)
    at = np.linspace(0.0, 1.2 * curve[-1][0], 20 * len(curve)).tolist()
    for each, own in zip(at, deltas_pld([event], at), strict=True):
        assert own <= gaussian_delta(each, mu) + cover.slack
    assert 1.0 <= cover.stretch <= most
    assert cover.slack <= 2e-9


def test_a_coarse_curve_makes_a_wide_cover_and_no_wrong_one():
    event, delta = EVENTS["the main job"][:2]
    epsilon, fine = epsilon_pld([event], delta), curve_of([event])
    coarse = [*fine[::100], fine[-1]]
    assert gaussian_cover(coarse, epsilon, delta).stretch > 1.1
    cut = gaussian_cover(fine[:256], epsilon, delta)  # the rest is granted instead
    assert cut.slack == fine[255][1] > 1e-5


def test_a_wider_cover_shows_less():
    asked = {"delta": DELTA, "significance": ODDS}
    covers = [Cover(), Cover(slack=1e-4), Cover(1.1), Cover(1.1, 1e-4), Cover(1.5, 1e-3)]
    found = [f_dp_bound(1000, 200, 195, **asked, cover=cover) for cover in covers]
    assert found[0] > found[1] > found[3]
    assert found[0] > found[2] > found[3] > found[4] > 0


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_guesses_at_a_subsampled_gaussian_are_seldom_better_than_its_cover_allows(rate):
    """The exact worst case of one step: the best guess at each canary, by likelihood."""
    event, delta, trials = Event(0.8, rate, 1), 1e-3, 60
    claimed = epsilon_pld([event], delta)
    cover = gaussian_cover(curve_of([event]), claimed, delta)
    draw, over = np.random.default_rng(0), 0
    for _ in range(trials):
        present = draw.random(1250) < 0.5
        drawn = present & (draw.random(1250) < rate)
        scores = drawn + 0.8 * draw.normal(size=1250)
        bound = bounds_of(scores, present, delta=delta, by=("f_dp",), cover=cover).lower_bound
        over += bound > claimed
    assert over / trials <= ODDS + 3 * math.sqrt(ODDS * (1 - ODDS) / trials)
