"""The plan: what a run will cost, known before anything is touched."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.cli import Invocation, emit_json
from common.coding import coded_bytes
from common.composition import run_job
from common.config import (
    Coding,
    Config,
    FaultsConfig,
    FederationConfig,
    PrivacyConfig,
    PrivacyMode,
    Weighting,
    as_told,
    check_delta,
    config_hash,
    share_of,
)
from common.errors import ConfigError, FederationError
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
from common.privacy.mechanism import (
    NOT_PRIVATE,
    count_event,
    is_private,
    round_event,
    run_events,
)
from common.strategies import StrategyConfig
from common.tasks import TASKS, build_model
from server.rates import with_raised_rate
from server.schedule import Schedule, digest_of, draw_schedule, training_names

RELATION = "add_or_remove_one"
PROBE = 8
"""Records of the synthetic batch that a time estimate measures."""


NAMED = 4
"""Sites that a table names one by one."""


@dataclass(frozen=True)
class SitePlan:
    """What one site is asked for, and what it pays. Sites on the same terms share one."""

    config: Config
    """What its instructions carry: its own epsilon, sigma and number of rounds, and nobody else's.
    """
    epsilon_by_round: tuple[float, ...]
    """Spent after each round it was charged, spares last; inf without privacy."""
    epsilon: float
    """What the whole run may cost it."""

    @cached_property
    def event(self) -> Event:
        """The charge of one round."""
        return round_event(self.config)


@dataclass(frozen=True)
class RunPlan:
    """One run, priced. `config` has sigma filled in, where it is the same at all sites; every other
    number follows from it.
    """

    config: Config
    schedule: Schedule
    sites: Mapping[str, SitePlan]
    """By name, in order; without those that are never asked."""

    @cached_property
    def worst(self) -> SitePlan:
        """Of the site that pays most."""
        return max(self.sites.values(), key=lambda each: each.epsilon)

    @property
    def epsilon(self) -> float:
        """What the whole run may cost the site that pays most."""
        return self.worst.epsilon

    @property
    def epsilon_by_round(self) -> tuple[float, ...]:
        """Spent by that site after each round it was charged, spares last."""
        return self.worst.epsilon_by_round

    @property
    def event(self) -> Event:
        """The charge of one round at that site."""
        return self.worst.event

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all sites are on the same terms, in all rounds: then names do not matter."""
        federation = self.config.federation
        everybody = federation.training_sites * federation.rounds
        alike = len({id(each) for each in self.sites.values()}) == 1
        return alike and self.schedule.questions == everybody

    def of(self, name: str) -> SitePlan:
        """The terms of a site that was asked, by the name that it has on the grid."""
        return self.worst if self.is_uniform else self.sites[name]

    def turn(self, name: str, number: int) -> int:
        """How many rounds have asked a site when this one has."""
        if self.is_uniform:
            return number
        return sum(name in cohort for cohort in self.schedule.cohorts[:number])

    def seated(self, nodes: Mapping[int, str]) -> dict[int, SitePlan]:
        """The terms of each node that the run may ask.

        Raises: FederationError if terms differ by name, and a node has none of the names.
        """
        if self.is_uniform:
            return dict.fromkeys(nodes, self.worst)
        names = training_names(self.config.federation)
        if strangers := sorted(set(nodes.values()) - set(names)):
            raise FederationError(
                f"{len(strangers)} of {len(nodes)} sites are not in the plan, which knows "
                f"{names[0]} to {names[-1]}: where sites differ in epsilon or rounds they need "
                "these names"
            )
        return {node: self.sites[name] for node, name in nodes.items() if name in self.sites}

    def cohort(self, number: int, nodes: Mapping[int, str]) -> dict[int, str]:
        """Of these nodes those that a round asks."""
        if self.is_uniform:
            return dict(nodes)
        asked = set(self.schedule.cohort(number))
        return {node: name for node, name in nodes.items() if name in asked}

    def weight_of(self, name: str) -> float:
        """What a site's update counts in a mean, 1 at most: a function of public numbers."""
        sigma = self.of(name).event.noise_multiplier
        if self.config.federation.weighting is Weighting.equal or sigma == 0:
            return 1.0
        return float((self._least_noise / sigma) ** 2)

    @cached_property
    def _least_noise(self) -> float:
        return min(each.event.noise_multiplier for each in self.sites.values())


@dataclass(frozen=True)
class ModelSize:
    """How much is trained, and so travels each way in each round at each site."""

    trainable: int
    total: int

    @property
    def bytes_per_message(self) -> int:
        """Float32 bytes of one vector, as the coordinator sends it."""
        return coded_bytes(self.trainable, Coding.float32)

    def bytes_per_update(self, config: Config) -> int:
        """Bytes of what a site sends back."""
        return coded_bytes(self.trainable, config.federation.coding)


def _traffic(size: ModelSize, config: Config) -> str:
    down, up = (each / 1e6 for each in (size.bytes_per_message, size.bytes_per_update(config)))
    return f"{down:.2f} MB each way" if down == up else f"{down:.2f} MB there and {up:.2f} MB back"


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
    """Draws the schedule, solves each site's sigma where the config leaves it open, prices all.

    A site's sigma is solved for its own epsilon and the number of rounds in which it is asked:
    taking part in some rounds is no amplification, as the coordinator sees who does.
    Raises: ConfigError if a sigma given by hand exceeds the configured epsilon, delta is not
    below one over the declared records of a site, or nobody can be asked in some round.
    """
    declared, sites = config.data.declared_records, config.federation.sites
    if config.privacy.mode is not PrivacyMode.none and declared is not None:
        check_delta(config.privacy.delta, math.ceil(declared / sites), "a site")
    resolved = solved(config)
    schedule = draw_schedule(resolved)
    plans: dict[Terms, SitePlan] = {}
    by_name: dict[str, SitePlan] = {}
    for name, terms in _terms(resolved, schedule).items():
        if terms not in plans:
            plans[terms] = _site_plan(resolved, terms)
        by_name[name] = plans[terms]
    return RunPlan(resolved, schedule, by_name)


def solved(config: Config) -> Config:
    """The config with what a plan fills in: the largest epsilon, sigma where it is one for all, the
    step size that the noise allows, and which file of availability it is.

    Raises: ConfigError if that file cannot be read, or the config is a site's own.
    """
    if config.federation.asked_rounds is not None:
        raise ConfigError(
            f"federation.asked_rounds={config.federation.asked_rounds}: is set by the plan; leave "
            "it null, and give federation.participation or federation.availability"
        )
    config = _with_digest(config)
    schedule = draw_schedule(config)
    asked = [name for name in training_names(config.federation) if schedule.rounds_of[name]]
    worst = max(epsilon_of(config, name) for name in asked)
    config = replace(config, privacy=replace(config.privacy, epsilon=worst))
    if config.privacy.mode is PrivacyMode.none:
        return _as_if_private(config, schedule)
    return _with_sigma(config, schedule)


@dataclass(frozen=True)
class Terms:
    """In what sites of one run may differ."""

    epsilon: float
    rounds: int
    """In which the site is asked."""


def epsilon_of(config: Config, name: str) -> float:
    """The bound of a site, by its name."""
    epsilons = config.privacy.site_epsilons or [config.privacy.epsilon]
    return epsilons[(int(name.removeprefix("site-")) - 1) % len(epsilons)]


def _terms(config: Config, schedule: Schedule) -> dict[str, Terms]:
    """By name, of the sites that are asked at all."""
    rounds = schedule.rounds_of
    return {
        name: Terms(epsilon_of(config, name), rounds[name])
        for name in training_names(config.federation)
        if rounds[name]
    }


def _site_plan(config: Config, terms: Terms) -> SitePlan:
    """Raises: ConfigError if a sigma given by hand is too small for these terms."""
    private = config.privacy.mode is not PrivacyMode.none
    own = _own(config, terms, _sigma(config, terms) if private else None)
    rounds, privacy = own.charged_rounds, own.privacy
    if not private:
        return SitePlan(own, (math.inf,) * rounds, math.inf)
    whole = run_events(own)
    _check_bound(own, whole)
    if not is_private(own):  # whoever knows the seed can subtract the noise
        return SitePlan(own, (math.inf,) * rounds, math.inf)
    # A solved sigma meets the bound on the finer grid at least; the coarse one may be above it.
    spent = epsilon_by_round(round_event(own), rounds, privacy.delta)
    by_round = tuple(min(epsilon, privacy.epsilon) for epsilon in spent)
    whole_run = min(epsilon_pld(whole, privacy.delta, LIVE_INTERVAL), privacy.epsilon)
    return SitePlan(own, by_round, whole_run)


def _own(config: Config, terms: Terms, sigma: float | None) -> Config:
    """What a site on these terms is told: nothing of others, nor of what a simulation does."""
    federation, privacy = config.federation, config.privacy
    asked = None if terms.rounds == federation.rounds else terms.rounds
    return replace(
        as_told(config),
        privacy=replace(privacy, epsilon=terms.epsilon, noise_multiplier=sigma, site_epsilons=[]),
        federation=replace(federation, asked_rounds=asked, availability="", availability_digest=""),
        faults=FaultsConfig(),
    )


def _with_digest(config: Config) -> Config:
    federation = config.federation
    if not federation.availability or federation.availability_digest:
        return config
    found = digest_of(Path(federation.availability).expanduser())
    return replace(config, federation=replace(federation, availability_digest=found))


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
    federation = config.federation
    asked = draw_schedule(config).questions / federation.rounds  # sites, on average
    visits = config.total_steps * config.privacy.sample_rate
    return (
        records
        / federation.sites
        * (federation.training_sites * prepare_s + asked * visits * step_s)
    )


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
        "strategy": config.strategy.name.name,
        "tolerated_sites": config.strategy.tolerated(config.federation.quorum_sites),
        "noise_multiplier": event.noise_multiplier,
        "sample_rate": event.sample_rate,
        "clip_norm": config.privacy.clip_norm,
        "sites": config.federation.training_sites,
        "rounds": config.federation.rounds,
        "steps_per_round": event.steps,
        "steps": config.total_steps,
        "spare_rounds": config.privacy.spare_rounds,
        "charge_per_site": {**asdict(event), "steps": run_plan.worst.config.charged_steps},
        "trainable": size.trainable,
        "parameters": size.total,
        "bytes_per_message": size.bytes_per_message,
        "bytes_per_update": size.bytes_per_update(config),
        "bytes": (size.bytes_per_message + size.bytes_per_update(config))
        * run_plan.schedule.questions,
        "config_hash": config_hash(config),
    }
    if config.federation.enough < 1:
        answer["enough_sites"] = config.federation.enough_sites
    if not run_plan.is_uniform:
        answer["site_plans"] = [_site_object(run_plan, name) for name in run_plan.sites]
    if seconds is not None:
        answer["estimated_s"] = round(seconds, 1)
    return answer


def _site_object(run_plan: RunPlan, name: str) -> dict[str, Any]:
    """The terms of one site, where they are its own."""
    terms = run_plan.of(name)
    return {
        "site": name,
        "epsilon": number(terms.epsilon),
        "rounds": terms.config.asked_rounds,
        "weight": run_plan.weight_of(name),
        "charge": {**asdict(terms.event), "steps": terms.config.charged_steps},
    }


def unit_facts(config: Config) -> dict[str, Any]:
    """The unit as plan and report name it; of persons also how many records of each are used."""
    facts: dict[str, Any] = {"unit": config.privacy.unit}
    if config.privacy.mode is PrivacyMode.person:
        facts["max_records_per_person"] = config.privacy.max_records_per_person
    return facts


def not_private_reason(config: Config) -> str:
    """Why a run protects nothing, with the stamp."""
    if config.privacy.mode is PrivacyMode.none:
        return f"{NOT_PRIVATE}: privacy.mode=none, no clipping and no noise."
    partly = config.federation.participation < 1 or config.federation.availability
    if config.privacy.noise_multiplier is None or partly:  # each site has its own price
        nominal = f"{shown(config.privacy.epsilon)} at most"
    else:
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
        f"{federation.partition.name}{_who_is_asked(run_plan)}",
        "strategy": _what_it_tolerates(config),
        "spare rounds": f"{privacy.spare_rounds}, to repeat what a crash lost; paid for already",
        "each step": f"Poisson rate {event.sample_rate:g}{_drawn(privacy)}, clip "
        f"{privacy.clip_norm:g}, sigma {_sigmas(run_plan)}, noise from {privacy.noise.name}",
        "each site pays" if run_plan.is_uniform else "the worst site pays": _price(run_plan),
        "traffic": f"{_traffic(size, config)} per site and round",
    }
    if config.strategy == StrategyConfig():
        del rows["strategy"]
    if not privacy.spare_rounds:
        del rows["spare rounds"]
    if privacy.count_noise is not None:
        rows["each site counts"] = (
            f"its correct answers once, with noise of deviation {privacy.count_noise:g}"
        )
    if seconds is not None:
        rows["sites' work here"] = f"about {seconds:.0f} s"
    for name, text in (*rows.items(), *_rows_of_sites(run_plan)):
        table.add_row(name, text)
    console.print(table)


def _who_trains(federation: FederationConfig) -> str:
    if not federation.leave_out:
        return f"{federation.sites} sites"
    return (
        f"{federation.training_sites} of {federation.sites} sites, without {federation.leave_out}"
    )


def _who_is_asked(run_plan: RunPlan) -> str:
    """How many sites a round asks, and waits for, where it does not ask or wait for all."""
    federation = run_plan.config.federation
    sizes = sorted({len(cohort) for cohort in run_plan.schedule.cohorts})
    text = ""
    if sizes != [federation.training_sites]:
        text = f"; a round asks {_between(sizes)} of them"
    if federation.enough < 1:
        enough = sorted({share_of(size, federation.enough) for size in sizes})
        text += (
            f"; it closes with the first {_between(enough)} updates, and who is later is charged "
            "all the same"
        )
    return text


def _between(sizes: list[int]) -> str:
    return f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"


def _sigmas(run_plan: RunPlan) -> str:
    values = sorted({each.event.noise_multiplier for each in run_plan.sites.values()})
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _rows_of_sites(run_plan: RunPlan) -> Iterator[tuple[str, str]]:
    """A row for each of the different terms, where there are several."""
    names: dict[int, list[str]] = {}
    for name, terms in run_plan.sites.items():
        names.setdefault(id(terms), []).append(name)
    if len(names) == 1:
        return
    for alike in sorted(names.values(), key=lambda each: run_plan.of(each[0]).epsilon):
        terms = run_plan.of(alike[0])
        more = f" and {len(alike) - NAMED} more" if len(alike) > NAMED else ""
        yield (
            f"{', '.join(alike[:NAMED])}{more}",
            f"epsilon {shown(terms.epsilon)} in {terms.config.asked_rounds} rounds, "
            f"sigma {terms.event.noise_multiplier:g}",
        )


def _what_it_tolerates(config: Config) -> str:
    updates, strategy = config.federation.quorum_sites, config.strategy
    tolerated = strategy.tolerated(updates)
    bounds = f"; of {updates} updates {tolerated} may be anything" if tolerated else ""
    return f"{strategy.name.name}{bounds}"


def _drawn(privacy: PrivacyConfig) -> str:
    if privacy.mode is not PrivacyMode.person:
        return ""
    return f" by person, with at most {privacy.max_records_per_person} records of each"


def _price(run_plan: RunPlan) -> str:
    privacy = run_plan.config.privacy
    if not is_private(run_plan.config):
        return not_private_reason(run_plan.config)
    spent = run_plan.epsilon_by_round
    rounds = run_plan.worst.config.asked_rounds
    turn = "round" if rounds == run_plan.config.federation.rounds else "its round"
    picked = sorted({1, (rounds + 1) // 2, rounds})
    steps = ", ".join(f"{shown(spent[number - 1])} after {turn} {number}" for number in picked)
    if run_plan.epsilon > spent[rounds - 1]:
        steps += f", {shown(run_plan.epsilon)} at most"
    return f"epsilon {steps} (delta {privacy.delta:g}, one {privacy.unit} added or removed)"


def _as_if_private(config: Config, schedule: Schedule) -> Config:
    """The baseline takes the steps that the private run would take."""
    if not config.tuning.head_noise or config.data.declared_records is None:
        return config
    return replace(config, tuning=_with_sigma(config, schedule).tuning)


def _with_sigma(config: Config, schedule: Schedule) -> Config:
    """Sigma, if it is the same at all sites, and the step size of the head that the noise allows.

    Where sigmas differ it follows the one that would leave as much noise in the final model.
    """
    terms = _terms(config, schedule)
    sigmas = {each: _sigma(config, each) for each in dict.fromkeys(terms.values())}
    (sigma, *others) = dict.fromkeys(sigmas.values())
    federation = config.federation
    everybody = federation.training_sites * federation.rounds
    uniform = not others and schedule.questions == everybody
    if not uniform:
        sigma = _equivalent(config, schedule, {name: sigmas[each] for name, each in terms.items()})
    raised = with_raised_rate(
        replace(config, privacy=replace(config.privacy, noise_multiplier=sigma))
    )
    return raised if uniform else replace(raised, privacy=config.privacy)


def _equivalent(config: Config, schedule: Schedule, sigmas: Mapping[str, float]) -> float:
    """The sigma that leaves as much noise in the final model if all sites add it in every round."""
    inverse = config.federation.weighting is Weighting.inverse_variance
    variance = 0.0
    for cohort in schedule.cohorts:
        weights = [sigmas[name] ** -2 if inverse else 1.0 for name in cohort]
        noise = sum((w * sigmas[n]) ** 2 for w, n in zip(weights, cohort, strict=True))
        variance += noise / sum(weights) ** 2
    federation = config.federation
    return math.sqrt(variance * federation.training_sites / federation.rounds)


def _sigma(config: Config, terms: Terms) -> float:
    """As given by hand, or the smallest at which the terms hold."""
    privacy = config.privacy
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    count = count_event(config)
    return solve_noise_multiplier(
        terms.epsilon,
        privacy.delta,
        privacy.sample_rate,
        (terms.rounds + privacy.spare_rounds) * config.federation.local_steps,
        beside=() if count is None else (count,),
    )
