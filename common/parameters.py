"""The trainable parameters as one flat vector with a layout both sides can compare."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.canonical import digest
from common.errors import VerificationError

Vector = NDArray[np.float32]
"""(P,) float32: every trainable parameter, in layout order."""


MAX_MAGNITUDE = 1e4
"""Of a parameter. With far larger ones whoever sends them could blow up the rounding errors of a
batch until one record's presence shows in the gradients of others."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the trainable parameters, in the order of the vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Layout":
        """The layout of everything in `model` that is trained."""
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return cls(tuple(n for n, _ in trained), tuple(tuple(p.shape) for _, p in trained))

    @cached_property
    def size(self) -> int:
        """P, the number of trainable parameters."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names and shapes: two sides with the same digest mean the same vector."""
        return digest([[name, list(s)] for name, s in zip(self.names, self.shapes, strict=True)])


def flatten(model: nn.Module) -> Vector:
    """Copies the trainable parameters of `model` into one vector."""
    return np.concatenate(parts_of(model))


def parts_of(model: nn.Module) -> list[Vector]:
    """The trainable parameters of `model`, each as a vector; on a processor no copies."""
    trained = (p.detach() for p in model.parameters() if p.requires_grad)
    return [each.to("cpu", torch.float32).reshape(-1).numpy() for each in trained]


@torch.no_grad()
def load(model: nn.Module, vector: Vector) -> None:
    """Writes `vector` into the trainable parameters of `model`, in place.

    Raises: VerificationError unless `vector` is finite float32 of exactly the right length.
    """
    check_vector(vector, Layout.of(model))
    write(model, vector)


@torch.no_grad()
def write(model: nn.Module, vector: Vector) -> None:
    """As `load`, of a vector that `check_vector` let pass."""
    start = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            part = vector[start : start + parameter.numel()].reshape(parameter.shape)
            if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
                np.copyto(parameter.detach().numpy(), part)
            else:
                parameter.copy_(torch.from_numpy(np.array(part)))
            start += parameter.numel()


def largest_magnitude(vector: Vector) -> float:
    """Of its values; NaN where one of them is, 0 where there is none."""
    if not vector.size:
        return 0.0
    # The two ends stand for all values, and need no copy: of a NaN both are NaN.
    return max(-float(vector.min()), float(vector.max()))


def check_vector(vector: Vector, layout: Layout) -> float:
    """Refuses a vector that is not one of `layout`, or of no model.

    Returns: the largest magnitude of its values. Raises: VerificationError.
    """
    if vector.dtype != np.float32 or vector.shape != (layout.size,):
        raise VerificationError(
            f"parameters: {vector.dtype} of shape {vector.shape}, expected float32 ({layout.size},)"
        )
    largest = largest_magnitude(vector)
    if not math.isfinite(largest):
        raise VerificationError("parameters: not finite")
    if largest > MAX_MAGNITUDE:
        raise VerificationError(f"parameters: larger than {MAX_MAGNITUDE:g}, as no model's are")
    return largest
