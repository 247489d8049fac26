"""A mean whose bits do not depend on who answered first, or on which worker summed whom."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import VerificationError
from common.exact_sum import MOST, SMALL, ExactSum
from common.parameters import MAX_MAGNITUDE

VALUES = st.one_of(
    st.floats(-MAX_MAGNITUDE, MAX_MAGNITUDE, width=32),
    st.floats(-1, 1, width=32),
    st.floats(-(2.0**-20), 2.0**-20, width=32),
    st.sampled_from([MAX_MAGNITUDE, -MAX_MAGNITUDE, 0.0, -0.0, 2.0**-149]),
)
VECTORS = hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=VALUES)


def summed(vectors, *, capacity=None):
    total = ExactSum(vectors.shape[1], capacity=capacity or len(vectors))
    for vector in vectors:
        total.add(vector)
    return total


@given(VECTORS, st.randoms(use_true_random=False))
def test_order_and_grouping_change_no_bit(vectors, draw):
    """Partial sums of workers, each of some sites, merged in any order."""
    whole = summed(vectors)
    order = [*range(len(vectors))]
    draw.shuffle(order)
    groups = [ExactSum(vectors.shape[1], capacity=len(vectors)) for _ in range(draw.randint(1, 4))]
    for index in order:
        draw.choice(groups).add(vectors[index])
    draw.shuffle(groups)
    first, *others = groups
    for group in others:
        first.merge(group)
    assert first.count == len(vectors)
    assert first.total.tobytes() == whole.total.tobytes()
    assert first.mean().tobytes() == whole.mean().tobytes()


@given(VECTORS)
def test_the_mean_is_the_true_one_rounded_once(vectors):
    """Half a unit in the last place of float32, and half of the fixed point's own."""
    total = summed(vectors)
    for at, mean in enumerate(total.mean()):
        true = sum(map(Fraction, vectors[:, at].tolist())) / len(vectors)
        step = Fraction(float(np.spacing(np.abs(np.float32(mean)))))
        # The division is in float64, whose rounding may move a tie of float32.
        error = abs(Fraction(float(mean)) - true)
        assert error <= step * Fraction(500001, 10**6) + Fraction(total.resolution) / 2


@given(hnp.arrays(np.float32, 5, elements=VALUES), st.integers(1, 1000))
def test_the_mean_of_equal_vectors_is_that_vector(vector, sites):
    exact = ExactSum(5, capacity=sites)
    vector[np.abs(vector) < 2.0**23 * exact.resolution] = 0.25
    for _ in range(min(sites, 7)):
        exact.add(vector)
    assert np.array_equal(exact.mean(), vector)


def test_the_largest_sum_there_may_be_fits():
    for sign in (1, -1):
        total = ExactSum(1, capacity=MOST)
        total.add(np.float32([sign * MAX_MAGNITUDE]))
        while total.count < MOST:
            total.merge(total)
        assert total.count == MOST
        assert total.mean().tolist() == [sign * MAX_MAGNITUDE]


@pytest.mark.parametrize("capacity", [2, 3, 1000, MOST])
@pytest.mark.parametrize("sign", [1, -1])
def test_while_values_are_small_the_sum_is_the_one_of_whole_numbers(capacity, sign):
    """Of the largest as many as leave room for one unit more: a float64 that is full drops it."""
    total = ExactSum(1, capacity=capacity)
    for _ in range(capacity - 1 if capacity < MOST else 1):
        total.add(np.float32([sign * SMALL]))
    while 2 * total.count < capacity:
        total.merge(total)
    large = total.count * int(SMALL / total.resolution)
    total.add(np.float32([sign * total.resolution]))
    assert total.total.dtype == np.float64
    assert int(total.total[0]) == sign * (large + 1)


@pytest.mark.parametrize("large_first", [True, False])
def test_the_first_large_value_takes_the_sum_to_whole_numbers_and_changes_none(large_first):
    larger = np.nextafter(np.float32(SMALL), np.float32(np.inf))
    parts = [np.float32([larger]), np.float32([2.0**-20])]
    one, other = (ExactSum(1, capacity=2) for _ in parts)
    for exact, part in zip((one, other), parts if large_first else parts[::-1], strict=True):
        exact.add(part)
    one.merge(other)
    assert one.total.dtype == np.int64
    assert Fraction(int(one.total[0])) * Fraction(one.resolution) == sum(
        Fraction(float(part[0])) for part in parts
    )


@pytest.mark.parametrize(("sites", "bits"), [(1, 49), (2, 48), (5, 46), (1000, 39), (100_000, 32)])
def test_what_is_lost_follows_from_the_number_of_sites(sites, bits):
    assert ExactSum(1, capacity=sites).resolution == 2.0**-bits


BAD = {
    "float64": np.zeros(3),
    "too long": np.zeros(4, np.float32),
    "nan": np.float32([0, np.nan, 0]),
    "infinite": np.float32([0, np.inf, 0]),
    "beyond the bound": np.float32([0, 0, 1.01e4]),
    "beyond it below": np.float32([-1.01e4, 0, 0]),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_could_overflow_is_refused_and_nothing_is_added(fault):
    total = summed(np.ones((1, 3), np.float32), capacity=4)
    with pytest.raises(VerificationError, match=r"^sum: "):
        total.add(BAD[fault])
    assert total.count == 1
    assert total.mean().tolist() == [1, 1, 1]


def test_one_vector_more_than_fits_is_refused():
    total = summed(np.ones((2, 3), np.float32))
    for more in (lambda: total.add(np.ones(3, np.float32)), lambda: total.merge(total)):
        with pytest.raises(VerificationError, match="holds 2 vectors at most"):
            more()
    assert total.mean().tolist() == [1, 1, 1]


def test_sums_of_other_scales_or_sizes_are_not_merged():
    total = ExactSum(3, capacity=4)
    for other in (ExactSum(3, capacity=5), ExactSum(2, capacity=4)):
        with pytest.raises(VerificationError, match="another size, or capacity"):
            total.merge(other)


@pytest.mark.parametrize("capacity", [0, -1, MOST + 1])
def test_a_sum_of_none_or_of_too_many_is_refused(capacity):
    with pytest.raises(VerificationError, match="must be of 1 to"):
        ExactSum(1, capacity=capacity)


def test_nothing_has_no_mean():
    with pytest.raises(VerificationError, match="no mean"):
        ExactSum(3, capacity=1).mean()


@given(VECTORS, st.randoms(use_true_random=False))
def test_a_weighted_mean_is_the_true_one_in_any_order(vectors, draw):
    weights = [draw.choice([1.0, 0.5, 0.3, 2.0**-10]) for _ in vectors]
    pairs = [*zip(vectors, weights, strict=True)]
    means = set()
    for _ in range(2):
        total = ExactSum(vectors.shape[1], capacity=len(vectors))
        draw.shuffle(pairs)
        for vector, weight in pairs:
            total.add(vector, weight)
        means.add(total.mean().tobytes())
    assert len(means) == 1
    whole = sum(map(Fraction, weights))
    for at, mean in enumerate(total.mean()):
        true = sum(Fraction(float(v[at])) * Fraction(w) for v, w in pairs) / whole
        step = Fraction(float(np.spacing(np.abs(np.float32(mean)))))
        rounding = Fraction(total.resolution) * len(vectors) / 2 / whole
        # A product of 24 and 53 bits is rounded to a float64 before it is put into fixed point.
        product = Fraction(2**-52) * int(MAX_MAGNITUDE) * len(vectors) / whole
        assert abs(Fraction(float(mean)) - true) <= step + rounding + product


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5, float("nan")])
def test_a_weight_that_is_none_is_refused_and_nothing_is_added(weight):
    total = ExactSum(1, capacity=2)
    with pytest.raises(VerificationError, match="is not above 0 and at most 1"):
        total.add(np.float32([1.0]), weight)
    assert total.count == 0
    assert total.total.tolist() == [0]
