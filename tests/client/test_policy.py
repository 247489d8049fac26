"""A site's policy: each limit refuses by itself, alone, and before anything else is looked at."""

from dataclasses import replace

import pytest

from client.policy import PolicyRefusedError, check_policy
from common.code import code_digest
from common.config import NodeConfig, PrivacyMode, TaskName, TuningMethod
from common.privacy.accounting import epsilon_pld
from common.privacy.mechanism import mechanism_of

# The tiny config: sigma 2, clip 1, two rounds of two steps, LoRA.
BROKEN = {
    "sigma 2 is below 2.5": NodeConfig(min_noise_multiplier=2.5),
    "clip_norm 1 is above 0.5": NodeConfig(max_clip_norm=0.5),
    "rounds 2 is above 1": NodeConfig(max_rounds=1),
    "steps of a run 4 is above 3": NodeConfig(max_steps=3),
    "epsilon of a run 1.621 is above 1.5": NodeConfig(max_epsilon=1.5),
    "is not one of minilm": NodeConfig(models=["minilm"]),
    "is not one that was reviewed": NodeConfig(code=["ab" * 32]),
    "tuning lora is not allowed": NodeConfig(tunings=[TuningMethod.head]),
    "unit record is not allowed": NodeConfig(units=[PrivacyMode.person]),
}
KEPT = [
    NodeConfig(),
    NodeConfig(code=["ab" * 32, code_digest()]),
    NodeConfig(
        *(2.0, 2.0, 1.0, 2, 4, []),
        [TaskName.text_classification],
        [TuningMethod.lora],
        units=[PrivacyMode.person, PrivacyMode.record],
    ),
]


@pytest.mark.parametrize("text", BROKEN)
def test_each_limit_refuses_and_is_named(text, tiny_config):
    with pytest.raises(PolicyRefusedError, match=r"^node policy: ") as refused:
        check_policy(BROKEN[text], tiny_config)
    assert text in str(refused.value)
    assert ";" not in str(refused.value)  # that limit and no other


@pytest.mark.parametrize("policy", KEPT, ids=["none", "reviewed code", "met exactly"])
def test_what_is_within_every_limit_passes(policy, tiny_config):
    check_policy(policy, tiny_config)
    check_policy(replace(policy, models=[tiny_config.model.name]), tiny_config)


def test_the_floor_of_sigma_is_of_a_count_too(tiny_config):
    """Its noise protects the same records."""
    counts = replace(tiny_config, privacy=replace(tiny_config.privacy, count_noise=1.5))
    check_policy(NodeConfig(min_noise_multiplier=1.5), counts)
    with pytest.raises(PolicyRefusedError, match=r"sigma 1\.5 is below 2"):
        check_policy(NodeConfig(min_noise_multiplier=2.0), counts)


def test_all_broken_limits_are_told_together(tiny_config):
    with pytest.raises(PolicyRefusedError, match=r"sigma .*; rounds .*; tuning "):
        check_policy(NodeConfig(2.5, max_rounds=1, tunings=[TuningMethod.head]), tiny_config)


def test_the_cap_of_a_run_is_of_the_run_by_pld(tiny_config):
    whole = mechanism_of(tiny_config).event(tiny_config.total_steps)
    price = epsilon_pld([whole], tiny_config.privacy.delta)
    check_policy(NodeConfig(max_epsilon=price * 1.000001), tiny_config)
    with pytest.raises(PolicyRefusedError):
        check_policy(NodeConfig(max_epsilon=price * 0.999999), tiny_config)


def test_a_run_without_privacy_breaks_any_cap_and_any_floor(tiny_config):
    none = replace(tiny_config, privacy=replace(tiny_config.privacy, mode=PrivacyMode.none))
    for policy in (NodeConfig(max_epsilon=1e6), NodeConfig(min_noise_multiplier=1e-6)):
        with pytest.raises(PolicyRefusedError):
            check_policy(policy, none)


def test_a_run_without_privacy_protects_no_unit(tiny_config, person_config):
    none = replace(tiny_config, privacy=replace(tiny_config.privacy, mode=PrivacyMode.none))
    policy = NodeConfig(units=[PrivacyMode.person])
    check_policy(policy, person_config)
    with pytest.raises(PolicyRefusedError, match="unit none is not allowed"):
        check_policy(policy, none)


def test_the_careful_policy_allows_every_task_of_today(compose_config, tiny_config):
    """And refuses by its other limits: here the run has less noise than half a clip bound."""
    policy = compose_config("node=careful").node
    strong = replace(tiny_config, privacy=replace(tiny_config.privacy, noise_multiplier=20.0))
    for task in TaskName:
        check_policy(policy, replace(strong, task=replace(strong.task, name=task)))
    weak = replace(tiny_config, privacy=replace(tiny_config.privacy, noise_multiplier=0.4))
    with pytest.raises(PolicyRefusedError, match=r"sigma 0\.4 is below 0\.5"):
        check_policy(policy, weak)
