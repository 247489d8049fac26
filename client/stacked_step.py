"""The private step of several sites at once: each its own coins, clip, noise, meters and step.

What is computed of records runs as one pass over several sites (`client.clipping.stacked`); what
touches randomness, the check of the clip bound or the divisor runs site by site, in the order and
by the functions of `client.private_step`, so that a seeded stream gives what it gives there.

Guarantee, beyond that of `private_step.private_steps`: what becomes of a site depends on its own
records, its own randomness and declared constants. With seeded noise that is what the loop gives,
to rounding, and the same to the bit in whatever company, at fixed `engine.threads` and fixed slots
and rows.

Shapes: P trained parameters; of a pass C slots, R rows in each. At most C sites step together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.clipping.stacked import StackedEngine
from client.measurements import Measurements
from client.meters import Meters
from client.private_step import ParameterGroup, cut, release, unit_count
from common.errors import PrivacyRefusedError
from common.frames import framed
from common.parameters import Vector
from common.prefix import Inputs
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness
from common.privacy.sampling import poisson_sample, records_of

Found = TypeVar("Found")
Drawn = NDArray[np.int64]
NOBODY: Drawn = np.zeros(0, dtype=np.int64)


@dataclass
class Seat:
    """One site while it steps beside others. What goes wrong at it stops it alone."""

    rows_at: Callable[[Drawn], Inputs] = field(repr=False)
    """(B, ...) what the model reads of its records at some indices."""
    records: int = field(repr=False)
    """N, private."""
    randomness: Randomness = field(repr=False)
    owners: Drawn | None = field(default=None, repr=False)
    """(N,) number of the person each record is of, where persons are drawn."""
    fault: Exception | None = None
    """Why it went no further."""
    vector: Vector | None = field(default=None, repr=False)
    """(P,) its parameters after the last step."""
    measured: Measurements | None = None
    """What its meters saw; None without privacy."""


@dataclass(frozen=True)
class Stack:
    """How the steps of several sites are computed together."""

    engine: StackedEngine
    filler: Inputs
    """(R, ...) rows that are nobody's."""
    fillers: int
    """How many rows of a slot no record takes, at least."""
    groups: Sequence[ParameterGroup]
    """What is trained, with its step sizes."""
    proximal_mu: float | None = None
    """Weight of FedProx's pull towards where the round began, after the noise. None: no pull."""

    @cached_property
    def rates(self) -> Tensor:
        """(P,) the step size of each coordinate.

        Raises: PrivacyRefusedError naming `optimizer-coverage` if a parameter has none.
        """
        sizes = {p: group.learning_rate for group in self.groups for p in group.parameters}
        outside = sum(p not in sizes for p in self.engine.parameters)
        if outside or len(sizes) != len(self.engine.parameters):
            raise PrivacyRefusedError(
                f"optimizer-coverage: {outside} trainable parameters outside the private optimiser"
            )
        return torch.cat([torch.full((p.numel(),), sizes[p]) for p in self.engine.parameters])

    @cached_property
    def rate(self) -> float | None:
        """The step size, where it is the same for all."""
        first = float(self.rates[0])
        return first if bool((self.rates == first).all()) else None


@torch.no_grad()
def private_steps_together(
    stack: Stack,
    seats: Sequence[Seat],
    meters: Sequence[Meters],
    vector: Vector,
    *,
    mechanism: Mechanism,
    steps: int,
) -> None:
    """Takes `steps` private steps at each of at most C seats, from `vector`; see the module.

    Each seat then has its `vector` and `measured`, or its `fault`.
    Args: meters: of each seat, told of the same mechanism.
    Raises: PrivacyRefusedError if a trainable parameter has no step size; and whatever goes wrong
    in what is computed of several.
    """
    walk = _Walk(stack, seats, vector, steps)
    units = _each(seats, lambda _, seat: unit_count(mechanism, seat.records, seat.owners))
    _each(seats, lambda place, _: meters[place].open_round())
    for _ in range(steps):
        _private_step(walk, seats, meters, units, mechanism)
    _each(seats, lambda place, seat: _close(seat, meters[place], steps))


@torch.no_grad()
def plain_steps_together(
    stack: Stack, seats: Sequence[Seat], vector: Vector, *, mechanism: Mechanism, steps: int
) -> None:
    """The same without clipping and noise: the baseline, with no guarantee at all."""
    walk = _Walk(stack, seats, vector, steps)
    for _ in range(steps):
        drawn = _each(
            seats,
            lambda _, seat: poisson_sample(
                seat.records, sample_rate=mechanism.sample_rate, coins=seat.randomness
            ),
        )
        walk.step_plainly(drawn, 1.0 / mechanism.divisor)


def _private_step(
    walk: "_Walk",
    seats: Sequence[Seat],
    meters: Sequence[Meters],
    units: Mapping[int, int],
    mechanism: Mechanism,
) -> None:
    """Draws, clips, sums, noises and divides at every seat, and takes each one step on."""
    samples = _each(
        seats, lambda place, seat: _sample(seat, units[place], meters[place], mechanism)
    )
    drawn = _each(seats, lambda place, seat: _records(seat, samples[place]))
    sums = walk.clipped_sums(drawn, mechanism.clip_norm)

    def released(place: int, seat: Seat) -> Tensor:
        own, meter = walk.by_parameter(sums[place]), meters[place]
        meter.check_sum(own, records=len(drawn[place]), units=len(samples[place]))
        gradients = release(own, mechanism, seat.randomness, meter.noise)
        return torch.cat([gradients[p].reshape(-1) for p in walk.parameters])

    walk.step(_each(seats, released))


class _Walk:
    """Where each seat stands, and the passes that take all of them further."""

    def __init__(self, stack: Stack, seats: Sequence[Seat], vector: Vector, steps: int) -> None:
        assert len(seats) <= stack.engine.slots
        self._stack, self._seats, self._left = stack, seats, steps
        self._shape = stack.engine.slots, stack.engine.rows
        self._piece = max(1, stack.engine.rows - stack.fillers)
        """Records of a seat in one pass, at most."""
        self._start = torch.from_numpy(np.array(vector, dtype=np.float32))
        self._moved: Tensor | None = None
        """(C, P); None while all stand where they began."""
        self._rates, self._pull = stack.rates, 0.0 * self._start[:0]
        if stack.proximal_mu is not None:
            pull = self._rates * stack.proximal_mu
            self._pull = pull / (1.0 + pull)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """What is trained, in the order of a flat vector."""
        return self._stack.engine.parameters

    def clipped_sums(self, drawn: Mapping[int, Drawn], clip_norm: float) -> Tensor:
        """(C, P) sums of the clipped gradients of those drawn, by seat."""
        engine = self._stack.engine
        return self._added(
            drawn, lambda at, rows, there: engine.clipped(at, rows, there, clip_norm)[0]
        )

    def by_parameter(self, flat: Tensor) -> dict[nn.Parameter, Tensor]:
        """(P,) in the parameters' shapes, as views."""
        engine = self._stack.engine
        parts = zip(engine.parameters, torch.split(flat, engine.sizes), strict=True)
        return {p: part.view_as(p) for p, part in parts}

    def step(self, gradients: Mapping[int, Tensor]) -> None:
        """Takes each seat that has a gradient (P,), which is used up, one step on; the others
        stand still.
        """
        self._begin_step()
        for place, gradient in gradients.items():
            self._step(place, gradient[None], 1.0)

    def step_plainly(self, drawn: Mapping[int, Drawn], scale: float) -> None:
        """Takes all one step down `scale` times the sums of the gradients of those drawn."""
        parts, place = self._plain_sums(drawn), 0
        self._begin_step()
        for part in parts:
            self._step(place, part, scale)
            place += len(part)

    def _plain_sums(self, drawn: Mapping[int, Drawn]) -> Iterable[Tensor]:
        """(c, P) sums of the gradients of those drawn, of some seats after the other."""
        engine, size = self._stack.engine, self._piece
        if any(len(own) > size for own in drawn.values()):
            return [self._added(drawn, engine.gradients)]
        whole = {place: (place, own) for place, own in drawn.items() if len(own)}
        if not whole:
            return [torch.zeros(engine.slots, len(self._start))]
        return engine.gradients_by_block(self._at(range(engine.slots)), *self._filled(whole))

    def _begin_step(self) -> None:
        self._left -= 1
        if self._left and self._moved is None:
            self._moved = self._start.repeat(self._stack.engine.slots, 1)

    def _step(self, place: int, gradients: Tensor, scale: float) -> None:
        """Takes the seats from `place` on down `scale` times their gradients (c, P), which are
        used up; after the last step each gets its vector, while that is in the cache.
        """
        slots = slice(place, place + len(gradients))
        at = self._start if self._moved is None else self._moved[slots]
        rate = self._stack.rate
        if rate is None:
            there = torch.addcmul(at, gradients, self._rates, value=-scale, out=gradients)
        else:  # a third less to read
            there = torch.add(at, gradients, alpha=-scale * rate, out=gradients)
        if len(self._pull):  # the penalty's implicit step, as the loop's
            there.lerp_(self._start.expand_as(there), self._pull)
        if self._moved is not None and self._left:
            self._moved[slots] = there
            return
        for seat, vector in zip(self._seats[slots], there, strict=False):  # the rest are nobody's
            if seat.fault is None:
                seat.vector = framed([vector.numpy()])

    def _added(
        self, drawn: Mapping[int, Drawn], of: Callable[[Tensor, Inputs, Tensor], Tensor]
    ) -> Tensor:
        """(C, P): the pieces of what each seat drew, in order; first all first ones, each in the
        slot of its seat, then what is left, in whatever slots there are.
        """
        slots = self._stack.engine.slots
        cuts = {place: list(cut(own, self._piece)) for place, own in drawn.items()}
        first = {place: (place, pieces[0]) for place, pieces in cuts.items() if pieces}
        if not first:
            return torch.zeros(slots, len(self._start))
        total = of(self._at(range(slots)), *self._filled(first))
        rest = [(place, piece) for place, pieces in cuts.items() for piece in pieces[1:]]
        for start in range(0, len(rest), slots):
            part = rest[start : start + slots]
            places = [place for place, _ in part] + [0] * (slots - len(part))
            found = of(self._at(places), *self._filled(dict(enumerate(part))))
            for slot, (place, _) in enumerate(part):
                total[place] += found[slot]
        return total

    def _at(self, places: Sequence[int]) -> Tensor:
        """The parameters of the seats at some places, (C, P); (P,) while all have the same."""
        if self._moved is None:
            return self._start
        return self._moved if isinstance(places, range) else self._moved[places]

    def _filled(self, pieces: Mapping[int, tuple[int, Drawn]]) -> tuple[Inputs, Tensor]:
        """The rows of a pass, by slot, and (C, R) which of them are records."""
        filler, there = self._stack.filler, np.zeros(self._shape, dtype=bool)
        parts: dict[str, list[Tensor]] = {name: [] for name in filler}
        for slot in range(len(there)):
            place, piece = pieces.get(slot, (-1, NOBODY))
            seat, own = self._seats[place], {}
            if len(piece) and seat.fault is None:
                try:
                    own = _read(seat, piece, filler)
                except Exception as fault:  # its own records cannot be read: that stops it alone
                    seat.fault = fault
            there[slot, : len(piece)] = bool(own)
            for name, tensor in filler.items():
                parts[name] += [own[name], tensor[len(piece) :]] if own else [tensor]
        rows = {
            n: torch.cat(each).view(*self._shape, *each[0].shape[1:]) for n, each in parts.items()
        }
        return rows, torch.from_numpy(there)


def _read(seat: Seat, piece: Drawn, like: Inputs) -> Inputs:
    """(B, ...) what is read of some records of a seat, each of the type and shape of `like`."""
    own, found = seat.rows_at(piece), {}
    for name, tensor in like.items():
        part = own[name]
        if part.shape != (len(piece), *tensor.shape[1:]):
            raise ValueError(f"{name}: of another shape than a made record's")
        found[name] = part if part.dtype == tensor.dtype else part.to(tensor.dtype)
    return found


def _each(seats: Iterable[Seat], act: Callable[[int, Seat], Found]) -> dict[int, Found]:
    """What comes of each seat that still goes on, by place; one that fails goes no further."""
    found: dict[int, Found] = {}
    for place, seat in enumerate(seats):
        if seat.fault is None:
            try:
                found[place] = act(place, seat)
            except Exception as fault:
                seat.fault = fault
    return found


def _sample(seat: Seat, units: int, meters: Meters, mechanism: Mechanism) -> Drawn:
    """The records, or persons, that a seat looks at in one step; its meters see it, too."""
    sample = poisson_sample(units, sample_rate=mechanism.sample_rate, coins=seat.randomness)
    meters.sampler.read(sample, units=units)
    return sample


def _records(seat: Seat, sample: Drawn) -> Drawn:
    return sample if seat.owners is None else records_of(sample, seat.owners)


def _close(seat: Seat, meters: Meters, steps: int) -> None:
    seat.measured = meters.close_round(steps)
