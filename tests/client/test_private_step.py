"""The private step keeps its promises: sensitivity, noise, divisor, count, and what it refuses.

Noise is never replaced by zeros here: the meters would rightly refuse it. Where a test needs the
sum under the noise it asks for the sum, or replays a seeded stream.
"""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from client import private_step
from client.clipping.engines import ENGINES, Hooks, Loop, SingleBackward
from client.private_step import (
    NOISE_CHUNK,
    ParameterGroup,
    _clipped_sums,
    plain_steps,
    private_steps,
    sgd,
)
from common.errors import PrivacyRefusedError
from common.model import read_of, targets_of
from common.pretrained import load_tokenizer
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness
from common.privacy.sampling import poisson_sample
from common.records import Records
from common.tasks import TASKS, build_model

CLIP = 0.5
TEXTS = ["goal match team", "bank shares", "the coach said score", "a loan", "trade", "cup cup"]
ALL = range(len(TEXTS))
LABELS = range(24)
"""Of replayed streams: some draw nobody."""


def mechanism(**changes):
    values = {"noise_multiplier": 1.0, "clip_norm": CLIP, "sample_rate": 1.0, "declared_records": 1}
    return Mechanism(**{**values, **changes})


def trainable(model):
    return tuple(p for p in model.parameters() if p.requires_grad)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


class Bench:
    """A tiny model with prepared inputs, and sums and steps on chosen records of them."""

    def __init__(self, config):
        self.model = build_model(config)
        with torch.no_grad():  # a zero head would give the adapters no gradient
            generator = torch.Generator().manual_seed(1)
            for parameter in trainable(self.model):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.task = TASKS[config.task.name]
        records = Records(tuple(TEXTS), np.arange(len(TEXTS)) % 2)
        encoded = self.task.encode(load_tokenizer(config.model), records, config.task)
        self.inputs = self.model.prepare(encoded)

    def losses(self, model, chosen):
        chosen = np.array(chosen, dtype=np.int64)

        def loss_of(indices):
            at = chosen[indices]
            rows = {name: tensor[at] for name, tensor in self.inputs.items()}
            return self.task.loss_vector(model(**read_of(rows)), targets_of(rows))

        return loss_of

    def clipped_sum(self, chosen, *, clip_norm=CLIP, physical_batch=4, engine=SingleBackward):
        """The sum under the noise, as one vector."""
        model = copy.deepcopy(self.model)
        clipping, loss_of = engine(model), self.losses(model, chosen)
        records = np.arange(len(chosen))
        sums = _clipped_sums(clipping, loss_of, records, clip_norm, physical_batch)
        return flat(sums[parameter] for parameter in trainable(model))

    def step(self, chosen, *, randomness=None, physical_batch=4, steps=1, **changes):
        """The change of all trainable parameters after private steps of size 1, as one vector."""
        model = copy.deepcopy(self.model)
        before = flat(trainable(model))
        private_steps(
            SingleBackward(model),
            sgd([ParameterGroup(trainable(model), 1.0)]),
            self.losses(model, chosen),
            mechanism=mechanism(**changes),
            randomness=randomness or Randomness.from_entropy(),
            records=len(chosen),
            steps=steps,
            physical_batch=physical_batch,
        )
        return flat(trainable(model)) - before

    def replayed_noise(self, stream, std):
        """What a step adds to its sum if it reads `stream`: a Gaussian per coordinate, once."""
        count = sum(p.numel() for p in trainable(self.model))
        assert count <= NOISE_CHUNK  # beyond, a step draws in several calls
        return torch.from_numpy(stream.normal(count, std))


@pytest.fixture(scope="module")
def bench(tiny_config):
    return Bench(tiny_config)


def clipped_alone(bench, record):
    """The clipped gradient of one record, by ordinary autograd on a batch of one."""
    model = copy.deepcopy(bench.model)
    row = {name: tensor[record : record + 1] for name, tensor in bench.inputs.items()}
    loss = functional.cross_entropy(model(**read_of(row)), row["target_labels"])
    gradient = flat(torch.autograd.grad(loss, trainable(model)))
    return gradient * min(1.0, CLIP / float(gradient.norm()))


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.__name__)
def test_the_sum_is_that_of_clipped_batches_of_one(bench, engine):
    expected = sum(clipped_alone(bench, record) for record in ALL)
    close(bench.clipped_sum(ALL, engine=engine), expected)


@pytest.mark.parametrize("label", LABELS)
def test_a_step_is_sample_clipped_sum_noise_and_a_declared_divisor(bench, label):
    """All of it at once, against a replayed stream: 20 records are declared, 6 are there, and
    whatever number is drawn, the divisor is 0.3 * 20.
    """
    stream = Randomness.seeded(label)
    drawn = poisson_sample(len(ALL), sample_rate=0.3, coins=stream)
    total = bench.replayed_noise(stream, 2.0 * CLIP)
    for record in drawn:
        total += clipped_alone(bench, record)
    change = bench.step(
        ALL,
        randomness=Randomness.seeded(label),
        noise_multiplier=2.0,
        sample_rate=0.3,
        declared_records=20,
    )
    close(change, (-total / 6.0).float())


def test_the_replayed_steps_above_cover_empty_samples_and_several_sizes():
    sizes = {
        len(poisson_sample(len(ALL), sample_rate=0.3, coins=Randomness.seeded(label)))
        for label in LABELS
    }
    assert 0 in sizes
    assert len(sizes) > 2


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_physical_batches_do_not_change_the_sum(bench, size):
    close(bench.clipped_sum(ALL, physical_batch=size), bench.clipped_sum(ALL))


@pytest.mark.parametrize("size", [1, 64])
def test_noise_is_added_once_whatever_the_number_of_physical_batches(bench, size):
    stream = Randomness.seeded("once")
    noise = bench.replayed_noise(stream, CLIP).float()
    change = bench.step(ALL, randomness=Randomness.seeded("once"), physical_batch=size)
    close(-change - noise, bench.clipped_sum(ALL))


@pytest.mark.parametrize("record", ALL)
def test_neighbouring_data_move_the_sum_by_at_most_the_clip_norm(bench, record):
    without = [other for other in ALL if other != record]
    distance = float((bench.clipped_sum(ALL) - bench.clipped_sum(without)).norm())
    assert 0 < distance <= CLIP * (1 + 1e-4)


def test_without_clipping_neighbours_would_differ_by_more(bench):
    """The bound above is not met by chance: unclipped, some record's gradient is longer."""
    lengths = [float(bench.clipped_sum([record], clip_norm=1e6).norm()) for record in ALL]
    assert max(lengths) > CLIP * 1.5


def noise_of(bench, steps=1, **changes):
    """Change made by steps that drew nobody: noise alone."""
    return bench.step([], steps=steps, **changes)


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


def test_two_steps_never_share_noise(bench):
    first, second = noise_of(bench), noise_of(bench)
    correlation = float(np.corrcoef(first.numpy(), second.numpy())[0, 1])
    assert abs(correlation) < 6 / len(first) ** 0.5


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.__name__)
def test_a_record_whose_gradient_is_not_finite_counts_as_zero(bench, engine):
    poisoned = copy.copy(bench)
    poisoned.inputs = {**bench.inputs, "hidden": bench.inputs["hidden"].clone()}
    poisoned.inputs["hidden"][2] = float("nan")
    total = poisoned.clipped_sum(ALL, engine=engine)
    assert torch.isfinite(total).all()
    close(total, bench.clipped_sum([record for record in ALL if record != 2]))


class Line:
    """A linear model of three features on made records, and private steps on it."""

    def __init__(self, *, frozen=None, records=5):
        self.head = nn.Linear(3, 2)
        self.model = nn.Sequential(frozen or nn.Identity(), self.head)
        self.values = torch.randn(records, 3, generator=torch.Generator().manual_seed(0)) + 10
        self.seen = []

    def loss_of(self, at):
        self.seen.append(at)
        labels = torch.zeros(len(at), dtype=torch.long)
        return functional.cross_entropy(self.model(self.values[at]), labels, reduction="none")

    def train(self, engine, *, loss_of=None, groups=None, steps=1, **changes):
        return private_steps(
            engine,
            sgd(groups or [ParameterGroup(trainable(self.model), 1.0)]),
            loss_of or self.loss_of,
            mechanism=mechanism(**changes),
            randomness=Randomness.from_entropy(),
            records=len(self.values),
            steps=steps,
            physical_batch=8,
        )


def assert_nothing_is_left_behind(model):
    for parameter in model.parameters():
        assert parameter.grad is None
        assert not {"grad_sample", "summed_grad", "_forward_counter"} & set(vars(parameter))
    for module in model.modules():
        assert not module.training
        assert not module._forward_hooks
        assert not module._backward_hooks


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.__name__)
def test_nothing_from_before_the_noise_is_left_behind(engine):
    line = Line()
    clipping = engine(line.model)
    line.train(clipping, steps=3)
    clipping.close()
    assert_nothing_is_left_behind(line.model)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.__name__)
def test_a_step_that_fails_leaves_nothing_behind(engine):
    line = Line()
    clipping = engine(line.model)

    def failing(at):
        if len(line.seen) == 3:
            raise OSError("the records went away")
        return line.loss_of(at)

    with pytest.raises(OSError, match="went away"):
        line.train(clipping, loss_of=failing, steps=100)
    clipping.close()
    assert_nothing_is_left_behind(line.model)


def test_a_step_whose_meter_alarms_is_not_taken(monkeypatch):
    """Refused means refused: what lacks its noise reaches no parameter."""
    line = Line()
    before = flat(line.model.parameters())
    monkeypatch.setattr(Randomness, "normal", lambda _, count, std: np.zeros(count))
    with pytest.raises(PrivacyRefusedError, match=r"^noise-scale: "):
        line.train(Loop(line.model))
    assert torch.equal(flat(line.model.parameters()), before)
    assert_nothing_is_left_behind(line.model)


@pytest.mark.parametrize(("chunk", "together"), [(1 << 16, 1 << 19), (3, 4), (1, 1), (5, 100)])
def test_every_coordinate_is_noised_once_however_parameters_are_grouped(
    chunk, together, monkeypatch
):
    """Chunks that cut through parameters, groups that fill up, a chunk larger than its group."""
    monkeypatch.setattr(private_step, "NOISE_CHUNK", chunk)
    monkeypatch.setattr(private_step, "NOISED_TOGETHER", together)
    drawn, draw = [], Randomness.normal

    def remembered(stream, count, std):
        drawn.append(draw(stream, count, std))
        return drawn[-1].copy()

    monkeypatch.setattr(Randomness, "normal", remembered)
    line = Line(records=0)
    line.model = line.head = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5), nn.Linear(5, 1))
    before = flat(trainable(line.model))
    line.train(SingleBackward(line.model))
    change = flat(trainable(line.model)) - before
    noise = torch.from_numpy(np.concatenate(drawn)).float()
    assert len(noise) == len(change) == 29
    assert torch.allclose(change, -noise, rtol=0, atol=1e-6)


def test_measurements_count_every_step_and_show_sound_noise():
    line = Line(records=0)
    measured = line.train(SingleBackward(line.model), steps=50)
    assert (measured.steps, line.seen) == (50, [])
    assert 0.7 < measured.noise_ratio < 1.3  # 400 coordinates: eight standard deviations
    assert measured.coin_deviation == 0


def test_a_trainable_parameter_outside_the_optimiser_is_refused(bench):
    model = copy.deepcopy(bench.model)
    head = tuple(model.classifier.parameters())
    with pytest.raises(PrivacyRefusedError, match=r"^optimizer-coverage: .*lora"):
        private_steps(
            SingleBackward(model),
            sgd([ParameterGroup(head, 1.0)]),
            lambda _: None,
            mechanism=mechanism(),
            randomness=Randomness.from_entropy(),
            records=0,
            steps=1,
            physical_batch=4,
        )


def test_an_optimiser_of_more_than_the_trainable_parameters_is_refused():
    """It would train what is not released, or release what was not clipped."""
    line, stranger = Line(), nn.Parameter(torch.zeros(3))
    groups = [ParameterGroup((*trainable(line.model), stranger), 1.0)]
    with pytest.raises(PrivacyRefusedError, match=r"^optimizer-coverage: "):
        line.train(Loop(line.model), groups=groups)


class Broadcast(nn.Module):
    """A position table added by broadcasting: Opacus's hooks see one record instead of B."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 2)

    def forward(self, values):
        return self.head(values + self.table(torch.arange(4)[None]).sum(1))


def test_a_model_with_a_gradient_missing_for_some_record_is_refused():
    """What BERT does with broadcast position ids: silently wrong without this check."""
    line = Line()
    line.model = Broadcast()
    with pytest.raises(PrivacyRefusedError, match="1 gradients for 8 records"):
        line.train(Hooks(line.model))


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.__name__)
def test_one_loss_for_all_records_is_refused(engine):
    """A mean mixes records: its gradient cannot be clipped by record."""
    line = Line()
    with pytest.raises(PrivacyRefusedError, match="never a mean over records"):
        line.train(engine(line.model), loss_of=lambda at: line.loss_of(at).mean())


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.__name__)
def test_a_frozen_layer_never_mixes_records(engine):
    """A frozen BatchNorm in training mode would normalise by the private batch."""
    frozen = nn.BatchNorm1d(3).requires_grad_(requires_grad=False)
    line, modes = Line(frozen=frozen), []
    before = copy.deepcopy(frozen.state_dict())
    clipping = engine(line.model)
    frozen.register_forward_hook(lambda module, *_: modes.append(module.training))
    line.train(clipping)
    assert modes
    assert not any(modes)
    for name, buffer in frozen.state_dict().items():
        assert torch.equal(buffer, before[name])


def test_the_batches_of_two_private_runs_differ():
    """Poisson coins are fresh: with a thousand records two draws agree once in 2^800 runs."""

    def batch():
        line = Line(records=1000)
        line.train(SingleBackward(line.model), sample_rate=0.5, declared_records=1000)
        return np.concatenate(line.seen).tolist()

    assert batch() != batch()


def test_plain_steps_are_ordinary_gradient_descent(bench):
    model = copy.deepcopy(bench.model)
    before = flat(trainable(model))
    loss = functional.cross_entropy(
        model(**read_of(bench.inputs)), bench.inputs["target_labels"], reduction="sum"
    )
    loss = loss / 6
    expected = flat(torch.autograd.grad(loss, trainable(model)))
    plain_steps(
        sgd([ParameterGroup(trainable(model), 0.1)]),
        bench.losses(model, ALL),
        mechanism=mechanism(noise_multiplier=0.0, declared_records=6),
        randomness=Randomness.from_entropy(),
        records=6,
        steps=1,
        physical_batch=4,
    )
    close(flat(trainable(model)) - before, -0.1 * expected)
