"""Sites that are answered together are answered, charged and refused as each is alone."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, Metadata, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from client import cohort as cohorts
from client.app import client_app
from client.cohort import Cohort
from client.ledger import Ledger, Store, Terms
from client.policy import NodeConfig
from client.site import Site
from client.train import Trainer
from common import messages
from common.config import NoiseSource, PrivacyMode
from common.messages import Instruction
from common.parameters import Layout, flatten
from common.privacy import accounting
from common.privacy.chain import Kind, Receipt
from common.records import Records
from common.tasks import build_model

SITES = 5
CLASSES = ("sport", "money")
WORDS = ("goal", "match", "team", "coach", "bank", "shares", "market", "loan")
SIZES = (20, 0, 1, 40, 17)
MOST = 8
COORDINATOR = 1


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, COORDINATOR, 1


@pytest.fixture(scope="module")
def config(compose_config, tiny_overrides):
    """Head tuning with entropy noise at five sites."""
    kept = [o for o in tiny_overrides if not o.startswith("federation.sites")]
    return compose_config(
        *kept,
        "tuning=head",
        f"federation.sites={SITES}",
        "privacy.noise_multiplier=2",
        "data.declared_records=100",
    )


@pytest.fixture(scope="module")
def start(config):
    model = build_model(config)
    return Layout.of(model), flatten(model)


@pytest.fixture
def instruction(config, start):
    layout, vector = start
    return Instruction("run", 1, config, layout.digest, vector)


@pytest.fixture
def store(tmp_path):
    with Store.create(tmp_path / "sites.db") as opened:
        yield opened


def sites_of(store, *, cap=100.0):
    """One file of books for all, as in a simulation; `caps` may differ."""
    found = []
    for number, size in enumerate(SIZES):
        texts = tuple(f"the {WORDS[i % 8]} {WORDS[(i + number) // 8 % 8]}" for i in range(size))
        ledger = None
        if store is not None:
            ledger = store.open(f"site-{number}", Terms("made", cap, 1e-3, "1" * 64, "record"))
        held = Records(texts, np.arange(size, dtype=np.int64) % 2)
        found.append(Site(f"site-{number}", held, CLASSES, ledger))
    return found


def message_of(number, content, kind="train"):
    outgoing = Message(content, number + 2, kind, ttl=3600.0).metadata
    metadata = Metadata(
        run_id=1,
        message_id=f"m-{number}",
        src_node_id=COORDINATOR,
        dst_node_id=number + 2,
        reply_to_message_id="",
        group_id="1",
        created_at=outgoing.created_at,
        ttl=3600.0,
        message_type=kind,
    )
    return Message(content=content, metadata=metadata)


def context_of(number):
    return Context(1, number + 2, {"partition-id": number}, RecordDict(), {})


def cohort_of(sites, *, most=MOST):
    def open_site(context):
        return sites[context.node_config["partition-id"]]

    return Cohort(open_site, most=most, allow_unprotected=True)


def asked(instruction, numbers=range(SITES), receipts=None):
    """Messages that share one vector and one text, as a round's do."""
    content = messages.pack_instruction(instruction)
    return [
        message_of(number, messages.addressed(content, (receipts or {}).get(number)))
        for number in numbers
    ]


def answers(cohort, outgoing):
    contexts = [context_of(message.metadata.dst_node_id - 2) for message in outgoing]
    return cohort(outgoing, contexts)


def codes(replies):
    return [reply.error.code if reply.has_error() else None for reply in replies]


def kinds(site):
    return [entry.kind for entry in site.ledger.entries()]


ANSWERED = [Kind.GENESIS, Kind.PLAN, Kind.RESERVE, Kind.PREPARE, Kind.RELEASE]
LOST = [Kind.GENESIS, Kind.PLAN, Kind.RESERVE, Kind.LOST]


def seeded(config, **changes):
    privacy = replace(config.privacy, noise=NoiseSource.seeded, **changes)
    return replace(config, privacy=privacy)


def one_by_one(sites, outgoing):
    """What the ClientApp answers."""
    app = client_app(lambda c: sites[c.node_config["partition-id"]], allow_unprotected=True)
    return [app(m, context_of(m.metadata.dst_node_id - 2)) for m in outgoing]


def test_replies_come_in_order_and_are_those_of_the_client_app(instruction, store, tmp_path):
    asking = replace(instruction, config=seeded(instruction.config))
    sites, others = sites_of(store), sites_of(Store.create(tmp_path / "others.db"))
    together = answers(cohort_of(sites), asked(asking))
    alone = one_by_one(others, asked(asking))
    for number, (reply, other) in enumerate(zip(together, alone, strict=True)):
        assert reply.metadata.reply_to_message_id == f"m-{number}"
        found, expected = messages.read_update(reply), messages.read_update(other)
        assert np.abs(found.vector - expected.vector).max() <= 1e-6
        assert not np.array_equal(found.vector, asking.vector)
        assert (found.charge, found.books.charged) == (expected.charge, expected.books.charged)
        assert found.books.spent == expected.books.spent
        assert set(reply.content["facts"]) == messages.UPDATE_FACTS
        assert set(reply.content) == {"vector", "facts"}
    assert [kinds(site) for site in sites] == [kinds(site) for site in others] == [ANSWERED] * SITES


def test_rounds_go_on_from_receipts(instruction, store):
    sites = sites_of(store)
    cohort, key = cohort_of(sites), store.key
    answers(cohort, asked(instruction))
    receipts = {n: Receipt.sign(site.ledger.head, key) for n, site in enumerate(sites)}
    later = replace(instruction, round=2)
    replies = answers(cohort, asked(later, receipts=receipts))
    assert codes(replies) == [None] * SITES
    for site, reply in zip(sites, replies, strict=True):
        more = [Kind.RECEIPT, Kind.RESERVE, Kind.PREPARE, Kind.RELEASE]
        assert kinds(site) == ANSWERED + more
        assert messages.read_update(reply).books.links


def test_without_privacy_nothing_is_charged(instruction):
    config = replace(
        instruction.config, privacy=replace(instruction.config.privacy, mode=PrivacyMode.none)
    )
    asking = replace(instruction, config=config)
    sites = sites_of(None)
    together, alone = answers(cohort_of(sites), asked(asking)), one_by_one(sites, asked(asking))
    assert codes(together) == [None] * SITES
    assert all(messages.read_update(reply).books is None for reply in together)
    empty = messages.read_update(together[1]).vector
    assert np.array_equal(empty, messages.read_update(alone[1]).vector)


def test_all_are_charged_on_disk_before_data_are_touched(instruction, store, monkeypatch):
    sites, seen = sites_of(store), []
    original = Trainer.train_together

    def spying(self, *arguments, **options):
        with Store(store.path) as other:  # as somebody else would read the file now
            seen.extend(
                other.ledger(site.name).books.open_reservations("reserved") for site in sites
            )
        return original(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "train_together", spying)
    answers(cohort_of(sites), asked(instruction))
    assert [len(found) for found in seen] == [1] * SITES


def test_books_are_flushed_three_times_for_all(instruction, store):
    sites, flushes = sites_of(store), []
    store._connection.set_trace_callback(flushes.append)
    answers(cohort_of(sites), asked(instruction))
    assert sum(line == "COMMIT" for line in flushes) == 3


# Refusals, and what goes on beside them.


def wrong_vector(instruction):
    content = messages.pack_instruction(instruction)
    short = ArrayRecord({"vector": Array(instruction.vector[:-1])})
    return RecordDict({"vector": short, "facts": content["facts"]})


REFUSED = {
    "garbage": (lambda i: RecordDict(), messages.INVALID_INSTRUCTION),
    "a vector too short": (wrong_vector, messages.INVALID_INSTRUCTION),
    "another layout": (
        lambda i: messages.pack_instruction(replace(i, layout_digest="0" * 64)),
        messages.INVALID_INSTRUCTION,
    ),
    "a round beyond the plan": (
        lambda i: messages.pack_instruction(replace(i, round=99)),
        messages.INVALID_INSTRUCTION,
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_one_that_is_refused_is_refused_alone(fault, instruction, store):
    make, code = REFUSED[fault]
    sites, outgoing = sites_of(store), asked(instruction)
    outgoing[2] = message_of(2, make(instruction))
    replies = answers(cohort_of(sites), outgoing)
    assert codes(replies) == [code if number == 2 else None for number in range(SITES)]
    assert replies[2].error.reason == messages.REFUSALS[code]
    assert kinds(sites[2]) == [Kind.GENESIS]
    assert [kinds(site) for n, site in enumerate(sites) if n != 2] == [ANSWERED] * 4


def test_sites_refuse_for_themselves(instruction, store, tmp_path):
    """A policy, a cap, other classes, no ledger: each beside sites that answer."""
    sites = sites_of(store)
    poor = Store.create(tmp_path / "poor.db").open("poor", Terms("made", 0.5, 1e-3, "1" * 64))
    sites[0] = replace(sites[0], policy=NodeConfig(min_noise_multiplier=50.0))
    sites[1] = replace(sites[1], ledger=poor)
    sites[2] = replace(sites[2], classes=("other", "names"))
    sites[3] = replace(sites[3], ledger=None)
    expected = [
        messages.AGAINST_POLICY,
        messages.BUDGET_EXHAUSTED,
        messages.INVALID_INSTRUCTION,
        messages.INVALID_INSTRUCTION,
        None,
    ]
    assert codes(answers(cohort_of(sites), asked(instruction))) == expected
    assert codes(one_by_one(sites[:4], asked(instruction, range(4)))) == expected[:4]
    assert kinds(sites[4]) == ANSWERED


def test_what_one_site_lets_pass_another_still_refuses(instruction, store):
    """A plan is looked at once for sites of one policy and the same classes, and no others."""
    sites = sites_of(store)
    sites[2] = replace(sites[2], policy=NodeConfig(min_noise_multiplier=50.0))
    sites[3] = replace(sites[3], classes=("other", "names"))
    found = codes(answers(cohort_of(sites), asked(instruction)))
    assert found == [None, None, messages.AGAINST_POLICY, messages.INVALID_INSTRUCTION, None]
    assert [kinds(site) for site in sites[2:4]] == [[Kind.GENESIS]] * 2


def test_a_refusal_after_something_was_written_leaves_nothing_of_it(
    instruction, store, monkeypatch
):
    """Its plan and receipt are undone; those of the others stay."""
    sites, original = sites_of(store), Ledger.reserve

    def failing(self, *arguments):
        if self.site == "site-3":
            raise ValueError("the disk is full of letters")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "reserve", failing)
        replies = answers(cohort_of(sites), asked(instruction))
    assert codes(replies) == [None, None, None, messages.LOCAL_FAILURE, None]
    assert kinds(sites[3]) == [Kind.GENESIS]
    assert kinds(sites[4]) == ANSWERED
    with Store(store.path) as other:
        assert [e.kind for e in other.ledger("site-3").entries()] == [Kind.GENESIS]


def test_a_transaction_that_fails_charges_nobody_and_trains_nobody(instruction, store, monkeypatch):
    sites = sites_of(store)
    monkeypatch.setattr(Trainer, "train_together", lambda *_, **__: pytest.fail("trained"))

    class Failing:
        def __init__(self, connection):
            self.connection = connection

        def __getattr__(self, name):
            return getattr(self.connection, name)

        def execute(self, query, *values):
            if query == "COMMIT":
                raise OSError("no space left")
            return self.connection.execute(query, *values)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_connection", Failing(store._connection))
        replies = answers(cohort_of(sites), asked(instruction))
    assert codes(replies) == [messages.LOCAL_FAILURE] * SITES
    assert [kinds(site) for site in sites] == [[Kind.GENESIS]] * SITES


# Rounds that are lost, or asked again.


def test_a_round_asked_again_gets_the_same_bytes_beside_new_ones(instruction, store):
    sites = sites_of(store)
    cohort = cohort_of(sites)
    first = answers(cohort, asked(instruction, [1, 3]))
    replies = answers(cohort, asked(instruction))
    assert codes(replies) == [None] * SITES
    for number, before in zip((1, 3), first, strict=True):
        again = replies[number].content["vector"]["vector"].data
        assert again == before.content["vector"]["vector"].data
    assert [kinds(site) for site in sites] == [ANSWERED] * SITES


def test_a_site_that_is_asked_twice_at_once_is_charged_once(instruction, store):
    sites = sites_of(store)
    replies = answers(cohort_of(sites), asked(instruction, [0, 1, 1, 0, 2]))
    assert codes(replies) == [None] * 5
    vectors = [reply.content["vector"]["vector"].data for reply in replies]
    assert vectors[1] == vectors[2]
    assert vectors[0] == vectors[3]
    assert [kinds(site) for site in sites[:3]] == [ANSWERED] * 3


def test_a_site_that_fails_loses_its_round_alone(instruction, store, monkeypatch, caplog):
    sites = sites_of(store)
    cohort = cohort_of(sites)
    broken = Records((object(),), np.zeros(1, np.int64))
    sites[2] = replace(sites[2], records=broken)
    replies = answers(cohort, asked(instruction))
    assert codes(replies) == [None, None, messages.LOCAL_FAILURE, None, None]
    assert kinds(sites[2]) == LOST
    assert kinds(sites[3]) == ANSWERED


def test_what_fails_for_all_loses_the_round_of_all(instruction, store, monkeypatch):
    sites = sites_of(store)
    monkeypatch.setattr(cohorts, "_compute", failing)
    replies = answers(cohort_of(sites), asked(instruction))
    assert codes(replies) == [messages.LOCAL_FAILURE] * SITES
    assert [kinds(site) for site in sites] == [LOST] * SITES


def failing(*_, **__):
    raise MemoryError("patient 4711 is too long")


def stopped(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["train_together", "prepare"])
def test_whoever_stops_the_process_leaves_no_round_open(instruction, store, monkeypatch, place):
    sites = sites_of(store)
    owner = Trainer if place == "train_together" else Ledger
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, stopped)
        with pytest.raises(KeyboardInterrupt):
            answers(cohort_of(sites), asked(instruction))
    assert [kinds(site) for site in sites] == [LOST] * SITES


def test_what_cannot_be_prepared_is_lost(instruction, store, monkeypatch):
    sites, original = sites_of(store), Ledger.prepare

    def one_fails(self, *arguments, **options):
        if self.site == "site-0":
            raise ValueError("not this one")
        original(self, *arguments, **options)

    monkeypatch.setattr(Ledger, "prepare", one_fails)
    replies = answers(cohort_of(sites), asked(instruction))
    assert codes(replies) == [messages.LOCAL_FAILURE, *[None] * 4]
    assert [kinds(site) for site in sites] == [LOST, *[ANSWERED] * 4]
    assert sites[0].ledger.books.alarms() == 0


def test_what_was_prepared_and_not_released_is_sent_when_asked_again(
    instruction, store, monkeypatch
):
    sites = sites_of(store)
    cohort = cohort_of(sites)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "release", failing)
        assert codes(answers(cohort, asked(instruction))) == [messages.LOCAL_FAILURE] * SITES
    assert codes(answers(cohort, asked(instruction))) == [None] * SITES
    assert [kinds(site) for site in sites] == [ANSWERED] * SITES


def test_an_alarm_of_one_site_loses_its_round_alone(instruction, store, monkeypatch):
    sites = sites_of(store)
    cohort = cohort_of(sites)
    answers(cohort, asked(instruction))
    (trainer,) = cohort._trainers.values()
    (meters,) = (each for (name, _), each in trainer._meters.items() if name == "site-4")
    monkeypatch.setattr(meters.noise, "_noise_std", 1e-4)
    replies = answers(cohort, asked(replace(instruction, round=2)))
    assert codes(replies) == [*[None] * 4, messages.LOCAL_FAILURE]
    assert kinds(sites[4])[-2:] == [Kind.RESERVE, Kind.LOST]
    assert [site.ledger.books.alarms() for site in sites] == [0, 0, 0, 0, 1]


def test_no_text_of_a_failure_leaves(instruction, store, monkeypatch, caplog):
    monkeypatch.setattr(cohorts, "_compute", failing)
    for reply in answers(cohort_of(sites_of(store)), asked(instruction)):
        assert "4711" not in str(reply.error)
        assert not reply.has_content()


# What goes together.


def test_a_count_is_answered_by_the_client_app(instruction, store):
    cohort = cohort_of(sites_of(store))
    (message,) = asked(instruction, [0])
    assert cohort.size(message) == MOST
    assert cohort.size(message_of(0, message.content, "evaluate")) == 1
    counting = replace(
        instruction.config, privacy=replace(instruction.config.privacy, count_noise=5.0)
    )
    content = messages.pack_instruction(replace(instruction, config=counting))
    (reply,) = answers(cohort, [message_of(0, content, "evaluate")])
    assert messages.read_count(reply).correct.is_integer()


def test_a_model_that_trains_site_by_site_is_answered_by_the_client_app(
    instruction, store, monkeypatch
):
    monkeypatch.setattr("client.agreement.LIGHT", 1.0)
    monkeypatch.setattr(Trainer, "train_together", lambda *_, **__: pytest.fail("together"))
    sites = sites_of(store)
    cohort, outgoing = cohort_of(sites), asked(instruction)
    assert codes(answers(cohort, outgoing)) == [None] * SITES
    assert [kinds(site) for site in sites] == [ANSWERED] * SITES
    assert cohort.size(outgoing[0]) == 1


def test_a_refused_instruction_loads_no_model(instruction, store, monkeypatch):
    sites = [replace(s, policy=NodeConfig(min_noise_multiplier=50.0)) for s in sites_of(store)]
    monkeypatch.setattr("client.app.Trainer", lambda *_: pytest.fail("loaded"))
    replies = answers(cohort_of(sites), asked(instruction))
    assert codes(replies) == [messages.AGAINST_POLICY] * SITES


def test_instructions_that_differ_are_answered_each_by_its_own(instruction, store):
    sites = sites_of(store)
    other = replace(instruction, run_id="another run")
    mixed = [asked(instruction)[n] if n % 2 else asked(other)[n] for n in range(SITES)]
    replies = answers(cohort_of(sites), mixed)
    assert [messages.read_update(reply).run_id for reply in replies] == [
        "run" if n % 2 else "another run" for n in range(SITES)
    ]


@settings(max_examples=12)
@given(st.permutations(range(SITES)), st.lists(st.booleans(), min_size=SITES, max_size=SITES))
def test_grouping_changes_no_bit(plain_trained, order, cuts):
    """Workers divide the sites as they like."""
    cohort, asking, expected = plain_trained
    groups: list[list[int]] = [[]]
    for number, cut in zip(order, cuts, strict=True):
        groups[-1].append(number)
        if cut:
            groups.append([])
    for group in filter(None, groups):
        for number, reply in zip(group, answers(cohort, asked(asking, group)), strict=True):
            assert reply.content["vector"]["vector"].data == expected[number]


@pytest.fixture(scope="module")
def plain_trained(config, start):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, COORDINATOR, 1
    plain = replace(seeded(config), privacy=replace(seeded(config).privacy, mode=PrivacyMode.none))
    asking = Instruction("run", 1, plain, start[0].digest, start[1])
    cohort = cohort_of(sites_of(None))
    replies = answers(cohort, asked(asking))
    return cohort, asking, [reply.content["vector"]["vector"].data for reply in replies]


# Whole runs.


RUN = ["tuning=head", "federation.sites=6", "privacy.noise=seeded", "federation.rounds=2"]


def test_a_run_together_is_the_run_one_by_one(coterie, tiny_overrides, tmp_path, monkeypatch):
    kept = [
        o for o in tiny_overrides if not o.startswith(("federation.sites", "federation.rounds"))
    ]
    answered = []
    original = Trainer.train_together
    monkeypatch.setattr(
        Trainer,
        "train_together",
        lambda self, sites, *a, **o: answered.append(len(sites)) or original(self, sites, *a, **o),
    )
    vectors, books = [], []
    for together in (1, 0):
        folder = tmp_path / f"run-{together}"
        done = coterie(
            "simulate", *kept, *RUN, f"engine.together={together}", f"run_dir={folder}", "--json"
        )
        assert done.code == 0, done.err
        vectors.append(vector_of(folder))
        with Store(folder / "ledgers" / "sites.db") as store:
            books.append({n: [e.kind for e in store.ledger(n).entries()] for n in store.sites()})
    assert answered == [6, 6]
    assert np.abs(vectors[0] - vectors[1]).max() <= 1e-6
    assert books[0] == books[1]
    assert len(books[0]) == 6


@pytest.mark.slow
def test_workers_that_divide_the_sites_change_no_bit(coterie, tiny_overrides, tmp_path):
    kept = [
        o for o in tiny_overrides if not o.startswith(("federation.sites", "federation.rounds"))
    ]
    vectors = []
    for workers in (1, 2):
        folder = tmp_path / f"run-{workers}"
        settings = [f"engine.workers={workers}", "engine.threads=1", f"run_dir={folder}"]
        done = coterie("simulate", *kept, *RUN, *settings, "--json")
        assert done.code == 0, done.err
        vectors.append(vector_of(folder).tobytes())
    assert vectors[0] == vectors[1]


def vector_of(folder):
    (last,) = sorted((folder / "checkpoints").glob("*2*"))
    (vector,) = load_file(last).values()
    return vector


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
torch.set_num_threads(1)
from client.train import Trainer
Trainer.train_together = lambda *_, **__: os._exit(9)
from common.cli import main
sys.exit(main({arguments!r}))
"""


@pytest.mark.slow
def test_a_process_that_dies_between_charge_and_answer_leaves_all_rounds_lost(
    tiny_overrides, tmp_path
):
    kept = [
        o for o in tiny_overrides if not o.startswith(("federation.sites", "federation.rounds"))
    ]
    folder = tmp_path / "run"
    arguments = ["simulate", *kept, *RUN, f"run_dir={folder}"]
    root = os.getcwd()
    script = KILLED.format(root=root, arguments=arguments)
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, check=False)
    assert ended.returncode == 9
    with Store(folder / "ledgers" / "sites.db") as store:
        assert len(store.sites()) == 6
        for name in store.sites():
            assert [entry.kind for entry in store.ledger(name).entries()] == LOST


@pytest.fixture
def misses(store, monkeypatch):
    """For each price that nobody had asked for before, whether the books were held meanwhile."""
    found = []
    whole = accounting._epsilon_pld.__wrapped__

    @lru_cache
    def noting(*facts):
        found.append(store._inside)
        return whole(*facts)

    monkeypatch.setattr(accounting, "_epsilon_pld", noting)
    return found


@pytest.mark.parametrize("most", [1, MOST])
def test_nobody_waits_for_the_books_while_what_was_spent_is_priced(
    store, instruction, misses, most
):
    """Other workers write to the same file; a price takes as long as a small site."""
    sites = sites_of(store)
    replies = cohort_of(sites, most=most)(asked(instruction), [context_of(n) for n in range(SITES)])
    assert not any(reply.has_error() for reply in replies)
    assert misses == [False] * len(misses) != []


@pytest.mark.parametrize("most", [1, MOST])
def test_who_rests_prices_what_each_site_will_say_next(store, instruction, misses, most):
    sites = sites_of(store)
    cohort = cohort_of(sites, most=most)
    contexts = [context_of(n) for n in range(SITES)]
    cohort(asked(instruction), contexts)
    assert [cohort.rest() for _ in sites] == [True] * (SITES - 1) + [False]
    assert not cohort.rest()
    before = len(misses)
    again = replace(instruction, round=2)
    assert not any(reply.has_error() for reply in cohort(asked(again), contexts))
    assert len(misses) == before
