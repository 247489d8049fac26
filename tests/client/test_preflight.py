"""Preflight and rehearsal: which models can be trained privately, said before any data is touched.

Which engine is exact for which architecture is asked in tests/client/clipping.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from client.clipping.engines import EngineName, Loop
from client.preflight import preflight
from client.train import BEYOND, REHEARSED, Trainer
from common import parameters
from common.config import TuningConfig, TuningMethod
from common.errors import PrivacyRefusedError

HEAD = TuningConfig(method=TuningMethod.head, targets=[], head_learning_rate=5.0)
TUNINGS = {"lora": lambda config: config, "head": lambda config: replace(config, tuning=HEAD)}


@pytest.fixture(params=TUNINGS)
def trainer(request, tiny_config):
    return Trainer(TUNINGS[request.param](tiny_config))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_bit_identical(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_a_bert_is_trained_by_the_fastest_engine_and_exactly(trainer, precision):
    verdict = trainer.preflight(precision=precision)
    assert verdict.engine.name is EngineName.single_backward
    assert verdict.refused == ()
    assert verdict.max_rel_error < 1e-5
    assert len(verdict.engine.parameters) == len(trainer.layout.names)


@pytest.mark.parametrize("call", [Trainer.preflight, Trainer.rehearse])
def test_the_model_is_bit_identical_afterwards(trainer, call):
    before, vector = state_of(trainer._model), parameters.flatten(trainer._model)
    call(trainer)
    assert_bit_identical(trainer._model, before)
    assert np.array_equal(parameters.flatten(trainer._model), vector)
    assert all(parameter.grad is None for parameter in trainer._model.parameters())
    assert not any(module.training for module in trainer._model.modules())


def test_the_verdict_is_the_same_at_every_site(tiny_config):
    """It is a function of config and model, so that a refusal tells nothing about records."""
    first, second = (Trainer(tiny_config).preflight() for _ in range(2))
    assert first.engine.plan.calls == second.engine.plan.calls
    assert replace(first, engine=None) == replace(second, engine=None)


@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 1e3])
def test_the_rehearsed_record_is_far_beyond_the_clip_bound(trainer, tiny_config, clip_norm):
    """Else the rehearsal of clipping would pass without any clipping."""
    trainer.rehearse()
    made, engine = trainer._made(REHEARSED), Loop(trainer._model)
    norms = engine.add_clipped(
        lambda at: made(at) * (BEYOND * clip_norm), np.arange(REHEARSED), clip_norm, {}
    )
    assert float(norms.min()) > 100 * clip_norm


class Made:
    """Made records of four features, for a model that gives two logits."""

    def __init__(self, model):
        self.model = model

    def __call__(self, records):
        dtype = next(self.model.parameters()).dtype
        values = torch.randn(records, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
        labels = torch.arange(records) % 2

        def loss_of(at):
            dtype = next(self.model.parameters()).dtype
            return functional.cross_entropy(
                self.model(values[at].to(dtype)), labels[at], reduction="none"
            )

        return loss_of


def verdict_of(model, **options):
    before = state_of(model)
    verdict = preflight(model, Made(model), **options)
    assert_bit_identical(model, before)
    return verdict


class Mixing(nn.Module):
    """Centres its batch: a record's loss depends on whoever was drawn with it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, values):
        return self.head(values - values.mean(0))


class Counting(nn.Module):
    """Keeps a running mean of what it has seen, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, values):
        self.seen.mul_(0.9).add_(values.detach().mean(0), alpha=0.1)
        return self.head(values)


class Unused(nn.Module):
    """Declares a parameter that no record's loss depends on."""

    def __init__(self):
        super().__init__()
        self.head, self.spare = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, values):
        return self.head(values)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2).requires_grad_(requires_grad=False)

    def forward(self, values):
        return self.head(values)


REFUSED = {
    "a loss that depends on other records": (Mixing, "depends on the other records"),
    "a buffer that forward changes": (Counting, "seen: a buffer"),
    "no trainable parameter": (Frozen, "no parameter is trainable"),
    "a parameter without a gradient": (Unused, "spare.weight"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_model_that_cannot_be_trained_privately_is_refused(fault):
    model, reason = REFUSED[fault]
    verdict = verdict_of(model())
    assert verdict.engine is None
    assert math.isinf(verdict.max_rel_error)
    assert reason in " ".join(verdict.refused)


def test_a_task_that_averages_over_records_is_refused():
    model = nn.Linear(4, 2)
    made = Made(model)
    verdict = preflight(model, lambda records: lambda at: made(records)(at).mean())
    assert verdict.engine is None
    assert "not one per record" in " ".join(verdict.refused)


def test_a_batch_norm_is_a_fixed_map_and_never_sees_the_batch():
    """Its running statistics are frozen, so its scale and shift can be trained record by record."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    verdict = verdict_of(model)  # which asserts that no statistic moved
    assert verdict.engine is not None
    assert not model[1].training


class Product(torch.autograd.Function):
    """A kernel of its own, as a compiled extension brings one: no engine can look into it."""

    @staticmethod
    def forward(ctx, values, weight):
        ctx.save_for_backward(values, weight)
        return values @ weight

    @staticmethod
    def backward(ctx, gradient):
        values, weight = ctx.saved_tensors
        return gradient @ weight.t(), values.t() @ gradient


class Odd(nn.Module):
    """Uses its weight in a way neither fast engine reads."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 2) / 4)

    def forward(self, values):
        return Product.apply(values, self.weight)


def test_what_no_fast_engine_reads_is_trained_in_a_loop():
    """Slow beats wrong, and the verdict says why."""
    verdict = verdict_of(Odd())
    assert verdict.engine.name is EngineName.loop
    assert any(reason.startswith("single_backward: ") for reason in verdict.refused)
    assert any(reason.startswith("hooks: ") for reason in verdict.refused)


def test_the_rehearsal_names_the_model_that_it_refuses(tiny_config, monkeypatch):
    trainer = Trainer(tiny_config)
    original = trainer._task.loss_vector
    monkeypatch.setattr(
        trainer._task, "loss_vector", lambda *arguments: original(*arguments).mean()
    )
    with pytest.raises(PrivacyRefusedError, match=r"^model\.name=.*: cannot be trained privately"):
        trainer.rehearse()
