"""Preflight: can this model be trained privately here, by which engine, and how exactly?

Runs on made records, before any data: each engine's clipped sum is compared with a loop of
batches of one, and the first engine that agrees is used. The same check at every site gives the
same verdict, so a refusal tells nothing about records.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from client.clipping.engines import (
    ENGINES,
    FILLER,
    ClippingEngine,
    EngineName,
    LossOf,
    SingleBackward,
    Sums,
    clip_factors,
    completed,
)
from common.errors import PrivacyRefusedError

TRIALS = (
    (EngineName.single_backward, 3),
    (EngineName.single_backward, 5),
    (EngineName.single_backward, 7),
    (EngineName.hooks, 3),
    (EngineName.loop, 3),
)
"""Engines in order of preference, with the number of made records: a prime that divides no other
size of the model tells what holds records from what does not, so several primes are tried."""
MADE_CLIP = 0.7
"""Clip bound of the check, in lengths of the first made record's gradient: it is clipped."""
STIR = 0.02
"""Standard deviation of what is added to parameters for the check: a zero head would hide
everything below it."""
EXACT = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Relative error a sum may have against a loop in this precision. The float32 loop rounds too."""
EXACT_NORM = 1e-5
"""Relative error of a norm, in any precision: what a norm understates, a record may exceed its
bound by, and the published epsilon with it."""
FLOOR = 1e-6
"""A parameter's error is relative to its own norm, or to this share of the whole gradient's."""

FAULTS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""What a model's code raises where an engine, a precision or a batch of one does not suit it."""

Made = Callable[[int], LossOf]
"""Losses of so many made records, for the model as it stands."""


@dataclass(frozen=True)
class Verdict:
    """What preflight found."""

    engine: ClippingEngine | None
    """The engine to train with, or None: this model is refused."""
    max_rel_error: float
    """Largest relative error of sum, parameters and norms against the loop; inf if refused."""
    adapted: tuple[str, ...]
    """What is done differently from ordinary training, in words."""
    refused: tuple[str, ...]
    """Why an engine, or the model, was refused, with the parameter's name."""


def refusal(model_name: str, verdict: Verdict) -> PrivacyRefusedError:
    """The error for a person whose model no engine can train privately."""
    return PrivacyRefusedError(
        f"model.name={model_name}: cannot be trained privately: {'; '.join(verdict.refused)}"
    )


@dataclass(frozen=True)
class _Reference:
    """Clipped sum and norms by a loop of batches of one."""

    loss_of: LossOf
    sums: dict[nn.Parameter, Tensor]
    norms: Tensor
    clip_norm: float


def preflight(
    model: nn.Module,
    made: Made,
    *,
    precision: torch.dtype = torch.float64,
    rows: int = 16,
) -> Verdict:
    """Picks the fastest exact engine for `model`, which is left as it was.

    Guarantee: the engine of the verdict gave, on made records, the clipped sum of a loop of
    batches of one in `precision` to `EXACT`, the norms of a smaller batch, and changed no buffer;
    on a processor, in batches of `rows`, every norm to the bit whoever else is there and where.
    Args: made: losses of made records; it must follow the model's dtype.
    """
    model.eval()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return Verdict(None, math.inf, (), ("no parameter is trainable",))
    refused: list[str] = []
    references: dict[int, _Reference] = {}
    with stirred(model):
        for name, records in TRIALS:
            if records not in references:
                try:
                    loss_of = made(records)
                    if not references:
                        _check_apart(model, loss_of, records)
                    references[records] = _reference(model, loss_of, records, precision)
                except PrivacyRefusedError as fault:
                    return Verdict(None, math.inf, (), (str(fault),))
                except FAULTS as fault:
                    return Verdict(None, math.inf, (), (f"the model failed ({_line(fault)})",))
            try:
                engine, error = _tried(name, model, references[records], EXACT[precision])
                _check_place(engine, made, rows)
            except PrivacyRefusedError as fault:
                refused.append(f"{name.name}: {fault}")
                continue
            return Verdict(engine, error, _adapted(engine), tuple(dict.fromkeys(refused)))
    return Verdict(None, math.inf, (), tuple(dict.fromkeys(refused)))


def _tried(
    name: EngineName, model: nn.Module, reference: _Reference, exact: float
) -> tuple[ClippingEngine, float]:
    """The engine and its error. Raises: PrivacyRefusedError if it cannot, or is not exact."""
    engine = ENGINES[name](model)
    records, made = len(reference.norms), reference.loss_of
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an engine that is only tried has nothing to say
            sums: Sums = {}
            norms = engine.add_clipped(made, np.arange(records), reference.clip_norm, sums)
            of_norm = _relative(norms.double(), reference.norms)
            for fewer in (records - 1, 1):
                again = engine.add_clipped(made, np.arange(fewer), reference.clip_norm, {})
                of_norm = max(of_norm, _relative(again.double(), reference.norms[:fewer]))
            error = max(_error(completed(sums, engine), reference), of_norm)
    except PrivacyRefusedError:
        engine.close()
        raise
    except FAULTS as fault:
        engine.close()
        raise PrivacyRefusedError(f"failed ({_line(fault)})") from fault
    if not (error <= exact and of_norm <= EXACT_NORM):
        engine.close()
        raise PrivacyRefusedError(f"per-record gradients are off by {error:.1e}")
    return engine, error


@torch.no_grad()
def _error(sums: Sums, reference: _Reference) -> float:
    """The larger relative error: of the whole sum, of each parameter's."""
    whole = torch.stack([total.norm() for total in reference.sums.values()]).norm()
    apart = {p: (sums[p] - reference.sums[p]).norm() for p in reference.sums}
    floored = [
        float(distance / torch.maximum(reference.sums[p].norm(), FLOOR * whole).clamp(min=1e-30))
        if distance > FLOOR * whole
        else 0.0
        for p, distance in apart.items()
    ]
    of_sum = float(torch.stack(list(apart.values())).norm() / whole.clamp(min=1e-30))
    return max(of_sum, *floored)


def _relative(found: Tensor, expected: Tensor) -> float:
    apart = (found - expected).abs() / expected.clamp(min=1e-30)
    return math.inf if apart.isnan().any() else float(apart.max())


def _reference(
    model: nn.Module, loss_of: LossOf, records: int, precision: torch.dtype
) -> _Reference:
    """A loop of batches of one, by ordinary autograd, with the model in `precision`.

    Raises: PrivacyRefusedError if a trainable parameter is not used.
    """
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    parameters, reached = list(names), set[nn.Parameter]()
    kept = next(iter(parameters)).dtype
    model.to(precision)
    try:
        sums = {p: torch.zeros_like(p) for p in parameters}
        norms, clip_norm = [], 0.0
        for record in range(records):
            loss = loss_of(np.array([record])).sum()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            present = [g for g in found if g is not None]
            norm = torch.stack([g.norm() for g in present]).norm()
            clip_norm = clip_norm or MADE_CLIP * float(norm)
            factor = clip_factors(norm, clip_norm)
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    sums[parameter].add_(gradient * factor)
                    reached.add(parameter)
            norms.append(norm.double())
    finally:
        model.to(kept)  # what was widened narrows to the same bits
    unused = [name for parameter, name in names.items() if parameter not in reached]
    if unused:
        raise PrivacyRefusedError(
            f"{', '.join(unused)}: trainable, but no loss depends on it; noise alone would train it"
        )
    return _Reference(loss_of, sums, torch.stack(norms), clip_norm)


@torch.no_grad()
def _check_apart(model: nn.Module, loss_of: LossOf, records: int) -> None:
    """Raises: PrivacyRefusedError if this model's records do not keep apart."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    together = loss_of(np.arange(records))
    if together.shape != (records,):
        raise PrivacyRefusedError(
            f"the task gives losses of shape {tuple(together.shape)}, not one per record"
        )
    alone = torch.cat([loss_of(np.array([record])) for record in range(records)])
    changed = [n for n, buffer in model.named_buffers() if not torch.equal(buffer, before[n])]
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    if changed:
        raise PrivacyRefusedError(
            f"{changed[0]}: a buffer that training changes would be released without noise"
        )
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4):
        raise PrivacyRefusedError("the loss of a record depends on the other records of its batch")


def _check_place(engine: ClippingEngine, made: Made, rows: int) -> None:
    """Refuses an engine that rounds a record's gradient by who else is in the batch, or where.

    A GPU adds in no fixed order, whoever is there: nothing is held against it.
    """
    device = next(iter(engine.parameters)).device
    if rows == 1 or device.type != "cpu":
        return
    loss_of = made(rows)
    forwards, alone = np.arange(rows), np.full(rows, FILLER)
    alone[0] = forwards[0]
    try:
        first = engine.add_clipped(loss_of, forwards, 1.0, {})
        turned = engine.add_clipped(loss_of, forwards[::-1].copy(), 1.0, {})
        single = engine.add_clipped(loss_of, alone, 1.0, {})
    except PrivacyRefusedError:
        engine.close()
        raise
    except FAULTS as fault:
        engine.close()
        raise PrivacyRefusedError(f"failed ({_line(fault)})") from fault
    if not (torch.equal(first, turned.flip(0)) and torch.equal(first[:1], single[:1])):
        engine.close()
        raise PrivacyRefusedError(
            "how a record's gradient is rounded depends on its place in a batch of "
            f"{rows}; an engine.physical_batch of a multiple of 16 may mend it"
        )


def _line(fault: Exception) -> str:
    """The first line of what was raised."""
    return (str(fault) or type(fault).__name__).splitlines()[0]


@contextmanager
def stirred(model: nn.Module) -> Iterator[None]:
    """Moves trainable parameters a little for the check, and puts them back."""
    generator = torch.Generator().manual_seed(0)
    kept = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in kept:
            noise = torch.randn(parameter.shape, generator=generator) * STIR
            parameter.add_(noise.to(parameter.device, parameter.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept.items():
                parameter.copy_(value)


def _adapted(engine: ClippingEngine) -> tuple[str, ...]:
    """What the engine does that ordinary training does not, from its plan."""
    plan = engine.plan if isinstance(engine, SingleBackward) else None
    notes: dict[str, None] = {}
    for decision in plan.calls if plan else ():
        name = decision.parameters[0]
        if decision.rule == "embedding" and decision.roles[:1] == ("other",):
            notes[f"{name}: its ids, shared by the batch, are looked up once per record"] = None
        elif decision.rule == "shared" and name != "*":
            notes[f"{name}: used before any record; its gradient is carried back per record"] = None
    return tuple(notes)
