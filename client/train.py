"""Local training: the warm model of one process, on which sites take turns."""

import logging
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.agreement import (
    Trial,
    fillers_of,
    least_fillers,
    most_together,
    rows_of_slot,
    stacked_engine,
)
from client.clipping.engines import FILLER, ClippingEngine, LossOf
from client.measurements import Measurements
from client.meters import Meters
from client.persons import usable
from client.preflight import Verdict, preflight, refusal
from client.private_step import (
    ParameterGroup,
    batch_rows,
    plain_steps,
    private_steps,
    rehearse_chance,
    sgd,
)
from client.site import Site
from client.stacked_step import Seat, Stack, plain_steps_together, private_steps_together
from common import parameters
from common.config import Config, NoiseSource, PrivacyMode, config_hash
from common.device import CPU
from common.frames import framed
from common.model import filled, read_of, targets_of
from common.parameters import Layout, Vector
from common.prefix import Inputs
from common.prepared import Preparation, PreparedRecords
from common.privacy.mechanism import Mechanism, mechanism_of
from common.privacy.noise import Randomness
from common.records import Records
from common.tasks import TASKS

log = logging.getLogger(__name__)

REHEARSED = 2
"""Made records, or persons, of a rehearsed step; and records of a person who is there alone."""
BEYOND = 1e6
"""A made record's loss is multiplied by this many clip bounds: its gradient is far too long."""
MADE_ROWS = 7
"""Made records on which what trains several sites at once is tried."""
Trained = tuple[Vector, Measurements | None]
"""New parameters, and what the meters saw of noise and coins; None without privacy."""


@dataclass(frozen=True)
class Held:
    """What steps read of a site's records, those beyond a person's bound left out."""

    source: Records
    """What it was prepared from: other records of that site are prepared anew."""
    prepared: PreparedRecords
    owners: NDArray[np.int64] | None
    """(N,) number of the person each record is of, where persons are drawn."""


class Trainer:
    """A model built once from a config, and the steps any site can take on it."""

    def __init__(self, config: Config, device: torch.device = CPU) -> None:
        """Args: device: where the model is, and steps are taken; noise and coins are drawn on the
        processor, whatever it is.
        """
        self._config = config
        self._task = TASKS[config.task.name]
        self._processor = self._task.load_processor(config.model)
        self._model = self._task.build(config).to(device)
        self.layout = Layout.of(self._model)
        self.parameters = sum(parameter.numel() for parameter in self._model.parameters())
        """Of the whole model, frozen ones included."""
        self.adapted = (
            *(f"{name}: frozen, the output does not depend on it" for name in self._model.unused),
            *(f"{name}: frozen, the whole batch reads it at once" for name in self._model.tables),
        )
        """What building the model changed in it, in words."""
        rates = config.tuning
        named = (
            (self._model.head_parameters(), rates.head_learning_rate),
            (self._model.adapter_parameters(), rates.adapter_learning_rate),
        )
        self._groups = [ParameterGroup(group, rate) for group, rate in named if group]
        self._checked: Vector | None = None
        """The last vector that was found to be one of this model; kept, so that it stays it."""
        self._engine: ClippingEngine | None = None
        self._meters: dict[tuple[str, Mechanism], Meters] = {}
        """What each site drew and added so far; private, and stays in this process."""
        self._held: dict[str, Held] = {}
        """What is prepared, by site: a trainer is one per config, as what is prepared must be."""
        self._stacks: list[Stack | None] = []
        """What trains several sites at once, once it was tried."""

    @property
    def config(self) -> Config:
        """What it was built from, or is under."""
        return self._config

    def under(self, config: Config) -> "Trainer":
        """The same warm model, and all that is kept of sites, for one on these terms.

        Args: config: as the trainer's own but for epsilon, sigma and number of rounds.
        """
        if config_hash(config) == config_hash(self._config):
            return self
        twin = copy(self)
        twin._config = config
        return twin

    def check(self, vector: Vector) -> None:
        """Refuses a vector that is not one of this model. Raises: VerificationError.

        All sites of a process are sent the same one: it is looked at once, if nobody can write it.
        """
        if not _are_one(vector, self._checked):
            parameters.check_vector(vector, self.layout)
            self._checked = vector

    def train(self, site: Site, vector: Vector, *, round_number: int) -> Trained:
        """The round's local steps at `site`, from the global parameters `vector`.

        Guarantee: with privacy the result is a post-processing of `vector` and of `local_steps`
        runs of the config's mechanism on the site's records, in `privacy.mode=person` on at most
        `max_records_per_person` of each person.
        Returns: new parameters, and what the meters saw of noise and coins; None without privacy.
        Raises: VerificationError if `vector` does not fit; PrivacyRefusedError; ConfigError if
        persons are to be protected and the records name none.
        """
        self.check(vector)
        parameters.write(self._model, vector)
        held = self._prepared(site)
        loss_of, records = self._loss_of(held.prepared.rows), len(held.prepared)
        randomness = randomness_of(self._config, site.name, round_number)
        measured = None
        if self._config.privacy.mode is PrivacyMode.none:
            self._plain_steps(loss_of, randomness, records)
        else:
            mechanism = mechanism_of(self._config)
            measured = self._private_steps(
                loss_of,
                mechanism,
                randomness,
                groups=self._groups,
                records=records,
                owners=held.owners,
                steps=self._config.federation.local_steps,
                meters=self._meters_of(site, mechanism),
            )
            log.info("%s, round %d: %s", site.name, round_number, measured)
        return framed(parameters.parts_of(self._model)), measured

    @property
    def together(self) -> int:
        """How many sites `train_together` takes; 1: this model trains site by site.

        It follows from the configuration and the model, never from records or from who is asked.
        Raises: PrivacyRefusedError, before anything is charged, if what trains several at once
        does not do on made records what its mechanism declares.
        """
        return 1 if self._stack is None else most_together(self._config, self.layout.size)

    def train_together(
        self, sites: Sequence[Site], vector: Vector, *, round_number: int
    ) -> list[Trained | Exception]:
        """As `train` at each of several sites, computed in a few passes.

        Guarantee: to rounding what `train` gives at each, by the same draws; a site at which
        something fails has its exception, and the others go on. For a model that trains so, what
        a site gets is the same to the bit whoever is asked beside it.
        """
        self.check(vector)
        stack, seats = self._stack, [self._seat(site, round_number) for site in sites]
        assert stack is not None
        for first in range(0, len(seats), stack.engine.slots):
            at = slice(first, first + stack.engine.slots)
            self._steps_together(stack, sites[at], seats[at], vector)
        return [_outcome(seat) for seat in seats]

    @torch.inference_mode()
    def count_correct(self, site: Site, vector: Vector) -> int:
        """How many records of `site` that a run may use the model gets right: private.

        Guarantee: one record more changes it by one at most. Each is prepared and judged alone:
        in a batch of another size sums round otherwise, and a coordinator can choose parameters
        at which that turns the answers of many.
        """
        parameters.load(self._model, vector)
        self._model.eval()
        records, count = usable(site.records, self._config.privacy), 0
        alone = replace(self._preparation, batch=1)
        for index in range(len(records)):
            row = self._as_read(alone.of(records.subset([index])))
            count += int(self._task.correct(self._model(**read_of(row)), targets_of(row)).sum())
        return count

    def preflight(self, *, precision: torch.dtype = torch.float32) -> Verdict:
        """Tries the model on made records; see `client.preflight`."""
        verdict = preflight(self._model, self._made, precision=precision, rows=self._rows())
        self._engine = verdict.engine
        return verdict

    def rehearse(self) -> None:
        """Picks a clipping engine and takes steps of size zero: on two made records, one, nobody.

        Guarantee: what this model cannot do fails here, before anything is charged, the same at
        every site, and so tells nothing about records. The gradients of the made records are far
        beyond the clip bound, and that of one alone is held against it. Where persons are drawn,
        one alone has the same record twice, if they may have two, and is held against theirs.
        Coins and noise, too, are tried on what is made up.
        Raises: ConfigError if the model cannot read its input; PrivacyRefusedError if it cannot
        be trained privately.
        """
        verdict = self.preflight()
        if verdict.engine is None:
            raise refusal(self._config.model.name, verdict)
        still = [replace(group, learning_rate=0.0) for group in self._groups]
        made, most = self._made(REHEARSED), self._config.privacy.max_records_per_person or 1
        for units, each in ((REHEARSED, 1), (1, min(most, REHEARSED)), (0, 0)):
            self._rehearse_step(made, still, np.repeat(np.arange(units), each))
        rehearse_chance(self._config.privacy.sample_rate)

    def _rehearse_together(self, stack: Stack) -> None:
        """The same steps, each at a site of its own, beside each other and under a bound that
        their gradients are far beyond.
        """
        privacy, made = self._config.privacy, self._as_read(self._prepared_made(REHEARSED))
        most = privacy.max_records_per_person
        still = [replace(group, learning_rate=0.0) for group in stack.groups]
        clip_norm = privacy.clip_norm / BEYOND
        mechanism = Mechanism(1.0, clip_norm, 1.0, REHEARSED, most)
        seats = []
        for units, each in ((REHEARSED, 1), (1, min(most or 1, REHEARSED)), (0, 0)):
            owners = np.repeat(np.arange(units), each)
            seats.append(
                Seat(
                    lambda at, of=owners: {n: t[of[at]] for n, t in made.items()},  # type: ignore[misc]
                    len(owners),
                    Randomness.from_entropy(),
                    None if most is None else owners,
                )
            )
        start = parameters.flatten(self._model)
        for first in range(0, len(seats), stack.engine.slots):
            part = seats[first : first + stack.engine.slots]
            meters = [Meters(mechanism) for _ in part]
            private_steps_together(
                replace(stack, groups=still), part, meters, start, mechanism=mechanism, steps=1
            )
        for seat in seats:
            if seat.fault is not None:
                raise seat.fault

    def _rehearse_step(
        self, made: LossOf, groups: list[ParameterGroup], owners: NDArray[np.int64]
    ) -> None:
        """A step on a made record for each of `owners`, the same one for the same owner."""
        privacy = self._config.privacy
        most = privacy.max_records_per_person
        self._private_steps(
            lambda at: (
                made(np.where(at == FILLER, FILLER, owners[at])) * (BEYOND * privacy.clip_norm)
            ),
            Mechanism(1.0, privacy.clip_norm, 1.0, REHEARSED, most),
            Randomness.from_entropy(),
            groups=groups,
            records=len(owners),
            owners=None if most is None else owners,
            steps=1,
        )

    def _private_steps(
        self,
        loss_of: LossOf,
        mechanism: Mechanism,
        randomness: Randomness,
        *,
        groups: list[ParameterGroup],
        records: int,
        owners: NDArray[np.int64] | None,
        steps: int,
        meters: Meters | None = None,
    ) -> Measurements:
        if self._engine is None:
            self.rehearse()
        assert self._engine is not None
        return private_steps(
            self._engine,
            sgd(groups, proximal_mu=self._config.strategy.proximal_mu),
            loss_of,
            mechanism=mechanism,
            randomness=randomness,
            records=records,
            steps=steps,
            physical_batch=self._rows(),
            fillers=self._fillers,
            meters=meters,
            owners=owners,
        )

    def _steps_together(
        self, stack: Stack, sites: Sequence[Site], seats: Sequence[Seat], vector: Vector
    ) -> None:
        mechanism, steps = mechanism_of(self._config), self._config.federation.local_steps
        self._model.eval()
        if self._config.privacy.mode is PrivacyMode.none:
            plain_steps_together(stack, seats, vector, mechanism=mechanism, steps=steps)
            return
        meters = [self._meters_of(site, mechanism) for site in sites]
        private_steps_together(stack, seats, meters, vector, mechanism=mechanism, steps=steps)

    def _seat(self, site: Site, round_number: int) -> Seat:
        """A site where it is ready to step; one that cannot be prepared has its fault."""
        try:
            held = self._prepared(site)
        except Exception as fault:
            return Seat(lambda _: {}, 0, Randomness.from_entropy(), fault=fault)
        return Seat(
            held.prepared.lent,
            len(held.prepared),
            randomness_of(self._config, site.name, round_number),
            held.owners,
        )

    def _meters_of(self, site: Site, mechanism: Mechanism) -> Meters:
        known = site.name, mechanism
        if known not in self._meters:
            self._meters[known] = Meters(mechanism)
        return self._meters[known]

    @property
    def _stack(self) -> Stack | None:
        """What trains several sites at once; None where that is not worth it, or not exact."""
        if not self._stacks:
            self._stacks.append(self._tried_stack())
        return self._stacks[0]

    def _tried_stack(self) -> Stack | None:
        most = most_together(self._config, self.layout.size)
        if most == 1 or self._model.device != CPU:  # its passes are made, and were tried, for one
            return None
        if self._engine is None:
            self.rehearse()
        private = self._config.privacy.mode is not PrivacyMode.none
        made, fillers = self._as_read(self._prepared_made(MADE_ROWS)), self._fillers
        trial = Trial(
            self._model,
            self._losses,
            made,
            fillers_of(made, rows_of_slot(self._config, fillers)),
            self._engine if private else None,
        )
        engine = stacked_engine(trial, sites=most)
        if engine is None:
            return None
        pull = self._config.strategy.proximal_mu
        stack = Stack(engine, trial.filler, fillers, self._groups, pull)
        if private:
            self._rehearse_together(stack)
        return stack

    def _rows(self) -> int:
        """Rows of a physical batch: a constant of the run."""
        most, records = self._config.engine.physical_batch, self._config.data.declared_records
        if records is None:
            return most
        rate = self._config.privacy.sample_rate
        return batch_rows(rate * records, rate, most)

    def _plain_steps(self, loss_of: LossOf, randomness: Randomness, records: int) -> None:
        self._model.eval()
        plain_steps(
            sgd(self._groups, proximal_mu=self._config.strategy.proximal_mu),
            loss_of,
            mechanism=mechanism_of(self._config),
            randomness=randomness,
            records=records,
            steps=self._config.federation.local_steps,
            physical_batch=self._config.engine.physical_batch,
        )

    @cached_property
    def _preparation(self) -> Preparation:
        return Preparation(self._config, self._model, self._processor, self._rows())

    @cached_property
    def _fillers(self) -> int:
        """Rows of a batch that are nobody's at least."""
        return least_fillers(self._prepared_made(1))

    def _made(self, records: int) -> LossOf:
        """Losses of made records of full length, some of them padded."""
        made = self._prepared_made(records)
        return self._loss_of(lambda at: {name: tensor[at] for name, tensor in made.items()})

    @torch.no_grad()
    def _prepared_made(self, records: int) -> Inputs:
        encoded = self._task.made(self._processor, records, self._config)
        return self._model.prepare(encoded, batch=self._config.engine.physical_batch)

    def _loss_of(self, rows_at: Callable[[NDArray[np.int64]], Inputs]) -> LossOf:
        def loss_of(indices: NDArray[np.int64]) -> Tensor:
            drawn = indices[indices != FILLER]
            return self._losses(filled(self._as_read(rows_at(drawn)), len(indices)))

        return loss_of

    def _losses(self, rows: Inputs) -> Tensor:
        """(B,) of rows as the model reads them."""
        return self._task.loss_vector(self._model(**read_of(rows)), targets_of(rows))

    def _as_read(self, rows: Inputs) -> Inputs:
        """Rows where the model is, and in its precision."""
        there, dtype = self._model.device, next(self._model.parameters()).dtype
        return {
            name: tensor.to(there, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in rows.items()
        }

    def _prepared(self, site: Site) -> Held:
        """Caps persons, and prepares what is to be kept, the first time a site trains."""
        known = self._held.get(site.name)
        if known is not None and known.source is site.records:
            return known
        records, config = usable(site.records, self._config.privacy), self._config
        # All sites may be in this process; of a number that is not declared nothing is known.
        declared = config.data.declared_records or len(records)
        prepared = PreparedRecords(records, self._preparation, declared=declared)
        persons = config.privacy.mode is PrivacyMode.person
        held = Held(site.records, prepared, records.owners() if persons else None)
        if len(records):
            self._held[site.name] = held
        return held


def _outcome(seat: Seat) -> Trained | Exception:
    """What a site is left with after its steps."""
    if seat.fault is not None:
        return seat.fault
    assert seat.vector is not None
    return seat.vector, seat.measured


def _are_one(vector: Vector, known: Vector | None) -> bool:
    """Whether two vectors are the same memory, which neither may write."""
    if known is None or vector.flags.writeable or known.flags.writeable:
        return False
    mine, theirs = vector.__array_interface__, known.__array_interface__
    return bool(mine == theirs)  # address, type, shape and strides


def randomness_of(config: Config, site: str, use: int | str) -> Randomness:
    """Fresh from the operating system; from labels only in a run stamped NOT PRIVATE."""
    if config.privacy.noise is NoiseSource.entropy:
        return Randomness.from_entropy()
    return Randomness.seeded(config.seed, site, use)
