"""Canaries: made records whose gradient is chosen, to be told from what is released.

A canary's gradient is one matrix of rank one, `left` times `right`, in one trainable layer. It
reaches a private step as any record's does, through a loss: the layer is called once more, beside
the model, on an input that makes its gradient so, and on zeros, which takes the bias out again.

Shapes: M canaries, B of them in a batch; a layer maps I inputs to O outputs.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from common.errors import PrivacyRefusedError
from common.parameters import Vector
from common.privacy.lower_bounds import Coins, Scores

Indices = NDArray[np.int64]
Sides = list[tuple[Tensor, Tensor]]
"""For each layer (B, O) and (B, I), whose product is the gradient there; zeros where it is none."""


@dataclass(frozen=True)
class Layer:
    """A layer that is linear in what is trained of it: its matrix, or only its bias."""

    module: nn.Module
    offset: int
    """Where its trained part begins in the vector of parameters."""
    outputs: int
    inputs: int
    """1 where only the bias is trained."""
    transposed: bool = False
    """Whether its matrix is (I, O), as in GPT-2."""
    bias_only: bool = False
    group: int = 0
    """Which group of parameters it is of, as the head, or what is below it."""

    @property
    def size(self) -> int:
        """Coordinates that a canary may point along."""
        return self.outputs * self.inputs

    def losses(self, left: Tensor, right: Tensor) -> Tensor:
        """(B,) whose gradient is `left` times `right`, and nothing outside this layer."""
        weight = self._weight
        left, right = (each.to(weight.device, weight.dtype) for each in (left, right))
        read = left.new_zeros(len(left), self._read) if self.bias_only else right
        out = self.module(torch.stack([read, torch.zeros_like(read)], dim=1))
        along = out[:, 1] * right if self.bias_only else out[:, 0] - out[:, 1]
        losses: Tensor = (left * along).sum(dim=1)
        return losses

    def matrix_of(self, vector: Vector) -> Tensor:
        """(O, I) of its part of a vector of parameters."""
        part = torch.from_numpy(vector[self.offset : self.offset + self.size])
        return (
            part.view(self.inputs, self.outputs).t()
            if self.transposed
            else part.view(self.outputs, self.inputs)
        )

    @property
    def _read(self) -> int:
        """Inputs of the whole layer."""
        return self._weight.shape[0] if isinstance(self.module, Conv1D) else self._weight.shape[1]

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment] # of a layer
        return weight


def layers_of(model: nn.Module, groups: Sequence[Collection[nn.Parameter]]) -> list[Layer]:
    """Every layer that a canary can be put into, of a model as it is trained.

    Args: groups: the parameters that are trained alike. Raises: PrivacyRefusedError if there is
    no such layer.
    """
    found: list[Layer] = []
    offset, places = 0, dict[Tensor, int]()
    for parameter in model.parameters():
        if parameter.requires_grad:
            places[parameter] = offset
            offset += parameter.numel()
    group: dict[Tensor, int] = {p: at for at, own in enumerate(groups) for p in own}
    for module in model.modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        turned, bias = isinstance(module, Conv1D), module.bias
        inputs, outputs = module.weight.shape if turned else module.weight.shape[::-1]
        if module.weight in places:
            own = group.get(module.weight, 0)
            found.append(Layer(module, places[module.weight], outputs, inputs, turned, group=own))
        elif bias is not None and bias in places:
            own = group.get(bias, 0)
            found.append(Layer(module, places[bias], outputs, 1, bias_only=True, group=own))
    if not found:
        raise PrivacyRefusedError("audit: no linear layer is trained, so no canary can be put in")
    return found


@dataclass(frozen=True)
class Canaries:
    """M canaries, each in one layer."""

    layers: Sequence[Layer]
    layer: Indices
    """(M,) which layer each is in."""
    left: Sequence[Tensor]
    """(M_l, O) for each layer, of its canaries in their order."""
    right: Sequence[Tensor]
    """(M_l, I)."""

    def __len__(self) -> int:
        """M."""
        return len(self.layer)

    def sides(self, indices: Indices) -> Sides:
        """Of a batch; an index below zero is nobody's."""
        there = indices >= 0
        layer = np.where(there, self.layer[indices], -1)
        within = self._within[indices]
        sides: Sides = []
        for number, (left, right) in enumerate(zip(self.left, self.right, strict=True)):
            rows = torch.from_numpy(np.flatnonzero(layer == number))
            chosen = torch.from_numpy(within[layer == number])
            batch: list[Tensor] = []
            for held in (left, right):
                whole = held.new_zeros(len(indices), held.shape[1])
                whole[rows] = held[chosen]
                batch.append(whole)
            sides.append((batch[0], batch[1]))
        return sides

    def scores(self, change: Vector) -> Scores:
        """(M,) how far a vector of parameters goes along each canary's gradient."""
        scores = np.zeros(len(self))
        for number, layer in enumerate(self.layers):
            matrix = layer.matrix_of(change).double()
            left, right = self.left[number].double(), self.right[number].double()
            scores[self.layer == number] = ((left @ matrix) * right).sum(dim=1).numpy()
        return scores

    @property
    def _within(self) -> Indices:
        """(M,) the place of each among those of its layer."""
        places = np.zeros(len(self), dtype=np.int64)
        for number in range(len(self.layers)):
            own = self.layer == number
            places[own] = np.arange(own.sum())
        return places


def losses_of(layers: Sequence[Layer], sides: Sides) -> Tensor:
    """(B,) of canaries, to be added to those of the made records they stand in."""
    parts = [layer.losses(*pair) for layer, pair in zip(layers, sides, strict=True)]
    return torch.stack(parts).sum(dim=0)


def dirac(layers: Sequence[Layer], most: int, draw: np.random.Generator) -> Canaries:
    """At most `most` canaries along one coordinate each, no two along the same.

    As many in each group, and there in each layer, as far as there is room: what is wrong with a
    small head must not be lost beside large blocks.
    """
    groups = [[layer for layer in layers if layer.group == at] for at in range(_groups(layers))]
    groups = [own for own in groups if own]
    room = min(sum(layer.size for layer in own) for own in groups)
    share = max(1, min(room, -(-most // len(groups))))
    counts: dict[int, int] = {}
    for own in groups[:most]:
        shared = _shared_out([layer.size for layer in own], share)
        counts |= {id(layer): count for layer, count in zip(own, shared, strict=True)}
    left, right, where = [], [], []
    for number, layer in enumerate(layers):
        count = counts.get(id(layer), 0)
        at = torch.from_numpy(draw.choice(layer.size, count, replace=False))
        left.append(nn.functional.one_hot(at // layer.inputs, layer.outputs).float())
        right.append(nn.functional.one_hot(at % layer.inputs, layer.inputs).float())
        where += [number] * count
    return _shuffled(layers, np.array(where, dtype=np.int64), left, right, draw)


def _groups(layers: Sequence[Layer]) -> int:
    return 1 + max(layer.group for layer in layers)


def random_units(layers: Sequence[Layer], count: int, draw: np.random.Generator) -> Canaries:
    """`count` canaries of random direction and length one, more of them in larger layers."""
    sizes = np.array([layer.size for layer in layers], dtype=np.float64)
    where = np.sort(draw.choice(len(layers), count, p=sizes / sizes.sum()))
    left, right = [], []
    for number, layer in enumerate(layers):
        own = int((where == number).sum())
        left.append(_units(own, layer.outputs, draw))
        right.append(_units(own, layer.inputs, draw))
    return _shuffled(layers, where, left, right, draw)


def coins_of(count: int, uniforms: NDArray[np.float64]) -> Coins:
    """(M,) fair coins of so many uniforms in [0, 1)."""
    assert len(uniforms) == count
    return uniforms < 0.5  # noqa: PLR2004 - a fair coin


def _shared_out(sizes: Sequence[int], most: int) -> list[int]:
    """Equal shares, none larger than its size; what one cannot take goes to the others.

    >>> _shared_out([2, 100, 100], 22)
    [2, 10, 10]
    """
    counts, left = [0] * len(sizes), min(most, sum(sizes))
    while left:
        open_ = [at for at, size in enumerate(sizes) if counts[at] < size]
        share = max(1, left // len(open_))
        for at in open_:
            taken = min(share, sizes[at] - counts[at], left)
            counts[at] += taken
            left -= taken
    return counts


def _shuffled(
    layers: Sequence[Layer],
    where: Indices,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    draw: np.random.Generator,
) -> Canaries:
    """In random order, so that the first ones are like the rest."""
    return Canaries(layers, draw.permutation(where), left, right)


def _units(count: int, size: int, draw: np.random.Generator) -> Tensor:
    found = draw.normal(size=(count, size))
    return torch.from_numpy(found / np.linalg.norm(found, axis=1, keepdims=True)).float()


def spread(layers: Iterable[Layer], records: int) -> Sides:
    """For each layer something of every record: what an engine is tried on."""
    generator = torch.Generator().manual_seed(0)

    def made(size: int) -> Tensor:
        return torch.randn(records, size, generator=generator).mul_(size**-0.5)

    return [(made(layer.outputs), made(layer.inputs)) for layer in layers]
