"""Several sites at once give what each gives alone, and keep nothing of one in another."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from client import agreement
from client.agreement import Trial, fillers_of, sites_together, stacked_engine
from client.clipping.engines import FILLER, Loop, completed
from client.clipping.stacked import LinearLayers, WholeGradients, _Losses
from client.measurements import Measurements
from client.site import Site
from client.train import Trainer
from common import parameters, prepared
from common.config import NoiseSource, PrivacyMode, TaskName
from common.records import Records
from common.tasks import TASKS, build_model

WORDS = ("goal", "match", "team", "coach", "bank", "shares", "market", "loan")
SIZES = (30, 0, 1, 70, 14, 30)
"""Records of six sites: none, one, and more than a pass has rows."""
CLIP = 0.7


def site_of(number, records):
    texts = tuple(
        f"the {WORDS[i % 8]} {WORDS[(i + number) // 8 % 8]} today" for i in range(records)
    )
    patients = tuple(f"patient {i // 4}" for i in range(records))
    held = Records(texts, np.arange(records) % 2, patients)
    return Site(f"site-{number}", held, ("sport", "money"), None)


SITES = [site_of(number, records) for number, records in enumerate(SIZES)]


def settings_of(compose_config, overrides, *more):
    kept = [o for o in overrides if not o.startswith(("federation.sites", "federation.local"))]
    return compose_config(
        *kept,
        "privacy.noise_multiplier=1",
        "privacy.noise=seeded",
        "federation.sites=6",
        "federation.local_steps=3",
        "data.declared_records=180",
        *more,
    )


IMAGES = ["task=image_classification", "data=digits", "model.name=made/vit-digits"]
WAYS = {
    "head": (False, ["tuning=head"], LinearLayers),
    "head of images": (True, ["tuning=head"], LinearLayers),
    "lora": (True, ["tuning=lora"], LinearLayers),
    "bitfit": (True, ["tuning=bitfit"], WholeGradients),
    "plain": (False, ["tuning=head", "privacy=none"], LinearLayers),
    "plain, whole": (True, ["tuning=full", "privacy=none"], WholeGradients),
}


@pytest.fixture(params=WAYS)
def way(request, compose_config, tiny_overrides):
    images, more, engine = WAYS[request.param]
    kept = [o for o in tiny_overrides if not o.startswith(("data", "model", "task"))]
    overrides = [*IMAGES, *kept] if images else tiny_overrides
    return settings_of(compose_config, overrides, *more), engine


def sites_of(config):
    """The same six sites, with what the task reads."""
    if config.task.name is TaskName.text_classification:
        return SITES
    toys, ends = TASKS[config.task.name].toy_examples(sum(SIZES)), np.cumsum(SIZES)
    return [
        Site(f"site-{n}", toys.subset(range(ends[n] - size, ends[n])), (), None)
        for n, size in enumerate(SIZES)
    ]


@pytest.fixture(scope="module")
def head(compose_config, tiny_overrides):
    """A trainer of the head alone, and where it starts."""
    trainer = Trainer(settings_of(compose_config, tiny_overrides, "tuning=head"))
    return trainer, parameters.flatten(trainer._model)


def together(config, sites, vector, *, round_number=1, trainer=None):
    """By a trainer without a past: its meters are new."""
    fresh = trainer or Trainer(config)
    assert fresh.together > 1
    return fresh.train_together(sites, vector, round_number=round_number)


def assert_same(alone, beside, start):
    """To a millionth of how far the site went."""
    for (vector, measured), found in zip(alone, beside, strict=True):
        assert not isinstance(found, Exception), found
        assert np.abs(vector - found[0]).max() <= 1e-6 * max(1.0, np.abs(vector - start).max())
        if measured is None:
            assert found[1] is None
        else:
            assert isinstance(found[1], Measurements)
            assert found[1].round_steps == measured.round_steps == 3
            assert found[1].noise_ratio == pytest.approx(measured.noise_ratio, abs=1e-4)


def test_sites_get_what_the_loop_gives_them(way):
    config, engine = way
    trainer = Trainer(config)
    start = parameters.flatten(trainer._model)
    sites = sites_of(config)
    alone = [trainer.train(site, start, round_number=1) for site in sites]
    fresh = Trainer(config)
    beside = together(config, sites, start, trainer=fresh)
    assert type(fresh._stack.engine) is engine
    assert_same(alone, beside, start)


@pytest.mark.parametrize("privacy", ["record", "none"])
def test_rows_of_all_records_are_read_where_they_lie_and_stay_as_they_are(
    compose_config, tiny_overrides, privacy, monkeypatch
):
    monkeypatch.setattr(prepared, "_SHELVES", {})
    more = ["tuning=head", "privacy.sample_rate=1", f"privacy={privacy}"]
    config = settings_of(compose_config, tiny_overrides, *more)
    trainer = Trainer(config)
    start = parameters.flatten(trainer._model)
    alone = [trainer.train(site, start, round_number=1) for site in SITES]
    held, everything = trainer._held["site-0"].prepared, np.arange(SIZES[0])
    before, lent = held.rows(everything), held.lent(everything)
    again = held.lent(everything)
    assert all(lent[name].data_ptr() == again[name].data_ptr() for name in before)
    assert_same(alone, together(config, SITES, start), start)
    assert_same(alone, together(config, SITES, start), start)
    assert all(torch.equal(lent[name], tensor) for name, tensor in before.items())


def test_persons_are_drawn_together_as_in_the_loop(compose_config, person_overrides):
    config = settings_of(compose_config, person_overrides, "tuning=head")
    trainer = Trainer(config)
    start = parameters.flatten(trainer._model)
    alone = [trainer.train(site, start, round_number=1) for site in SITES]
    assert_same(alone, together(config, SITES, start), start)


def test_a_second_round_goes_on_where_the_meters_were(head):
    trainer, start = head
    first = trainer.train_together(SITES, start, round_number=1)
    later = trainer.train_together(SITES, first[0][0], round_number=2)
    assert all(measured.steps >= 6 for _, measured in later)


@settings(max_examples=25)
@given(st.permutations(range(len(SITES))), st.lists(st.booleans(), min_size=6, max_size=6))
def test_a_site_is_the_same_to_the_bit_in_any_company(head_bits, order, cuts):
    """However the sites are divided among calls, as workers divide them."""
    trainer, start, expected = head_bits
    groups: list[list[int]] = [[]]
    for number, cut in zip(order, cuts, strict=True):
        groups[-1].append(number)
        if cut:
            groups.append([])
    for group in filter(None, groups):
        trainer._meters.clear()
        found = trainer.train_together([SITES[n] for n in group], start, round_number=1)
        for number, (vector, _) in zip(group, found, strict=True):
            assert vector.tobytes() == expected[number]


@pytest.fixture(scope="module")
def head_bits(head):
    trainer, start = head
    found = trainer.train_together(SITES, start, round_number=1)
    return trainer, start, [vector.tobytes() for vector, _ in found]


def test_a_site_that_fails_stops_alone(head):
    trainer, start = head
    trainer._meters.clear()
    expected = trainer.train_together(SITES, start, round_number=7)
    trainer._meters.clear()
    broken = replace(SITES[2], name="broken", records=Records((object(),), np.zeros(1, int)))
    sites = [*SITES[:2], broken, *SITES[3:]]
    found = trainer.train_together(sites, start, round_number=7)
    assert isinstance(found[2], Exception)
    for place in (0, 1, 3, 4, 5):
        assert np.array_equal(found[place][0], expected[place][0])


def test_a_meter_that_alarms_stops_its_site_alone(head, monkeypatch):
    trainer, start = head
    trainer._meters.clear()
    trainer.train_together(SITES, start, round_number=1)
    (meters,) = (each for (name, _), each in trainer._meters.items() if name == "site-3")
    monkeypatch.setattr(meters.noise, "_noise_std", 1e-3)
    found = trainer.train_together(SITES, start, round_number=2)
    assert [isinstance(each, Exception) for each in found] == [n == 3 for n in range(6)]
    assert str(found[3]).startswith("noise-scale:")
    trainer._meters.clear()


# The engines, on a model whose records and parameters are chosen.


class Layers(nn.Module):
    """Two linear layers; with `scale`, something else that is trained, too."""

    def __init__(self, *, scale=False):
        super().__init__()
        self.below, self.above = nn.Linear(5, 7), nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(7)) if scale else None

    def forward(self, rows):
        hidden = self.below(rows).tanh()
        return self.above(hidden if self.scale is None else hidden * self.scale)


SLOTS, ROWS, RECORDS = 5, 16, 11


def bench(*, scale=False, seed=0):
    """A model, its losses, and records that lie in a table."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Layers(scale=scale)
        table = {"x": torch.randn(RECORDS, 5), "target_y": torch.arange(RECORDS) % 3}

    def losses(rows):
        return functional.cross_entropy(model(rows["x"]), rows["target_y"], reduction="none")

    return model, losses, table


def trial_of(model, losses, table, alone=None):
    return Trial(model, losses, table, fillers_of(table, ROWS), alone or Loop(model))


def engine_of(model, losses, table):
    engine = stacked_engine(trial_of(model, losses, table), sites=SLOTS)
    assert engine is not None
    assert (engine.slots, engine.rows) == (SLOTS, ROWS)
    return engine


def passed(engine, trial, parameters, drawn, clip_norm=CLIP):
    """One pass over lists of records, a slot each."""
    at = np.full((SLOTS, ROWS), FILLER)
    for slot, records in enumerate(drawn):
        at[slot, : len(records)] = records
    with torch.no_grad():
        return engine.clipped(
            parameters, trial.passed(at), torch.from_numpy(at != FILLER), clip_norm
        )


def stacked(engine, seed=0, decades=0.0):
    """Parameters of each slot, of any size between one and ten to the power of `decades`."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(engine.sizes)
    spread = 10 ** (torch.rand(SLOTS, 1, generator=generator) * decades)
    return torch.randn(SLOTS, size, generator=generator) * spread


DRAWN = [[0, 1, 2], [], [3], list(range(RECORDS)), [5, 5, 6]]


@pytest.mark.parametrize("scale", [False, True], ids=["linear layers", "whole gradients"])
def test_each_slot_has_the_sum_of_the_loop(scale):
    model, losses, table = bench(scale=scale)
    engine, trial = engine_of(model, losses, table), trial_of(model, losses, table)
    assert type(engine) is (WholeGradients if scale else LinearLayers)
    at = stacked(engine)
    sums, norms = passed(engine, trial, at, DRAWN)
    loop = Loop(model)
    for slot, records in enumerate(DRAWN):
        load(engine, at[slot])
        held = {}
        expected = (
            loop.add_clipped(
                lambda i: losses({n: t[i] for n, t in table.items()}), np.array(records), CLIP, held
            )
            if records
            else torch.zeros(0)
        )
        whole = torch.cat([each.flatten() for each in completed(held, loop).values()])
        torch.testing.assert_close(sums[slot], whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norms[slot, : len(records)], expected, rtol=1e-5, atol=1e-7)
    assert float(norms[3, :RECORDS].max()) > CLIP  # some are clipped


def load(engine, flat):
    with torch.no_grad():
        parts = torch.split(flat, engine.sizes)
        for parameter, part in zip(engine.parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))


@pytest.mark.parametrize("scale", [False, True], ids=["linear layers", "whole gradients"])
@pytest.mark.parametrize("decades", [0.0, 4.0], ids=["ordinary", "hostile"])
def test_a_record_moves_its_slot_by_the_clip_bound_and_no_other_slot_at_all(scale, decades):
    model, losses, table = bench(scale=scale)
    engine, trial = engine_of(model, losses, table), trial_of(model, losses, table)
    at = stacked(engine, decades=decades)
    whole, norms = passed(engine, trial, at, DRAWN)
    moved = []
    for left_out in range(RECORDS):
        fewer = [*DRAWN]
        fewer[3] = [record for record in DRAWN[3] if record != left_out]
        sums, others = passed(engine, trial, at, fewer)
        moved.append(float((whole[3].double() - sums[3].double()).norm()))
        for slot in (0, 1, 2, 4):
            assert torch.equal(whole[slot], sums[slot])
        kept = norms[3, :RECORDS][torch.arange(RECORDS) != left_out]
        assert torch.equal(others[3, : RECORDS - 1], kept)
    assert 0 < max(moved) <= CLIP * (1 + 1e-4)


@pytest.mark.parametrize("scale", [False, True], ids=["linear layers", "whole gradients"])
@pytest.mark.parametrize("worth", [math.nan, math.inf])
def test_what_is_not_finite_adds_nothing_and_spoils_no_other(scale, worth):
    model, losses, table = bench(scale=scale)
    engine, at = engine_of(model, losses, table), None
    at = stacked(engine)
    expected, _ = passed(engine, trial_of(model, losses, table), at, [[1, 2], [3], [], [], []])
    table["x"][0] = worth
    trial = trial_of(model, losses, table)
    found, _ = passed(engine, trial, at, [[0, 1, 2], [3], [0], [], []])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(found[2], torch.zeros_like(found[2]))


def test_whoever_is_nobody_adds_exactly_nothing():
    model, losses, table = bench()
    engine, trial = engine_of(model, losses, table), trial_of(model, losses, table)
    sums, _ = passed(engine, trial, stacked(engine), [[], [], [], [], []])
    assert not sums.any()


def test_layers_whose_records_mix_are_not_taken_for_such():
    """Each record by itself is another matter: so the loop sees it, too."""
    model, _, table = bench()

    def losses(rows):
        logits = model(rows["x"] - rows["x"].mean(0))
        return functional.cross_entropy(logits, rows["target_y"], reduction="none")

    engine = stacked_engine(trial_of(model, losses, table), sites=SLOTS)
    assert type(engine) is WholeGradients


def test_a_layer_that_is_used_twice_is_no_linear_layer():
    model, _, table = bench()

    def losses(rows):
        logits = model.above(model.below(rows["x"]) + model.below(2 * rows["x"]))
        return functional.cross_entropy(logits, rows["target_y"], reduction="none")

    engine = stacked_engine(trial_of(model, losses, table), sites=SLOTS)
    assert type(engine) is WholeGradients


@pytest.mark.parametrize("fault", ["sum", "norm", "place"])
def test_an_engine_that_is_not_exact_is_not_used(monkeypatch, fault):
    model, losses, table = bench()
    for kind in (LinearLayers, WholeGradients):
        original = kind.clipped

        def broken(self, *arguments, original=original):
            sums, norms = original(self, *arguments)
            if fault == "sum":
                sums = sums * (1 + 1e-4)
            if fault == "norm":
                norms = norms * (1 + 1e-4)
            if fault == "place":  # the last bit of one slot depends on the slot
                norms[0] = torch.nextafter(norms[0], torch.tensor(math.inf))
            return sums, norms

        monkeypatch.setattr(kind, "clipped", broken)
    assert stacked_engine(trial_of(model, losses, table), sites=SLOTS) is None


def test_work_enough_for_one_site_is_left_to_the_loop(monkeypatch, head, tiny_config):
    monkeypatch.setattr(agreement, "LIGHT", 1.0)
    assert Trainer(head[0]._config).together == 1
    assert sites_together(head[0]._config, build_model(tiny_config)) == 1


def test_a_pull_leads_back_to_where_the_round_began(head):
    """FedProx: a step ends at 1 / (1 + lr mu) of the way, noise and all."""
    trainer, start = head
    free, mu = trainer._stack, 0.5
    trainer._meters.clear()
    once = replace(trainer._config.federation, local_steps=1)
    alone = Trainer(replace(trainer._config, federation=once))
    (there, _), *_ = alone.train_together(SITES, start, round_number=1)
    alone._stacks[:] = [replace(alone._stack, proximal_mu=mu)]
    alone._meters.clear()
    (pulled, _), *_ = alone.train_together(SITES, start, round_number=1)
    rates = free.rates.numpy()
    np.testing.assert_allclose(pulled - start, (there - start) / (1 + rates * mu), atol=1e-6)


def test_how_many_go_together_follows_from_the_configuration(head):
    trainer, _ = head
    config = trainer._config
    assert trainer.together == 6 == sites_together(config, build_model(config))
    for together, expected in ((1, 1), (4, 4), (100, 6)):
        asked = replace(config, engine=replace(config.engine, together=together))
        assert Trainer(asked).together == expected == sites_together(asked, build_model(asked))
    alone = replace(config, federation=replace(config.federation, sites=1))
    assert Trainer(alone).together == 1


def test_without_a_guarantee_the_meters_are_silent(head):
    config = head[0]._config
    plain = replace(config, privacy=replace(config.privacy, mode=PrivacyMode.none))
    assert all(measured is None for _, measured in together(plain, SITES, head[1]))


def test_noise_from_entropy_differs_from_site_to_site_and_time_to_time(head):
    config = head[0]._config
    config = replace(config, privacy=replace(config.privacy, noise=NoiseSource.entropy))
    empty = [replace(SITES[1], name=f"empty-{n}") for n in range(3)]
    trainer = Trainer(config)
    vectors = [
        vector.tobytes()
        for number in (1, 1)
        for vector, _ in trainer.train_together(empty, head[1], round_number=number)
    ]
    assert len(set(vectors)) == 6


def test_a_trial_leaves_a_model_whose_encoder_hangs_in_two_places_as_it_was():
    """As that of a native head does: torch's own way with tied weights leaves a stranger there."""
    inner = torch.nn.Linear(4, 3)
    outer = torch.nn.Module()
    outer.inner, outer.body = inner, torch.nn.Sequential(inner)
    rows = {"x": torch.ones(2, 4)}
    losses = _Losses(outer, lambda given: outer.body(given["x"]).sum(1))
    names = {name: p for name, p in losses.named_parameters() if p.requires_grad}
    before = list(outer.parameters())
    other = {name: torch.zeros_like(p) for name, p in names.items()}
    assert torch.equal(losses.under(other, rows), torch.zeros(2))
    assert [id(p) for p in outer.parameters()] == [id(p) for p in before]
    assert inner.weight is before[0]
