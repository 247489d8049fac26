"""The private step keeps its promises: sensitivity, noise, divisor, count, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from client.private_step import ParameterGroup, PrivateOptimizer, plain_steps, private_steps
from common.errors import PrivacyRefusedError
from common.model import build_classifier, load_tokenizer
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness
from common.tasks import TASKS

CLIP = 0.5


class Silent(Randomness):
    """Draws every record and adds nothing, so that the sum under the noise can be seen."""

    def __init__(self):
        super().__init__(bytes(32))

    def uniform(self, count):
        return np.zeros(count)

    def normal(self, count):
        return np.zeros(count)


def mechanism(**changes):
    values = {"noise_multiplier": 1.0, "clip_norm": CLIP, "sample_rate": 1.0, "declared_records": 1}
    return Mechanism(**{**values, **changes})


class Bench:
    """A tiny model with prepared inputs, and one step on chosen records of them."""

    def __init__(self, config, texts, labels):
        self.model = build_classifier(config)
        with torch.no_grad():  # a zero head would give the adapters no gradient
            generator = torch.Generator().manual_seed(1)
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        task = TASKS[config.task.name]
        encoded = task.encode(load_tokenizer(config.model), texts, max_tokens=12)
        self.inputs, self.labels, self.task = (
            self.model.prepare(encoded),
            torch.tensor(labels),
            task,
        )

    def trainable(self, model):
        return tuple(p for p in model.parameters() if p.requires_grad)

    def step(self, records, *, randomness=None, physical_batch=4, chosen=None, steps=1, **changes):
        """The change of all trainable parameters after steps of size 1, as one vector."""
        model = copy.deepcopy(self.model)
        chosen = np.arange(records) if chosen is None else np.array(chosen)

        def loss_of(indices):
            at = chosen[indices]
            inputs = {name: tensor[at] for name, tensor in self.inputs.items()}
            return self.task.loss_vector(model(**inputs), self.labels[at])

        before = torch.cat([p.detach().flatten().clone() for p in self.trainable(model)])
        private_steps(
            model,
            [ParameterGroup(self.trainable(model), 1.0)],
            loss_of,
            mechanism=mechanism(**changes),
            randomness=randomness or Silent(),
            records=len(chosen),
            steps=steps,
            physical_batch=physical_batch,
        )
        return torch.cat([p.detach().flatten() for p in self.trainable(model)]) - before


@pytest.fixture(scope="module")
def bench(tiny_config):
    texts = ["goal match team", "bank shares", "the coach said score", "a loan", "trade", "cup cup"]
    return Bench(tiny_config, texts, [0, 1, 0, 1, 1, 0])


def clipped_alone(bench, record):
    """The clipped gradient of one record, by ordinary autograd on a batch of one."""
    model = copy.deepcopy(bench.model)
    inputs = {name: tensor[record : record + 1] for name, tensor in bench.inputs.items()}
    loss = functional.cross_entropy(model(**inputs), bench.labels[record : record + 1])
    gradients = torch.autograd.grad(loss, bench.trainable(model))
    gradient = torch.cat([g.flatten() for g in gradients])
    return gradient * min(1.0, CLIP / float(gradient.norm()))


def test_the_sum_is_that_of_clipped_batches_of_one(bench):
    expected = -sum(clipped_alone(bench, record) for record in range(6))
    torch.testing.assert_close(bench.step(6), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_physical_batches_do_not_change_the_step(bench, size):
    torch.testing.assert_close(
        bench.step(6, physical_batch=size), bench.step(6), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("record", range(6))
def test_neighbouring_data_move_the_sum_by_at_most_the_clip_norm(bench, record):
    without = [other for other in range(6) if other != record]
    distance = float((bench.step(6) - bench.step(5, chosen=without)).norm())
    assert 0 < distance <= CLIP * (1 + 1e-4)


def test_without_clipping_neighbours_would_differ_by_more(bench):
    """The bound above is not met by chance: unclipped, some record's gradient is longer."""
    loose = 1e6
    steps = [
        float(
            (
                bench.step(6, clip_norm=loose)
                - bench.step(5, chosen=[o for o in range(6) if o != r], clip_norm=loose)
            ).norm()
        )
        for r in range(6)
    ]
    assert max(steps) > CLIP * 1.5


def test_the_divisor_is_declared_and_not_the_drawn_number(bench):
    whole, rare = bench.step(6), bench.step(6, sample_rate=0.5, declared_records=20)
    torch.testing.assert_close(rare * 10, whole, rtol=1e-4, atol=1e-6)


def noise_of(bench, steps=1, **changes):
    """Change made by steps that drew nobody: noise alone."""
    return bench.step(0, chosen=[], randomness=Randomness.from_entropy(), steps=steps, **changes)


def test_an_empty_batch_still_adds_noise_and_counts(bench):
    change = noise_of(bench, noise_multiplier=3.0)
    p_value = stats.kstest(change.numpy() / (3.0 * CLIP), "norm").pvalue
    assert p_value > 1e-6
    assert stats.kstest(change.numpy() / (3.0 * CLIP * 0.5), "norm").pvalue < 1e-6


def test_each_step_adds_its_own_noise_once(bench):
    change = noise_of(bench, steps=9)
    squares = float((change**2).sum()) / CLIP**2
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], len(change))
    assert low < squares / 9 < high


def test_noise_is_added_once_whatever_the_number_of_physical_batches(bench):
    noisy = bench.step(6, randomness=NoNobody(), physical_batch=1) - bench.step(6)
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], len(noisy))
    assert low < float((noisy**2).sum()) / CLIP**2 < high


class NoNobody(Silent):
    """Draws every record, with real noise."""

    def normal(self, count):
        return Randomness.from_entropy().normal(count)


def test_two_steps_never_share_noise(bench):
    first, second = noise_of(bench), noise_of(bench)
    correlation = float(np.corrcoef(first.numpy(), second.numpy())[0, 1])
    assert abs(correlation) < 6 / len(first) ** 0.5


def test_a_record_whose_gradient_is_not_finite_counts_as_zero(bench):
    poisoned = copy.copy(bench)
    poisoned.inputs = {**bench.inputs, "hidden": bench.inputs["hidden"].clone()}
    poisoned.inputs["hidden"][2] = float("nan")
    change = poisoned.step(6)
    assert torch.isfinite(change).all()
    others = [record for record in range(6) if record != 2]
    torch.testing.assert_close(change, bench.step(5, chosen=others), rtol=1e-4, atol=1e-6)


def test_nothing_from_before_the_noise_is_left_behind(bench):
    model = copy.deepcopy(bench.model)
    trainable = bench.trainable(model)
    private_steps(
        model,
        [ParameterGroup(trainable, 1.0)],
        lambda at: bench.task.loss_vector(
            model(**{n: t[at] for n, t in bench.inputs.items()}), bench.labels[at]
        ),
        mechanism=mechanism(),
        randomness=Silent(),
        records=6,
        steps=1,
        physical_batch=4,
    )
    for parameter in trainable:
        assert parameter.grad is None
        assert not {"grad_sample", "summed_grad", "_forward_counter"} & set(vars(parameter))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_trainable_parameter_outside_the_optimiser_is_refused(bench):
    model = copy.deepcopy(bench.model)
    head = tuple(model.classifier.parameters())
    with pytest.raises(PrivacyRefusedError, match=r"outside the private optimiser: .*lora"):
        private_steps(
            model,
            [ParameterGroup(head, 1.0)],
            lambda _: None,
            mechanism=mechanism(),
            randomness=Silent(),
            records=0,
            steps=1,
            physical_batch=4,
        )


class Broadcast(nn.Module):
    """A position table added by broadcasting: Opacus's hooks see one record instead of B."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 2)

    def forward(self, values):
        return self.head(values + self.table(torch.arange(4)[None]).sum(1))


def test_a_model_with_a_gradient_missing_for_some_record_is_refused():
    """What BERT does with broadcast position ids: silently wrong without this check."""
    model, values = Broadcast(), torch.ones(5, 3)
    with pytest.raises(PrivacyRefusedError, match="1 gradients for 5 records"):
        private_steps(
            model,
            [ParameterGroup(tuple(model.parameters()), 1.0)],
            lambda at: functional.cross_entropy(
                model(values[at]), torch.zeros(len(at), dtype=torch.long), reduction="none"
            ),
            mechanism=mechanism(),
            randomness=Silent(),
            records=5,
            steps=1,
            physical_batch=8,
        )


def test_a_layer_with_buffers_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(PrivacyRefusedError, match="BatchNorm"):
        private_steps(
            model,
            [ParameterGroup(tuple(model.parameters()), 1.0)],
            lambda _: None,
            mechanism=mechanism(),
            randomness=Silent(),
            records=0,
            steps=1,
            physical_batch=4,
        )


def test_a_frozen_layer_never_mixes_records():
    """A frozen BatchNorm in training mode would normalise by the private batch."""
    frozen = nn.BatchNorm1d(3).requires_grad_(requires_grad=False)
    model, values = nn.Sequential(frozen, nn.Linear(3, 2)), torch.randn(5, 3) + 10
    before = frozen.running_mean.clone()
    modes = []

    def loss_of(at):
        modes.append((frozen.training, model[1].training))
        return functional.cross_entropy(
            model(values[at]), torch.zeros(len(at), dtype=torch.long), reduction="none"
        )

    private_steps(
        model,
        [ParameterGroup(tuple(model[1].parameters()), 1.0)],
        loss_of,
        mechanism=mechanism(),
        randomness=Silent(),
        records=5,
        steps=1,
        physical_batch=8,
    )
    assert modes == [(False, True)]
    assert torch.equal(frozen.running_mean, before)


def test_the_batches_of_two_private_runs_differ(bench):
    """Poisson coins are fresh: with a thousand records two draws agree once in 2^800 runs."""

    def batch():
        drawn = []
        parameter = nn.Parameter(torch.zeros(1))
        plain_steps(
            nn.Module(),
            [ParameterGroup((parameter,), 0.0)],
            lambda at: (drawn.extend(at), parameter * torch.ones(len(at)))[1],
            mechanism=mechanism(sample_rate=0.5, declared_records=1000),
            randomness=Randomness.from_entropy(),
            records=1000,
            steps=1,
            physical_batch=4096,
        )
        return drawn

    assert batch() != batch()


def test_plain_steps_are_ordinary_gradient_descent(bench):
    model = copy.deepcopy(bench.model)
    trainable = bench.trainable(model)
    before = torch.cat([p.detach().flatten().clone() for p in trainable])
    loss = functional.cross_entropy(model(**bench.inputs), bench.labels, reduction="sum") / 6
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainable)])
    plain_steps(
        model,
        [ParameterGroup(trainable, 0.1)],
        lambda at: bench.task.loss_vector(
            model(**{n: t[at] for n, t in bench.inputs.items()}), bench.labels[at]
        ),
        mechanism=mechanism(declared_records=6),
        randomness=Silent(),
        records=6,
        steps=1,
        physical_batch=4,
    )
    change = torch.cat([p.detach().flatten() for p in trainable]) - before
    torch.testing.assert_close(change, -0.1 * expected, rtol=1e-4, atol=1e-6)


def test_opacus_itself_cannot_skip_our_noise():
    """`PrivateOptimizer.step`, if anyone calls it, goes through the same clip, noise, divisor."""
    parameter = nn.Parameter(torch.zeros(50))
    optimizer = PrivateOptimizer(
        [ParameterGroup((parameter,), 1.0)], mechanism(), Randomness.from_entropy()
    )
    parameter.grad_sample = torch.zeros(3, 50)
    optimizer.step()
    assert 0.3 < float(parameter.detach().std()) / CLIP < 2
