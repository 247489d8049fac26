"""The private step: Poisson sample, per-record clipping, noise, constant divisor.

Clipped sums come from a `client.clipping` engine; everything that touches randomness, the
clip bound or the divisor is here and comes from one `Mechanism`. What a step computes on the
way (batch, norms, clipped sum) lives in these functions and does not escape.

Shapes: N records, B of them in a physical batch, P trainable parameters.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor, nn
from torch.optim import Optimizer

from client.clipping.engines import FILLER, ClippingEngine, LossOf, Sums, completed
from client.measurements import Measurements
from client.meters import WINDOW, Meters, NoiseMeter
from client.proximal import ProximalSGD
from common.errors import PrivacyRefusedError
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness
from common.privacy.sampling import poisson_sample, records_of

EVEN_ROWS = 16
"""Rows of a batch come in multiples of it: a product of fewer rounds each row by its place."""
NOISE_CHUNK = 1 << 16
"""Coordinates that are noised at a time: a chunk stays in the processor's cache."""
QUANTILES = np.linspace(0.01, 0.99, 99)
"""Sizes of a drawn batch that count when its rows are chosen."""
SPARED = 1.1
"""What fewer passes are worth, in rows computed."""
NOISED_TOGETHER = 1 << 19
"""Coordinates of parameters that are cut into chunks as one, so that few chunks are small."""

REHEARSED_DRAWS, SPREAD, MOST_DRAWN, MOST_UNITS = 16, 100, 1 << 12, 1 << 17
"""Samples that are drawn of made units before a run; what the variance of their sizes should be;
how many units are expected in each at most, and of how many, where the rate is close to 1 or 0."""
REHEARSED_NOISES, MADE_PIECES = 2, 16
"""Noise that is drawn before a run: so often, for so many pieces that are read whole."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a step size."""

    parameters: tuple[nn.Parameter, ...]
    learning_rate: float


def sgd(groups: list[ParameterGroup], *, proximal_mu: float | None = None) -> Optimizer:
    """Gradient descent with the groups' step sizes, and no state from one step to the next.

    Args: proximal_mu: of a pull towards the parameters as they are now; see `client.proximal`.
    """
    settings = [{"params": list(g.parameters), "lr": g.learning_rate} for g in groups]
    if proximal_mu is None:
        return torch.optim.SGD(settings, lr=0.0)
    return ProximalSGD(settings, mu=proximal_mu)


def private_steps(
    engine: ClippingEngine,
    optimizer: Optimizer,
    loss_of: LossOf,
    *,
    mechanism: Mechanism,
    randomness: Randomness,
    records: int,
    steps: int,
    physical_batch: int,
    fillers: int = 1,
    meters: Meters | None = None,
    owners: NDArray[np.int64] | None = None,
) -> Measurements:
    """Takes `steps` private steps on the engine's model, in place.

    Guarantee: the change of the trainable parameters is the output of `steps` compositions of
    `mechanism`, post-processed by `optimizer`; the number of steps depends on nothing but
    `steps`; no gradient is left behind. An empty sample runs no model, and is a step like any.
    Args: loss_of: losses of records by index; records: N, private, used to draw and not released;
    physical_batch: rows of each forward and backward pass; fillers: how many of them no record
    takes, none only where the model reads no mask; meters: those of earlier rounds here, told of
    the same mechanism; owners: (N,) number of the person each record is of, where the mechanism
    draws persons.
    Returns: what the meters saw: a function of noise and coins, never of records.
    Raises: PrivacyRefusedError if a trainable parameter is not optimised, a meter alarms, or a
    person has more records than the mechanism bounds.
    """
    _check_all_optimised(engine, optimizer)
    units = unit_count(mechanism, records, owners)
    meters = meters or Meters(mechanism)
    meters.open_round()
    try:
        for _ in range(steps):
            sample = poisson_sample(units, sample_rate=mechanism.sample_rate, coins=randomness)
            meters.sampler.read(sample, units=units)
            drawn = sample if owners is None else records_of(sample, owners)
            sums = _clipped_sums(
                engine, loss_of, drawn, mechanism.clip_norm, physical_batch, fillers=fillers
            )
            meters.check_sum(sums, records=len(drawn), units=len(sample))
            released = release(sums, mechanism, randomness, meters.noise)
            for parameter, gradient in released.items():
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # an engine refuses gradients it did not make
    finally:
        for parameter in engine.parameters:
            parameter.grad = None
    return meters.close_round(steps)


def rehearse_chance(sample_rate: float) -> None:
    """Draws made units and noises made zeros as steps do, beneath meters of its own.

    Guarantee: coins or noise that are not what is declared mostly show here, where nothing is
    charged or released yet; of no record anything is seen. Passes over shuffled units alarm at
    rates from 1e-4 on, noise off by a tenth always, and by a hundredth in 96 of 100 trials.
    Raises: PrivacyRefusedError naming the check.
    """
    mechanism = Mechanism(1.0, 1.0, sample_rate, 1.0 / sample_rate)
    meters, randomness = Meters(mechanism), Randomness.from_entropy()
    spread = sample_rate * (1.0 - sample_rate)
    units = math.ceil(min(SPREAD / max(spread, 1e-9), MOST_DRAWN / sample_rate, MOST_UNITS))
    for _ in range(REHEARSED_DRAWS):
        sample = poisson_sample(units, sample_rate=sample_rate, coins=randomness)
        meters.sampler.read(sample, units=units)
    for _ in range(REHEARSED_NOISES):
        made = [nn.Parameter(torch.zeros(WINDOW)) for _ in range(MADE_PIECES)]
        release({p: torch.zeros(WINDOW) for p in made}, mechanism, randomness, meters.noise)


def batch_rows(expected: float, sample_rate: float, most: int, *, fillers: int = 1) -> int:
    """How many rows, at most `most`, each physical batch has: many, and few of them fillers.

    Guarantee: it follows from declared constants alone, and not from who was drawn.
    Args: expected: records of a step, the mechanism's divisor; fillers: rows of each batch that
    are nobody's at least.

    >>> batch_rows(150, 0.5, 16), batch_rows(150, 0.5, 256), batch_rows(10, 0.5, 256)
    (16, 176, 16)
    """
    drawn = special.ndtri(QUANTILES) * math.sqrt(expected * (1.0 - sample_rate)) + expected
    choices = range(EVEN_ROWS, most + 1, EVEN_ROWS) or range(most, most + 1)
    used = {rows: float(rows * np.ceil(drawn / max(1, rows - fillers)).mean()) for rows in choices}
    return max(rows for rows in choices if used[rows] <= SPARED * min(used.values()))


def plain_steps(
    optimizer: Optimizer,
    loss_of: LossOf,
    *,
    mechanism: Mechanism,
    randomness: Randomness,
    records: int,
    steps: int,
    physical_batch: int,
) -> None:
    """The same steps without clipping and noise: the baseline, with no guarantee at all."""
    for _ in range(steps):
        sample = poisson_sample(records, sample_rate=mechanism.sample_rate, coins=randomness)
        for piece in cut(sample, physical_batch):
            (loss_of(piece).sum() / mechanism.divisor).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def unit_count(mechanism: Mechanism, records: int, owners: NDArray[np.int64] | None) -> int:
    """How many coins a step tosses: one a record, or one a person.

    Raises: PrivacyRefusedError naming `person-cap`, if what is drawn is not what the mechanism
    bounds. Records that were capped never raise it, whatever they are; the text tells no number.
    """
    most = mechanism.max_records_per_person
    if owners is None and most is None:
        return records
    held = np.bincount(owners) if owners is not None and len(owners) else np.zeros(0, np.int64)
    if owners is None or most is None or len(owners) != records or held.max(initial=0) > most:
        raise PrivacyRefusedError(
            "person-cap: the records are not capped as the mechanism declares"
        )
    return len(held)


def _clipped_sums(
    engine: ClippingEngine,
    loss_of: LossOf,
    sample: NDArray[np.int64],
    clip_norm: float,
    physical_batch: int,
    *,
    fillers: int = 1,
) -> Sums:
    """The sample's clipped gradients, summed over physical batches whose cut does not matter.

    All batches have the same number of rows, `fillers` of them at least for nobody: how a record's
    gradient is rounded depends on the size of its batch, and in models that take a shorter way
    where nobody is padded, on the others in it. Hostile parameters make much of a rounding.
    """
    sums: Sums = {}
    for piece in cut(sample, max(1, physical_batch - fillers)):
        filling = np.full(physical_batch - len(piece), FILLER)
        engine.add_clipped(loss_of, np.concatenate([piece, filling]), clip_norm, sums)
    return completed(sums, engine)


@torch.no_grad()
def release(sums: Sums, mechanism: Mechanism, randomness: Randomness, meter: NoiseMeter) -> Sums:
    """What a step releases: each sum, noised once, over q * N_declared. `sums` is used up.

    It is the same, draw by draw, whether a site steps alone or beside others.
    """
    released: Sums = {}
    for group in _together(sums):
        totals = [sums.pop(p).view(-1) for p in group]
        read = [(at, window) for at in totals for window in meter.windows([at.numel()])]
        clipped = torch.cat([at[window] for at, window in read])
        for pieces in _chunks(totals):
            _noise(pieces, mechanism, randomness)
        noised = torch.cat([at[window] for at, window in read])
        meter.read(clipped, noised, [window.stop - window.start for _, window in read])
        for parameter, total in zip(group, totals, strict=True):
            released[parameter] = total.view_as(parameter).to(parameter.dtype)
    meter.close_step()
    return released


def _together(sums: Sums) -> list[list[nn.Parameter]]:
    """Every parameter once, in order; neighbours share a group as far as they fit."""
    groups: list[list[nn.Parameter]] = []
    room = 0
    for parameter in sums:
        if parameter.numel() > room:
            groups.append([])
            room = NOISED_TOGETHER
        groups[-1].append(parameter)
        room -= parameter.numel()
    return groups


def _chunks(totals: list[Tensor]) -> Iterator[list[Tensor]]:
    """The coordinates of `totals` in order, as views of `NOISE_CHUNK` together."""
    held: list[Tensor] = []
    room = NOISE_CHUNK
    for total in totals:
        start, size = 0, total.numel()  # of a tensor `len` is a slow call
        while size - start >= room:
            yield [*held, total[start : start + room]]
            held, start, room = [], start + room, NOISE_CHUNK
        if start < size:
            held.append(total[start:])
            room -= size - start
    if held:
        yield held


def _noise(pieces: list[Tensor], mechanism: Mechanism, randomness: Randomness) -> None:
    """Puts (piece + N(0, noise_std^2) per coordinate) / divisor into each, added in float64."""
    std, divisor = mechanism.noise_std, mechanism.divisor
    sizes = [piece.numel() for piece in pieces]
    noise = torch.from_numpy(randomness.normal(sum(sizes), std / divisor)).to(pieces[0].device)
    for piece, drawn in zip(pieces, torch.split(noise, sizes), strict=True):
        # Two passes of one type each are quicker than one that converts on the way.
        piece.copy_(drawn.add_(piece.double(), alpha=1.0 / divisor))


def cut(sample: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """A sample in order, `size` of it at a time."""
    for start in range(0, len(sample), size):
        yield sample[start : start + size]


def _check_all_optimised(engine: ClippingEngine, optimizer: Optimizer) -> None:
    """Trainable = optimised: a parameter outside would be trained, or released, without noise."""
    optimised = {p for group in optimizer.param_groups for p in group["params"]}
    outside = sorted(name for p, name in engine.parameters.items() if p not in optimised)
    if outside or len(optimised) != len(engine.parameters):
        raise PrivacyRefusedError(
            "optimizer-coverage: trainable parameters outside the private optimiser: "
            f"{', '.join(outside) or 'unknown'}"
        )
