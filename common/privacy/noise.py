"""Randomness for noise and Poisson coins: ChaCha20 keyed by the operating system.

Known coins void amplification by sampling, and known noise voids everything, so neither may
come from a seed in a config. `seeded` exists for tests and stamps a run NOT PRIVATE.
"""

import hashlib
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

KEY_BYTES = 32
_SCALE = 2.0**-53


class Randomness:
    """One stream of a CSPRNG (ChaCha20, RFC 8439): uniforms and Gaussians in float64.

    Guarantee: without the key, the output is indistinguishable from random by any known
    method; two streams from `from_entropy` are independent. The key is never shown.
    """

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    @classmethod
    def from_entropy(cls) -> "Randomness":
        """A fresh stream keyed by `os.urandom`."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def seeded(cls, *labels: int | str) -> "Randomness":
        """NOT PRIVATE: the stream that belongs to these labels, the same every time."""
        text = "\x1f".join(str(label) for label in labels)
        return cls(hashlib.sha256(f"coterie not private\x1f{text}".encode()).digest())

    def uniform(self, count: int) -> NDArray[np.float64]:
        """(count,) independent multiples of 2^-53, uniform in [0, 1)."""
        bits = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        return (bits >> np.uint64(11)).astype(np.float64) * _SCALE

    def normal(self, count: int) -> NDArray[np.float64]:
        """(count,) independent standard Gaussians, by Box-Muller in float64.

        Largest magnitude possible: sqrt(2 * 53 * ln 2) = 8.57.
        Source: Box & Muller (1958), doi:10.1214/aoms/1177706645.
        """
        pairs = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(1.0 - self.uniform(pairs)))
        angle = (2.0 * np.pi) * self.uniform(pairs)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
