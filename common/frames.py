"""Frames: vectors in the memory in which they travel, so that packing one copies nothing.

What Flower's `Array` holds of a vector is what `numpy.save` writes: a header, and the values. A
vector that is written behind its header once is packed, and read again, as it lies there.
"""

import io
from collections.abc import Iterable
from functools import lru_cache
from typing import cast

import numpy as np

from common.parameters import Vector

FLOAT_BYTES = 4


@lru_cache(maxsize=16)
def header_of(count: int, kind: str = "<f4") -> bytes:
    """What `numpy.save` writes before the bytes of a (count,) array, of float32 by default."""
    buffer = io.BytesIO()
    facts = {"descr": kind, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


def framed(parts: Iterable[Vector]) -> Vector:
    """(P,) these parts end to end, copied once: a vector that nobody writes, in its frame.

    Args: parts: contiguous float32, little-endian as our hosts are.

    >>> vector = framed([np.float32([1, 2]), np.float32([3])])
    >>> vector, len(frame_of(vector)), vector.flags.writeable
    (array([1., 2., 3.], dtype=float32), 140, False)
    """
    flat = [part.reshape(-1) for part in parts]
    header = header_of(sum(part.size for part in flat))
    return _within(b"".join((header, *(part.data for part in flat))), header)


def frame_of(vector: Vector) -> bytes:
    """What `numpy.save` writes of a flat float32 vector: its frame if it has one, else a copy."""
    header, base = header_of(vector.size), cast("object", vector.base)
    if isinstance(base, bytes) and len(base) == len(header) + FLOAT_BYTES * vector.size:
        plain = vector.dtype.str == "<f4" and vector.flags.c_contiguous and base.startswith(header)
        if plain and _address(vector) == _address(_within(base, header)):
            return base
    return b"".join((header, np.ascontiguousarray(vector).data))


def _within(frame: bytes, header: bytes) -> Vector:
    return np.frombuffer(frame, dtype=np.float32, offset=len(header))


def _address(vector: Vector) -> int:
    return int(vector.__array_interface__["data"][0])
