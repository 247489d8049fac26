"""A site's policy: what it never does, whatever a coordinator asks and however much budget is left.

It is held against the instruction alone, before a model is loaded or a record read, so that a
refusal tells nothing about records.
"""

from collections.abc import Iterator

from client.refusals import PolicyRefusedError
from common.code import code_digest
from common.config import Config, NodeConfig, PrivacyMode
from common.privacy.accounting import epsilon_pld
from common.privacy.mechanism import mechanism_of, run_events


def check_policy(policy: NodeConfig, config: Config) -> None:
    """Raises: PolicyRefusedError naming every limit that the run would break."""
    broken = [*_broken(policy, config)]
    if broken:
        raise PolicyRefusedError(f"node policy: {'; '.join(broken)}")


def _broken(policy: NodeConfig, config: Config) -> Iterator[str]:
    mechanism, rounds, steps = mechanism_of(config), config.asked_rounds, config.charged_steps
    for event in run_events(config):
        if event.noise_multiplier < policy.min_noise_multiplier:
            yield f"sigma {event.noise_multiplier:g} is below {policy.min_noise_multiplier:g}"
    for name, asked, limit in (
        ("clip_norm", mechanism.clip_norm, policy.max_clip_norm),
        ("rounds", rounds, policy.max_rounds),
        ("steps of a run", steps, policy.max_steps),
        ("epsilon of a run", _epsilon(policy, config), policy.max_epsilon),
    ):
        if limit is not None and not asked <= limit:
            yield f"{name} {asked:.4g} is above {limit:g}"
    if policy.code and code_digest() not in policy.code:
        yield f"this site's code, {code_digest()}, is not one that was reviewed"
    if policy.models and config.model.name not in policy.models:
        yield f"model {config.model.name} is not one of {', '.join(policy.models)}"
    if policy.tasks and config.task.name not in policy.tasks:
        yield f"task {config.task.name.name} is not allowed"
    if policy.units and config.privacy.mode not in policy.units:
        yield f"unit {config.privacy.mode.name} is not allowed"
    if policy.tunings and config.tuning.method not in policy.tunings:
        yield f"tuning {config.tuning.method.name} is not allowed"


def _epsilon(policy: NodeConfig, config: Config) -> float:
    """Of the whole run by PLD; computed only where the policy limits it."""
    if policy.max_epsilon is None:
        return 0.0
    if config.privacy.mode is PrivacyMode.none:
        return float("inf")
    return epsilon_pld(run_events(config), config.privacy.delta)
