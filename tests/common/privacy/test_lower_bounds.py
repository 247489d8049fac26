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
    bounds_of,
    clopper_pearson,
    epsilon_of_mu,
    f_dp_bound,
    gaussian_bound,
    gaussian_covers,
    gaussian_delta,
    mu_of_epsilon,
    one_run_bound,
    one_run_odds,
)

DELTA, ODDS = 1e-5, 0.05
EPSILONS = (1.0, 3.0, 8.0)


def game(epsilon, m, draw, *, delta=DELTA):
    """Scores and coins of canaries that do not disturb each other, under the exact Gaussian."""
    present = draw.random(m) < 0.5
    return present + draw.normal(size=m) / mu_of_epsilon(epsilon, delta), present


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
        present = draw.random(6250) < 0.5
        scores = present + 0.5 * draw.normal(size=6250) / mu_of_epsilon(epsilon, DELTA)
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


def test_a_gaussian_covers_itself_and_the_main_job_and_not_what_leaks_more():
    """Where it does not, a run is judged without the bound that assumes a Gaussian's curve."""

    def curve(event, epsilon):
        at = [float(each) for each in np.linspace(0.0, epsilon, 9)]
        return [*zip(at, deltas_pld([event], at), strict=True)]

    for event, delta in ((Event(1.3, 1.0, 1), 1e-5), (Event(2.9222, 0.5, 20), 1e-4)):
        epsilon = epsilon_pld([event], delta)
        assert gaussian_covers(curve(event, epsilon), epsilon, delta)
        assert not gaussian_covers(curve(event, epsilon), 0.5 * epsilon, delta)
    rare = Event(0.5, 0.01, 1)  # seldom drawn, and then hardly hidden
    assert not gaussian_covers([(0.0, 1.0), *curve(rare, 1.0)], 1.0, 1e-2)
