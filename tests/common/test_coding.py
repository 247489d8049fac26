"""Fewer bytes for an update: rounded without a bias, and read back by nobody's word."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common import coding as codings
from common.coding import AT_ONCE, BLOCK, coded_bytes, decoded, encoded
from common.config import Coding
from common.errors import VerificationError
from common.parameters import MAX_MAGNITUDE
from common.privacy.noise import Randomness

ROUNDED = [Coding.float16, Coding.int8]
VALUES = hnp.arrays(
    np.float32,
    st.integers(0, 3 * BLOCK),
    elements=st.floats(-MAX_MAGNITUDE, MAX_MAGNITUDE, width=32),
)


def coins(label=0):
    return Randomness.seeded("coding", label)


def vectors(count, scale=1e-2):
    made = np.random.default_rng(count)
    start = made.normal(size=count).astype(np.float32)
    return (start + made.normal(size=count, scale=scale)).astype(np.float32), start


def step_of(vector, start, coding):
    """How far two values that a parameter can be rounded to are apart, at most."""
    way = np.abs(vector.astype(np.float64) - start)
    if coding is Coding.float16:
        return np.maximum(way * 2.0**-10, 2.0**-24)
    longest = [way[at : at + BLOCK].max() for at in range(0, len(way), BLOCK)]
    return np.repeat(np.array(longest) / 127 * (1 + 1e-6), BLOCK)[: len(way)]


@given(VALUES)
def test_what_is_not_coded_comes_back_to_the_bit(vector):
    data = encoded(vector, np.zeros_like(vector), Coding.float32, coins())
    assert decoded(data, np.zeros_like(vector), Coding.float32).tobytes() == vector.tobytes()


@pytest.mark.parametrize("coding", ROUNDED)
@given(vector=VALUES)
def test_any_vector_comes_back_within_a_step(coding, vector):
    start = np.roll(vector, 1) * np.float32(0.5)
    data = encoded(vector, start, coding, coins())
    assert len(data) == coded_bytes(len(vector), coding)
    back = decoded(data, start, coding)
    assert back.dtype == np.float32
    rounding = 2.0**-22 * (np.abs(vector) + np.abs(start) + 1e-3)
    assert np.all(
        np.abs(back.astype(np.float64) - vector) <= step_of(vector, start, coding) + rounding
    )


@pytest.mark.parametrize("coding", list(Coding))
@pytest.mark.parametrize("count", [0, 1, BLOCK, BLOCK + 1, AT_ONCE, AT_ONCE + 300])
def test_pieces_are_put_together_in_order(coding, count):
    vector, start = vectors(count)
    back = decoded(encoded(vector, start, coding, coins()), start, coding)
    assert np.abs(back - vector).max(initial=0) <= 5e-4


@pytest.mark.parametrize("coding", ROUNDED)
def test_rounding_is_right_on_average(coding):
    """The mean of 4,000 codings is within five of its own deviations of the truth, everywhere."""
    vector, start = vectors(64, scale=1e-3)
    codes = [
        decoded(encoded(vector, start, coding, coins(draw)), np.zeros_like(start), coding)
        for draw in range(4000)
    ]
    codes = np.array(codes, dtype=np.float64)
    way = vector.astype(np.float64) - start
    rounding = 2.0**-23 * np.abs(way)  # of float32, at both ends
    off = np.abs(codes.mean(0) - way)
    assert np.all(off <= 5 * codes.std(0) / np.sqrt(len(codes)) + rounding)
    assert codes.std(0).max() > 0  # it is rounded at random, and not to the nearest


@pytest.mark.parametrize("coding", ROUNDED)
def test_what_is_on_the_grid_stays_and_a_still_vector_costs_nothing(coding):
    start = vectors(600)[1]
    assert (
        decoded(encoded(start, start, coding, coins()), start, coding).tobytes() == start.tobytes()
    )
    zero = np.zeros(600, np.float32)
    halves = np.float32([0.5, -0.25, 0.0, 2.0] * 150)
    if coding is Coding.float16:
        assert (
            decoded(encoded(halves, zero, coding, coins()), zero, coding).tolist()
            == halves.tolist()
        )


@pytest.mark.parametrize("coding", ROUNDED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e4, -3e4])
def test_no_vector_of_a_model_is_not_coded(coding, value):
    vector, start = vectors(700)
    vector[650] = value
    with pytest.raises(VerificationError, match="not finite, or larger"):
        encoded(vector, start, coding, coins())


@pytest.mark.parametrize("coding", list(Coding))
@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"\0", lambda _: b""]
)
def test_bytes_of_another_length_are_refused(coding, change):
    vector, start = vectors(300)
    data = encoded(vector, start, coding, coins())
    with pytest.raises(VerificationError, match=f"not 300 parameters in {coding.name}"):
        decoded(change(data), start, coding)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 1e30])
def test_a_scale_of_no_model_is_refused(scale):
    vector, start = vectors(300)
    data = encoded(vector, start, Coding.int8, coins())
    forged = np.float32(scale).tobytes() + data[4:]
    with pytest.raises(VerificationError, match="a scale"):
        decoded(forged, start, Coding.int8)


def test_halves_that_are_no_numbers_reach_the_check_of_every_vector():
    start = np.zeros(2, np.float32)
    data = np.array([np.nan, np.inf], "<f2").tobytes()
    assert not np.isfinite(decoded(data, start, Coding.float16)).any()


def test_every_coding_has_its_line_in_the_table():
    assert all(f"| `{coding.name}` |" in codings.__doc__ for coding in Coding)
