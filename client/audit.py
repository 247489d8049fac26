"""`coterie audit mechanism`: tries to falsify what this installation's private step claims.

Canaries go through the loss into the step that trains: engine, clipping, noise, divisor and
optimiser are those of `client.train`. What is released is read off the parameters, and bounds
epsilon from below. Records are made, nothing is charged, and no file of anybody's is read.

What the meters would stop is noted here and not enforced, or there would be nothing to audit; no
site trains by what is in this file.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from client.canaries import Canaries, coins_of, dirac, layers_of, losses_of, spread
from client.clipping.engines import FILLER, LossOf
from client.ledger import Store
from client.measurements import Measurements
from client.meters import AlarmError, Meters, NoiseMeter, SamplerMeter
from client.preflight import refusal
from client.train import BEYOND, Trainer
from common import parameters
from common.canonical import digest
from common.cli import emit_json
from common.config import Config, NoiseSource, PrivacyMode
from common.errors import ConfigError, VerificationError
from common.privacy.accounting import REPORT_INTERVAL, epsilon_pld, shown, solve_noise_multiplier
from common.privacy.chain import Kind
from common.privacy.lower_bounds import (
    FALSIFIED,
    INDEPENDENT,
    PILOT_SHARE,
    Audit,
    Coins,
    Scores,
    bounds_of,
    told,
)
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness

MADE = 16
"""Made records that canaries stand in, in turns."""
CANARIES = 5000
"""That are counted, where nobody says how many. Noise of half its size shows at epsilon 1."""
FEWEST = 1000
"""Fewer show too little to be worth a verdict."""
UNTESTED = (
    "Not tested: subsampling (every canary is drawn, q is 1), and what this program was not run "
    "for: the records, the accounting of a whole run, whoever operates the site."
)


class CanaryTrainer(Trainer):
    """A trainer whose made records can be canaries."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layers = layers_of(self._model, [group.parameters for group in self._groups])

    def ready(self) -> str:
        """Picks the engine that is exact for records and canaries; returns its name.

        Raises: PrivacyRefusedError if the model cannot be trained privately.
        """
        verdict = self.preflight()
        if verdict.engine is None:
            raise refusal(self._config.model.name, verdict)
        return verdict.engine.name.name

    def scores(self, canaries: Canaries, present: Coins, mechanism: Mechanism) -> "Tried":
        """How far a step of `mechanism` goes along each canary, in units of its sensitivity.

        Guarantee: the step is that of training, on those canaries that are present, a person's
        each as often as a person may have records; the model is afterwards as it was.
        """
        most = mechanism.max_records_per_person
        drawn = np.repeat(np.flatnonzero(present), most or 1)
        owners = None if most is None else np.repeat(np.arange(len(drawn) // most), most)
        meters = NotedMeters(mechanism)
        # One step as long as the sum that is released: what is read off is in its units.
        rate = mechanism.divisor / mechanism.sensitivity
        start = parameters.flatten(self._model)
        try:
            self._private_steps(
                self._losses_of(canaries, drawn, BEYOND * mechanism.clip_norm),
                mechanism,
                Randomness.from_entropy(),
                groups=[replace(group, learning_rate=rate) for group in self._groups],
                records=len(drawn),
                owners=owners,
                steps=1,
                meters=meters,
            )
            change = start - parameters.flatten(self._model)
        finally:
            parameters.write(self._model, start)
        return Tried(canaries.scores(change), tuple(meters.alarms))

    def _losses_of(self, canaries: Canaries, drawn: NDArray[np.int64], scale: float) -> LossOf:
        """Losses of made records, each with the canary that stands in it."""
        made = super()._made(MADE)

        def loss_of(indices: NDArray[np.int64]) -> Tensor:
            here = np.where(indices == FILLER, FILLER, drawn[indices])
            plain = made(np.where(here == FILLER, FILLER, here % MADE))
            return plain + scale * losses_of(self.layers, canaries.sides(here))

        return loss_of

    def _made(self, records: int) -> LossOf:
        """What engines are tried on: made records with something of a canary in every layer."""
        made, sides = super()._made(records), spread(self.layers, records)

        def loss_of(indices: NDArray[np.int64]) -> Tensor:
            there = torch.from_numpy(indices != FILLER)[:, None]
            own = [(left[indices] * there, right[indices]) for left, right in sides]
            return made(indices) + losses_of(self.layers, own)

        return loss_of


@dataclass(frozen=True)
class Tried:
    """What one step showed."""

    scores: Scores
    alarms: tuple[str, ...]
    """Names of the meters that would have stopped it."""


class NotedMeters(Meters):
    """Meters whose alarms are noted by name, and not raised: for audits, which release nothing."""

    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__(mechanism)
        self.alarms: list[str] = []
        charged = mechanism.event(1).noise_multiplier * mechanism.sensitivity
        self.noise = _NotedNoise(charged, mechanism.divisor, self.alarms)
        self.sampler = _NotedSampler(mechanism.sample_rate, self.alarms)

    def check_sum(self, sums: dict[nn.Parameter, Tensor], *, records: int, units: int) -> None:
        """As `Meters`, noted."""
        with _noted(self.alarms):
            super().check_sum(sums, records=records, units=units)

    def close_round(self, steps: int) -> Measurements:
        """As `Meters`, noted."""
        try:
            return super().close_round(steps)
        except AlarmError as alarm:
            self.alarms.append(_name_of(alarm))
        return Measurements(self.noise.steps, steps, self.noise.ratio, self.noise.deviation, 0.0)


class _NotedNoise(NoiseMeter):
    def __init__(self, noise_std: float, divisor: float, alarms: list[str]) -> None:
        super().__init__(noise_std, divisor)
        self._alarms = alarms

    def close_step(self) -> None:
        before = self.steps
        with _noted(self._alarms):
            super().close_step()
        self.steps = before + 1


class _NotedSampler(SamplerMeter):
    def __init__(self, sample_rate: float, alarms: list[str]) -> None:
        super().__init__(sample_rate)
        self._alarms = alarms

    def read(self, sample: NDArray[np.int64], *, units: int) -> None:
        with _noted(self._alarms):
            super().read(sample, units=units)


@contextmanager
def _noted(alarms: list[str]) -> Iterator[None]:
    try:
        yield
    except AlarmError as alarm:
        alarms.append(_name_of(alarm))


def _name_of(alarm: AlarmError) -> str:
    return str(alarm).partition(":")[0]


@dataclass(frozen=True)
class MechanismAudit:
    """What an audit of the mechanism found."""

    audit: Audit
    alarms: tuple[str, ...]
    """Meters that would have stopped a round of this step, by name, each once."""
    engine: str
    noise_multiplier: float
    steps: int
    """Private steps that were taken."""

    def content(self, config: Config) -> dict[str, Any]:
        """What `--json` gives."""
        return {
            **self.audit.content(),
            "alarms": list(self.alarms),
            "unit": config.privacy.unit,
            "model": config.model.name,
            "tuning": config.tuning.method.name,
            "engine": self.engine,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": config.privacy.clip_norm,
            "sample_rate": 1.0,
            "steps": self.steps,
            "not_tested": UNTESTED,
        }


def check_auditable(config: Config) -> None:
    """Raises: ConfigError where nothing is claimed, so that nothing can be falsified."""
    if config.privacy.mode is PrivacyMode.none:
        raise ConfigError("privacy=none: claims nothing that an audit could falsify")
    if config.privacy.noise is NoiseSource.seeded:
        raise ConfigError(
            "privacy.noise=seeded: protects nothing, whatever an audit finds; give entropy"
        )


def audit_mechanism(config: Config, canaries: int = CANARIES) -> MechanismAudit:
    """Tries to falsify the private step of `config`; see the module.

    Args: canaries: how many are counted; a fifth more choose where to cut.
    Raises: ConfigError if nothing is claimed; PrivacyRefusedError if the model cannot be trained
    privately, or a trainable parameter is outside the optimiser.
    """
    check_auditable(config)
    trainer = CanaryTrainer(config)
    engine, mechanism = trainer.ready(), mechanism_tested(config, canaries)
    tried: list[Tried] = []
    present: list[Coins] = []
    draw, left = np.random.default_rng(), round(canaries / (1 - PILOT_SHARE))
    while left > 0:  # no two canaries of a step along one coordinate: small models take several
        some = dirac(trainer.layers, left, draw)
        coins = coins_of(len(some), Randomness.from_entropy().uniform(len(some)))
        tried.append(trainer.scores(some, coins, mechanism))
        present.append(coins)
        left -= len(some)
    bounds = bounds_of(
        np.concatenate([each.scores for each in tried]),
        np.concatenate(present),
        delta=config.privacy.delta,
        by=INDEPENDENT,
    )
    claimed = epsilon_pld([mechanism.event(1)], config.privacy.delta, REPORT_INTERVAL)
    design = "mechanism: Dirac canaries in gradient space, q=1, one step"
    alarms = tuple(dict.fromkeys(name for each in tried for name in each.alarms))
    return MechanismAudit(
        Audit(design, bounds, claimed, config.privacy.delta),
        alarms,
        engine,
        mechanism.noise_multiplier,
        len(tried),
    )


def mechanism_tested(config: Config, canaries: int) -> Mechanism:
    """One step in which everybody is drawn, at the epsilon that is configured."""
    privacy = config.privacy
    sigma = solve_noise_multiplier(privacy.epsilon, privacy.delta, 1.0, 1)
    most = privacy.max_records_per_person if privacy.mode is PrivacyMode.person else None
    return Mechanism(sigma, privacy.clip_norm, 1.0, canaries / 2 * (most or 1), most)


def check_ledger(ledger: str) -> None:
    """Raises: ConfigError if FILE[#SITE] is none."""
    path, _, site = ledger.partition("#")
    with Store(Path(path).expanduser()) as store:
        if site:
            store.ledger(site).signable()


def signed_into(ledger: str, audit: Audit, content: Mapping[str, Any]) -> None:
    """Appends a result to a ledger, FILE[#SITE]; to each site's where none is named.

    Raises: ConfigError if there is no such ledger.
    """
    path, _, site = ledger.partition("#")
    with Store(Path(path).expanduser()) as store, store.together():
        for name in [site] if site else store.sites():
            store.ledger(name).append(Kind.AUDIT, audit_body(audit, content))


def audit_body(audit: Audit, content: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a result. Args: content: all of it as `--json` gives it, of which it has the
    SHA-256 in canonical JSON.
    """
    return {
        "report": digest(dict(content)),
        "design": audit.design,
        "m": audit.bounds.m,
        "confidence": audit.confidence,
        "lower_bound": audit.bounds.lower_bound,
        "claimed_epsilon": audit.claimed_epsilon,
        "ceiling": audit.bounds.ceiling,
        "verdict": audit.verdict,
    }


def tell_mechanism(config: Config, *, canaries: int, ledger: str, json: bool) -> None:
    """Runs the audit, prints and signs its result.

    Raises: VerificationError if it falsifies the claim, or a measurement alarms.
    """
    if canaries < FEWEST:
        raise ConfigError(f"canaries={canaries}: must be at least {FEWEST}")
    if ledger:
        check_ledger(ledger)  # before the work
    found = audit_mechanism(config, canaries)
    content = found.content(config)
    if ledger:
        signed_into(ledger, found.audit, content)
    fault = fault_of([found.audit], content, found.alarms)
    if not json:
        show_mechanism(found, config, Console(markup=False))
    elif fault is None:
        emit_json(content)
    if fault is not None:
        raise fault


def fault_of(
    audits: Sequence[Audit], content: Mapping[str, Any], alarms: Sequence[str] = ()
) -> VerificationError | None:
    """The error in which a falsified claim ends, with the result for a machine."""
    falsified = [audit for audit in audits if audit.verdict == FALSIFIED]
    if falsified:
        worst = max(falsified, key=lambda audit: audit.bounds.lower_bound)
        site = f"{worst.site}: " if worst.site else ""
        text = (
            f"{FALSIFIED}: {site}epsilon is at least {worst.bounds.lower_bound:.3f}, and "
            f"{shown(worst.claimed_epsilon)} is claimed; do not train with this installation"
        )
    elif alarms:
        text = f"{', '.join(alarms)}: measurements alarmed; do not train with this installation"
    else:
        return None
    fault = VerificationError(text)
    fault.details = dict(content)
    return fault


def show_mechanism(found: MechanismAudit, config: Config, console: Console) -> None:
    """Prints a result for a person."""
    table = Table(title="Audit of the mechanism", show_header=False, title_justify="left")
    sigma = found.noise_multiplier
    rows = {
        "tested": f"{config.model.name}, {config.tuning.method.name}; engine {found.engine}, clip "
        f"{config.privacy.clip_norm:g}, sigma {sigma:g}, unit {config.privacy.unit}",
        **rows_of(found.audit),
        "measurements": ", ".join(found.alarms) or "no alarm",
        "verdict": found.audit.verdict,
    }
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)
    console.print(UNTESTED, highlight=False)
    if weak := told([found.audit]):
        console.print(weak, highlight=False)


def rows_of(audit: Audit) -> dict[str, str]:
    """A result as rows of a table, but for its verdict."""
    found = ", ".join(f"{name} {value:.3f}" for name, value in audit.bounds.found.items())
    best = ", ".join(f"{name} {value:.2f}" for name, value in audit.bounds.best.items())
    return {
        "design": f"{audit.design}; {audit.bounds.m} canaries counted",
        "claimed": f"epsilon {shown(audit.claimed_epsilon)} at delta {audit.delta:g}, of what was "
        "tested",
        "lower bound": f"epsilon {audit.bounds.lower_bound:.3f} at {audit.confidence:.0%} "
        f"confidence ({found})",
        "ceiling": f"{audit.bounds.ceiling:.2f}, had every guess been right ({best})",
    }
