"""The private step: Poisson sample, per-record clipping, noise, constant divisor.

Per-sample gradients come from Opacus's hooks; everything that touches randomness, the clip
bound or the divisor is here and comes from one `Mechanism`. What a step computes on the way
(batch, norms, clipped sum) lives in these functions and does not escape.

Shapes: B records of a physical batch, P trainable parameters.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from common.errors import PrivacyRefusedError
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness
from common.privacy.sampling import poisson_sample

LossOf = Callable[[NDArray[np.int64]], Tensor]
"""(B,) loss vector of the records at the given indices."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a step size."""

    parameters: tuple[nn.Parameter, ...]
    learning_rate: float


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """Opacus's DPOptimizer over SGD, with our randomness, divisor and non-finite guard.

    Guarantee: adding or removing one record changes the noise-free sum by at most
    `mechanism.clip_norm` in L2 (to float32 rounding); every coordinate of the sum gets
    independent N(0, noise_std^2); the result is divided by a constant.
    """

    def __init__(
        self, groups: list[ParameterGroup], mechanism: Mechanism, randomness: Randomness
    ) -> None:
        super().__init__(
            _sgd(groups),
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._mechanism, self._randomness = mechanism, randomness

    @torch.no_grad()
    def clip_and_accumulate(self) -> None:
        """Adds the clipped gradients of one physical batch to `summed_grad`.

        A record whose norm is not finite contributes zero: its gradient carries no
        information, and zero keeps the sensitivity bound.
        """
        flat = [gradient.reshape(len(gradient), -1) for gradient in self.grad_samples]
        norms = torch.stack([part.float().norm(dim=1) for part in flat], dim=1).norm(dim=1)
        finite = torch.isfinite(norms)
        factors = (self._mechanism.clip_norm / (norms + 1e-6)).clamp(max=1.0)
        factors = torch.where(finite, factors, torch.zeros_like(factors))
        for parameter, part in zip(self.params, flat, strict=True):
            safe = torch.where(finite[:, None], part, torch.zeros_like(part))
            clipped = (factors @ safe.float()).view_as(parameter)
            total = parameter.summed_grad
            parameter.summed_grad = clipped if total is None else total + clipped

    def add_noise(self) -> None:
        """Puts the noised sum into `grad`: fresh ChaCha20 noise for every coordinate."""
        for parameter in self.params:
            noise = self._randomness.normal(parameter.numel()) * self._mechanism.noise_std
            noised = parameter.summed_grad.double() + torch.from_numpy(noise).view_as(parameter)
            parameter.grad = noised.to(parameter.dtype)

    def scale_grad(self) -> None:
        """Divides by q * N_declared, never by the realised batch size."""
        for parameter in self.params:
            parameter.grad /= self._mechanism.divisor


def private_steps(
    model: nn.Module,
    groups: list[ParameterGroup],
    loss_of: LossOf,
    *,
    mechanism: Mechanism,
    randomness: Randomness,
    records: int,
    steps: int,
    physical_batch: int,
) -> None:
    """Takes `steps` private steps on `model`, in place.

    Guarantee: the change of the trainable parameters is the output of `steps` compositions of
    `mechanism`; the number of steps depends on nothing but `steps`; no gradient is left behind.
    Args: loss_of: losses of records by index; records: N, private, used to draw and not released.
    Raises: PrivacyRefusedError if a trainable parameter is not optimised, or has no
    gradient of its own for every record.
    """
    optimizer = PrivateOptimizer(groups, mechanism, randomness)
    _check_all_optimised(model, optimizer)
    hooks = _attach(model)
    _train_what_is_trained(model)
    try:
        for _ in range(steps):
            sample = poisson_sample(records, sample_rate=mechanism.sample_rate, coins=randomness)
            _private_step(optimizer, loss_of, sample, physical_batch)
    finally:
        _forget(optimizer, hooks)
        model.eval()


def plain_steps(
    model: nn.Module,
    groups: list[ParameterGroup],
    loss_of: LossOf,
    *,
    mechanism: Mechanism,
    randomness: Randomness,
    records: int,
    steps: int,
    physical_batch: int,
) -> None:
    """The same steps without clipping and noise: the baseline, with no guarantee at all."""
    model.eval()
    sgd = _sgd(groups)
    for _ in range(steps):
        sample = poisson_sample(records, sample_rate=mechanism.sample_rate, coins=randomness)
        for piece in _pieces(sample, physical_batch):
            (loss_of(piece).sum() / mechanism.divisor).backward()  # type: ignore[no-untyped-call]
        sgd.step()
        sgd.zero_grad(set_to_none=True)


def _sgd(groups: list[ParameterGroup]) -> torch.optim.SGD:
    return torch.optim.SGD(
        [{"params": list(g.parameters), "lr": g.learning_rate} for g in groups], lr=0.0
    )


def _private_step(
    optimizer: PrivateOptimizer,
    loss_of: LossOf,
    sample: NDArray[np.int64],
    physical_batch: int,
) -> None:
    """One step: pieces are clipped and summed, noise is added once, an empty sample included."""
    optimizer.zero_grad(set_to_none=True)
    for parameter in optimizer.params:
        parameter.summed_grad = torch.zeros_like(parameter)
    for piece in _pieces(sample, physical_batch):
        with warnings.catch_warnings():
            # Nothing below the lowest trainable layer needs a gradient; Opacus reads outputs only.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            loss_of(piece).sum().backward()  # type: ignore[no-untyped-call]
        _check_every_record(optimizer.params, len(piece))
        optimizer.clip_and_accumulate()
        for parameter in optimizer.params:
            parameter.grad_sample = parameter.grad = None
    optimizer.add_noise()
    optimizer.scale_grad()
    optimizer.original_optimizer.step()


def _pieces(sample: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(sample), size):
        yield sample[start : start + size]


def _train_what_is_trained(model: nn.Module) -> None:
    """Training mode for the modules that own a trainable parameter, and for no other.

    Opacus's hooks record in training mode only. A frozen BatchNorm in training mode would
    normalise by the batch, and so mix records.
    """
    model.eval()
    for module in model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.training = True


def _attach(model: nn.Module) -> GradSampleHooks:
    try:
        return GradSampleHooks(model, loss_reduction="sum", strict=True)
    except NotImplementedError as error:
        raise PrivacyRefusedError(
            "a trainable layer keeps buffers (as BatchNorm does), which mix records; "
            "this model cannot be trained privately"
        ) from error


def _check_all_optimised(model: nn.Module, optimizer: PrivateOptimizer) -> None:
    """Trainable = optimised: a parameter outside would be trained, or released, without noise."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimised = {id(parameter) for parameter in optimizer.params}
    outside = sorted(name for name, p in trainable.items() if id(p) not in optimised)
    if outside or len(optimised) != len(trainable):
        raise PrivacyRefusedError(
            f"trainable parameters outside the private optimiser: {', '.join(outside) or 'unknown'}"
        )


def _check_every_record(parameters: list[nn.Parameter], records: int) -> None:
    """Each parameter has one gradient per record, or clipping would bound the wrong thing."""
    for parameter in parameters:
        gradients = getattr(parameter, "grad_sample", None)
        if not isinstance(gradients, Tensor) or len(gradients) != records:
            found = len(gradients) if isinstance(gradients, Tensor) else "no"
            raise PrivacyRefusedError(
                f"a parameter of shape {tuple(parameter.shape)} has {found} gradients "
                f"for {records} records; this model cannot be trained privately"
            )


def _forget(optimizer: PrivateOptimizer, hooks: GradSampleHooks) -> None:
    """Drops everything computed before the noise."""
    hooks.cleanup()
    for parameter in optimizer.params:
        parameter.grad = None
        for name in ("grad_sample", "summed_grad"):
            if hasattr(parameter, name):
                delattr(parameter, name)
