"""Poisson sampling: the only sampler the accountants' amplification holds for."""

import numpy as np
from numpy.typing import NDArray

from common.privacy.noise import Randomness


def poisson_sample(records: int, *, sample_rate: float, coins: Randomness) -> NDArray[np.int64]:
    """Indices of the records that one step looks at.

    Guarantee: each of `records` is in, independently, with probability `sample_rate` (to
    within 2^-53); the sample may be empty, and its size is private.
    """
    return np.flatnonzero(coins.uniform(records) < sample_rate)
