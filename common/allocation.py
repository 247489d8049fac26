"""What the C library does with memory a training step has freed.

By default glibc gives large blocks, and the top of its heap, back to the system, and the next
step has them zeroed and mapped in again page by page: a fifth of a step on a virtual machine.
Speed and memory only; a library without `mallopt` is left alone.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Names of the settings in glibc's malloc.h."""
NEVER = -1
"""As a trim threshold."""


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


def _set(settings: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(name, value) for name, value in settings.items())
