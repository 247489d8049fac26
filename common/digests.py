"""Digests: many SHA-256 values as one array, 32 bytes each, compared and ordered at once.

What is to be told apart among millions of records is held by digest: neither the contents nor an
object for each of them is in memory.
"""

from collections.abc import Iterable, Iterator, Set

import numpy as np
from numpy.typing import NDArray

SIZE = 32

Digests = NDArray[np.uint8]
"""(N, 32) bytes."""


def gathered(digests: Iterable[bytes]) -> Digests:
    """(N, 32) of as many values."""
    whole = bytearray()
    for digest in digests:
        whole += digest
    return rows_of(whole)


def rows_of(whole: bytes | bytearray) -> Digests:
    """(N, 32) of values that stand one after the other."""
    return np.frombuffer(whole, dtype=np.uint8).reshape(-1, SIZE)


def words_of(digests: Digests) -> tuple[NDArray[np.uint64], ...]:
    """Four (N,) numbers of each, the most significant first: ordered as the bytes are."""
    words = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)
    return tuple(words[:, place] for place in range(words.shape[1]))


def order_of(digests: Digests) -> NDArray[np.int64]:
    """(N,) the rows in the order of their bytes; equal ones stay as they stand."""
    return np.lexsort(words_of(digests)[::-1]).astype(np.int64, copy=False)


def numbers_of(digests: Digests) -> NDArray[np.int64]:
    """(N,) numbers that are equal where digests are.

    >>> numbers_of(gathered([b"b" * 32, b"a" * 32, b"b" * 32])).tolist()
    [1, 0, 1]
    """
    order = order_of(digests)
    ordered = digests[order]
    numbers = np.zeros(len(digests), dtype=np.int64)
    numbers[order[1:]] = (ordered[1:] != ordered[:-1]).any(1).cumsum()
    return numbers


class DigestSet(Set[bytes]):
    """A set of digests in 32 bytes each; in their order."""

    def __init__(self, digests: Digests) -> None:
        firsts = np.unique(numbers_of(digests), return_index=True)[1]
        self._sorted = digests[firsts]

    @classmethod
    def _from_iterable(cls, digests: Iterable[bytes]) -> "DigestSet":  # type: ignore[override] # Set names no type of its own
        return cls(gathered(digests))

    def __len__(self) -> int:
        return len(self._sorted)

    def __iter__(self) -> Iterator[bytes]:
        return (row.tobytes() for row in self._sorted)

    def __contains__(self, digest: object) -> bool:
        if not isinstance(digest, bytes) or len(digest) != SIZE:
            return False
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._sorted[middle].tobytes() < digest:
                low = middle + 1
            else:
                high = middle
        return low < len(self) and self._sorted[low].tobytes() == digest
