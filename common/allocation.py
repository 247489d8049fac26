"""What the C library does with memory a training step has freed.

By default glibc gives large blocks, and the top of its heap, back to the system, and the next
step has them zeroed and mapped in again page by page: a fifth of a step on a virtual machine.
Speed and memory only; a library without `mallopt` is left alone.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from time import monotonic, process_time

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Names of the settings in glibc's malloc.h."""
NEVER = -1
"""As a trim threshold."""
GROWTH = 1.2
"""Of a process's memory, up to which it is left alone for a while. At 1.02 each of the first five
rounds gave back, and took again, what the one before had: a tenth of a round of small sites."""
SELDOM_S, BUSY_S = 1.0, 5.0
"""After so long what is free goes back in any case: where each round leaves a small gap a process
touches a quarter of a megabyte more in each, and does not grow by much at once. The second where
more than half of the time was work: forty megabytes cost 50 ms to map in again, a hundredth."""
STATM = Path("/proc/self/statm")


def keep_freed_memory() -> bool:
    """Freed memory stays with the process, for the next step. Fast; fragments cost memory.

    Returns: False where there is no glibc to ask.
    """
    return _set({MMAP_MAX: 0, TRIM_THRESHOLD: NEVER})


def return_freed_memory() -> bool:
    """Every block of a megabyte or more goes back when it is freed. Lean; each step faults in anew.

    Returns: False where there is no glibc to ask.
    """
    return _set({MMAP_MAX: 65536, MMAP_THRESHOLD: 1 << 20, TRIM_THRESHOLD: 1 << 20})


def trim_freed_memory() -> bool:
    """What is free by now goes back, once, whatever was asked for; a millisecond or two.

    Returns: False where there is no glibc to ask.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return False
    return True


class Trimming:
    """Gives freed memory back after a round in which the process grew, and seldom after another:
    what is given back is zeroed and mapped in again in the next, a tenth of a round of small sites.

    Guarantee: whatever was freed is given back once a round ends with more than `GROWTH` times the
    memory that the round after the last trim had, or `SELDOM_S` later, or `BUSY_S` where nobody
    waited. Where the kernel is silent, every other round.
    """

    def __init__(
        self,
        resident: Callable[[], int] | None = None,
        clock: Callable[[], float] = monotonic,
        worked: Callable[[], float] = process_time,
    ) -> None:
        """Args: resident: pages that the process has in memory; by default the kernel's word;
        worked: seconds of processor that it has taken.
        """
        self._resident, self._clock, self._worked = resident or resident_pages, clock, worked
        self._level, self._has_trimmed, self._at = 0, False, (clock(), worked())

    def after_round(self) -> bool:
        """Whether memory was given back."""
        pages = self._resident()
        due = self._is_due()
        if self._has_trimmed and not due:
            self._level, self._has_trimmed = pages, False
        elif due or not pages or pages > GROWTH * self._level:
            self._has_trimmed, self._at = True, (self._clock(), self._worked())
            trim_freed_memory()
        return self._has_trimmed

    def _is_due(self) -> bool:
        passed, worked = self._clock() - self._at[0], self._worked() - self._at[1]
        return passed >= (SELDOM_S if worked < passed / 2 else BUSY_S)


def resident_pages() -> int:
    """Of this process, in memory; 0 where there is no /proc to ask."""
    try:
        return int(STATM.read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _set(settings: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(name, value) for name, value in settings.items())
