"""Randomness for noise and Poisson coins: ChaCha20 keyed by the operating system.

Known coins void amplification by sampling, and known noise voids everything, so neither may
come from a seed in a config. `seeded` exists for tests and stamps a run NOT PRIVATE.
"""

import hashlib
import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = 32
_MANTISSA = (1 << 53) - 1
"""What is left of a word after its low 11 bits are shifted out, sign bit and all."""
_FRACTION, _ONE = (1 << 52) - 1, 1023 << 52
"""The fraction bits of a float64, and the bits of 1.0."""
_ZEROS = memoryview(bytes(8 << 16))
"""What is enciphered: the key stream itself comes out."""


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
        text = "\x1f".join(map(str, labels))
        return cls(hashlib.sha256(f"coterie not private\x1f{text}".encode()).digest())

    def uniform(self, count: int) -> NDArray[np.float64]:
        """(count,) independent multiples of 2^-53, uniform in [0, 1)."""
        bits = self._bits(count).bitwise_right_shift_(11).bitwise_and_(_MANTISSA)
        uniforms: NDArray[np.float64] = bits.double().mul_(2.0**-53).numpy()
        return uniforms

    def normal(self, count: int, std: float = 1.0) -> NDArray[np.float64]:
        """(count,) independent Gaussians of mean zero, by Box-Muller in float64.

        Largest magnitude possible: sqrt(2 * 52 * ln 2) = 8.49 deviations. About 6 ns each on
        one core, of which ChaCha20 takes 1.5; torch's vector cosine is a dozen times numpy's.
        Source: Box & Muller (1958), doi:10.1214/aoms/1177706645.
        """
        pairs = (count + 1) // 2
        # 52 random bits under the exponent of 1.0 are uniform in [1, 2): no conversion, no scaling.
        bits = self._bits(2 * pairs).bitwise_and_(_FRACTION).bitwise_or_(_ONE)
        both = bits.view(torch.float64)
        radius = torch.rsub(both[:pairs], 2.0).log_().mul_(-2.0 * std * std).sqrt_()
        angle = both[pairs:].mul_(2.0 * math.pi)
        torch.cos(angle, out=both[:pairs])
        angle.sin_()
        both.view(2, pairs).mul_(radius)
        gaussians: NDArray[np.float64] = both[:count].numpy()
        return gaussians

    def _bits(self, count: int) -> Tensor:
        """(count,) random int64: words of the key stream, little-endian as our hosts are."""
        words = torch.empty(count, dtype=torch.int64)
        if count:
            zeros = _ZEROS[: 8 * count] if 8 * count <= len(_ZEROS) else bytes(8 * count)
            self._stream.update_into(zeros, words.numpy().data.cast("B"))
        return words
