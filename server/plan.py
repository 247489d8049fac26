"""The plan: what a run will cost, known before anything is touched."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from common.cli import Invocation, emit_json
from common.composition import run_job
from common.config import (
    Config,
    FederationConfig,
    NoiseSource,
    PrivacyConfig,
    PrivacyMode,
    check_delta,
    config_hash,
)
from common.errors import ConfigError
from common.model import FineTuned, read_of, targets_of
from common.parameters import Layout
from common.privacy.accounting import (
    LIVE_INTERVAL,
    Event,
    check_agreement,
    epsilon_by_round,
    epsilon_pld,
    epsilons,
    number,
    shown,
    solve_noise_multiplier,
    within,
)
from common.privacy.mechanism import count_event, round_event, run_events
from common.tasks import TASKS, build_model
from server.rates import with_raised_rate

RELATION = "add_or_remove_one"
BYTES_PER_PARAMETER = 4
NOT_PRIVATE = "NOT PRIVATE"
PROBE = 8
"""Records of the synthetic batch that a time estimate measures."""


@dataclass(frozen=True)
class RunPlan:
    """One run, priced. `config` has sigma filled in; every other number follows from it."""

    config: Config
    epsilon_by_round: tuple[float, ...]
    """Spent by a site after each round it was charged, spares last; inf without privacy."""
    epsilon: float
    """What the whole run may cost each site."""

    @property
    def event(self) -> Event:
        """The charge of one round at one site."""
        return round_event(self.config)


@dataclass(frozen=True)
class ModelSize:
    """How much is trained, and so travels each way in each round at each site."""

    trainable: int
    total: int

    @property
    def bytes_per_message(self) -> int:
        """Float32 bytes of one vector."""
        return self.trainable * BYTES_PER_PARAMETER


def plan(invocation: Invocation) -> None:
    """Say what a run will cost, in epsilon, steps, bytes and time; touch no data."""

    def job(config: Config) -> None:
        run_plan = make_plan(config)
        model = build_model(config)
        size = size_of(model)
        seconds = estimate_seconds(run_plan.config, model)
        if invocation.json:
            emit_json(plan_object(run_plan, size, seconds))
        else:
            show_plan(run_plan, size, seconds, Console(markup=False))

    run_job(job, invocation)


def make_plan(config: Config) -> RunPlan:
    """Solves sigma where the config leaves it open, and prices every round.

    Raises: ConfigError if a sigma given by hand exceeds the configured epsilon, or delta is
    not below one over the declared records of a site.
    """
    privacy, rounds = config.privacy, config.charged_rounds
    declared, sites = config.data.declared_records, config.federation.sites
    if privacy.mode is PrivacyMode.none:
        return RunPlan(solved(config), (math.inf,) * rounds, math.inf)
    if declared is not None:
        check_delta(privacy.delta, math.ceil(declared / sites), "a site")
    resolved = solved(config)
    whole = run_events(resolved)
    _check_bound(resolved, whole)
    if not is_private(config):  # whoever knows the seed can subtract the noise
        return RunPlan(resolved, (math.inf,) * rounds, math.inf)
    # A solved sigma meets the bound on the finer grid at least; the coarse one may be above it.
    spent = epsilon_by_round(round_event(resolved), rounds, privacy.delta)
    by_round = tuple(min(epsilon, privacy.epsilon) for epsilon in spent)
    return RunPlan(
        resolved, by_round, min(epsilon_pld(whole, privacy.delta, LIVE_INTERVAL), privacy.epsilon)
    )


def solved(config: Config) -> Config:
    """The config with what a plan fills in: sigma, and the step size that it allows."""
    if config.privacy.mode is PrivacyMode.none:
        return _as_if_private(config)
    return with_raised_rate(_with_sigma(config))


def _check_bound(config: Config, whole: tuple[Event, ...]) -> None:
    """Raises: ConfigError if a sigma given by hand is too small; VerificationError."""
    privacy = config.privacy
    if not within(whole, epsilon=privacy.epsilon, delta=privacy.delta):
        raise ConfigError(
            f"privacy.noise_multiplier={privacy.noise_multiplier}: spends epsilon "
            f"{epsilon_pld(whole, privacy.delta):.4g} in {config.charged_steps} steps, above "
            f"privacy.epsilon={privacy.epsilon:g}; raise either, or leave it null to have it solved"
        )
    check_agreement(epsilons(whole, privacy.delta))


def size_of(model: FineTuned) -> ModelSize:
    """Counts the parameters of a model."""
    return ModelSize(Layout.of(model).size, sum(p.numel() for p in model.parameters()))


def estimate_seconds(config: Config, model: FineTuned) -> float | None:
    """Rough wall time of the sites' work here, from one timed synthetic batch; None if the
    number of records is not declared. Evaluation and start-up come on top.
    """
    records = config.data.declared_records
    if records is None:
        return None
    task = TASKS[config.task.name]
    made = task.made(task.load_processor(config.model), PROBE, config)
    prepared = model.prepare(made)
    prepare_s = _fastest(lambda: model.prepare(made)) / PROBE

    def step() -> None:
        losses = task.loss_vector(model(**read_of(prepared)), targets_of(prepared))
        losses.sum().backward()  # type: ignore[no-untyped-call]

    step_s = _fastest(step) / PROBE
    model.zero_grad(set_to_none=True)
    visits = config.total_steps * config.privacy.sample_rate
    training = records * config.federation.training_sites / config.federation.sites
    return training * (prepare_s + visits * step_s)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of three calls: the one the machine disturbed least."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def plan_object(run_plan: RunPlan, size: ModelSize, seconds: float | None) -> dict[str, Any]:
    """The `--json` form of a plan."""
    config, event = run_plan.config, run_plan.event
    answer: dict[str, Any] = {
        "privacy": {
            "mode": config.privacy.mode.name,
            **unit_facts(config),
            "relation": RELATION,
            "delta": config.privacy.delta,
            "epsilon": number(run_plan.epsilon),
            "epsilon_by_round": [number(epsilon) for epsilon in run_plan.epsilon_by_round],
            "private": is_private(config),
        },
        "noise_multiplier": event.noise_multiplier,
        "sample_rate": event.sample_rate,
        "clip_norm": config.privacy.clip_norm,
        "sites": config.federation.training_sites,
        "rounds": config.federation.rounds,
        "steps_per_round": event.steps,
        "steps": config.total_steps,
        "spare_rounds": config.privacy.spare_rounds,
        "charge_per_site": {**asdict(event), "steps": config.charged_steps},
        "trainable": size.trainable,
        "parameters": size.total,
        "bytes_per_message": size.bytes_per_message,
        "bytes": 2
        * size.bytes_per_message
        * config.federation.rounds
        * config.federation.training_sites,
        "config_hash": config_hash(config),
    }
    if seconds is not None:
        answer["estimated_s"] = round(seconds, 1)
    return answer


def unit_facts(config: Config) -> dict[str, Any]:
    """The unit as plan and report name it; of persons also how many records of each are used."""
    facts: dict[str, Any] = {"unit": config.privacy.unit}
    if config.privacy.mode is PrivacyMode.person:
        facts["max_records_per_person"] = config.privacy.max_records_per_person
    return facts


def is_private(config: Config) -> bool:
    """Whether the run protects records, or persons, at all."""
    none = config.privacy.mode is PrivacyMode.none
    return not none and config.privacy.noise is NoiseSource.entropy


def not_private_reason(config: Config) -> str:
    """Why a run protects nothing, with the stamp."""
    if config.privacy.mode is PrivacyMode.none:
        return f"{NOT_PRIVATE}: privacy.mode=none, no clipping and no noise."
    nominal = shown(epsilons(run_events(config), config.privacy.delta).pld)
    return (
        f"{NOT_PRIVATE}: privacy.noise=seeded, whoever knows the seed can subtract the noise. "
        f"With noise from entropy the whole run would cost a site epsilon {nominal}."
    )


def show_plan(run_plan: RunPlan, size: ModelSize, seconds: float | None, console: Console) -> None:
    """Prints the plan as a table for a person."""
    config, event = run_plan.config, run_plan.event
    federation, privacy = config.federation, config.privacy
    title = "Plan" if is_private(config) else f"Plan ({NOT_PRIVATE})"
    table = Table(title=title, show_header=False, title_justify="left")
    rows = {
        "model": f"{config.model.name}, {config.tuning.method.name}: trains "
        f"{size.trainable:,} of {size.total:,} parameters",
        "federation": f"{_who_trains(federation)}, {federation.rounds} rounds of "
        f"{federation.local_steps} step{'s' if federation.local_steps > 1 else ''}, "
        f"{federation.partition.name}",
        "spare rounds": f"{privacy.spare_rounds}, to repeat what a crash lost; paid for already",
        "each step": f"Poisson rate {event.sample_rate:g}{_drawn(privacy)}, clip "
        f"{privacy.clip_norm:g}, sigma {event.noise_multiplier:g}, noise from {privacy.noise.name}",
        "each site pays": _price(run_plan),
        "traffic": f"{size.bytes_per_message / 1e6:.2f} MB each way per site and round",
    }
    if not privacy.spare_rounds:
        del rows["spare rounds"]
    if privacy.count_noise is not None:
        rows["each site counts"] = (
            f"its correct answers once, with noise of deviation {privacy.count_noise:g}"
        )
    if seconds is not None:
        rows["sites' work here"] = f"about {seconds:.0f} s"
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)


def _who_trains(federation: FederationConfig) -> str:
    if not federation.leave_out:
        return f"{federation.sites} sites"
    return (
        f"{federation.training_sites} of {federation.sites} sites, without {federation.leave_out}"
    )


def _drawn(privacy: PrivacyConfig) -> str:
    if privacy.mode is not PrivacyMode.person:
        return ""
    return f" by person, with at most {privacy.max_records_per_person} records of each"


def _price(run_plan: RunPlan) -> str:
    privacy = run_plan.config.privacy
    if not is_private(run_plan.config):
        return not_private_reason(run_plan.config)
    spent = run_plan.epsilon_by_round
    rounds = run_plan.config.federation.rounds
    picked = sorted({1, (rounds + 1) // 2, rounds})
    steps = ", ".join(f"{shown(spent[number - 1])} after round {number}" for number in picked)
    if run_plan.epsilon > spent[rounds - 1]:
        steps += f", {shown(run_plan.epsilon)} at most"
    return f"epsilon {steps} (delta {privacy.delta:g}, one {privacy.unit} added or removed)"


def _as_if_private(config: Config) -> Config:
    """The baseline takes the steps that the private run would take."""
    if not config.tuning.head_noise or config.data.declared_records is None:
        return config
    return replace(config, tuning=with_raised_rate(_with_sigma(config)).tuning)


def _with_sigma(config: Config) -> Config:
    privacy = config.privacy
    if privacy.noise_multiplier is not None:
        return config
    count = count_event(config)
    sigma = solve_noise_multiplier(
        privacy.epsilon,
        privacy.delta,
        privacy.sample_rate,
        config.charged_steps,
        beside=() if count is None else (count,),
    )
    return replace(config, privacy=replace(privacy, noise_multiplier=sigma))
