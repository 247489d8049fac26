"""Keeps memory a step has freed for the next step, where the C library would give it back.

glibc returns what is free at the top of its heap, and the next step has it zeroed and mapped in
again, page by page: a fifth of a training step on a virtual machine. Speed only.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of the settings in glibc's malloc.h."""
KEPT_BYTES = 1 << 30
"""Free memory at the top of the heap that stays with the process."""
LARGE_BYTES = 32 << 20
"""Above this, glibc's upper limit, a block has its own mapping and goes back when freed."""


def keep_freed_memory() -> bool:
    """Asks glibc to keep freed memory. Returns: False where there is no glibc to ask."""
    try:
        setting = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(setting(MMAP_THRESHOLD, LARGE_BYTES) and setting(TRIM_THRESHOLD, KEPT_BYTES))
