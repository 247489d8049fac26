"""Looks: when a node asks whether there is an instruction for it.

Flower has no call that waits. Each look takes 15 ms of the SuperLink's processor, which is one
process for everybody: three nodes that look ten times a second take half of it, from the answers
of all. So a node looks often when an instruction is due, and seldom when none is.
"""

from collections.abc import Callable
from time import monotonic

EARLY = 0.8
"""Of the time that the last instruction took to come after an answer, the first look rests."""
MOST_FIRST = 5.0
"""Times `poll_s`: the longest first rest, as rounds may become shorter at once."""
LATENESS = 0.05
"""Of the time that was waited, an instruction lies unseen at most."""
MOST_S = 2.0
"""Between looks, however long was waited."""


class Looks:
    """Rests between the looks of one node.

    Guarantee: no rest is shorter than `poll_s`, and none is longer than it and `MOST_S`. The first
    after an answer is at most five times `poll_s`, the others a twentieth of what was waited.
    """

    def __init__(self, poll_s: float, clock: Callable[[], float] = monotonic) -> None:
        self._poll_s, self._clock = poll_s, clock
        self._since, self._last = clock(), 0.0
        self._first = self._has_answered = False

    def answered(self) -> None:
        """An answer has left; the next instruction comes once the others have answered, too."""
        self._since, self._first, self._has_answered = self._clock(), True, True

    def came(self) -> None:
        """An instruction was there."""
        if self._has_answered:
            self._last = self._clock() - self._since

    def rest_s(self) -> float:
        """Seconds until the next look."""
        waited, first = self._clock() - self._since, self._first
        self._first = False
        if first:
            rest = min(EARLY * self._last, MOST_FIRST * self._poll_s, MOST_S)
            return max(self._poll_s, rest)
        return max(self._poll_s, min(LATENESS * waited, MOST_S))
