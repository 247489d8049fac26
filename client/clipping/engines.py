"""Three ways to the same clipped sum, fastest first.

`single_backward` (ours): one forward, one backward, no per-record weight gradients where a cheaper
form exists. `hooks` (Opacus): per-record gradients of every layer in memory. `loop`: one record
at a time, for whatever the others cannot read. `common.errors.PrivacyRefusedError` where an
engine cannot; `client.preflight` picks the first that is exact for a model.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.clipping.capture import Capture, Plan, UncoveredError
from client.clipping.tape import Tape
from common.errors import PrivacyRefusedError

FILLER = -1
"""Index of nobody's record: it fills a batch to its size, and nothing of it is added."""
LossOf = Callable[[NDArray[np.int64]], Tensor]
"""(B,) loss vector of the records at the given indices; of a `FILLER`, anything."""
Sums = dict[nn.Parameter, Tensor]
"""Float32 sum of clipped gradients, by parameter; one that is not there is zero."""
ROUNDING = 1e-6
"""Added to a norm before dividing: a clipped gradient stays within the bound after rounding."""
ROUGHEST = 1e3
"""How many times as long as a gradient, or as the clip bound, its terms may be before they are
added up. Beyond, they cancel to what float32 rounding makes of them, here and in the sums of
others: such a record adds nothing. Ordinary training has about 1."""


class EngineName(Enum):
    """Which engine; see the module."""

    single_backward = "single_backward"
    hooks = "hooks"
    loop = "loop"


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """(B,) what each record's gradient is multiplied by: min(1, C / norm), and 0 if not finite.

    A gradient that is not finite carries no information; zero keeps the sensitivity bound.
    """
    factors = (clip_norm / (norms + ROUNDING)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def _there(piece: NDArray[np.int64], norms: Tensor) -> Tensor:
    """(B,) whether what stands in the batch is a record, and no filler."""
    return torch.from_numpy(piece != FILLER).to(norms.device)


class ClippingEngine(ABC):
    """Adds clipped per-record gradients of one physical batch to running sums.

    Guarantee: with `sums` before and after the call, the difference is the sum over records of
    g_i * min(1, clip_norm / ||g_i||), g_i the gradient of record i's loss over all of
    `parameters`, to float32 rounding (1e-5 relative), or PrivacyRefusedError is raised. A
    record whose gradient is not finite adds nothing, and nor does a `FILLER`.
    """

    name: EngineName

    def __init__(self, model: nn.Module) -> None:
        model.eval()  # dropout off, running statistics frozen: records do not mix
        self.parameters: dict[nn.Parameter, str] = {
            p: name for name, p in model.named_parameters() if p.requires_grad
        }
        """The trainable parameters and their names."""

    @abstractmethod
    def add_clipped(
        self, loss_of: LossOf, piece: NDArray[np.int64], clip_norm: float, sums: Sums
    ) -> Tensor:
        """Adds the records of `piece` to `sums`; returns their (B,) norms, which are private."""

    def close(self) -> None:  # noqa: B027 - most engines leave nothing behind
        """Leaves the model as it was found."""


class SingleBackward(ClippingEngine):
    """Book-keeping on intercepted torch calls; see `client.clipping.capture`."""

    name = EngineName.single_backward

    def __init__(self, model: nn.Module, plan: Plan | None = None) -> None:
        super().__init__(model)
        self.plan = plan
        """Decisions made on made records, followed ever after. None: the next batch decides."""

    def add_clipped(
        self, loss_of: LossOf, piece: NDArray[np.int64], clip_norm: float, sums: Sums
    ) -> Tensor:
        """One forward and one backward; see `ClippingEngine`."""
        tape = self._tape_of(loss_of, piece)
        with torch.no_grad():
            norms = tape.squared_norms().sqrt_()
            factors = clip_factors(norms, clip_norm)
            rough = tape.terms() > ROUGHEST * norms.clamp(min=clip_norm)
            whole = torch.isfinite(norms) & ~rough
            if not bool(whole.all()):
                tape.zero_records(whole)
            tape.add_weighted(torch.where(_there(piece, norms), factors, 0), sums)
        return norms

    def _tape_of(self, loss_of: LossOf, piece: NDArray[np.int64]) -> Tape:
        tape = Tape(len(piece), self.plan.habits if self.plan else None)
        capture = Capture(self.parameters, tape, self.plan)
        try:
            with capture:
                losses = _checked(loss_of(piece), len(piece))
                losses.sum().backward()  # type: ignore[no-untyped-call]
            tape.settle(list(self.parameters))
            self._check(capture)
        finally:
            for parameter in self.parameters:
                parameter.grad = None
        self.plan = self.plan or Plan(tuple(capture.calls), tape.shown())
        return tape

    def _check(self, capture: Capture) -> None:
        """Nothing went past the tape, and every parameter has a gradient of every record."""
        tape = capture.tape
        if self.plan is not None and len(capture.calls) != len(self.plan.calls):
            raise PrivacyRefusedError(
                "the model used its parameters less often than on made records; a model whose "
                "path depends on its records cannot be trained privately"
            )
        passed = [name for p, name in self.parameters.items() if p.grad is not None]
        if passed:
            raise UncoveredError(f"{', '.join(passed)}: gradients went past the clipping engine")
        covered = tape.covered()
        unused = [name for p, name in self.parameters.items() if p not in covered]
        if unused:
            raise UncoveredError(f"{', '.join(unused)}: no gradient from any record")
        for parameter, gradients in tape.kept.items():
            if gradients.shape != (tape.records, *parameter.shape):
                raise UncoveredError(
                    f"{self.parameters[parameter]}: gradients of shape {tuple(gradients.shape)} "
                    f"for {tape.records} records"
                )


class Hooks(ClippingEngine):
    """Opacus's per-layer hooks, which keep every record's gradient of every layer."""

    name = EngineName.hooks

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._model = model
        from opacus.grad_sample import GradSampleHooks  # noqa: PLC0415 - few models need it

        try:
            self._hooks = GradSampleHooks(model, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            raise PrivacyRefusedError(
                "a trainable layer keeps buffers (as BatchNorm does), which mix records; "
                "this model cannot be trained privately"
            ) from error
        _train_what_is_trained(model)

    def add_clipped(
        self, loss_of: LossOf, piece: NDArray[np.int64], clip_norm: float, sums: Sums
    ) -> Tensor:
        """See `ClippingEngine`."""
        try:
            with warnings.catch_warnings():
                # Nothing below the lowest trainable layer needs a gradient; outputs suffice.
                warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
                losses = _checked(loss_of(piece), len(piece))
                losses.sum().backward()  # type: ignore[no-untyped-call]
            return self._collect(piece, clip_norm, sums)
        finally:
            for parameter in self.parameters:
                parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]

    @torch.no_grad()
    def _collect(self, piece: NDArray[np.int64], clip_norm: float, sums: Sums) -> Tensor:
        flat = {p: self._gradients(p, name, len(piece)) for p, name in self.parameters.items()}
        norms: Tensor = torch.stack([part.norm(dim=1) for part in flat.values()]).norm(dim=0)
        factors, finite = clip_factors(norms, clip_norm), torch.isfinite(norms)
        factors = torch.where(_there(piece, norms), factors, 0)
        for parameter, part in flat.items():
            safe = torch.where(finite[:, None], part, 0)
            _add(sums, parameter, (factors @ safe).view_as(parameter))
        return norms

    def _gradients(self, parameter: nn.Parameter, name: str, records: int) -> Tensor:
        """(B, numel) in float32: one per record, or clipping would bound the wrong thing."""
        gradients = getattr(parameter, "grad_sample", None)
        if not isinstance(gradients, Tensor) or len(gradients) != records:
            found = len(gradients) if isinstance(gradients, Tensor) else "no"
            raise UncoveredError(
                f"{name} has {found} gradients for {records} records; "
                "this model cannot be trained privately"
            )
        flat: Tensor = gradients.reshape(records, -1).float()
        return flat

    def close(self) -> None:
        """Removes the hooks and what they left on parameters."""
        self._hooks.cleanup()
        self._model.eval()
        for parameter in self.parameters:
            if hasattr(parameter, "grad_sample"):
                del parameter.grad_sample


class Loop(ClippingEngine):
    """One forward and backward per record: as slow as it sounds, and right for any model."""

    name = EngineName.loop

    def add_clipped(
        self, loss_of: LossOf, piece: NDArray[np.int64], clip_norm: float, sums: Sums
    ) -> Tensor:
        """See `ClippingEngine`."""
        parameters, norms = list(self.parameters), []
        for record in range(len(piece)):
            if piece[record] == FILLER:
                norms.append(torch.zeros(()))
                continue
            losses = _checked(loss_of(piece[record : record + 1]), 1)
            gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
            present = [g.float() for g in gradients if g is not None]
            norm = torch.stack([g.norm() for g in present]).norm()
            factor = clip_factors(norm, clip_norm)
            if factor > 0:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        _add(sums, parameter, gradient.float() * factor)
            norms.append(norm)
        return torch.stack(norms)


def _train_what_is_trained(model: nn.Module) -> None:
    """Training mode for the modules that own a trainable parameter, and for no other.

    Opacus's hooks record in training mode only. A frozen BatchNorm in training mode would
    normalise by the batch, and so mix records.
    """
    for module in model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.training = True


def completed(sums: Sums, engine: ClippingEngine) -> Sums:
    """`sums` in the order of the engine's parameters, with zeros where nothing was added."""
    return {
        p: sums[p] if p in sums else torch.zeros_like(p, dtype=torch.float32)
        for p in engine.parameters
    }


def _add(sums: Sums, parameter: nn.Parameter, gradient: Tensor) -> None:
    sums[parameter] = sums[parameter] + gradient if parameter in sums else gradient


def _checked(losses: Tensor, records: int) -> Tensor:
    if losses.shape != (records,):
        raise PrivacyRefusedError(
            f"the task gave losses of shape {tuple(losses.shape)} for {records} records; "
            "one loss per record is needed, never a mean over records"
        )
    return losses


ENGINES: dict[EngineName, Callable[[nn.Module], ClippingEngine]] = {
    EngineName.single_backward: SingleBackward,
    EngineName.hooks: Hooks,
    EngineName.loop: Loop,
}
"""By name, in order of preference."""
