"""A sum of vectors that does not depend on the order, or grouping, in which they were added.

Floating-point sums do: (a + b) + c rounds otherwise than a + (b + c), and replies come in any
order. Here every value is brought to one fixed point first, a multiple of 2^-F in an int64, and
whole numbers add up exactly. F is chosen so that the largest sum just fits, so that little is lost:
with 5 sites 46 bits behind the point, with 100,000 still 32.
Source: the idea of reproducible summation by pre-rounding, Demmel & Nguyen (2013), ARITH 21; our
bound on each value is known beforehand, so one word does.
"""

import math

import numpy as np
from numpy.typing import NDArray

from common.errors import VerificationError
from common.parameters import MAX_MAGNITUDE, Vector, largest_magnitude

ROOM = 49
"""Bits for number of vectors and fraction together: 2^63 holds 2^49 times `MAX_MAGNITUDE`."""
SMALL = 2.0 ** (53 - ROOM)
"""Size of values up to which a float64, of 53 bits, holds every sum that fits, and each on the way
to it."""
MOST = 1 << 17
"""Vectors one sum may hold."""
CHUNK = 1 << 16
"""Values converted at a time: they stay in the processor's cache."""


class ExactSum:
    """The running sum of at most `capacity` vectors of one size.

    Guarantee: `total`, and so `mean()`, is a function of the multiset of vectors that were added,
    here or in sums merged into this one; order and grouping change no bit. Each value is off by
    half of `resolution` at most, and one that is at least 2^23 times `resolution` is exact.
    Memory: 8 bytes a value, whatever the number of vectors; 16 for a moment, once a sum.

    >>> one, other = ExactSum(1, capacity=3), ExactSum(1, capacity=3)
    >>> for value in (1e4, 0.5):
    ...     one.add(np.float32([value]))
    >>> other.add(np.float32([-1e4]))
    >>> one.merge(other)
    >>> one.mean()
    array([0.16666667], dtype=float32)
    """

    def __init__(self, size: int, *, capacity: int) -> None:
        """Args: size: values in a vector; capacity: vectors at most, the same in sums to merge.

        Raises: VerificationError if it is none, or more than `MOST`.
        """
        if not 1 <= capacity <= MOST:
            raise VerificationError(f"sum: of {capacity} vectors, must be of 1 to {MOST}")
        self.count, self._capacity = 0, capacity
        """Vectors added so far."""
        self._weights: list[float] = []
        self._fraction = ROOM - (capacity - 1).bit_length()
        self.total: NDArray[np.float64] | NDArray[np.int64] = np.zeros(size)
        """(P,) the sum, in whole multiples of `resolution`; int64 once a value was not `SMALL`."""

    @property
    def resolution(self) -> float:
        """2^-F, of which every summed value is a multiple."""
        return float(2.0**-self._fraction)

    def add(self, vector: Vector, weight: float = 1.0) -> None:
        """Adds one vector.

        Args: vector: (P,) float32, of values whose size is at most `MAX_MAGNITUDE`; weight: what it
        counts in the mean, above 0 and at most 1.
        Raises: VerificationError if it is another one, or one more than fit; nothing was added.
        """
        largest = largest_magnitude(vector)
        if not largest <= MAX_MAGNITUDE:  # nor where it is no number
            raise VerificationError(f"sum: a value is not within {MAX_MAGNITUDE:g}")
        self.add_checked(vector, weight, largest=largest)

    def add_checked(
        self, vector: Vector, weight: float = 1.0, *, largest: float = MAX_MAGNITUDE
    ) -> None:
        """As `add`, of a vector that `check_vector` let pass: its values are not looked at again.

        Args: largest: no value is of a larger size.
        Raises: VerificationError if its type or size is another, or it is one more than fit.
        """
        self._check_room(1)
        if vector.dtype != np.float32 or vector.shape != self.total.shape:
            raise VerificationError("sum: a vector is not float32 of the size of the others")
        if not 0 < weight <= 1:
            raise VerificationError(f"sum: a weight of {weight} is not above 0 and at most 1")
        # By a power of two no bit is lost in float32 either; by another factor some would be.
        kind = np.float32 if weight == 1 else np.float64
        scale = kind(2.0**self._fraction * weight)
        if largest > SMALL:
            self._widen()
        scaled = np.empty(min(CHUNK, vector.size), dtype=kind)
        for start in range(0, len(vector), CHUNK):
            part, target = vector[start : start + CHUNK], self.total[start : start + CHUNK]
            units = scaled[: len(part)]
            np.multiply(part, scale, out=units)
            np.rint(units, out=units)
            np.add(target, units, out=target, dtype=target.dtype, casting="unsafe")
        self.count += 1
        self._weights.append(weight)

    def merge(self, other: "ExactSum") -> None:
        """Adds what another sum holds, as if its vectors had been added here.

        Raises: VerificationError if it is of another size or capacity, or more than fits.
        """
        if (other.total.shape, other._capacity) != (self.total.shape, self._capacity):
            raise VerificationError("sum: of another size, or capacity, than what it is added to")
        self._check_room(other.count)
        if other.total.dtype == np.int64:
            self._widen()
        np.add(self.total, other.total, out=self.total, dtype=self.total.dtype, casting="unsafe")
        self.count += other.count
        self._weights += other._weights

    def mean(self) -> Vector:
        """(P,) float32: the mean of what was added, rounded once beside the values' own rounding.

        Guarantee: within half a unit in the last place of float32, plus half of `resolution`, of
        the true mean; of equal vectors it is that vector wherever they are exact.
        Raises: VerificationError if nothing was added.
        """
        if not self.count:
            raise VerificationError("sum: of no vectors has no mean")
        mean, weight = np.empty(len(self.total), dtype=np.float32), math.fsum(self._weights)
        for start in range(0, len(mean), CHUNK):
            part = self.total[start : start + CHUNK].astype(np.float64)
            mean[start : start + CHUNK] = part / weight * self.resolution
        return mean

    def _widen(self) -> None:
        """To whole numbers of 63 bits; of those that are there none changes."""
        self.total = self.total.astype(np.int64, copy=False)

    def _check_room(self, more: int) -> None:
        if self.count + more > self._capacity:
            raise VerificationError(f"sum: holds {self._capacity} vectors at most")
