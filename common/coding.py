"""Fewer bytes for an update, after the noise: the way from where it began, rounded at random.

What a site releases is a function of its noisy sums, and so is what this makes of it: coding costs
no epsilon (post-processing). Rounding is unbiased, so that errors of many sites average out.

| coding | bytes a parameter | a value is |
|---|---|---|
| `float32` | 4 | the parameter itself, to the bit |
| `float16` | 2 | its way from the global one, in half precision |
| `int8` | 1 + 4 / 256 | the same in 1/127ths of the longest way in its block of 256 |

Source: stochastic quantisation of updates, Konecny et al. (2016), arXiv:1610.05492; Alistarh et al.
(2017), arXiv:1610.02132.
"""

import numpy as np
from numpy.typing import NDArray

from common.config import Coding
from common.errors import VerificationError
from common.parameters import MAX_MAGNITUDE, Vector
from common.privacy.noise import Randomness

BLOCK = 256
"""Parameters that share a scale in `int8`."""
LEVELS = 127
"""Steps on each side of zero."""
FURTHEST = 2 * MAX_MAGNITUDE
"""Of a parameter from where it was."""
AT_ONCE = BLOCK << 7
"""Parameters coded at a time: they stay in the processor's cache."""
LITTLE_FLOAT32, LITTLE_FLOAT16 = np.dtype("<f4"), np.dtype("<f2")


def coded_bytes(count: int, coding: Coding) -> int:
    """Bytes of `count` parameters on their way.

    >>> [coded_bytes(1000, coding) for coding in Coding]
    [4000, 2000, 1016]
    """
    if coding is Coding.float32:
        return count * LITTLE_FLOAT32.itemsize
    if coding is Coding.float16:
        return count * LITTLE_FLOAT16.itemsize
    return count + _blocks(count) * LITTLE_FLOAT32.itemsize


def encoded(vector: Vector, start: Vector, coding: Coding, coins: Randomness) -> bytes:
    """What travels of the parameters (P,) of a site that began with `start` (P,).

    Guarantee: `decoded` of it is `vector` to the bit for `float32`; else each value is one of the
    two next to the true one, and the true one on average, over `coins`, up to float32 rounding.
    Raises: VerificationError if a value is not finite, or larger than any model's.
    """
    if coding is Coding.float32:
        return vector.astype(LITTLE_FLOAT32, copy=False).tobytes()
    coded = _halves if coding is Coding.float16 else _levels
    pieces = range(0, len(vector), AT_ONCE)
    found = [coded(vector[at : at + AT_ONCE], start[at : at + AT_ONCE], coins) for at in pieces]
    return b"".join([*(scales for scales, _ in found), *(values for _, values in found)])


def decoded(data: bytes, start: Vector, coding: Coding) -> Vector:
    """The parameters (P,) that `encoded` coded; bytes of a stranger are checked, and not trusted.

    Raises: VerificationError unless they are as many as P asks for, with finite scales.
    """
    if len(data) != coded_bytes(len(start), coding):
        raise VerificationError(f"update: not {len(start)} parameters in {coding.name}")
    if coding is Coding.float32:
        return np.frombuffer(data, LITTLE_FLOAT32).astype(np.float32, copy=False)
    if coding is Coding.float16:
        way = np.frombuffer(data, LITTLE_FLOAT16).astype(np.float32)
    else:
        scales = np.frombuffer(data, LITTLE_FLOAT32, count=_blocks(len(start)))
        levels = np.frombuffer(data, np.int8, offset=scales.nbytes)
        if not np.all((scales >= 0) & (scales <= FURTHEST)):  # NaN is not
            raise VerificationError("update: a scale that no model's parameters have")
        way = levels.astype(np.float32)
        way *= np.repeat(scales, BLOCK)[: len(way)]
    way += start
    return way


def _way(vector: Vector, start: Vector) -> NDArray[np.float64]:
    way = vector.astype(np.float64)
    way -= start
    if not (way.max(initial=0.0) <= FURTHEST and way.min(initial=0.0) >= -FURTHEST):  # nor NaN
        raise VerificationError("parameters: not finite, or larger than any model's are")
    return way


def _halves(vector: Vector, start: Vector, coins: Randomness) -> tuple[bytes, bytes]:
    """No scales, and one of the two halves next to each value: which are neighbours as integers."""
    way = _way(vector, start)
    nearest = way.astype(LITTLE_FLOAT16)
    near = nearest.astype(np.float64)
    out = np.abs(way) > np.abs(near)
    other = (nearest.view("<u2") + np.where(out, 1, -1).astype("<u2")).view(LITTLE_FLOAT16)
    other[near == way] = 0
    way -= near
    near -= other
    share = np.divide(way, -near, out=np.zeros_like(way), where=way != 0)
    return b"", np.where(coins.uniform(len(way)) < share, other, nearest).tobytes()


def _levels(vector: Vector, start: Vector, coins: Randomness) -> tuple[bytes, bytes]:
    """A scale of each block, and a level of each value."""
    way = np.zeros(_blocks(len(vector)) * BLOCK)
    way[: len(vector)] = _way(vector, start)
    blocks = way.reshape(-1, BLOCK)
    longest = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
    # The next float32: no value is beyond the last level.
    scales = np.nextafter((longest / LEVELS).astype(LITTLE_FLOAT32), np.float32(np.inf))
    scales[longest == 0] = 0
    blocks /= np.where(scales, scales, 1)[:, None]
    way[: len(vector)] += coins.uniform(len(vector))
    return scales.tobytes(), np.floor(way[: len(vector)]).astype(np.int8).tobytes()


def _blocks(count: int) -> int:
    return -(-count // BLOCK)
