"""The border of a site: what is answered, what is refused, what is charged, and what leaves."""

import contextlib
import hashlib
import json
import logging
import threading
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from client.app import _coded, client_app
from client.ledger import Ledger, Store
from client.meters import NoiseMeter
from client.site import Site
from common import messages, parameters
from common.canonical import canonical_json, digest
from common.coding import coded_bytes, decoded
from common.config import Coding, NodeConfig, NoiseSource, PrivacyMode, config_hash, to_canonical
from common.errors import ConfigError, FederationError, PrivacyRefusedError
from common.frames import header_of
from common.messages import Instruction
from common.parameters import Layout
from common.privacy.accounting import epsilon_pld
from common.privacy.chain import Receipt, continued
from common.privacy.mechanism import round_event
from common.privacy.watched import watched
from common.records import Records
from common.tasks import build_model

from .ledgers import charges_of, ledger_of

RECORD = "patient 4711 scored a goal"
"""A private text that must never leave."""
CLASSES = ("sport", "money")
COORDINATOR, SITE = 1, 2
INVALID = (messages.INVALID_INSTRUCTION, "invalid instruction")
EXHAUSTED = (messages.BUDGET_EXHAUSTED, "budget exhausted")
BEHIND = (messages.BOOKS_BEHIND, messages.REFUSALS[messages.BOOKS_BEHIND])
NO_SPARE = (messages.NO_SPARE_ROUND, messages.REFUSALS[messages.NO_SPARE_ROUND])
FAILED = (messages.LOCAL_FAILURE, "local failure")


@pytest.fixture(autouse=True)
def _identity():
    """As `simulations/grid.py` does: Flower's Message reads its sender from here."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SITE, 1


@pytest.fixture(scope="module")
def start(tiny_config):
    """The layout and the initial parameters that both sides share."""
    model = build_model(tiny_config)
    return Layout.of(model), parameters.flatten(model)


@pytest.fixture
def instruction(tiny_config, start):
    layout, vector = start
    return Instruction("run", 1, tiny_config, layout.digest, vector)


def some_records(count=12):
    texts = [f"the goal match number {index}" for index in range(count)]
    return Records(tuple(texts), np.arange(count, dtype=np.int64) % 2)


def site_of(records=None, *, cap=100.0):
    held = some_records() if records is None else records
    return Site("site-1", held, CLASSES, ledger_of(cap=cap))


def app_of(site, **options):
    return client_app(lambda _: site, **options)


def send(app, content, *, ttl=3600.0, created_at=None):
    """One train message over the real ClientApp; returns the reply."""
    TaskIdentity.node_id = COORDINATOR
    outgoing = Message(content, SITE, "train", ttl=ttl).metadata
    metadata = Metadata(
        run_id=1,
        message_id="m-1",
        src_node_id=COORDINATOR,
        dst_node_id=SITE,
        reply_to_message_id="",
        group_id="1",
        created_at=outgoing.created_at if created_at is None else created_at,
        ttl=ttl,
        message_type="train",
    )
    TaskIdentity.node_id = SITE
    context = Context(1, SITE, {"partition-id": 0}, RecordDict(), {})
    return app(Message(content=content, metadata=metadata), context)


def ask(app, instruction):
    return send(app, messages.pack_instruction(instruction))


def sent_vector(app, instruction):
    return ask(app, instruction).content["vector"]["vector"].data


def refusal(reply):
    assert reply.has_error()
    assert not reply.has_content()
    return reply.error.code, reply.error.reason


def wire(reply):
    return message_to_proto(reply).SerializeToString()


def with_facts(instruction, **changes):
    """The content of an instruction with some facts replaced; None takes one away."""
    content = messages.pack_instruction(instruction)
    facts = dict(content.config_records["facts"])
    for name, value in changes.items():
        facts[name.replace("_", "-")] = value
    kept = {name: value for name, value in facts.items() if value is not None}
    return RecordDict({"vector": content["vector"], "facts": ConfigRecord(kept)})


def with_arrays(instruction, arrays):
    content = messages.pack_instruction(instruction)
    return RecordDict({"vector": arrays, "facts": content["facts"]})


def with_config_values(instruction, **changes):
    """A config no honest coordinator can compose, with a hash that matches it."""
    values = {**plain_values(instruction.config), **changes}
    return with_facts(instruction, config=canonical_json(values), config_hash=hash_of(values))


def plain_values(config):
    return json.loads(to_canonical(config))


def hash_of(values):
    return digest({name: value for name, value in values.items() if name != "run_dir"})


def changed(instruction, section, **changes):
    config = instruction.config
    return replace(
        instruction,
        config=replace(config, **{section: replace(getattr(config, section), **changes)}),
    )


def test_valid_instruction_is_answered_with_an_update(instruction, start):
    layout, vector = start
    site = site_of()
    update = messages.read_update(ask(app_of(site), instruction))
    assert (update.run_id, update.round) == ("run", 1)
    assert update.layout_digest == layout.digest
    assert update.charge == round_event(instruction.config)
    assert update.vector.shape == (layout.size,)
    assert update.vector.dtype == np.float32
    assert np.isfinite(update.vector).all()
    assert not np.array_equal(update.vector, vector)


def test_answered_round_is_charged_once(instruction):
    site = site_of()
    assert ask(app_of(site), instruction).has_content()
    assert charges_of(site) == {(instruction.run_id, 1): round_event(instruction.config)}


def test_update_holds_nothing_but_the_allow_list(instruction, start):
    """Spelled out here on purpose: whoever adds a fact to the egress must come by this test."""
    layout, _ = start
    site = site_of()
    content = ask(app_of(site), instruction).content
    assert set(content) == {"vector", "facts"}
    assert set(content.array_records) == {"vector"}
    assert set(content.config_records) == {"facts"}
    assert not content.metric_records
    assert set(content["vector"]) == {"vector"}
    assert dict(content["facts"]) == {
        "run-id": "run",
        "round": 1,
        "layout-digest": layout.digest,
        "noise-multiplier": 2.0,
        "sample-rate": 0.5,
        "steps": 2,
        "ledger-head": str(site.ledger.head),
        "links": b"",
        "cap": 100.0,
        "spent": site.ledger.books.spent(),
        "charged": [2.0, 0.5, 2.0],
    }


def test_update_without_its_vector_does_not_depend_on_the_number_of_records(instruction):
    """N is private; a site without any record must look like all others."""
    replies = [ask(app_of(site_of(some_records(n))), instruction) for n in (0, 1, 40)]
    facts = [dict(reply.content["facts"]) for reply in replies]
    heads = {fact.pop("ledger-head") for fact in facts}
    assert len(heads) == 3  # each of a chain of its own; hashes under secret nonces
    assert facts[0] == facts[1] == facts[2]
    assert len({len(wire(reply)) for reply in replies}) == 1


def test_update_holds_no_text_of_a_record(instruction):
    records = Records((RECORD, "bank shares"), np.array([0, 1], dtype=np.int64))
    assert b"4711" not in wire(ask(app_of(site_of(records)), instruction))


GARBAGE = {
    "empty content": lambda i: RecordDict(),
    "facts only": lambda i: RecordDict({"facts": messages.pack_instruction(i)["facts"]}),
    "one record more": lambda i: RecordDict(
        {**messages.pack_instruction(i), "more": ConfigRecord({"a": 1})}
    ),
    "one fact more": lambda i: with_facts(i, more="x"),
    "one fact less": lambda i: with_facts(i, run_id=None),
    "round is text": lambda i: with_facts(i, round="1"),
    "round is negative": lambda i: with_facts(i, round=-1),
    "round is a bool": lambda i: with_facts(i, round=True),
    "config is bytes": lambda i: with_facts(i, config=b"{}"),
    "config is not JSON": lambda i: with_facts(i, config="{"),
    "config is a JSON list": lambda i: with_facts(i, config="[1]"),
    "config is a JSON number": lambda i: with_facts(i, config="5"),
    "config is null": lambda i: with_facts(i, config="null"),
    "config is empty": lambda i: with_facts(i, config="{}"),
    "config is nested deeply": lambda i: with_facts(i, config="[" * 100_000),
    "config has an unknown key": lambda i: with_config_values(i, more=1),
    "config section is a number": lambda i: with_config_values(i, privacy=1),
    "config section is null": lambda i: with_config_values(i, privacy=None),
    "config hash of another": lambda i: with_facts(i, config_hash="0" * 64),
    "layout of another model": lambda i: with_facts(i, layout_digest="0" * 64),
    "vector of float64": lambda i: with_arrays(
        i, ArrayRecord({"vector": Array(i.vector.astype(np.float64))})
    ),
    "two vectors": lambda i: with_arrays(
        i, ArrayRecord({"vector": Array(i.vector), "more": Array(i.vector)})
    ),
    "vector bytes cut": lambda i: with_arrays(i, arrays_of(i, Array(i.vector).data[:-4])),
    "vector bytes are noise": lambda i: with_arrays(i, arrays_of(i, b"\x00\xff" * 50)),
    "vector bytes are a pickle": lambda i: with_arrays(
        i, arrays_of(i, b"\x80\x04\x95\x0b\x00\x00\x00")
    ),
    "no vector bytes": lambda i: with_arrays(i, arrays_of(i, b"")),
}


def arrays_of(instruction, data):
    array = Array(dtype="float32", shape=instruction.vector.shape, stype="numpy.ndarray", data=data)
    return ArrayRecord({"vector": array})


@pytest.mark.parametrize("fault", GARBAGE)
def test_garbage_is_an_invalid_instruction_and_charges_nothing(fault, instruction):
    site = site_of()
    reply = send(app_of(site), GARBAGE[fault](instruction))
    assert refusal(reply) == INVALID
    assert charges_of(site) == {}


WRONG = {
    "round 0": lambda i: replace(i, round=0),
    "round beyond the plan": lambda i: replace(i, round=3),
    "layout of another model": lambda i: replace(i, layout_digest="0" * 64),
    "seeded noise": lambda i: changed(i, "privacy", noise=NoiseSource.seeded),
    "unsolved noise": lambda i: changed(i, "privacy", noise_multiplier=None),
    "undeclared records": lambda i: changed(i, "data", declared_records=None),
    "delta above 1/N": lambda i: changed(i, "privacy", delta=0.03, epsilon=100.0),
    "negative epsilon": lambda i: changed(i, "privacy", epsilon=-1.0),
    "a model that is not here": lambda i: changed(i, "model", name="./nowhere"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_well_formed_but_wrong_instruction_is_refused_and_charges_nothing(fault, instruction):
    site = site_of()
    assert refusal(ask(app_of(site), WRONG[fault](instruction))) == INVALID
    assert charges_of(site) == {}


VECTORS = {
    "nan": lambda v: np.concatenate([v[:-1], np.float32([np.nan])]),
    "infinite": lambda v: np.concatenate([np.float32([-np.inf]), v[1:]]),
    "short": lambda v: v[:-1],
    "empty": lambda v: v[:0],
}


@pytest.mark.parametrize("fault", VECTORS)
def test_unusable_vector_is_refused(fault, instruction):
    wrong = replace(instruction, vector=VECTORS[fault](instruction.vector))
    assert refusal(ask(app_of(site_of()), wrong)) == INVALID


@pytest.mark.parametrize("fault", VECTORS)
def test_unusable_vector_charges_nothing(fault, instruction):
    """A fault that can be seen without data must not cost the site its budget."""
    site = site_of()
    ask(app_of(site), replace(instruction, vector=VECTORS[fault](instruction.vector)))
    assert charges_of(site) == {}


def test_instruction_without_privacy_is_refused_where_seeded_noise_is(instruction):
    """No noise protects even less than noise with a known seed."""
    site = site_of()
    wrong = changed(instruction, "privacy", mode=PrivacyMode.none, noise=NoiseSource.seeded)
    assert refusal(ask(app_of(site), wrong)) == INVALID
    assert charges_of(site) == {}


def test_config_cannot_read_the_environment_of_a_site(instruction, monkeypatch):
    """An answer or a refusal would tell the coordinator whether it guessed the value."""
    monkeypatch.setenv("COTERIE_TEST_SECRET", "text")
    values = plain_values(instruction.config)
    guessed = hash_of(values)
    values["data"]["text_column"] = "${oc.env:COTERIE_TEST_SECRET}"
    site = site_of()
    content = with_facts(instruction, config=canonical_json(values), config_hash=guessed)
    assert refusal(send(app_of(site), content)) == INVALID
    assert charges_of(site) == {}


def test_same_round_twice_gets_the_same_bytes_and_is_charged_once(instruction):
    site = site_of()
    app = app_of(site)
    first, second = sent_vector(app, instruction), sent_vector(app, instruction)
    assert first == second
    assert len(site.ledger.books.reservations) == 1
    elsewhere = replace(instruction, vector=instruction.vector + 1)
    assert sent_vector(app, elsewhere) == first
    assert len(site.ledger.books.reservations) == 1


@pytest.mark.parametrize("coding", [Coding.float16, Coding.int8])
def test_a_coded_update_is_the_one_prepared_and_is_sent_again_to_the_byte(instruction, coding):
    site, instruction = site_of(), changed(instruction, "federation", coding=coding)
    app = app_of(site)
    reply = ask(app, instruction)
    update = messages.UpdateReader(coding, instruction.vector).read(reply)
    assert len(update.coded) == coded_bytes(len(update.vector), coding)
    head = len(header_of(len(update.coded), "|u1"))
    assert messages.content_bytes(reply.content) == len(update.coded) + head
    assert np.array_equal(decoded(update.coded, instruction.vector, coding), update.vector)
    assert not np.array_equal(update.vector, instruction.vector)
    (reservation,) = site.ledger.books.reservations
    assert site.ledger.release(reservation) == update.coded
    assert sent_vector(app, instruction) == reply.content["vector"]["vector"].data


def test_coding_is_rounded_by_coins_that_no_seed_gives(instruction):
    """Of one trained vector: what is rounded must not be told from the run's configuration."""
    wanted = changed(instruction, "federation", coding=Coding.int8)
    vector = instruction.vector + np.float32(1e-3) * np.arange(len(instruction.vector)) % 0.01
    made = {_coded(vector.astype(np.float32), site_of(), wanted) for _ in range(3)}
    assert len(made) == 3


def test_a_round_whose_bytes_are_gone_is_not_trained_again(instruction):
    """They are kept until the next round is reserved."""
    site = site_of()
    app = app_of(site)
    assert ask(app, instruction).has_content()
    assert ask(app, replace(instruction, round=2)).has_content()
    assert refusal(ask(app, instruction)) == INVALID
    assert len(site.ledger.books.reservations) == 2


def test_rounds_of_a_plan_are_all_answered(instruction):
    site = site_of()
    app = app_of(site)
    replies = [ask(app, replace(instruction, round=number)) for number in (1, 2)]
    assert all(reply.has_content() for reply in replies)
    assert [number for _, number in charges_of(site)] == [1, 2]


def test_round_beyond_epsilon_is_refused_as_exhausted(instruction):
    config = instruction.config
    once = epsilon_pld([round_event(config)], config.privacy.delta, 1e-3)
    tight = changed(instruction, "privacy", epsilon=1.01 * once)
    site = site_of()
    assert refusal(ask(app_of(site), tight)) == EXHAUSTED  # two rounds are planned
    assert charges_of(site) == {}
    enough = changed(tight, "federation", rounds=1)
    assert ask(app_of(site), enough).has_content()


def test_runs_share_the_cap_of_their_site(instruction):
    """A second coordinator sees what is left, whatever epsilon it was promised."""
    site = site_of(cap=2.5)
    app = app_of(site)
    assert ask(app, instruction).has_content()
    spent = site.ledger.books.spent_pld()
    assert refusal(ask(app, replace(instruction, run_id="second"))) == EXHAUSTED
    assert ask(app, replace(instruction, round=2)).has_content()
    assert [*charges_of(site)] == [("run", 1), ("run", 2)]
    assert spent < site.ledger.books.spent_pld() <= 2.5


def test_a_round_that_was_answered_is_prepared_and_released_in_the_ledger(instruction):
    site = site_of()
    update = messages.read_update(ask(app_of(site), instruction))
    (reservation,) = site.ledger.books.reservations.values()
    assert reservation.state == "released"
    assert reservation.update == hashlib.sha256(update.vector.tobytes()).hexdigest()
    assert update.books.head == site.ledger.head
    assert [*update.books.charged] == [round_event(instruction.config)]


def test_what_the_policy_forbids_is_refused_before_data_are_touched(instruction):
    site = replace(unreadable_site(), policy=NodeConfig(min_noise_multiplier=2.5))
    reply = ask(app_of(site), instruction)
    assert refusal(reply) == (messages.AGAINST_POLICY, "against the site's policy")
    assert charges_of(site) == {}
    assert b"2.5" not in wire(reply)


def test_a_delta_below_the_ledgers_is_refused(instruction):
    site = replace(site_of(), ledger=ledger_of(delta=2e-3))
    assert refusal(ask(app_of(site), instruction)) == INVALID
    assert charges_of(site) == {}


def test_what_a_coordinator_asks_never_takes_gigabytes_to_price(instruction):
    """PLD of this would: an epsilon in the thousands, on a grid of a ten thousandth."""
    dear = changed(instruction, "privacy", noise_multiplier=0.05, epsilon=2e5)
    dear = changed(dear, "federation", local_steps=10_000)
    assert refusal(ask(app_of(site_of()), dear)) == EXHAUSTED


def test_a_site_without_a_ledger_answers_no_private_instruction(instruction):
    site = replace(site_of(), ledger=None)
    assert refusal(ask(app_of(site), instruction)) == INVALID


class Unreadable(tuple):
    """Texts that fail on the first touch, and note what was charged by then."""

    def bind(self, site):
        self.site, self.charged_when_touched = site, None
        return self

    def fail(self, *_):
        self.charged_when_touched = dict(charges_of(self.site))
        raise OSError(f"cannot read {RECORD}")

    __len__ = __iter__ = __getitem__ = fail


def unreadable_site():
    texts = Unreadable()
    site = site_of(Records(texts, np.zeros(3, dtype=np.int64)))
    texts.bind(site)
    return site


def test_charge_is_there_before_data_are_touched(instruction):
    site = unreadable_site()
    assert refusal(ask(app_of(site), instruction)) == FAILED
    assert site.records.contents.charged_when_touched == {
        (instruction.run_id, 1): round_event(instruction.config)
    }


def test_failure_on_the_data_gives_no_charge_back(instruction):
    site = unreadable_site()
    app = app_of(site)
    assert refusal(ask(app, instruction)) == FAILED
    assert refusal(ask(app, instruction)) == NO_SPARE
    assert charges_of(site) == {(instruction.run_id, 1): round_event(instruction.config)}


def test_a_round_whose_measurement_alarms_is_not_released(instruction, monkeypatch):
    """Its charge stays, its ledger says that a measurement alarmed, and nobody else is told so."""
    site, original = site_of(), NoiseMeter.close_step

    def close_step(self):
        if noise_is_less:
            self._step.energies[0] *= 0.5
        original(self)

    monkeypatch.setattr(NoiseMeter, "close_step", close_step)
    noise_is_less = False
    app = app_of(site)
    assert ask(app, instruction).has_content()
    noise_is_less = True
    second = replace(instruction, round=2)
    assert refusal(ask(app, second)) == FAILED
    noise_is_less = False
    assert refusal(ask(app, second)) == NO_SPARE  # nor is it, when asked again
    books = site.ledger.books
    assert [(r.state, r.reason) for r in books.reservations.values()] == [
        ("released", ""),
        ("lost", "alarm"),
    ]
    assert (books.alarms(), len(books.charges())) == (1, 1)
    assert books.charges()[0].steps == 2 * round_event(instruction.config).steps
    assert watched(books)["alarms"] == 1
    assert watched(books)["rounds_released"] == 1


def test_a_spare_round_pays_for_another_attempt(instruction):
    instruction = changed(instruction, "privacy", spare_rounds=1, noise_multiplier=3.0)
    site = site_of()
    whole, site.records = site.records, unreadable_site().records
    site.records.contents.bind(site)
    app = app_of(site)
    assert refusal(ask(app, instruction)) == FAILED
    site.records = whole
    assert ask(app, instruction).has_content()
    states = [r.state for r in site.ledger.books.reservations.values()]
    assert states == ["lost", "released"]
    assert site.ledger.books.charges() == [replace(round_event(instruction.config), steps=4)]
    site.records = unreadable_site().records
    site.records.contents.bind(site)
    app = app_of(site)  # a new process
    assert refusal(ask(app, replace(instruction, round=2))) == FAILED
    site.records = whole
    assert refusal(ask(app, replace(instruction, round=2))) == NO_SPARE


def test_a_run_is_priced_with_its_spares(instruction):
    """Ten spare rounds cost what ten rounds cost: at this sigma, more than epsilon allows."""
    assert refusal(ask(app_of(site_of()), changed(instruction, "privacy", spare_rounds=1000))) == (
        EXHAUSTED
    )


KEY = Ed25519PrivateKey.generate()


def test_a_receipt_is_kept_once_and_the_reply_goes_on_from_it(instruction):
    site = site_of()
    app = app_of(site)
    head = messages.read_update(ask(app, instruction)).books.head
    receipt = Receipt.sign(head, KEY)
    second = messages.read_update(ask(app, replace(instruction, round=2, receipt=receipt))).books
    assert continued(head, second.links) == second.head == site.ledger.head
    assert site.ledger.books.receipts == {receipt.key: head}
    again = messages.read_update(ask(app, replace(instruction, round=2, receipt=receipt))).books
    assert again == second
    kinds = [entry.kind.value for entry in site.ledger.entries()]
    assert kinds.count("RECEIPT") == 1


def test_a_reply_goes_on_from_its_receipt_though_others_append_meanwhile(instruction, monkeypatch):
    """Two runs on one ledger: head and links of two moments would look like a fork."""
    site = site_of()
    head = messages.read_update(ask(app_of(site), instruction)).books.head
    told = replace(instruction, round=2, receipt=Receipt.sign(head, KEY))
    ask(app_of(site), told)
    path = site.ledger._store.path
    plain, late = Ledger.links, []

    def append():
        with contextlib.suppress(ConfigError), Store(path) as other:
            other.ledger("site-1").commit(
                "other", round_event(instruction.config), rounds=1, spare_rounds=0,
                plan="0" * 64, model="m", unit="record",
            )  # fmt: skip

    def links(ledger, after, to):
        late.append(threading.Thread(target=append))
        late[-1].start()
        late[-1].join(0.5)
        return plain(ledger, after, to)

    monkeypatch.setattr(Ledger, "links", links)
    books = messages.read_update(ask(app_of(site), told)).books
    late[-1].join()
    assert continued(head, books.links) == books.head
    assert site.ledger.books.head.seq == books.head.seq + 1  # it came, and came after


def test_a_run_that_has_the_name_of_a_count_is_refused(instruction):
    site = site_of()
    assert refusal(ask(app_of(site), replace(instruction, run_id="run count"))) == INVALID
    assert charges_of(site) == {}


def test_a_run_is_of_one_configuration_though_two_begin_it_at_once(instruction, monkeypatch):
    """Both may look before either has committed; the second one's plan is another's."""
    site = site_of()
    other = changed(instruction, "privacy", clip_norm=2.0)
    begun = []

    def check_fit(trainer, asked):
        if asked.config.privacy.clip_norm == 1.0 and not begun:
            begun.append(ask(app_of(site), other))

    monkeypatch.setattr("client.app.check_fit", check_fit)
    assert refusal(ask(app_of(site), replace(instruction, round=2))) == INVALID
    assert begun[0].has_content()
    assert [*charges_of(site)] == [("run", 1)]


def test_a_ledger_put_back_to_an_older_copy_is_seen_before_data_are_touched(instruction):
    ahead, behind = site_of(), unreadable_site()
    head = messages.read_update(ask(app_of(ahead), instruction)).books.head
    told = replace(instruction, receipt=Receipt.sign(head, KEY))
    assert refusal(ask(app_of(behind), told)) == BEHIND
    assert behind.records.contents.charged_when_touched is None
    assert charges_of(behind) == {}
    assert behind.ledger.head.seq == 1


def test_a_receipt_that_nobody_signed_is_refused(instruction):
    site = site_of()
    forged = replace(Receipt.sign(site.ledger.head, KEY), key="ab" * 32)
    assert refusal(ask(app_of(site), replace(instruction, receipt=forged))) == INVALID
    assert site.ledger.books.receipts == {}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (RuntimeError, FAILED),
        (MemoryError, FAILED),
        (ConfigError, INVALID),
        (PrivacyRefusedError, INVALID),
        (FederationError, INVALID),
    ],
)
def test_text_of_an_exception_stays_in_the_local_log(kind, expected, instruction, caplog):
    def open_site(_):
        raise kind(f"row 3: {RECORD}")

    with caplog.at_level(logging.ERROR):
        reply = ask(client_app(open_site), instruction)
    assert refusal(reply) == expected
    assert RECORD.encode() not in wire(reply)
    assert kind.__name__.encode() not in wire(reply)
    assert RECORD in caplog.text


def test_text_of_a_failure_on_the_data_stays_in_the_local_log(instruction, caplog):
    with caplog.at_level(logging.ERROR):
        reply = ask(app_of(unreadable_site()), instruction)
    assert RECORD.encode() not in wire(reply)
    assert RECORD in caplog.text


def test_refusals_are_fixed_and_tell_the_codes_of_flower_apart():
    """Flower's own error codes are below 600; a refusal must not look like one of them."""
    assert messages.REFUSALS == {
        601: "invalid instruction",
        602: "budget exhausted",
        603: "local failure",
        604: "against the site's policy",
        605: "the site's ledger is an older copy, or a fork, of the one this coordinator knew",
        606: "the round was lost at the site, and its plan has no spare round left",
    }


def test_reply_goes_to_the_message_it_answers(instruction):
    site = site_of()
    for reply in (ask(app_of(site), instruction), ask(app_of(site), replace(instruction, round=0))):
        assert reply.metadata.reply_to_message_id == "m-1"
        assert reply.metadata.dst_node_id == COORDINATOR
        assert reply.metadata.src_node_id == SITE


def test_instruction_past_its_deadline_still_gets_one_reply(instruction):
    """A slow site must not bring down the process that carries its messages."""
    reply = send(
        app_of(site_of()), messages.pack_instruction(instruction), ttl=1.0, created_at=1.7e9
    )
    assert reply.metadata.reply_to_message_id == "m-1"


def test_seeded_noise_repeats_where_it_is_allowed(instruction):
    seeded = changed(instruction, "privacy", noise=NoiseSource.seeded)
    vectors = [
        messages.read_update(ask(app_of(site_of(), allow_unprotected=True), seeded)).vector
        for _ in range(2)
    ]
    assert np.array_equal(*vectors)


def test_private_answers_to_one_instruction_differ(instruction):
    """Noise comes from the operating system, for each answer anew."""
    vectors = [messages.read_update(ask(app_of(site_of()), instruction)).vector for _ in range(2)]
    assert not np.array_equal(*vectors)


def test_config_of_another_run_is_read_anew_and_of_the_same_run_refused(instruction):
    """The warm model belongs to one config; another config must not train with it."""
    app = app_of(site_of())
    more = changed(instruction, "federation", local_steps=1)
    assert config_hash(more.config) != config_hash(instruction.config)
    assert messages.read_update(ask(app, instruction)).charge.steps == 2
    assert refusal(ask(app, replace(more, round=2))) == INVALID  # its plan was another
    other = replace(more, run_id="other")
    assert messages.read_update(ask(app, other)).charge.steps == 1


HOSTILE = {
    "classes of its own": ("data", {"labels": ["sport"]}),
    "other classes": ("data", {"labels": ["money", "sport"]}),
    "more tokens than the model reads": ("task", {"max_tokens": 10_000}),
    "no such model": ("model", {"name": "./absent"}),
    "delta no record is safe at": ("privacy", {"delta": 0.5}),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_config_gets_one_answer_whatever_the_records(fault, instruction):
    """Two neighbouring sites, one of them empty: an answer that differed would be a release that
    no noise covers. Nothing is charged, so nothing was asked of the records.
    """
    section, values = HOSTILE[fault]
    hostile = changed(instruction, section, **values)
    sites = [site_of(), site_of(some_records(0)), site_of(some_records(1))]
    assert [refusal(ask(app_of(site), hostile)) for site in sites] == [INVALID] * 3
    assert [charges_of(site) for site in sites] == [{}, {}, {}]


def test_a_declaration_smaller_than_the_federation_cannot_switch_the_delta_rule_off(instruction):
    hostile = changed(instruction, "data", declared_records=1)
    assert refusal(ask(app_of(site_of()), hostile)) == INVALID


def test_each_run_prepares_its_own_inputs(instruction):
    """A second run on the same site, with fewer tokens, must not train on the first's inputs."""
    shorter = changed(instruction, "task", max_tokens=4)
    other = replace(shorter, run_id="other")
    seeded = [
        changed(one, "privacy", noise=NoiseSource.seeded, epsilon=100.0)
        for one in (instruction, other)
    ]
    site = site_of()
    app = app_of(site, allow_unprotected=True)
    ask(app, seeded[0])
    after = messages.read_update(ask(app, seeded[1])).vector
    alone = messages.read_update(ask(app_of(site_of(), allow_unprotected=True), seeded[1])).vector
    assert np.array_equal(after, alone)


# Persons.


@pytest.fixture
def person_instruction(person_config, start):
    layout, vector = start
    return Instruction("run", 1, person_config, layout.digest, vector)


def of_persons(count=12, each=4):
    texts = tuple(f"the goal match number {index}" for index in range(count))
    persons = tuple(f"{RECORD} {index // each}" for index in range(count))
    return Records(texts, np.arange(count, dtype=np.int64) % 2, persons)


def person_site(records=None, *, unit="person"):
    held = of_persons() if records is None else records
    return replace(site_of(held), ledger=ledger_of(unit=unit))


def test_a_run_by_person_is_answered_charged_and_planned_by_person(person_instruction):
    site = person_site()
    reply = ask(app_of(site), person_instruction)
    assert messages.read_update(reply).charge == round_event(person_instruction.config)
    plan = next(e for e in site.ledger.entries() if e.kind.value == "PLAN")
    assert plan.body["unit"] == site.ledger.books.unit == "person"
    assert b"4711" not in wire(reply)


def test_what_leaves_does_not_depend_on_the_number_of_persons_or_of_their_records(
    person_instruction,
):
    """Of nobody, of one person far beyond the bound, of many."""
    sites = [person_site(of_persons(n, each)) for n, each in ((0, 1), (30, 30), (12, 1))]
    replies = [ask(app_of(site), person_instruction) for site in sites]
    facts = [dict(reply.content["facts"]) for reply in replies]
    assert len({fact.pop("ledger-head") for fact in facts}) == 3
    assert facts[0] == facts[1] == facts[2]
    assert len({len(wire(reply)) for reply in replies}) == 1


UNITS = {
    "a record's price in books of persons": ("instruction", "person"),
    "a person's price in books of records": ("person_instruction", "record"),
}


@pytest.mark.parametrize("fault", UNITS)
def test_a_run_of_another_unit_than_the_ledgers_is_refused_before_data(fault, request):
    name, unit = UNITS[fault]
    site = replace(unreadable_site(), ledger=ledger_of(unit=unit))
    site = replace(site, records=replace(site.records, persons=("a", "b", "c")))
    assert refusal(ask(app_of(site), request.getfixturevalue(name))) == INVALID
    assert charges_of(site) == {}
    assert site.ledger.head.seq == 1


def test_persons_are_not_protected_where_the_records_name_none(person_instruction):
    """Refused by how the site is set up, the same with and without records."""
    for count in (0, 12):
        site = person_site(some_records(count))
        assert refusal(ask(app_of(site), person_instruction)) == INVALID
        assert charges_of(site) == {}


def test_no_id_of_a_person_reaches_a_log_or_a_reply(person_instruction, caplog, monkeypatch):
    """Not when a step refuses what capping should have cut, either."""
    monkeypatch.setattr("client.persons.capped", lambda records, most: records)
    site = person_site()
    with caplog.at_level(logging.DEBUG):
        reply = ask(app_of(site), person_instruction)
    assert refusal(reply) == FAILED
    assert "person-cap: " in caplog.text
    assert "4711" not in caplog.text
    assert b"4711" not in wire(reply)
