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
    return tuple(_word(digests, place) for place in range(SIZE // 8))


def order_of(digests: Digests) -> NDArray[np.int64]:
    """(N,) the rows in the order of their bytes; equal ones stay as they stand."""
    first = _word(digests, 0)
    order = np.argsort(first, kind="stable")
    same = first[order[1:]] == first[order[:-1]]
    if same.any():  # these are repeats; the rest of their bytes is looked at all the same
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        rows = order[tied]
        order[tied] = rows[np.lexsort(words_of(digests[rows])[::-1])]
    return order


def firsts_of(digests: Digests) -> NDArray[np.bool_]:
    """(N,) whether a digest stands nowhere before.

    >>> firsts_of(gathered([b"b" * 32, b"a" * 32, b"b" * 32])).tolist()
    [True, True, False]
    """
    order = order_of(digests)
    firsts = np.ones(len(digests), dtype=bool)
    firsts[order[1:][_repeats(digests, order)]] = False
    return firsts


def torn(digests: Digests, labels: NDArray[np.int64]) -> Digests:
    """(M, 32) those that stand there with different labels, some of them repeatedly.

    >>> torn(gathered([b"b" * 32, b"a" * 32, b"b" * 32]), np.array([0, 0, 1])).shape
    (1, 32)
    """
    order = order_of(digests)
    other = labels[order[1:]] != labels[order[:-1]]
    several: Digests = digests[order[1:][_repeats(digests, order) & other]]
    return several


def among(digests: Digests, others: Digests) -> NDArray[np.bool_]:
    """(N,) whether a digest is one of the others.

    >>> among(gathered([b"b" * 32, b"a" * 32]), gathered([b"a" * 32, b"c" * 32])).tolist()
    [False, True]
    """
    found: NDArray[np.bool_] = np.isin(_word(digests, 0), _word(others, 0))
    alike = others[np.isin(_word(others, 0), _word(digests[found], 0))]
    known = {other.tobytes() for other in alike}
    found[found] = [digest.tobytes() in known for digest in digests[found]]
    return found


def _word(digests: Digests, place: int) -> NDArray[np.uint64]:
    """(N,) eight bytes of each, as a number."""
    part = np.ascontiguousarray(digests[:, 8 * place : 8 * place + 8])
    return part.view(">u8").ravel().astype(np.uint64)


def _repeats(digests: Digests, order: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N - 1,) whether each but the first, in their order, is equal to the one before it."""
    first = _word(digests, 0)
    same: NDArray[np.bool_] = first[order[1:]] == first[order[:-1]]
    at = np.flatnonzero(same)
    same[at] = (digests[order[at]] == digests[order[at + 1]]).all(1)
    return same


class DigestSet(Set[bytes]):
    """A set of digests in 32 bytes each; in their order."""

    def __init__(self, digests: Digests) -> None:
        order = order_of(digests)
        self._sorted = digests[order[np.append(True, ~_repeats(digests, order))[: len(order)]]]

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
