"""Segment: memory that processes share, as a file without a name.

Written once and sealed; whoever is given the descriptor maps it. Nobody can open it by a path, and
the system frees it with its last holder, however that one ends: none can be left behind.
"""

import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterable
from pickle import PickleBuffer
from weakref import WeakSet

Part = bytes | bytearray | memoryview | PickleBuffer

ALIGNED = 64
"""Bytes: where each part of a segment begins is a multiple of it, as vector instructions like."""
MOST_MAPPED = 64
"""Segments that a process has mapped at a time, each of which takes a file handle; others are
read into memory of its own."""

_MAPPED: WeakSet[mmap.mmap] = WeakSet()


class Segment:
    """Some parts of memory in one sealed file. Its descriptor is closed by `close`, and the memory
    stays as long as any process has mapped it.
    """

    def __init__(self, handle: int, size: int) -> None:
        self.handle, self.size = handle, size

    @classmethod
    def of(cls, parts: Iterable[Part]) -> "tuple[Segment, list[tuple[int, int]]]":
        """A segment of these parts, and where each of them is: its start and its length."""
        handle = _nameless()
        try:
            places, end = [], 0
            for part in parts:
                content = memoryview(part).cast("B")
                end += _write(handle, bytes(-end % ALIGNED))
                places.append((end, len(content)))
                end += _write(handle, content)
            _seal(handle)
        except BaseException:
            os.close(handle)
            raise
        return cls(handle, end), places

    def view(self) -> memoryview:
        """What is in it, not writable. Unmapped with the last that refers to it."""
        if len(_MAPPED) >= MOST_MAPPED:
            return memoryview(os.pread(self.handle, self.size, 0))
        return self._mapped(mmap.PROT_READ)

    def copied_on_write(self) -> memoryview:
        """The same, where a write changes this process's own copy of a page and nothing else."""
        return self._mapped(mmap.PROT_READ | mmap.PROT_WRITE)

    def close(self) -> None:
        """Lets go of the descriptor, once; what is mapped stays."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _mapped(self, protection: int) -> memoryview:
        if not self.size:
            return memoryview(b"")
        # Private: older kernels refuse to share what is sealed, even to whom only reads.
        mapped = mmap.mmap(self.handle, self.size, flags=mmap.MAP_PRIVATE, prot=protection)
        _MAPPED.add(mapped)
        return memoryview(mapped)


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("coterie", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _seal(handle: int) -> None:
    """From now on it can neither be written nor cut, by this process neither."""
    if hasattr(fcntl, "F_ADD_SEALS") and hasattr(os, "memfd_create"):
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)


def _write(handle: int, content: bytes | memoryview) -> int:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(handle, rest) :]
    return len(content)
