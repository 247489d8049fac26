"""A bet that records are shuffled and not drawn: what it wins is evidence against sound coins.

Independent coins and a shuffling loader give each sample some probability. A bettor who takes the
ratio of the two, step after step, wins nothing on the average while the coins are sound, whatever
the rate and the number of records; so that a fortune of 1/odds is ever reached, over all steps
together, has at most these odds. Source: Ville (1939); Shafer (2021), doi:10.1111/rssa.12647.

It is as quick as a test of sizes and overlaps can be, to a step or two: where batches of one size
are drawn independently, no test that false-alarms with odds a can catch them, with certainty,
before the product of the odds of these sizes under sound coins is below a.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

KEPT = 0.1
"""Of a fortune stays out of each bet: one sample that fits no pass does not lose all."""


class Passes:
    """Half a fortune on batches of one size, half on passes in which nobody comes twice.

    What is remembered (who was drawn in a pass, the last size) is private and stays here.
    """

    def __init__(self, sample_rate: float) -> None:
        self._rate = sample_rate
        self._size: int | None = None
        """Of the batches so far."""
        self._used: NDArray[np.bool_] | None = None
        """(N,) who was drawn in this pass."""
        self._sizes = self._passes = 0.0
        """Logarithms of the two fortunes."""

    @property
    def odds(self) -> float:
        """At most so likely have sound coins ever won so much; at most 1."""
        won = float(np.logaddexp(self._sizes, self._passes)) - math.log(2)
        return math.exp(-max(0.0, won))

    def read(self, sample: NDArray[np.int64], *, units: int) -> None:
        """Those drawn in one step, nobody twice, out of `units` records or persons."""
        if self._used is None or len(self._used) != units:  # the first step, or other records
            self._used, self._size = np.zeros(units, dtype=bool), None
        size, left = len(sample), units - int(self._used.sum())
        sound = float(special.xlogy(size, self._rate))
        sound += float(special.xlog1py(units - size, -self._rate))
        again = bool(self._used[sample].any())
        if self._size is None:  # nothing is known but the rate: half is bet on the usual size
            usual = size == round(self._rate * units)
            rival = -_ways(units, size) if usual else -math.inf
            self._bet(rival, rival, sound, kept=0.5)
        else:
            alike = -_ways(units, size) if size == self._size else -math.inf
            self._bet(alike, self._in_pass(size, left, again=again), sound, kept=KEPT)
        if again or size > left or not left:
            self._used[:] = False
        if not (size == left and self._size is not None and size < self._size):
            self._size = size  # not that of the remainder of a pass
        self._used[sample] = True

    def _in_pass(self, size: int, left: int, *, again: bool) -> float:
        """Log-probability of a sample where passes are shuffled, in batches of one size."""
        assert self._size is not None
        assert self._used is not None
        units = len(self._used)
        if left >= self._size and left:
            return -_ways(left, size) if size == self._size and not again else -math.inf
        # The pass has no whole batch left: its remainder comes, or it is left out, as likely.
        rest = 0.0 if left and size == left and not again else -math.inf
        anew = -_ways(units, size) if size == self._size else -math.inf
        return float(np.logaddexp(rest, anew)) - math.log(2)

    def _bet(self, sizes: float, passes: float, sound: float, *, kept: float) -> None:
        self._sizes += _winning(sizes, sound, kept)
        self._passes += _winning(passes, sound, kept)


def _winning(rival: float, sound: float, kept: float) -> float:
    """Logarithm of the factor by which a fortune grows. Args: two log-probabilities."""
    if rival == -math.inf:
        return math.log(kept)
    return float(np.logaddexp(math.log(kept), math.log1p(-kept) + rival - sound))


def _ways(units: int, size: int) -> float:
    """Logarithm of in how many ways `size` of `units` can be drawn."""
    whole = special.gammaln(units + 1.0)
    return float(whole - special.gammaln(size + 1.0) - special.gammaln(units - size + 1.0))
