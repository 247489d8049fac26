"""`coterie audit run`: canaries in a real run, site by site, and what a coordinator sees of them.

Everything is a run's: ledgers, charges, policy, rounds, meters, noise, sampling. Each site has
canaries beside its records, of which a fair coin decided whether they are there; each that is there
is drawn like a record. Whoever sees all that a site sent, as a coordinator does, guesses which.

Beside real gradients, and drawn now and then, a canary is hard to see: what such a test can reach
lies far below what a sound run claims, and the ceiling says how far above zero it could come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from client.audit import CanaryTrainer, check_auditable, fault_of, signed_into
from client.canaries import Canaries, coins_of, losses_of, random_units
from client.clipping.engines import FILLER, LossOf
from client.measurements import Measurements
from client.private_step import ParameterGroup
from client.site import Site
from client.train import BEYOND, Trained, Trainer
from common.canonical import canonical_json
from common.cli import Invocation, emit_json
from common.config import Config, EngineName, Resume
from common.durable import write_atomic
from common.errors import ConfigError
from common.parameters import Vector
from common.privacy.accounting import (
    LIVE_INTERVAL,
    REPORT_INTERVAL,
    Event,
    deltas_pld,
    epsilon_pld,
)
from common.privacy.lower_bounds import (
    MOST_STRETCH,
    ONE_RUN,
    PILOT_SHARE,
    SLACK,
    Audit,
    Coins,
    Scores,
    bounds_of,
    gaussian_cover,
    told,
)
from common.privacy.mechanism import Mechanism, mechanism_of
from common.privacy.noise import Randomness
from simulations.run import run_simulation

CANARIES = 1000
"""Of each site that are counted, where nobody says how many."""
FEWEST = 100
"""Fewer say too little to be worth a verdict."""
CURVE_POINTS = 512
"""Of the trade-off that a run claims, by which a Gaussian's is made to cover it: more, closer."""
FILE = "audit.json"
"""In the run folder."""
NOTE = (
    "The model of this run saw canaries: it is for this audit, not for use. The run was charged "
    "like any other. A bound far below the claim says that this test is weak, and no more."
)


@dataclass
class Watched:
    """The canaries of one site, and what was seen of them so far."""

    mechanism: Mechanism
    """Of each step there."""
    canaries: Canaries
    present: Coins = field(repr=False)
    scores: Scores = field(repr=False)
    steps: int = 0
    """Private steps in which they could be drawn."""


class RunTrainer(CanaryTrainer):
    """A trainer that adds canaries to each site's records, and reads updates as anybody might."""

    def __init__(self, config: Config, device: torch.device, canaries: int) -> None:
        super().__init__(config, device)
        self._count = round(canaries / (1 - PILOT_SHARE))
        self.watched: dict[str, Watched] = {}
        """By site."""
        self._training: Watched | None = None
        sizes = {p: g.learning_rate for g in self._groups for p in g.parameters}
        trained = (p for p in self._model.parameters() if p.requires_grad)
        self._rates = np.concatenate([np.full(p.numel(), sizes[p]) for p in trained])

    def train(self, site: Site, vector: Vector, *, round_number: int) -> Trained:
        """As `Trainer`, with the site's canaries among its records."""
        mechanism = mechanism_of(self._config)
        if site.name not in self.watched:
            self.watched[site.name] = self._watch(mechanism)
        self._training = mine = self.watched[site.name]
        try:
            found = super().train(site, vector, round_number=round_number)
        finally:
            self._training = None
        # What left the site, in units of what one record can do to a sum.
        change = (vector - found[0]) / self._rates * mechanism.divisor / mechanism.sensitivity
        mine.scores += mine.canaries.scores(change.astype(np.float32))
        mine.steps += self._config.federation.local_steps
        return found

    def _watch(self, mechanism: Mechanism) -> Watched:
        canaries = random_units(self.layers, self._count, np.random.default_rng())
        coins = coins_of(self._count, Randomness.from_entropy().uniform(self._count))
        return Watched(mechanism, canaries, coins, np.zeros(self._count))

    def _private_steps(
        self,
        loss_of: LossOf,
        mechanism: Mechanism,
        randomness: Randomness,
        *,
        groups: list[ParameterGroup],
        records: int,
        owners: NDArray[np.int64] | None,
        **rest: Any,
    ) -> Measurements:
        """While a site trains, its canaries follow its records."""
        if self._training is not None:
            there = np.flatnonzero(self._training.present)
            there = np.repeat(there, mechanism.max_records_per_person or 1)
            scale = BEYOND * mechanism.clip_norm
            loss_of = self._beside(loss_of, records, self._training.canaries, there, scale)
            if owners is not None:  # each canary is a person of its own, with all they may have
                first = int(owners.max(initial=-1)) + 1
                most = mechanism.max_records_per_person or 1
                owners = np.concatenate([owners, first + np.arange(len(there)) // most])
            records += len(there)
        return super()._private_steps(
            loss_of, mechanism, randomness, groups=groups, records=records, owners=owners, **rest
        )

    def _beside(
        self,
        loss_of: LossOf,
        records: int,
        canaries: Canaries,
        there: NDArray[np.int64],
        scale: float,
    ) -> LossOf:
        """Losses of records, and of canaries in the blank rows that follow them."""
        blank = Trainer._made(self, 1)  # without the canaries of a rehearsal

        def losses(indices: NDArray[np.int64]) -> Tensor:
            own = np.where(indices < records, indices, FILLER)
            plain = (loss_of if (own != FILLER).any() else blank)(own)
            at = np.full(len(indices), FILLER)
            at[indices >= records] = there[indices[indices >= records] - records]
            return plain + scale * losses_of(self.layers, canaries.sides(at))

        return losses


def tell_run(config: Config, *, canaries: int, invocation: Invocation) -> None:
    """Runs the audit, prints, writes and signs its results.

    Raises: VerificationError if one falsifies what its site claims.
    """
    if canaries < FEWEST:
        raise ConfigError(f"canaries={canaries}: must be at least {FEWEST}")
    _check(config)
    console = Console(stderr=invocation.json, markup=False)
    run_dir, audits = audit_run(config, console, canaries)
    content = {
        "run_dir": str(run_dir),
        "audits": [audit.content() for audit in audits],
        "note": NOTE,
    }
    write_atomic(run_dir / FILE, canonical_json(content) + "\n")
    books = config.ledger or str(run_dir / "ledgers" / "sites.db")
    for audit in audits:
        signed_into(f"{books}#{audit.site}", audit, audit.content())
    fault = fault_of(audits, content)
    if not invocation.json:
        show_run(audits, run_dir, Console(markup=False))
    elif fault is None:
        emit_json(content)
    if fault is not None:
        raise fault


def audit_run(config: Config, console: Console, canaries: int) -> tuple[Path, list[Audit]]:
    """A run with canaries; its folder, and a result for each site that was heard."""
    trainers: list[RunTrainer] = []

    def make(resolved: Config, device: torch.device) -> RunTrainer:
        trainers.append(RunTrainer(resolved, device, canaries))
        return trainers[-1]

    # In this process, and one site after the other: canaries are added where a site trains alone.
    engine = replace(config.engine, workers=1, together=1)
    run_dir = run_simulation(replace(config, engine=engine), console, make)
    if len(trainers) != 1:
        raise ConfigError(f"{run_dir}: nothing was trained; an audit needs a run of its own")
    trainer = trainers[0]
    return run_dir, [result_of(trainer, name) for name in sorted(trainer.watched)]


def result_of(trainer: RunTrainer, site: str) -> Audit:
    """What the canaries of a site show of the steps it took."""
    watched, delta = trainer.watched[site], trainer.config.privacy.delta
    events = [watched.mechanism.event(watched.steps)]
    claimed = epsilon_pld(events, delta, REPORT_INTERVAL)
    cover = gaussian_cover(curve_of(events), claimed, delta)
    by = ONE_RUN if cover.stretch <= MOST_STRETCH else ONE_RUN[:1]
    bounds = bounds_of(watched.scores, watched.present, delta=delta, by=by, cover=cover)
    rate, steps = watched.mechanism.sample_rate, watched.steps
    design = f"run: random unit gradient canaries, q={rate:g}, {steps} steps, all updates seen"
    return Audit(design, bounds, claimed, delta, site=site)


def curve_of(events: Sequence[Event]) -> list[tuple[float, float]]:
    """(epsilon, delta at most) of a history, from 0 to where delta is `SLACK`."""
    at = np.linspace(0.0, epsilon_pld(events, SLACK, LIVE_INTERVAL), CURVE_POINTS).tolist()
    return [*zip(at, deltas_pld(events, at), strict=True)]


def _check(config: Config) -> None:
    """Raises: ConfigError for a run that canaries cannot be put into, or that claims nothing."""
    check_auditable(config)
    if config.engine.name is not EngineName.local:
        raise ConfigError(f"engine={config.engine.name.name}: must be local with audit run")
    if config.resume is not Resume.off:
        raise ConfigError("resume=auto: must be off with audit run; its canaries were in memory")
    if config.faults.active:
        raise ConfigError("faults: must be none with audit run; a lost round shows nothing")
    if config.privacy.site_epsilons:
        raise ConfigError("privacy.site_epsilons: must be empty with audit run; audit each epsilon")


def show_run(audits: list[Audit], run_dir: Path, console: Console) -> None:
    """Prints the results of a run for a person."""
    table = Table(title="Audit of the run", title_justify="left")
    for column in ("site", "lower bound", "claimed", "ceiling", "canaries", "verdict"):
        table.add_column(column, no_wrap=column == "verdict")
    for audit in audits:
        table.add_row(
            audit.site,
            f"{audit.bounds.lower_bound:.3f}",
            f"{audit.claimed_epsilon:.3f}",
            f"{audit.bounds.ceiling:.2f}",
            str(audit.bounds.m),
            audit.verdict,
        )
    console.print(table)
    if audits:
        console.print(
            f"{audits[0].design}; {audits[0].confidence:.0%} confidence, by site, by "
            f"{', '.join(audits[0].bounds.found)}; signed into the ledgers, and in "
            f"{run_dir / FILE}",
            highlight=False,
        )
    console.print(NOTE, highlight=False)
    if weak := told(audits):
        console.print(weak, highlight=False)
