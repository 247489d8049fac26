"""Poisson sampling: the only sampler the accountants' amplification holds for."""

import numpy as np
from numpy.typing import NDArray

from common.privacy.noise import Randomness


def poisson_sample(units: int, *, sample_rate: float, coins: Randomness) -> NDArray[np.int64]:
    """Indices of the records, or of the persons, that one step looks at.

    Guarantee: each of `units` is in, independently, with probability `sample_rate` (to
    within 2^-53); the sample may be empty, and its size is private. Where all are in, no coin says
    anything, and none is thrown.
    """
    if sample_rate == 1:
        return np.arange(units)
    return np.flatnonzero(coins.uniform(units) < sample_rate)


def records_of(persons: NDArray[np.int64], owners: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of all records of the persons drawn, in ascending order.

    Args: persons: (D,) those drawn; owners: (N,) number of the person each record is of.
    Guarantee: a person's records are all in or all out.

    >>> records_of(np.array([0, 2]), np.array([2, 0, 1, 2]))
    array([0, 1, 3])
    """
    drawn = np.zeros(int(owners.max(initial=-1)) + 1, dtype=bool)
    drawn[persons] = True
    return np.flatnonzero(drawn[owners])
