"""Made scores of canaries: a game between a guesser and a mechanism whose epsilon is known."""

import numpy as np

from common.privacy.lower_bounds import Coins, Scores, mu_of_epsilon

DELTA = 1e-5
EPSILONS = (1.0, 3.0, 8.0)


def game(
    epsilon: float, m: int, draw: np.random.Generator, *, noise: float = 1.0
) -> tuple[Scores, Coins]:
    """Scores and fair coins of `m` canaries that do not disturb each other, under the Gaussian
    with this epsilon at `DELTA`, or one with so many times its noise.
    """
    present = draw.random(m) < 0.5
    return present + noise * draw.normal(size=m) / mu_of_epsilon(epsilon, DELTA), present
