"""Do several sites at once give what each gives alone? Tried on made records, before any data.

The choice between one computation for several sites and the loop follows from the model and from
declared constants, never from records or from who is asked; so it tells nothing about records, and
a run is computed the same way however its sites are divided among processes.
"""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from client.clipping.engines import FILLER, ClippingEngine, Sums, completed
from client.clipping.stacked import LinearLayers, RowLosses, StackedEngine, WholeGradients
from client.preflight import EXACT_NORM, FAULTS, STIR, stirred
from client.private_step import batch_rows
from common.config import Coding, Config
from common.errors import PrivacyRefusedError
from common.model import FineTuned, filled, read_of, targets_of
from common.prefix import Inputs
from common.privacy.mechanism import mechanism_of
from common.tasks import TASKS

LIGHT = 3e7
"""Operations of one site's forward pass up to which several sites at once are quicker: below it
most of the time goes into starting operations, and not into doing them."""
MOST_SLOTS, PASS_BYTES = 64, 64 << 20
"""Sites in one pass, at most, and what their rows, parameters and gradients may take, roughly."""
FEW_SLOTS = 4
"""Of more sites, fewer in one pass are not worth it."""
AGREES = 1e-5
"""Relative error that a slot's sum may have against the loop, in float32; both round."""
TRIED = 3
"""Slots that are compared with the loop."""
MOST_ROWS = 256
"""Rows of a slot, at most."""
MOST_TOGETHER, TOGETHER_BYTES = 256, 16 << 20
"""Sites that are answered together at most, and what their parameters may take then: so many share
a flush of their books, and a deadline passes between one lot and the next."""


def most_together(config: Config, trained: int) -> int:
    """How many sites may be answered at once, as far as a configuration tells: 1 where none may.

    Args: trained: P.
    """
    asked = config.engine.together or MOST_TOGETHER
    if config.data.declared_records is None:  # nothing trains before it is known
        return 1
    if config.federation.coding is not Coding.float32:  # coded site by site
        return 1
    room = max(1, TOGETHER_BYTES // (4 * max(1, trained)))
    return min(asked, MOST_TOGETHER, room, config.federation.training_sites)


def sites_together(config: Config, model: FineTuned) -> int:
    """The same as far as the model tells, too, before it is tried: 1 where one site is work enough.

    It takes a forward pass of a made record, and is no promise: see `Trainer.together`.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    most = most_together(config, trained)
    if most == 1:
        return 1
    task = TASKS[config.task.name]
    with torch.no_grad():
        made = model.prepare(task.made(task.load_processor(config.model), 1, config), batch=1)

    def losses(rows: Inputs) -> Tensor:
        return task.loss_vector(model(**read_of(rows)), targets_of(rows))

    rows = rows_of_slot(config, least_fillers(made))
    return most if _operations(losses, made) * rows <= LIGHT else 1


def rows_of_slot(config: Config, fillers: int) -> int:
    """R, from declared constants alone; sigma, which sites may differ in, plays no part."""
    mechanism = mechanism_of(replace(config, privacy=replace(config.privacy, noise_multiplier=1.0)))
    return batch_rows(mechanism.divisor, mechanism.sample_rate, MOST_ROWS, fillers=fillers)


def least_fillers(rows: Inputs) -> int:
    """How many rows of a batch are nobody's at least: one, where the model reads a mask."""
    return int(any(name.endswith("mask") for name in rows))


def fillers_of(made: Inputs, rows: int) -> Inputs:
    """So many rows of nobody, beside a made one."""
    one = {name: tensor[:1] for name, tensor in made.items()}
    return {name: tensor[1:] for name, tensor in filled(one, rows + 1).items()}


@dataclass(frozen=True)
class Trial:
    """What engines for several sites are tried on."""

    model: nn.Module
    losses: RowLosses
    """Of rows, by the model as it stands."""
    made: Inputs
    """(M, ...) made rows."""
    filler: Inputs
    """(R, ...) rows of nobody: what a slot holds."""
    alone: ClippingEngine | None
    """The engine of the loop; None where nothing is clipped."""

    @property
    def rows(self) -> int:
        """R."""
        return len(next(iter(self.filler.values())))

    @property
    def records(self) -> int:
        """M."""
        return len(next(iter(self.made.values())))

    def slots(self, sites: int, *, whole: bool) -> int:
        """C, how many sites fit in one pass; `whole` where every record's gradient is kept."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        read = sum(tensor.numel() for tensor in self.filler.values())
        numbers = 2 * read + 3 * trained + (2 * self.rows * trained if whole else 0)
        return min(sites, MOST_SLOTS, PASS_BYTES // (4 * max(1, numbers)))

    def passed(self, at: NDArray[np.int64]) -> Inputs:
        """(..., ...) the made rows at some indices, and a filler's at `FILLER`."""
        pool = {name: torch.cat([t, self.filler[name][:1]]) for name, t in self.made.items()}
        where = torch.from_numpy(np.where(at == FILLER, self.records, at))
        return {name: tensor[where] for name, tensor in pool.items()}


def stacked_engine(trial: Trial, *, sites: int) -> StackedEngine | None:
    """What trains several sites at once, if that is worth it for the model, and exact.

    Guarantee: on made records each slot gave the sum, and the norms, of the loop for the same rows
    and parameters, to `AGREES` and `EXACT_NORM`; and on a processor the same bits in any slot and
    beside any others, a record's norm also in any row.
    """
    try:
        if _operations(trial.losses, trial.made) * trial.rows > LIGHT:
            return None
    except FAULTS:
        return None
    with stirred(trial.model):
        for whole in (False, True):
            slots = trial.slots(sites, whole=whole)
            if slots < min(sites, FEW_SLOTS):
                continue
            try:
                with warnings.catch_warnings():
                    # That torch has no rule for several at once, and takes one after the other.
                    warnings.simplefilter("error", UserWarning)
                    engine = _made_engine(trial, slots, whole=whole)
                    if _agrees(engine, trial):
                        return engine
            except (PrivacyRefusedError, UserWarning, *FAULTS):
                continue  # the next way, or the loop
    return None


def _operations(losses: RowLosses, made: Inputs) -> float:
    """Of the forward pass of one record."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        losses(made)
    return float(counter.get_total_flops()) / len(next(iter(made.values())))


def _made_engine(trial: Trial, slots: int, *, whole: bool) -> StackedEngine:
    if whole:
        return WholeGradients(trial.model, trial.losses, slots=slots, rows=trial.rows)
    return LinearLayers(trial.model, trial.losses, slots=slots, rows=trial.rows, made=trial.filler)


@torch.no_grad()
def _agrees(engine: StackedEngine, trial: Trial) -> bool:
    """From one start for all, and from a start of its own for each."""
    start = torch.cat([p.detach().reshape(-1) for p in engine.parameters])
    generator = torch.Generator().manual_seed(1)
    apart = start + STIR * torch.randn(engine.slots, len(start), generator=generator)
    number = np.arange(engine.slots)[:, None]
    at = (np.arange(trial.rows) + number) % trial.records
    at[np.arange(trial.rows) > number % max(1, trial.rows - 1)] = (
        FILLER  # one record, two, and so on
    )
    return all(_is_exact(engine, trial, each, at) for each in (start, apart))


def _is_exact(
    engine: StackedEngine, trial: Trial, parameters: Tensor, at: NDArray[np.int64]
) -> bool:
    stacked = parameters.dim() > 1
    clip_norm = 1.0
    if trial.alone is not None:
        norms = _run(engine, trial, parameters, at, 1.0)[1]
        clip_norm = float(norms[torch.from_numpy(at != FILLER)].median())  # some are clipped
    sums, norms = _run(engine, trial, parameters, at, clip_norm)
    for slot in range(min(TRIED, engine.slots)):
        _load(engine, parameters[slot] if stacked else parameters)
        alone = _alone(trial, engine, at[slot], clip_norm)
        if not _match(alone, (sums[slot], norms[slot])):
            return False
    if parameters.device.type != "cpu":  # a GPU adds in no fixed order, whoever is there
        return True
    turned = parameters.flip(0) if stacked else parameters
    again = _run(engine, trial, turned, at[::-1].copy(), clip_norm)
    rows = _run(engine, trial, parameters, at[:, ::-1].copy(), clip_norm)
    single = np.full_like(at, FILLER)
    single[-1, 0] = at[0, 0]
    lonely = _run(
        engine, trial, parameters.roll(-1, 0) if stacked else parameters, single, clip_norm
    )
    return (
        torch.equal(sums, again[0].flip(0))
        and torch.equal(norms, again[1].flip(0))
        and torch.equal(norms, rows[1].flip(1))
        and torch.equal(norms[0, 0], lonely[1][-1, 0])
    )


def _run(
    engine: StackedEngine,
    trial: Trial,
    parameters: Tensor,
    at: NDArray[np.int64],
    clip_norm: float,
) -> tuple[Tensor, Tensor]:
    """(C, P) sums and (C, R) norms of records; zeros for norms where nothing is clipped."""
    rows, there = trial.passed(at), torch.from_numpy(at != FILLER)
    if trial.alone is None:
        return engine.gradients(parameters, rows, there), torch.zeros(at.shape)
    sums, norms = engine.clipped(parameters, rows, there, clip_norm)
    return sums, torch.where(there, norms, 0)


def _load(engine: StackedEngine, flat: Tensor) -> None:
    parts = torch.split(flat, engine.sizes)
    for parameter, part in zip(engine.parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


@torch.enable_grad()
def _alone(
    trial: Trial, engine: StackedEngine, at: NDArray[np.int64], clip_norm: float
) -> tuple[Tensor, Tensor]:
    """(P,) sum and (R,) norms of one slot's rows by the loop, for the model as it stands."""
    there = torch.from_numpy(at != FILLER)
    if trial.alone is None:
        total = torch.where(there, trial.losses(trial.passed(at)), 0).sum()
        found = torch.autograd.grad(total, engine.parameters)
        return torch.cat([each.reshape(-1) for each in found]), torch.zeros(len(at))
    sums: Sums = {}
    norms = trial.alone.add_clipped(
        lambda rows: trial.losses(trial.passed(rows)), at, clip_norm, sums
    )
    whole = completed(sums, trial.alone)
    return torch.cat([whole[p].reshape(-1) for p in engine.parameters]), norms * there


def _match(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> bool:
    apart = (expected[0] - found[0]).norm()
    norms = (expected[1] - found[1]).abs() / expected[1].clamp(min=1e-30)
    return bool(apart <= AGREES * expected[0].norm() and norms.max() <= EXACT_NORM)
