import math

import numpy as np
import pytest
import torch
from scipy import stats

from common.privacy.noise import KEY_BYTES, Randomness

ALPHA = 1e-7
"""Per statistic; four of them on fresh entropy keep false alarms below one in a million."""
COUNT = 200_000

# RFC 8439, appendix A.1: key, number of 64-byte blocks to skip, keystream.
VECTORS = [
    (
        bytes(32),
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\x01",
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
]


def looks_like_gaussian(values, scale):
    """Whether shape and spread could be those of N(0, scale^2), at significance ALPHA each."""
    shape = stats.kstest(values, "norm", args=(0, scale)).pvalue
    squares = float(np.sum((values / scale) ** 2))
    tail = min(stats.chi2.cdf(squares, len(values)), stats.chi2.sf(squares, len(values)))
    return bool(shape > ALPHA and 2 * tail > ALPHA)


@pytest.mark.parametrize(("key", "skip", "keystream"), VECTORS)
def test_bits_are_the_chacha20_keystream(key, skip, keystream):
    stream = Randomness(key)
    stream.uniform(8 * skip)
    words = np.frombuffer(bytes.fromhex(keystream), dtype="<u8")
    expected = [int(word) // 2**11 / 2**53 for word in words]
    assert stream.uniform(8).tolist() == expected


def test_noise_has_the_right_scale_and_shape():
    values = Randomness.from_entropy().normal(COUNT)
    assert values.dtype == np.float64
    assert looks_like_gaussian(values, 1.0)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_the_test_above_rejects_a_wrong_scale(factor):
    values = factor * Randomness.from_entropy().normal(COUNT)
    assert not looks_like_gaussian(values, 1.0)
    assert stats.kstest(values, "norm").pvalue < ALPHA
    assert looks_like_gaussian(values, factor)


def test_the_test_above_rejects_a_wrong_shape():
    values = (Randomness.from_entropy().uniform(COUNT) - 0.5) * math.sqrt(12)
    assert np.var(values) == pytest.approx(1, abs=0.02)
    assert not looks_like_gaussian(values, 1.0)


def test_the_two_halves_of_box_muller_are_independent():
    values = Randomness.from_entropy().normal(COUNT)
    half = COUNT // 2
    bound = stats.norm.isf(ALPHA / 2) / math.sqrt(half)
    first, second = values[:half], values[half:]
    assert abs(np.mean(first * second)) < bound * 1.01
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < bound * 1.1
    assert looks_like_gaussian((first + second) / math.sqrt(2), 1.0)


def test_uniforms_are_uniform_and_below_one():
    values = Randomness.from_entropy().uniform(COUNT)
    assert stats.kstest(values, "uniform").pvalue > ALPHA
    assert 0 <= values.min() < values.max() < 1
    assert np.array_equal(values * 2.0**53, np.floor(values * 2.0**53))


@pytest.mark.parametrize(("bits", "largest"), [(0, 0.0), (-1, math.sqrt(2 * 52 * math.log(2)))])
def test_no_bits_make_an_infinite_gaussian(monkeypatch, bits, largest):
    stream = Randomness.seeded("extreme")
    monkeypatch.setattr(stream, "_bits", lambda count: torch.full((count,), bits))
    assert np.abs(stream.normal(4)).max() == pytest.approx(largest, abs=1e-9)


def test_normals_are_box_muller_of_the_key_stream():
    words = Randomness.seeded("both")._bits(10).numpy().view(np.uint64)
    uniforms = (words % 2**52).astype(np.float64) / 2**52
    radius = np.sqrt(-2 * np.log(1 - uniforms[:5]))
    angle = 2 * np.pi * uniforms[5:]
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    assert np.allclose(Randomness.seeded("both").normal(10), expected, rtol=0, atol=1e-12)
    assert np.allclose(Randomness.seeded("both").normal(9, 3.0), 3 * expected[:9], atol=1e-11)


def test_a_call_larger_than_the_prepared_zeros_is_the_same_stream():
    count = 3 * (1 << 16) + 5
    parts = Randomness.seeded("long")
    split = np.concatenate([parts.uniform(1 << 16), parts.uniform(count - (1 << 16))])
    assert np.array_equal(Randomness.seeded("long").uniform(count), split)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_as_many_values_as_asked(count):
    stream = Randomness.from_entropy()
    assert stream.normal(count).shape == (count,)
    assert stream.uniform(count).shape == (count,)


def test_two_streams_from_entropy_differ():
    first, second = Randomness.from_entropy().uniform(100), Randomness.from_entropy().uniform(100)
    assert not np.intersect1d(first, second).size


def test_a_stream_never_repeats_itself():
    stream = Randomness.from_entropy()
    assert not np.intersect1d(stream.uniform(100), stream.uniform(100)).size


def test_numpy_and_python_seeds_do_not_reach_entropy():
    draws = []
    for _ in range(2):
        np.random.seed(0)
        draws.append(Randomness.from_entropy().normal(4))
    assert not np.array_equal(*draws)


def test_seeded_streams_agree_and_differ_by_label():
    labels = [("noise", 0), ("noise", 1), ("coins", 0), (0, "noise"), ("noise",), ("noise0",), ()]
    draws = [tuple(Randomness.seeded(*label).uniform(4)) for label in labels]
    assert draws == [tuple(Randomness.seeded(*label).uniform(4)) for label in labels]
    assert len(set(draws)) == len(labels)


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_not_taken(length):
    with pytest.raises(AssertionError):
        Randomness(bytes(length))


def test_the_key_is_never_shown():
    key = bytes(range(100, 100 + KEY_BYTES))
    stream = Randomness(key)
    for shown in (repr(stream), str(stream), repr(vars(stream)), repr(vars(stream).values())):
        assert key.hex() not in shown
        assert repr(key)[2:-1] not in shown
    assert key not in vars(stream).values()
    assert not [name for name in dir(stream) if getattr(stream, name) == key]
