"""What a clipped sum must be: a float64 loop of batches of one by ordinary autograd."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

SUM, NORM, FLOOR = 1e-5, 1e-6, 1e-6
"""Relative error of a clipped sum, of a record's norm, and the share of the whole sum's norm below
which a parameter's error is rounding: BERT's key bias has a true gradient of zero."""


@dataclass(frozen=True)
class Oracle:
    """Every record's gradient in float64."""

    gradients: list[dict[nn.Parameter, Tensor]]

    @property
    def norms(self) -> Tensor:
        """(B,) L2 norm of each record's gradient over all parameters."""
        parts = [torch.stack([g.norm() for g in one.values()]).norm() for one in self.gradients]
        return torch.stack(parts)

    def clipped_sum(self, records, clip_norm):
        """Sum of g_i * min(1, C / ||g_i||) over some records, by parameter."""
        factors = (clip_norm / self.norms).clamp(max=1)
        return {
            parameter: sum(self.gradients[i][parameter] * factors[i] for i in records)
            for parameter in self.gradients[0]
        }


def oracle(specimen, records):
    """The gradients of `records` made records; the model is left in float32, as it was."""
    model = specimen.model.double()
    trained = [p for p in model.parameters() if p.requires_grad]
    loss_of = specimen.made(records)
    gradients = []
    for record in range(records):
        loss = loss_of(np.array([record])).sum()
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        gradients.append(
            {
                p: torch.zeros_like(p) if g is None else g.clone()
                for p, g in zip(trained, found, strict=True)
            }
        )
    model.float()
    return Oracle(gradients)


def assert_exact(sums, norms, expected, records, clip_norm):
    """The clipped sum as a whole and by parameter, and the norms, are the oracle's."""
    wanted = expected.clipped_sum(records, clip_norm)
    whole = length(wanted)
    assert distance(sums, wanted) <= SUM * whole
    apart = {p: float((sums[p] - wanted[p]).norm()) for p in wanted}
    for parameter, error in apart.items():
        assert error <= max(SUM * float(wanted[parameter].norm()), FLOOR * whole)
    relative = (norms.double() - expected.norms[records]).abs() / expected.norms[records]
    assert float(relative.max()) <= NORM


def length(sums):
    """L2 norm over all parameters."""
    return float(torch.stack([part.double().norm() for part in sums.values()]).norm())


def distance(left, right):
    """L2 distance over all parameters; one that is not there is zero."""
    zero = torch.zeros(())
    parameters = {**left, **right}
    return length({p: left.get(p, zero).double() - right.get(p, zero).double() for p in parameters})
