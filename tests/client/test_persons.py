"""The person unit: a person's records are capped, enter a step together, and move it by k C."""

import copy
import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dp_accounting import dp_event
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st

from client import private_step
from client.clipping.engines import ENGINES, SingleBackward
from client.commitment import commit_to, secret_of
from client.meters import Meters
from client.persons import capped, usable
from client.private_step import ParameterGroup, private_steps, sgd
from client.site import Site
from client.train import Trainer
from common import parameters
from common.errors import ConfigError, PrivacyRefusedError
from common.model import read_of, targets_of
from common.pretrained import load_tokenizer
from common.privacy.accounting import epsilon_pld, solve_noise_multiplier
from common.privacy.mechanism import Mechanism, round_event
from common.privacy.noise import Randomness
from common.privacy.sampling import poisson_sample
from common.records import Records
from common.tasks import TASKS, build_model

from .ledgers import ledger_of

SECRET = "patient 4711"


def records_of_persons(rows):
    texts, labels, persons = zip(*rows, strict=True) if rows else ((), (), ())
    return Records(texts, np.array(labels, dtype=np.int64), persons)


def rows_of(records):
    return Counter(zip(records.contents, records.labels.tolist(), records.persons, strict=True))


rows = st.lists(
    st.tuples(
        st.sampled_from([f"text {n}" for n in range(25)]),
        st.integers(0, 2),
        st.sampled_from([f"person {n}" for n in range(5)]),
    ),
    max_size=40,
)
bounds = st.integers(1, 6)


# Capping.


@given(rows=rows, most=bounds)
def test_a_person_keeps_as_many_records_as_are_allowed_and_no_other_ones(rows, most):
    records = records_of_persons(rows)
    kept = capped(records, most)
    assert rows_of(kept) <= rows_of(records)
    before, after = Counter(records.persons), Counter(kept.persons)
    assert after == Counter({person: min(count, most) for person, count in before.items()})


@given(rows=rows, most=bounds)
def test_what_a_person_keeps_depends_on_nobody_else(rows, most):
    kept = rows_of(capped(records_of_persons(rows), most))
    alone = Counter()
    for person in {person for _, _, person in rows}:
        own = [row for row in rows if row[2] == person]
        alone += rows_of(capped(records_of_persons(own), most))
    assert kept == alone


@given(rows=rows, most=bounds, draw=st.randoms(use_true_random=False))
def test_the_order_of_a_file_changes_nothing_and_stays(rows, most, draw):
    other = draw.sample(rows, len(rows))
    kept, again = capped(records_of_persons(rows), most), capped(records_of_persons(other), most)
    assert rows_of(kept) == rows_of(again)
    remaining = iter(rows)
    assert all(
        row in remaining for row in zip(kept.contents, kept.labels, kept.persons, strict=True)
    )


def test_the_records_kept_are_those_of_the_smallest_hashes():
    texts = [f"letter {n}" for n in range(50)]
    kept = capped(records_of_persons([(text, 0, "anna") for text in texts]), 4)
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    assert set(kept.contents) == set(by_hash[:4])


def test_a_run_by_record_uses_all_records_as_they_are(tiny_config, person_config):
    records = records_of_persons([(f"text {n}", 0, "anna") for n in range(9)])
    assert usable(records, tiny_config.privacy) is records
    assert len(usable(records, person_config.privacy)) == 3


def test_persons_that_are_not_named_are_not_made_up(person_config):
    nameless = Records(("a",), np.zeros(1, dtype=np.int64))
    named = records_of_persons([("a", 0, SECRET)])
    unbounded = replace(person_config.privacy, max_records_per_person=None)
    for records, privacy in ((nameless, person_config.privacy), (named, unbounded)):
        with pytest.raises(ConfigError, match=r"^privacy=person: ") as refused:
            usable(records, privacy)
        assert SECRET not in str(refused.value)


# The private step, on a real model.

CLIP, MOST = 0.5, 3
TEXTS = ["goal match team", "bank shares", "the coach said score", "a loan", "trade", "cup cup"]
WORST = [1, 1, 1]
"""A person whose records all pull the same way: the bound is met."""
DATA = [[0, 2, 5], [3], [4, 0], WORST]
"""Records, by number of their text, of four persons."""


class Bench:
    """A tiny model, prepared texts, and what a step makes of persons who have some of them."""

    def __init__(self, config):
        self.model = build_model(config)
        with torch.no_grad():  # a zero head would give the adapters no gradient
            generator = torch.Generator().manual_seed(1)
            for parameter in self.trainable(self.model):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.task = TASKS[config.task.name]
        records = Records(tuple(TEXTS), np.arange(len(TEXTS)) % 2)
        encoded = self.task.encode(load_tokenizer(config.model), records, config.task)
        self.inputs = self.model.prepare(encoded)

    @staticmethod
    def trainable(model):
        return tuple(p for p in model.parameters() if p.requires_grad)

    def losses(self, model, persons, scale=1e4):
        """Losses so large that every gradient is clipped."""
        texts = np.array([text for person in persons for text in person], dtype=np.int64)

        def loss_of(indices):
            at = texts[indices]
            rows = {name: tensor[at] for name, tensor in self.inputs.items()}
            return scale * self.task.loss_vector(model(**read_of(rows)), targets_of(rows))

        return loss_of

    def step(
        self, persons, *, randomness=None, rate=1.0, most=MOST, batch=4, engine=SingleBackward
    ):
        """The change that one step of size 1 makes, as one vector."""
        model = copy.deepcopy(self.model)
        before = torch.cat([p.detach().flatten() for p in self.trainable(model)])
        owners = np.repeat(np.arange(len(persons)), [len(person) for person in persons])
        private_steps(
            engine(model),
            sgd([ParameterGroup(self.trainable(model), 1.0)]),
            self.losses(model, persons),
            mechanism=Mechanism(2.0, CLIP, rate, 1.0 / rate, most),
            randomness=randomness or Randomness.from_entropy(),
            records=len(owners),
            owners=owners,
            steps=1,
            physical_batch=batch,
        )
        return torch.cat([p.detach().flatten() for p in self.trainable(model)]) - before

    def clipped(self, persons):
        """The sum of the clipped gradients of all records of some persons."""
        model, texts = copy.deepcopy(self.model), [text for person in persons for text in person]
        engine, loss_of = SingleBackward(model), self.losses(model, persons)
        sums = private_step._clipped_sums(engine, loss_of, np.arange(len(texts)), CLIP, 4)
        return torch.cat([sums[p].flatten() for p in self.trainable(model)])


@pytest.fixture(scope="module")
def bench(tiny_config):
    return Bench(tiny_config)


@pytest.mark.parametrize("gone", range(len(DATA)))
def test_data_without_one_person_move_the_sum_by_at_most_k_clip_norms(bench, gone):
    without = [person for number, person in enumerate(DATA) if number != gone]
    distance = float((bench.clipped(DATA) - bench.clipped(without)).norm())
    assert 0 < distance <= MOST * CLIP * (1 + 1e-4)


def test_the_bound_of_a_person_is_met(bench):
    """k records that pull one way: less noise than for k C would be too little."""
    moved = float((bench.clipped(DATA) - bench.clipped(DATA[:-1])).norm())
    assert moved == pytest.approx(MOST * CLIP, rel=1e-3)
    assert moved > (MOST - 0.1) * CLIP


def test_a_persons_price_is_no_bound_for_one_record_of_them(bench):
    """With k = 1 the record that goes brings another one in: up to 2 C, not C. Why a ledger whose
    unit is the record takes no run by person (decision 0010).
    """
    pull, against = bench.clipped([[1]]), bench.clipped([[0]])
    assert max(float(pull.norm()), float(against.norm())) <= CLIP * (1 + 1e-4)
    assert float((pull - against).norm()) > 1.5 * CLIP


@pytest.mark.parametrize("label", range(12))
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_step_draws_persons_with_all_records_and_adds_noise_for_k(bench, label, batch):
    """All of it at once, against a replayed stream, and wherever pieces cut a person's records."""
    stream = Randomness.seeded("step", str(label))
    drawn = poisson_sample(len(DATA), sample_rate=0.25, coins=stream)
    expected = bench.clipped([DATA[person] for person in drawn])
    noise = torch.from_numpy(stream.normal(len(expected), 2.0 * MOST * CLIP)).float()
    change = bench.step(
        DATA, randomness=Randomness.seeded("step", str(label)), rate=0.25, batch=batch
    )
    torch.testing.assert_close(change, -(expected + noise), rtol=1e-4, atol=1e-5)


def test_the_replayed_steps_cover_nobody_and_somebody():
    sizes = {
        len(poisson_sample(4, sample_rate=0.25, coins=Randomness.seeded("step", str(label))))
        for label in range(12)
    }
    assert {0, 1} < sizes


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.__name__)
def test_nobody_is_a_step_like_any(bench, engine):
    assert torch.isfinite(bench.step([], engine=engine)).all()


REFUSED = "person-cap: the records are not capped as the mechanism declares"


@pytest.mark.parametrize(
    "persons", [[[0, 1, 2, 3]], [[0], [1, 2, 3, 4]], [[0] * 50]], ids=["four", "beside", "fifty"]
)
def test_a_person_of_more_records_than_declared_is_refused_and_not_counted(bench, persons):
    with pytest.raises(PrivacyRefusedError) as refused:
        bench.step(persons)
    assert str(refused.value) == REFUSED


def steps_on(owners, records, most):
    model = torch.nn.Linear(2, 2)
    return private_steps(
        SingleBackward(model),
        sgd([ParameterGroup(tuple(model.parameters()), 1.0)]),
        lambda at: model(torch.ones(len(at), 2)).sum(1),
        mechanism=Mechanism(1.0, 1.0, 1.0, 1, most),
        randomness=Randomness.from_entropy(),
        records=records,
        steps=1,
        physical_batch=4,
        owners=owners,
    )


@pytest.mark.parametrize(
    ("owners", "records", "most"),
    [(None, 4, 2), (None, 4, 1), ([0, 0, 1, 1], 4, None), ([0, 0, 1], 4, 2), ([], 1, 2)],
    ids=["nobody named", "nobody named, k of one", "no bound", "one of nobody", "all of nobody"],
)
def test_persons_and_their_bound_come_together(owners, records, most):
    """Records drawn one by one at a person's price would be charged too little."""
    owners = None if owners is None else np.array(owners, dtype=np.int64)
    with pytest.raises(PrivacyRefusedError, match=r"^person-cap: "):
        steps_on(owners, records, most)


def test_a_sum_longer_than_its_persons_allow_alarms():
    """Two records each within the clip bound, of one person who is bounded as one record."""
    meters = Meters(Mechanism(1.0, 0.5, 0.5, 10, 2))
    total = {torch.nn.Parameter(torch.zeros(1)): torch.tensor([1.0])}
    meters.check_sum(total, records=2, units=1)
    with pytest.raises(PrivacyRefusedError, match=r"^clip-bound: "):
        meters.check_sum(total, records=3, units=0)
    with pytest.raises(PrivacyRefusedError, match=r"^clip-bound: "):
        meters.check_sum(total, records=1, units=1)


# The trainer.


def site_of(rows):
    return Site("site-1", records_of_persons(rows), ("sport", "money"), ledger_of(unit="person"))


def test_the_site_caps_whatever_it_was_dealt(person_config, monkeypatch):
    """Not only a simulation: beyond k records of a person none is even tokenised."""
    read = []
    rows = [(f"goal number {n}", n % 2, f"person {n % 4}") for n in range(40)]
    trainer, site = Trainer(person_config), site_of(rows)
    encode = trainer._task.encode

    def spying(tokenizer, records, task):
        read.append(list(records.contents))
        return encode(tokenizer, records, task)

    monkeypatch.setattr(trainer._task, "encode", spying)
    trainer.train(site, parameters.flatten(trainer._model), round_number=1)
    kept = capped(site.records, 3)
    assert len(kept) == 12
    assert list(kept.contents) in read
    assert not any(
        text in texts for texts in read for text in set(site.records.contents) - {*kept.contents}
    )


def test_the_sampler_is_judged_by_persons(person_config):
    """A hundred rounds of 40 persons, whose records number 3 or 1: no alarm at sound coins."""
    config = replace(
        person_config,
        federation=replace(person_config.federation, rounds=100, local_steps=1),
    )
    rows = [
        (f"goal {person} {n}", n % 2, f"person {person}")
        for person in range(40)
        for n in range(3 if person % 2 else 1)
    ]
    trainer, site = Trainer(config), site_of(rows)
    vector = parameters.flatten(trainer._model)
    for number in range(1, 101):
        _, measured = trainer.train(site, vector, round_number=number)
    assert measured.steps == 100
    assert abs(measured.coin_deviation) < 6


def test_what_is_charged_is_what_account_prices(person_config, coterie, tmp_path):
    """The event of a run by person is (sigma, q, steps), whatever k; sigma is solved from it."""
    config = person_config.privacy
    steps = person_config.total_steps
    sigma = solve_noise_multiplier(config.epsilon, config.delta, config.sample_rate, steps)
    event = round_event(replace(person_config, privacy=replace(config, noise_multiplier=sigma)))
    priced = tmp_path / "events.json"
    priced.write_text(
        f'[{{"noise_multiplier": {sigma}, "sample_rate": {config.sample_rate}, "steps": {steps}}}]'
    )
    answer = coterie("account", priced, "--delta", config.delta, "--json").json
    whole = replace(event, steps=steps)
    assert answer["epsilon"]["pld"] == pytest.approx(epsilon_pld([whole], config.delta), abs=1e-6)
    assert 0.98 * config.epsilon < answer["epsilon"]["pld"] <= config.epsilon


@pytest.mark.parametrize(("rate", "steps"), [(0.5, 20), (0.02, 200)])
def test_a_persons_price_is_that_of_the_mixture_they_make(rate, steps):
    """By another road: N(0) against (1 - q) N(0) + q N(k C), in parameter units."""
    mechanism = Mechanism(1.5, 0.25, rate, 100, 4)
    pair = dp_event.MixtureOfGaussiansDpEvent(
        mechanism.noise_std, [0.0, 4 * mechanism.clip_norm], [1 - rate, rate]
    )
    accountant = PLDAccountant()
    accountant.compose(pair, steps)
    ours = epsilon_pld([mechanism.event(steps)], 1e-4)
    assert ours == pytest.approx(accountant.get_epsilon(1e-4), rel=2e-3)


# The commitment.

SECRET_BYTES = secret_of(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


def root_of(records):
    return commit_to(records, SECRET_BYTES).root


def test_the_commitment_changes_with_whose_a_record_is():
    rows = [("a", 0, "anna"), ("b", 1, "anna"), ("c", 0, "bert")]
    moved = [("a", 0, "anna"), ("b", 1, "bert"), ("c", 0, "bert")]
    named = records_of_persons(rows)
    roots = {
        root_of(records)
        for records in (named, records_of_persons(moved), Records(named.contents, named.labels))
    }
    assert len(roots) == 3
    assert root_of(records_of_persons(rows[::-1])) in roots


def test_the_commitment_of_records_of_nobody_is_as_it_was():
    """Computed once, before persons were in it."""
    records = Records(("a", "b", "c"), np.array([0, 1, 0], dtype=np.int64))
    assert root_of(records) == "8128cca3795737668e36cb7571f9656658c503c493e183b207ed3b825afa33fd"


def test_ledgers_of_persons_overlap_in_a_person_and_those_of_records_in_a_text_of_one():
    anna, bert = records_of_persons([("a", 0, "anna")]), records_of_persons([("a", 0, "bert")])
    other = records_of_persons([("b", 0, "anna")])

    def overlap(one, two, unit):
        first, second = (commit_to(each, SECRET_BYTES, unit=unit).tags for each in (one, two))
        return bool(first & second)

    assert not overlap(anna, bert, "record")  # two persons may have written the same
    assert not overlap(anna, bert, "person")
    assert overlap(anna, other, "person")  # at two sites
    assert not overlap(anna, other, "record")
    assert overlap(anna, anna, "record")
