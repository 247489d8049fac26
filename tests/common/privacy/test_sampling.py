import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.privacy.noise import Randomness
from common.privacy.sampling import poisson_sample, records_of

ALPHA = 1e-7
RECORDS, STEPS, RATE = 100, 3000, 0.25


def draw(sample_rate=RATE):
    """(STEPS, RECORDS) who was in which step, on fresh entropy."""
    coins = Randomness.from_entropy()
    inside = np.zeros((STEPS, RECORDS), dtype=bool)
    for step in inside:
        step[poisson_sample(RECORDS, sample_rate=sample_rate, coins=coins)] = True
    return inside


def sizes_are_binomial(inside, rate):
    """Mean and dispersion of the sample sizes, at significance ALPHA each."""
    steps, records = inside.shape
    sizes = inside.sum(1)
    total = stats.binomtest(int(sizes.sum()), steps * records, rate).pvalue
    spread = float(((sizes - records * rate) ** 2).sum() / (records * rate * (1 - rate)))
    tail = min(stats.chi2.cdf(spread, steps), stats.chi2.sf(spread, steps))
    return bool(total > ALPHA and 2 * tail > ALPHA)


def test_each_record_is_in_with_the_sample_rate():
    counts = draw().sum(0)
    low, high = stats.binom.ppf([ALPHA / RECORDS, 1 - ALPHA / RECORDS], STEPS, RATE)
    assert low <= counts.min()
    assert counts.max() <= high


def test_sizes_are_as_dispersed_as_independent_coins_make_them():
    assert sizes_are_binomial(draw(), RATE)


def test_the_test_above_rejects_samples_of_fixed_size():
    """Shuffled batches are what most libraries draw, and no amplification was proved for them."""
    generator = np.random.default_rng(0)
    inside = np.zeros((STEPS, RECORDS), dtype=bool)
    for step in inside:
        step[generator.choice(RECORDS, int(RECORDS * RATE), replace=False)] = True
    assert not sizes_are_binomial(inside, RATE)


@pytest.mark.parametrize("wrong", [0.24, 0.26])
def test_the_test_above_rejects_a_wrong_rate(wrong):
    assert not sizes_are_binomial(draw(wrong), RATE)


def test_steps_are_independent():
    """A record drawn in one step is in the next no more and no less often than any other.

    Neighbouring pairs share a step, hence the second term of the variance.
    """
    inside = draw()
    both = int((inside[:-1] & inside[1:]).sum())
    pairs = (STEPS - 1) * RECORDS
    mean, q2 = pairs * RATE**2, RATE**2
    variance = pairs * (q2 * (1 - q2) + 2 * (RATE**3 - q2**2))
    assert abs(both - mean) < stats.norm.isf(ALPHA / 2) * np.sqrt(variance)


def test_rate_one_takes_all_and_rate_zero_none():
    coins = Randomness.from_entropy()
    assert poisson_sample(50, sample_rate=1.0, coins=coins).tolist() == list(range(50))
    assert poisson_sample(50, sample_rate=0.0, coins=coins).tolist() == []


def test_where_all_are_in_no_coin_is_thrown():
    thrown, fresh = Randomness.seeded("a"), Randomness.seeded("a")
    poisson_sample(50, sample_rate=1.0, coins=thrown)
    assert thrown.uniform(8).tolist() == fresh.uniform(8).tolist()


def test_no_records_is_an_empty_sample():
    sample = poisson_sample(0, sample_rate=0.5, coins=Randomness.from_entropy())
    assert sample.shape == (0,)
    assert sample.dtype == np.int64


def test_a_sample_is_each_index_once_and_in_order():
    sample = poisson_sample(1000, sample_rate=0.5, coins=Randomness.from_entropy())
    assert (np.diff(sample) > 0).all()
    assert 0 <= sample[0] < sample[-1] < 1000


def test_the_coins_decide_alone():
    first, second, other = (
        poisson_sample(200, sample_rate=0.5, coins=Randomness.seeded(label)).tolist()
        for label in ("a", "a", "b")
    )
    assert first == second != other


OWNERS = st.lists(st.integers(0, 20), max_size=60).map(lambda o: np.array(o, dtype=np.int64))


@given(owners=OWNERS, label=st.integers(0, 1000))
def test_a_person_drawn_comes_with_all_records_and_nobody_else_does(owners, label):
    persons = int(owners.max(initial=-1)) + 1
    drawn = poisson_sample(persons, sample_rate=0.4, coins=Randomness.seeded(label))
    chosen = records_of(drawn, owners)
    assert chosen.tolist() == [i for i, owner in enumerate(owners) if owner in set(drawn.tolist())]


def test_persons_are_drawn_independently_whatever_they_hold():
    """Of the records of 40 persons, in 4000 steps: together within, independent between."""
    owners = np.repeat(np.arange(40), np.arange(40) % 4 + 1)
    steps, coins = 4000, Randomness.seeded("persons")
    seen = np.zeros((steps, len(owners)))
    for step in seen:
        sample = poisson_sample(40, sample_rate=RATE, coins=coins)
        step[records_of(sample, owners)] = 1
    correlation = np.corrcoef(seen.T)
    same = owners[:, None] == owners[None, :]
    assert np.allclose(correlation[same], 1)
    assert np.abs(correlation[~same]).max() < 6 / np.sqrt(steps)
    rates = seen.mean(0)
    assert np.abs(rates - RATE).max() < 6 * np.sqrt(RATE * (1 - RATE) / steps)
