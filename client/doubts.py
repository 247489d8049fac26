"""Doubts: whether an instruction was lost on its way a node may not know, and says by its absence.

Flower hands an instruction out once, and has no call that asks again for it; see decision 0028.
"""

from collections.abc import Callable
from time import monotonic

ABSENCES_S = (0.0, 15.0, 75.0)
"""After the first look that found nothing. One absence may pass unseen: a coordinator that fetches
large replies looks for others when it has them, which took it up to ten seconds."""


class Doubts:
    """Whether what may have been lost is to be made known still, and when.

    Guarantee: at most as many absences as `ABSENCES_S` has, and never sooner, from the beginning of
    one doubt to its end, whatever arises meanwhile.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._since, self._made = clock(), 0

    def remain(self, absent: Callable[[], None]) -> bool:
        """Of a look that found nothing: is absent if it is time. Returns: whether doubt remains."""
        if not self._made:
            self._since = self._clock()
        if self._clock() - self._since >= ABSENCES_S[self._made]:
            absent()
            self._made += 1
        if self._made == len(ABSENCES_S):
            self.settled()
            return False
        return True

    def settled(self) -> None:
        """An instruction came."""
        self._made = 0
