"""The accounted way to measure on private records: charged, noised, and released once."""

import math
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from scipy import stats

from client.app import client_app
from client.site import Site
from client.train import Trainer
from common import messages, parameters
from common.messages import Instruction
from common.parameters import Layout
from common.privacy.accounting import Event, epsilon_pld
from common.privacy.mechanism import (
    count_event,
    count_std,
    counting,
    noisy_count,
    run_events,
)
from common.privacy.noise import Randomness
from common.records import Records
from common.tasks import build_model

from .ledgers import ledger_of

SIGMA, COUNTED = 6.0, "run count"
CHARGE = Event(SIGMA, 1.0, 1)


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 1


@pytest.fixture(scope="module")
def config(tiny_config):
    privacy = replace(tiny_config.privacy, count_noise=SIGMA)
    return replace(tiny_config, privacy=privacy)


@pytest.fixture(scope="module")
def instruction(config):
    model = build_model(config)
    layout = Layout.of(model)
    return Instruction("run", 2, config, layout.digest, parameters.flatten(model))


def records_of(count=40):
    texts = [f"the goal match number {index}" for index in range(count)]
    return Records(tuple(texts), np.arange(count, dtype=np.int64) % 2)


def site_of(count=40, cap=100.0):
    return Site("site-1", records_of(count), ("sport", "money"), ledger_of(cap=cap))


def ask(site, instruction, kind="evaluate", **options):
    metadata = Metadata(1, "m-1", 1, 2, "", "1", 1.8e9, 3600.0, kind)
    message = Message(content=messages.pack_instruction(instruction), metadata=metadata)
    return client_app(lambda _: site, **options)(message, Context(1, 2, {}, RecordDict(), {}))


def test_a_count_is_charged_at_its_price_and_says_nothing_else(instruction):
    site = site_of()
    reply = ask(site, instruction)
    assert {*reply.content} == {"facts"}
    assert {*reply.content["facts"]} == messages.COUNT_FACTS
    count = messages.read_count(reply)
    books = site.ledger.books
    (reservation,) = books.reservations.values()
    assert (reservation.run, reservation.event, reservation.state) == (COUNTED, CHARGE, "released")
    assert count.books.head == books.head
    assert books.charges() == [Event(2.0, 0.5, 0), CHARGE]
    assert count.correct == round(count.correct)


def test_it_is_released_once_whatever_is_asked(instruction):
    site = site_of()
    first = messages.read_count(ask(site, instruction)).correct
    other = replace(instruction, vector=instruction.vector + 1, round=1)
    again = [messages.read_count(ask(site, each)).correct for each in (instruction, other)]
    assert again == [first, first]
    assert len(site.ledger.books.reservations) == 1


def test_it_counts_what_the_model_gets_right(config, instruction):
    trainer, site = Trainer(config), site_of()
    right = trainer.count_correct(site, instruction.vector)
    flipped = replace(site, records=Records(site.records.contents, 1 - site.records.labels))
    assert 0 < right < 40
    assert trainer.count_correct(flipped, instruction.vector) == 40 - right
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.app.noisy_count", lambda count, *_: float(count))
        assert messages.read_count(ask(site, instruction)).correct == right


def test_each_record_is_judged_where_no_other_can_change_a_bit(config, instruction, monkeypatch):
    """In a last batch of 15 instead of 16, sums round otherwise: a coordinator that makes all
    records near ties saw ten of 399 answers change with one record, not one.
    """
    trainer, site, seen = Trainer(config), site_of(), []
    plain = {"prepare": trainer._model.prepare, "forward": trainer._model.forward}

    def watched(name):
        def call(inputs=None, **more):
            shapes = {
                len(tensor) for tensor in (inputs or more).values() if hasattr(tensor, "shape")
            }
            seen.append((name, shapes))
            return plain[name](inputs, **more) if inputs is not None else plain[name](**more)

        return call

    monkeypatch.setattr(trainer._model, "prepare", watched("prepare"))
    monkeypatch.setattr(trainer._model, "forward", watched("forward"))
    trainer.count_correct(site, instruction.vector)
    assert seen.count(("prepare", {1})) == seen.count(("forward", {1})) == 40
    assert len(seen) == 80


def test_a_site_without_records_releases_noise(instruction):
    assert messages.read_count(ask(site_of(0), instruction)).correct == pytest.approx(0, abs=60)


def test_the_noise_is_the_gaussian_that_is_charged():
    drawn = [noisy_count(100, SIGMA, Randomness.from_entropy()) - 100 for _ in range(4000)]
    jittered = np.array(drawn) + np.random.default_rng(0).uniform(-0.5, 0.5, len(drawn))
    whole = math.sqrt(SIGMA**2 + 1 / 12)
    assert stats.kstest(jittered / whole, "norm").pvalue > 1e-6
    assert np.std(jittered) == pytest.approx(whole, rel=0.07)  # six deviations


def test_counting_is_part_of_the_plan_that_is_committed_first(instruction):
    """Both before any release: PLD may then price them as one."""
    site = site_of()
    assert ask(site, replace(instruction, round=1), kind="train").has_content()
    plans = site.ledger.books.plans
    assert {*plans} == {"run", counting("run")}
    assert [plan.admission for plan in plans.values()] == ["plan", "plan"]
    assert plans[COUNTED].whole == CHARGE
    assert ask(site, instruction).has_content()
    assert not site.ledger.books.filtered


def test_a_cap_that_allows_the_rounds_and_not_the_count_refuses_the_run(instruction, config):
    rounds, count = run_events(config)
    delta = 1e-3
    alone, both = epsilon_pld([rounds], delta), epsilon_pld([rounds, count], delta)
    site = site_of(cap=(alone + both) / 2)
    for kind in ("train", "evaluate"):
        assert ask(site, instruction, kind=kind).error.code == messages.BUDGET_EXHAUSTED
    assert site.ledger.head.seq == 1


def test_a_plan_without_a_count_is_not_counted(instruction, config):
    silent = replace(config, privacy=replace(config.privacy, count_noise=None))
    assert count_event(silent) is None
    site = site_of()
    reply = ask(site, replace(instruction, config=silent))
    assert reply.error.code == messages.INVALID_INSTRUCTION
    assert site.ledger.head.seq == 1


def test_a_failure_while_counting_keeps_the_charge(instruction, monkeypatch):
    site = site_of()

    def broken(*_):
        raise OSError("disk")

    monkeypatch.setattr(Trainer, "count_correct", broken)
    assert ask(site, instruction).error.code == messages.LOCAL_FAILURE
    monkeypatch.undo()
    assert ask(site, instruction).error.code == messages.NO_SPARE_ROUND
    assert [r.state for r in site.ledger.books.reservations.values()] == ["lost"]


# By person.


@pytest.fixture
def person_instruction(person_config, instruction):
    privacy = replace(person_config.privacy, count_noise=SIGMA)
    return replace(instruction, config=replace(person_config, privacy=privacy))


def person_site(each=10):
    held = replace(records_of(), persons=tuple(f"person {n // each}" for n in range(40)))
    return replace(site_of(), records=held, ledger=ledger_of(unit="person"))


def test_a_count_looks_at_no_more_records_of_a_person_than_are_allowed(person_instruction):
    """Four persons, three records each: one of them changes it by three at most."""
    vector, trainer = person_instruction.vector, Trainer(person_instruction.config)
    site = person_site()
    flipped = replace(site.records, labels=1 - site.records.labels)
    right = trainer.count_correct(site, vector)
    assert right + trainer.count_correct(replace(site, records=flipped), vector) == 12


def test_the_noise_of_a_count_covers_a_person_at_an_unchanged_price(config, person_instruction):
    by_person = person_instruction.config
    assert count_event(by_person) == count_event(config) == CHARGE
    assert (count_std(config), count_std(by_person)) == (SIGMA, 3 * SIGMA)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.app.noisy_count", lambda count, std, _: seen.append(std) or 0.0)
        site = person_site()
        assert ask(site, person_instruction).has_content()
    assert seen == [3 * SIGMA]
    plans = [entry for entry in site.ledger.entries() if entry.kind.value == "PLAN"]
    assert [plan.body["unit"] for plan in plans] == ["person", "person"]


def test_nothing_is_counted_at_no_noise(tiny_config):
    assert count_std(tiny_config) == 0
