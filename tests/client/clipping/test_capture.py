"""The single-backward engine, one way of using a parameter at a time: exact, or refused by name."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from client.clipping import tape
from client.clipping.capture import UncoveredError
from client.clipping.engines import EngineName, Loop, SingleBackward, completed
from client.preflight import preflight
from common.errors import PrivacyRefusedError

from .oracle import assert_exact, distance, length, oracle
from .zoo import (
    LABELS,
    LISTED,
    OTHERS,
    TOKENS,
    WORDS,
    classified,
    floats,
    plain,
    texts,
    tuned,
)

WIDTH, ROWS, RECORDS = 6, 5, 7
ROUTES = [(None, None), (0, math.inf), (0, 0.0)]
"""KEPT_ELEMENTS and INSTANTIATE_COST: each form of the norm must be right."""

vectors = partial(floats, shape=(ROWS, WIDTH), name="x")


class Reading(nn.Module):
    """A model of token ids: embeds them, and reads the mean of its own tokens."""

    def __init__(self, **embedding):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, **embedding)
        self.head = nn.Linear(WIDTH, LABELS)

    def hidden(self, ids):
        return self.words(ids)

    def forward(self, input_ids, attention_mask):
        own = attention_mask.unsqueeze(-1)
        return self.head((self.hidden(input_ids) * own).tanh().mean(1))


class BroadcastIds(Reading):
    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(TOKENS, WIDTH)

    def hidden(self, ids):
        return self.words(ids) + self.positions(torch.arange(TOKENS)[None])


class IdsWithoutBatch(BroadcastIds):
    def hidden(self, ids):
        return self.words(ids) + self.positions(torch.arange(TOKENS))


class Tied(Reading):
    """One weight as table, as matrix, and as the same matrix turned round."""

    def hidden(self, ids):
        scores = functional.linear(self.words(ids).tanh(), self.words.weight)
        return scores.softmax(-1) @ self.words.weight


class Indexed(Reading):
    """A table read by indexing rather than by an embedding."""

    def hidden(self, ids):
        return self.words.weight[ids]


class Vectors(nn.Module):
    """A model of (B, ROWS, WIDTH) floats, with one weight of its own."""

    def __init__(self, *shape):
        super().__init__()
        self.own = nn.Parameter(torch.randn(*shape))
        self.head = nn.Linear(WIDTH, LABELS)

    def forward(self, x):
        return self.head(self.hidden(x).tanh()).mean(1)


def using(hidden, *shape):
    """A model whose own weight, of `shape`, is used as `hidden(x, weight)` says."""

    class Using(Vectors):
        def hidden(self, x):
            return hidden(x, self.own)

    return plain(lambda: Using(*shape), vectors, classified)


def layers(*build):
    """A model of torch's layers between the vectors and the head."""

    class Layers(Vectors):
        def __init__(self):
            super().__init__(1)
            del self.own
            self.layers = nn.Sequential(*(make() for make in build))

        def hidden(self, x):
            return self.layers(x)

    return plain(Layers, vectors, classified)


def reading(model, **embedding):
    return plain(lambda: model(**embedding), texts, classified)


def linear():
    return nn.Linear(WIDTH, WIDTH)


def weight_normed():
    return nn.utils.parametrizations.weight_norm(linear())


def shared_twice():
    once = linear()
    return nn.Sequential(once, nn.Tanh(), once)


def turned(make):
    """A layer over channels, for inputs (B, channels, ...)."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make()

        def forward(self, x):
            return self.layer(x.mT).mT

    return Turned


def table_attention(x, table):
    """Self-attention with a trained (ROWS, ROWS) bias that has no batch axis."""
    return functional.scaled_dot_product_attention(x, x, x, attn_mask=table)


COVERED = {
    "embedding": reading(Reading),
    "padding index": reading(Reading, padding_idx=0),
    "negative padding index": reading(Reading, padding_idx=-3),
    "ids (1, T)": reading(BroadcastIds),
    "ids (T,)": reading(IdsWithoutBatch),
    "tied": reading(Tied),
    "indexed table": reading(Indexed),
    "layer norm": layers(linear, lambda: nn.LayerNorm(WIDTH), linear),
    "layer norm without bias": layers(linear, lambda: nn.LayerNorm(WIDTH, bias=False), linear),
    "layer norm without weights": layers(
        linear, lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), linear
    ),
    "layer norm over two axes": layers(linear, lambda: nn.LayerNorm((ROWS, WIDTH)), linear),
    "RMS norm": layers(linear, lambda: nn.RMSNorm(WIDTH, eps=1e-3), linear),
    "PReLU": layers(linear, nn.PReLU, linear),
    "weight norm": layers(weight_normed),
    "shared layer": layers(shared_twice),
    "linear without bias": layers(lambda: nn.Linear(WIDTH, WIDTH, bias=False)),
    "conv 1d": layers(turned(lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=2, dilation=2))),
    "conv same": layers(turned(lambda: nn.Conv1d(WIDTH, WIDTH, 4, padding="same"))),
    "conv valid": layers(turned(lambda: nn.Conv1d(WIDTH, WIDTH, 2, padding="valid", stride=2))),
    "conv reflected": layers(
        turned(lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect"))
    ),
    "conv in groups": layers(turned(lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=3))),
    "conv transposed": layers(turned(lambda: nn.ConvTranspose1d(WIDTH, WIDTH, 3))),
    "weight-normed conv": layers(
        turned(lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(WIDTH, WIDTH, 2), dim=2))
    ),
    "group norm": layers(linear, turned(lambda: nn.GroupNorm(2, WIDTH))),
    "instance norm": layers(linear, turned(lambda: nn.InstanceNorm1d(WIDTH, affine=True))),
    "frozen statistics": layers(linear, turned(lambda: nn.BatchNorm1d(WIDTH))),
    "square weight both ways": using(lambda x, w: x @ w + functional.linear(x, w), WIDTH, WIDTH),
    "square weight, turned by hand": using(lambda x, w: x @ w.T, WIDTH, WIDTH),
    "class token by expand": using(
        lambda x, w: torch.cat([w.expand(len(x), -1, -1), x], 1), 1, 1, WIDTH
    ),
    "class token by expand of fewer axes": using(
        lambda x, w: torch.cat([w.expand(len(x), 1, -1), x], 1), WIDTH
    ),
    "prompt by repeat": using(lambda x, w: torch.cat([w.repeat(len(x), 1, 1), x], 1), 2, WIDTH),
    "table added": using(lambda x, w: x + w, ROWS, WIDTH),
    "scalar": using(lambda x, w: x * w, 1),
    "attention bias (T, T)": using(table_attention, ROWS, ROWS),
    "attention bias (H, T, T)": using(
        lambda x, w: table_attention(x[:, None].expand(-1, 2, -1, -1), w[None]).sum(1),
        2,
        ROWS,
        ROWS,
    ),
    "einsum": using(lambda x, w: torch.einsum("btd,dhe->bthe", x, w).sum(2), WIDTH, 2, WIDTH),
    "bilinear": layers(linear, lambda: Twice(nn.Bilinear(WIDTH, WIDTH, WIDTH))),
    "written into": using(lambda x, w: functional.linear(x, w).div_(2).tanh_(), WIDTH, WIDTH),
    "windows": using(
        lambda x, w: functional.linear(x.reshape(-1, WIDTH), w).add(w.sum(0)).view_as(x),
        WIDTH,
        WIDTH,
    ),
}


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x.tanh())


def routed(monkeypatch, kept, cost):
    if kept is not None:
        monkeypatch.setattr(tape, "KEPT_ELEMENTS", kept)
        monkeypatch.setattr(tape, "INSTANTIATE_COST", cost)


def exact(specimen, engine):
    """Compares batches of several sizes, most of which the plan was not made on."""
    for records in (RECORDS, 8, 1):
        expected, sums = oracle(specimen, records), {}
        clip_norm = float(expected.norms.median())
        norms = engine.add_clipped(specimen.made(records), np.arange(records), clip_norm, sums)
        assert_exact(completed(sums, engine), norms, expected, [*range(records)], clip_norm)


def planned(specimen):
    """The engine that preflight gives, which must be the single backward."""
    verdict = preflight(specimen.model, specimen.made)
    assert verdict.engine is not None, verdict.refused
    assert verdict.engine.name is EngineName.single_backward, verdict.refused
    return verdict.engine


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's own, of a copy
@pytest.mark.parametrize("name", COVERED)
@pytest.mark.parametrize(("kept", "cost"), ROUTES)
def test_every_use_is_exact(name, kept, cost, monkeypatch):
    routed(monkeypatch, kept, cost)
    specimen = tuned(COVERED[name], "full")
    exact(specimen, planned(specimen))


@pytest.mark.parametrize("name", ["BERT", "Llama", "ViT", "Wav2Vec2"])
def test_a_frozen_lower_part_is_exact(name):
    """Records reach the first trained layer without needing a gradient."""
    specimen = tuned(LISTED[name], "full")
    parameters = list(specimen.model.parameters())
    for parameter in parameters[: len(parameters) // 2]:
        parameter.requires_grad_(requires_grad=False)
    exact(specimen, planned(specimen))


@pytest.mark.parametrize(("kept", "cost"), ROUTES)
def test_gradient_checkpointing_is_exact(kept, cost, monkeypatch):
    """Layers run again during the backward pass, and are filed once."""
    routed(monkeypatch, kept, cost)
    specimen, runs = tuned(LISTED["BERT"], "full"), []
    for layer in specimen.model.bert.encoder.layer:
        layer.forward = partial(_checkpointed, layer.forward, runs)
    engine = planned(specimen)
    runs.clear()
    sums = {}
    engine.add_clipped(specimen.made(2), np.arange(2), 1.0, sums)
    assert len(runs) == 4  # two layers, forward and again
    exact(specimen, engine)


def _checkpointed(forward, runs, *args, **kwargs):
    def counted(*args, **kwargs):
        runs.append(1)
        return forward(*args, **kwargs)

    return checkpoint(counted, *args, use_reentrant=False, **kwargs)


def halved(specimen, records):
    """The losses under bfloat16 autocast."""
    loss_of = specimen.made(records)

    def autocast(piece):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(piece).float()

    return autocast


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "ViT", "conv net"])
@pytest.mark.parametrize(("kept", "cost"), ROUTES)
def test_bfloat16_autocast_bounds_what_it_sums(name, kept, cost, monkeypatch):
    """Rounded gradients are other gradients, but the norm is that of the gradient that is summed.

    bfloat16 keeps 8 bits: each rounding errs by up to 2^-9, and a gradient passes through some
    dozens, so an error of 2^-9 * sqrt(100) = 2 % is rounding and one of order 1 is not.
    """
    routed(monkeypatch, kept, cost)
    specimen = tuned({**LISTED, **OTHERS}[name], "full")
    expected, loss_of = oracle(specimen, RECORDS), halved(specimen, RECORDS)
    engine = SingleBackward(specimen.model)
    clip_norm, everyone = float(expected.norms.min()) / 2, np.arange(RECORDS)
    whole = {}
    engine.add_clipped(loss_of, everyone, clip_norm, whole)
    wanted = expected.clipped_sum(range(RECORDS), clip_norm)
    assert distance(whole, wanted) <= 0.02 * length(wanted)
    for record in range(RECORDS):
        alone = (torch.arange(RECORDS) == record).float()
        sums = {}
        engine.add_clipped(
            lambda piece, alone=alone: loss_of(piece) * alone, everyone, clip_norm, sums
        )
        assert length(sums) == pytest.approx(clip_norm, rel=1e-4)


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "ViT", "conv net", "T5 eager"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(("kept", "cost"), ROUTES)
def test_a_record_that_is_not_finite_counts_as_zero(name, poison, kept, cost, monkeypatch):
    routed(monkeypatch, kept, cost)
    specimen = tuned({**LISTED, **OTHERS}[name], "full")
    expected, loss_of = oracle(specimen, RECORDS), specimen.made(RECORDS)
    clip_norm = float(expected.norms.median())

    def poisoned(piece):
        return loss_of(piece) * torch.where(torch.from_numpy(piece) == 2, poison, 1.0)

    engine, sums = SingleBackward(specimen.model), {}
    norms = engine.add_clipped(poisoned, np.arange(RECORDS), clip_norm, sums)
    assert torch.isfinite(norms).tolist() == [record != 2 for record in range(RECORDS)]
    others = [record for record in range(RECORDS) if record != 2]
    assert_exact(completed(sums, engine), norms[others], expected, others, clip_norm)


class Crossroads(nn.Module):
    """Takes one of two paths, by what a batch holds."""

    def __init__(self, *, more):
        super().__init__()
        self.left, self.right, self.more = linear(), linear(), more

    def forward(self, x):
        if self.more:
            return self.right(self.left(x)) if x.mean() < 10 else self.left(self.right(x))
        return self.right(self.left(x)) if x.mean() < 10 else self.right(x)


@pytest.mark.parametrize("more", [True, False])
def test_a_path_that_depends_on_records_is_refused(more):
    model = Crossroads(more=more)
    engine, x = SingleBackward(model), torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
    engine.add_clipped(lambda at: model(x[at]).sum(1), np.arange(4), 1.0, {})
    with pytest.raises(PrivacyRefusedError, match="path depends on its records"):
        engine.add_clipped(lambda at: model(x[at] + 20).sum(1), np.arange(4), 1.0, {})


def test_rows_that_do_not_fit_the_plan_are_refused():
    """Made records of one length hide that the model drops padding; real ones show it."""
    specimen = tuned(OTHERS["packed"], "full")
    engine, ids = SingleBackward(specimen.model), torch.arange(40).view(4, 10)
    mask = torch.ones_like(ids)

    def loss_of(piece):
        inputs = {"input_ids": ids, "attention_mask": mask, "label": torch.arange(4) % LABELS}
        return classified(specimen.model, {name: value[piece] for name, value in inputs.items()})

    engine.add_clipped(loss_of, np.arange(4), 1.0, {})
    mask[1, 7:] = 0
    with pytest.raises(PrivacyRefusedError, match=r"linear.weight.* in another way"):
        engine.add_clipped(loss_of, np.arange(4), 1.0, {})


class Past(torch.autograd.Function):
    """A product that torch's function mode does not see."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).sum(0)


def test_a_parameter_that_autograd_reaches_past_the_tape_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.hidden = linear(), nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            return Past.apply(self.linear(x), self.hidden)

    specimen = tuned(plain(Model, partial(floats, shape=(WIDTH,), name="x")), "full")
    with pytest.raises(UncoveredError, match="hidden: gradients went past"):
        SingleBackward(specimen.model).add_clipped(specimen.made(4), np.arange(4), 1.0, {})
    verdict = preflight(specimen.model, specimen.made)
    assert verdict.engine.name is EngineName.loop
    assert any("hidden" in reason for reason in verdict.refused)
    assert all(p.grad is None for p in specimen.model.parameters())


def test_a_trainable_parameter_that_no_loss_reaches_is_refused_by_name():
    """Noise alone would train it."""
    specimen = tuned(LISTED["BERT"], "full")
    specimen.model.register_parameter("idle", nn.Parameter(torch.zeros(3)))
    verdict = preflight(specimen.model, specimen.made)
    assert verdict.engine is None
    assert verdict.refused == (
        "idle: trainable, but no loss depends on it; noise alone would train it",
    )
    with pytest.raises(UncoveredError, match="idle: no gradient"):
        SingleBackward(specimen.model).add_clipped(specimen.made(4), np.arange(4), 1.0, {})


class Counting(Vectors):
    def __init__(self):
        super().__init__(1)
        self.register_buffer("seen", torch.zeros(()))

    def hidden(self, x):
        self.seen += len(x)
        return x * self.own


def test_a_buffer_that_training_changes_is_refused_by_name():
    specimen = tuned(plain(Counting, vectors, classified), "full")
    verdict = preflight(specimen.model, specimen.made)
    assert verdict.engine is None
    assert verdict.refused == (
        "seen: a buffer that training changes would be released without noise",
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_loss_for_all_records_is_refused(reduction):
    model = linear()
    x = torch.ones(4, WIDTH)
    with pytest.raises(PrivacyRefusedError, match="one loss per record is needed"):
        SingleBackward(model).add_clipped(
            lambda at: getattr(model(x[at]), reduction)(), np.arange(4), 1.0, {}
        )


@pytest.mark.parametrize("name", ["BERT", "nn.LSTM", "Mixtral", "LeViT"])
def test_preflight_leaves_a_model_as_it_was(name):
    """Whatever the verdict: parameters to the bit, buffers, hooks, and no gradient."""
    specimen = tuned({**LISTED, **OTHERS}[name], "full")
    model = specimen.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    preflight(model, specimen.made)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not any(hasattr(p, "grad_sample") or p.grad is not None for p in model.parameters())


def rows_apart(weight, x):
    """Two rows of one use, nearly the same, that count against each other."""
    y = functional.linear(x, weight)
    return y[:, 0] - y[:, 1]


def uses_apart(weight, x):
    """Two uses of one weight that count against each other."""
    return functional.linear(x[:, 0], weight) - functional.linear(x[:, 1], weight)


def lookups_apart(weight, x):
    """One row of a table looked up twice."""
    looked = functional.embedding(torch.zeros(len(x), 2, dtype=torch.long), weight)
    return (looked * x).sum(-1).diff()


@pytest.mark.parametrize("apart", [rows_apart, uses_apart, lookups_apart])
def test_parts_that_cancel_do_not_hide_a_gradient(apart):
    """A norm as a difference of Grams a million times its size would be mostly rounding."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(400, 300, bias=False)
    base, step = torch.randn(2, 1, 1, 400, generator=generator)
    x = torch.cat([base, base + 1e-3 * step], 1)

    def loss_of(piece):
        return apart(model.weight, x[piece]).sum(1)

    loop, single = {}, {}
    expected = Loop(model).add_clipped(loss_of, np.arange(1), 1e-2, loop)
    norms = SingleBackward(model).add_clipped(loss_of, np.arange(1), 1e-2, single)
    assert length(single) <= 1e-2 * (1 + 1e-4)
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=0)


class FirstRow(nn.Module):
    """Reads one row, as a classifier over a first token does, or all of them."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, LABELS)
        self.rows = slice(0, 1)

    def forward(self, x):
        return self.head(self.norm(self.inner(x).tanh())[:, self.rows].mean(1))


def filed_rows(monkeypatch):
    """The rows per record of every matrix that is filed from now on, by weight."""
    seen, file = {}, tape.Tape.file_matrix

    def spied(self, use):
        seen[use.weight] = use.g.shape[1]
        file(self, use)

    monkeypatch.setattr(tape.Tape, "file_matrix", spied)
    return seen


def test_rows_without_gradient_are_left_out(monkeypatch):
    specimen = tuned(plain(FirstRow, vectors), "full")
    engine, seen = planned(specimen), filed_rows(monkeypatch)
    exact(specimen, engine)
    assert seen[specimen.model.inner.weight] == 1
    assert {
        specimen.model.inner.weight,
        specimen.model.norm.weight,
    } <= engine.plan.habits.narrow.keys()


@pytest.mark.parametrize("rows", [slice(4, 5), slice(None), slice(1, 4)])
def test_rows_that_have_a_gradient_after_all_are_not(rows, monkeypatch):
    """The habit of made records is looked at again: a batch that breaks it is exact."""
    specimen = tuned(plain(FirstRow, vectors), "full")
    engine = planned(specimen)
    specimen.model.rows = rows
    seen = filed_rows(monkeypatch)
    exact(specimen, engine)
    assert seen[specimen.model.inner.weight] == ROWS


def test_a_gradient_that_is_not_a_number_is_not_taken_for_zero():
    use = torch.zeros(3, 8, 2)
    use[1, 5] = math.nan
    assert tape.Tape(3).live_rows(nn.Parameter(torch.zeros(2, 2)), use) == slice(5, 6)


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "ALBERT", "ViT"])
@pytest.mark.parametrize("shown", ["everything", "nothing"])
def test_no_result_rests_on_habits(name, shown, monkeypatch):
    """Tied and shared weights too: wrong habits cost time, and nothing else."""
    routed(monkeypatch, 0, math.inf)
    specimen = tuned(LISTED[name], "full")
    engine = planned(specimen)
    weights = frozenset(engine.parameters if shown == "everything" else ())
    narrow = dict.fromkeys(weights, slice(0, 1))
    engine.plan = replace(engine.plan, habits=tape.Habits(weights, narrow, weights))
    exact(specimen, engine)


def test_norms_are_taken_early_where_nothing_is_added_up(monkeypatch):
    routed(monkeypatch, 0, math.inf)
    specimen = tuned(LISTED["GPT-2"], "full")
    engine = planned(specimen)
    tied = specimen.model.transformer.wte.weight
    assert engine.plan.habits.alone
    assert tied not in engine.plan.habits.alone
