"""The audit of the mechanism: what it falsifies, and what it does not.

On the real private step with a small Transformer, by the real engine; a fault is a change of the
real code, as in `test_mutations`. How often each is found: `python -m benchmarks.audits`.
"""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch

from client import private_step
from client.audit import (
    CANARIES,
    CanaryTrainer,
    audit_body,
    audit_mechanism,
    fault_of,
    mechanism_tested,
)
from client.canaries import coins_of, dirac, layers_of, losses_of, random_units
from client.clipping import engines
from client.train import Trainer
from common.config import NoiseSource, PrivacyMode, TaskName, TuningMethod
from common.errors import ConfigError, PrivacyRefusedError
from common.parameters import Layout
from common.privacy import chain
from common.privacy.chain import Kind
from common.privacy.lower_bounds import FALSIFIED, NOT_FALSIFIED
from common.privacy.noise import Randomness
from tests.common.toy import toy_config

from .test_mutations import edit, noise

EPSILONS = (1.0, 8.0)
FEW = 1000


@pytest.fixture
def known(monkeypatch):
    """The same coins and noise on every call: a sound step is falsified once in some hundred audits
    of so few canaries, and a test must not be.
    """
    fix_draws(monkeypatch)


def fix_draws(patch):
    draw, numbers = np.random.default_rng, count()
    patch.setattr(np.random, "default_rng", lambda seed=0: draw(seed))
    patch.setattr(Randomness, "from_entropy", lambda: Randomness.seeded("known", next(numbers)))


def at(config, epsilon, **changes):
    return replace(config, privacy=replace(config.privacy, epsilon=epsilon, **changes))


def tuned(config, method):
    return replace(config, tuning=replace(config.tuning, method=method))


def plain_head(patch):
    """The head is trained by an optimiser of its own, without clipping and without noise."""
    original = Trainer._private_steps

    def steps(self, loss_of, mechanism, randomness, *, groups, records, **rest):
        head, *others = groups
        measured = original(
            self, loss_of, mechanism, randomness, groups=others, records=records, **rest
        )
        for piece in private_step.cut(np.arange(records), 16):
            (loss_of(piece).sum() / mechanism.divisor).backward()
        torch.optim.SGD(head.parameters, lr=head.learning_rate).step()
        self._model.zero_grad(set_to_none=True)
        return measured

    patch.setattr(Trainer, "_private_steps", steps)


def unchecked_plain_head(patch):
    patch.setattr(private_step, "_check_all_optimised", lambda engine, optimizer: None)
    plain_head(patch)


FAULTS = {
    "half noise": noise(lambda draw, stream, count: 0.5 * draw(stream, count)),
    "no noise": noise(lambda draw, stream, count: np.zeros(count)),
    "no clipping": edit(engines.clip_factors, (".clamp(max=1.0)", ".clamp(min=1.0, max=1.0)")),
    "head outside the optimiser": unchecked_plain_head,
}
ALARMS = {
    "half noise": {"noise-scale"},
    "no noise": {"noise-scale"},
    "no clipping": {"clip-bound"},
    "head outside the optimiser": set(),
}
"""What would have stopped each before it could be audited."""
QUICK = [("half noise", 8.0), ("no noise", 1.0), ("no clipping", 8.0)]
QUICK += [("head outside the optimiser", 8.0)]


def check_falsified(name, epsilon, config, patch):
    FAULTS[name](patch)
    many = name == "head outside the optimiser" or (name, epsilon) == ("half noise", 1.0)
    found = audit_mechanism(at(config, epsilon), CANARIES if many else FEW)
    assert found.audit.verdict == FALSIFIED, found.audit.bounds
    assert {*found.alarms} == ALARMS[name]


@pytest.mark.parametrize(("name", "epsilon"), QUICK)
def test_a_fault_of_the_private_step_is_falsified(name, epsilon, tiny_config, monkeypatch):
    check_falsified(name, epsilon, tiny_config, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "epsilon"), [(n, e) for n in FAULTS for e in EPSILONS if (n, e) not in QUICK]
)
def test_so_are_the_others(name, epsilon, tiny_config, monkeypatch):
    check_falsified(name, epsilon, tiny_config, monkeypatch)


@pytest.mark.usefixtures("known")
def test_the_sound_step_is_not_falsified(tiny_config):
    found = audit_mechanism(at(tiny_config, 8.0), FEW)
    assert found.audit.verdict == NOT_FALSIFIED, found.audit.bounds
    assert found.audit.bounds.lower_bound > 2  # the test could tell something
    assert (found.alarms, found.engine) == ((), "single_backward")
    assert found.audit.claimed_epsilon == pytest.approx(8.0, rel=1e-3)


@pytest.mark.slow  # 20 audits of each
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_sound_step_is_falsified_in_at_most_one_of_twenty_audits(epsilon, tiny_config):
    config = at(tiny_config, epsilon)
    found = [audit_mechanism(config).audit.verdict for _ in range(20)]
    assert found.count(FALSIFIED) <= 1


def test_a_head_outside_the_optimiser_is_stopped_before_anything_is_read_off(
    tiny_config, monkeypatch
):
    plain_head(monkeypatch)
    with pytest.raises(PrivacyRefusedError, match=r"optimizer-coverage:.*classifier"):
        audit_mechanism(tiny_config, FEW)


@pytest.mark.slow  # three records of each person
@pytest.mark.usefixtures("known")
def test_persons_are_audited_with_all_of_their_records(person_config, monkeypatch):
    config = at(person_config, 8.0)
    found = audit_mechanism(config, FEW)
    assert (found.audit.verdict, found.alarms) == (NOT_FALSIFIED, ())
    assert found.audit.bounds.lower_bound > 2
    of_one = edit(
        private_step._noise,
        ("mechanism.noise_std", "mechanism.noise_multiplier * mechanism.clip_norm"),
    )
    of_one(monkeypatch)
    assert audit_mechanism(config, FEW).audit.verdict == FALSIFIED


@pytest.mark.slow
@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("method", [TuningMethod.full, TuningMethod.bitfit, TuningMethod.head])
def test_every_way_of_tuning_can_be_audited(method, tiny_config):
    found = audit_mechanism(at(tuned(tiny_config, method), 8.0), FEW)
    assert (found.audit.verdict, found.alarms) == (NOT_FALSIFIED, ())
    assert found.audit.bounds.lower_bound > 2


@pytest.mark.slow  # a model for each task
@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("task", TaskName)
def test_every_task_can_be_audited(task, tiny_config, tmp_path):
    found = audit_mechanism(at(toy_config(task, tiny_config, tmp_path), 8.0), FEW)
    assert (found.audit.verdict, found.alarms) == (NOT_FALSIFIED, ())
    assert found.audit.bounds.lower_bound > 2


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_by_a_loop_of_batches_of_one_it_is_the_same(tiny_config, monkeypatch):
    monkeypatch.setattr("client.preflight.TRIALS", ((engines.EngineName.loop, 3),))
    found = audit_mechanism(at(tuned(tiny_config, TuningMethod.head), 8.0), FEW)
    assert (found.engine, found.audit.verdict) == ("loop", NOT_FALSIFIED)
    assert found.audit.bounds.lower_bound > 2


def test_an_audit_leaves_the_model_as_it_was(tiny_config):
    trainer = CanaryTrainer(tiny_config)
    trainer.ready()
    before = [p.detach().clone() for p in trainer._model.parameters()]
    canaries = dirac(trainer.layers, 50, np.random.default_rng(0))
    trainer.scores(canaries, np.ones(50, dtype=bool), mechanism_tested(tiny_config, 50))
    assert all(
        torch.equal(p, was) for p, was in zip(trainer._model.parameters(), before, strict=True)
    )


# What cannot be audited.


@pytest.mark.parametrize(
    "changes", [{"mode": PrivacyMode.none}, {"noise": NoiseSource.seeded}], ids=["none", "seeded"]
)
def test_what_claims_nothing_is_refused(changes, tiny_config):
    with pytest.raises(ConfigError, match=r"^privacy"):
        audit_mechanism(at(tiny_config, 8.0, **changes), FEW)


# Canaries.


def gradients(trainer, canaries, index):
    """The gradient of one canary by autograd, over all trained parameters in their order."""
    losses = losses_of(trainer.layers, canaries.sides(np.array([index])))
    trained = [p for p in trainer._model.parameters() if p.requires_grad]
    found = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
    flat = [
        torch.zeros(p.numel()) if g is None else g.flatten()
        for p, g in zip(trained, found, strict=True)
    ]
    return torch.cat(flat).numpy()


@pytest.mark.parametrize("method", [TuningMethod.lora, TuningMethod.bitfit])
@pytest.mark.parametrize("kind", [dirac, random_units])
def test_a_canary_has_the_gradient_that_it_is_told_by(kind, method, tiny_config):
    trainer = CanaryTrainer(tuned(tiny_config, method))
    canaries = kind(trainer.layers, 40, np.random.default_rng(0))
    assert len(canaries) == 40
    for index in range(0, 40, 7):
        gradient = gradients(trainer, canaries, index)
        assert gradient.shape == (Layout.of(trainer._model).size,)
        assert np.linalg.norm(gradient) == pytest.approx(1.0, abs=1e-5)
        scores = canaries.scores(gradient)
        assert scores[index] == pytest.approx(1.0, abs=1e-5)
        if kind is dirac:
            assert np.abs(np.delete(scores, index)).max() < 1e-6
            assert (gradient != 0).sum() == 1


def test_canaries_are_as_many_in_the_head_as_below_it(tiny_config):
    trainer = CanaryTrainer(tiny_config)
    canaries = dirac(trainer.layers, 100, np.random.default_rng(0))
    groups = np.array([layer.group for layer in trainer.layers])[canaries.layer]
    assert np.bincount(groups).tolist() == [50, 50]


def test_a_filler_is_no_canary(tiny_config):
    trainer = CanaryTrainer(tiny_config)
    canaries = dirac(trainer.layers, 10, np.random.default_rng(0))
    for left, right in canaries.sides(np.array([-1, -1])):
        assert not left.any()
        assert not right.any()


def test_a_model_without_a_trained_linear_layer_is_refused():
    with pytest.raises(PrivacyRefusedError, match="no linear layer"):
        layers_of(torch.nn.LayerNorm(3), [])


def test_coins_are_fair():
    coins = coins_of(100_000, np.random.default_rng(0).random(100_000))
    assert abs(coins.mean() - 0.5) < 0.01


# What becomes of a result.


@pytest.mark.usefixtures("known")
def test_an_entry_says_what_the_result_says(tiny_config):
    found = audit_mechanism(at(tuned(tiny_config, TuningMethod.head), 8.0), FEW)
    content = found.content(tiny_config)
    body = audit_body(found.audit, content)
    chain.check_body(2, Kind.AUDIT, body)
    for name in ("design", "m", "confidence", "lower_bound", "claimed_epsilon", "ceiling"):
        assert body[name] == content[name]
    assert body["verdict"] == content["verdict"] == NOT_FALSIFIED
    assert fault_of([found.audit], content) is None


@pytest.mark.usefixtures("known")
def test_an_alarm_ends_in_the_exit_code_of_a_falsified_claim(tiny_config, monkeypatch):
    noise(lambda draw, stream, count: 0.95 * draw(stream, count))(monkeypatch)
    found = audit_mechanism(at(tuned(tiny_config, TuningMethod.full), 1.0), FEW)
    assert found.audit.verdict == NOT_FALSIFIED  # too little to be told by guesses
    fault = fault_of([found.audit], {}, found.alarms)
    assert found.alarms == ("noise-scale",)
    assert fault.exit_code == 5
    assert str(fault).startswith("noise-scale: measurements alarmed")
