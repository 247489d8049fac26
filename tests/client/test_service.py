"""A node's patience, its records, and what it makes of an instruction that was left over."""

import errno
import logging
import os
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from client import service
from client.fleet import NotAdmittedError, NotReachedError, Parcel, RunOverError, UnreachableError
from client.inbox import Inbox
from client.ledger import Ledger, Store, Terms
from client.service import FIRST_DELAY_S, MAX_DELAY_S, Line, Node, open_site
from client.settings import NODE
from client.site import Site
from common import messages, parameters
from common.cli import Invocation
from common.composition import run_with
from common.config import NodeConfig, NoiseSource
from common.errors import ConfigError, FederationError
from common.folding import folded, unfold
from common.log_lines import OneLine
from common.messages import Instruction, pack_instruction
from common.parameters import Layout
from common.privacy import accounting
from common.privacy.mechanism import round_event
from common.tasks import build_model


class Clock(threading.Event):
    """Remembers how long it was waited for, and does not wait."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def wait(self, timeout=None):
        self.waited.append(timeout)
        return self.is_set()


@pytest.fixture
def settings(tiny_csv, tmp_path):
    """Of a node on the suite's records."""
    got = []
    words = (
        *("name=site-1", "superlink=127.0.0.1:1", "authority=ca.crt", "key=node.key"),
        *(f"ledger={tmp_path / 'books.db'}", f"data.path={tiny_csv}", "data.labels=[sport,money]"),
    )
    run_with(NODE, got.append, Invocation("node", words, json=False))
    return got[0]


@pytest.fixture
def store(settings):
    with Store.create(Path(settings.ledger)) as made:
        yield made


@pytest.fixture
def line(settings):
    return Line(settings, Clock())


def failing(times, error=UnreachableError):
    """A call that succeeds after so many failures."""
    left = [times]

    def call():
        if left[0]:
            left[0] -= 1
            raise error("nobody there")
        return "answer"

    return call


def test_a_call_is_repeated_ever_more_slowly_until_somebody_answers(line, caplog):
    assert line.call(failing(12)) == "answer"
    waited = line.stopping.waited
    assert len(waited) == 12
    longest = [min(FIRST_DELAY_S * 2**n, MAX_DELAY_S) for n in range(12)]
    assert all(most / 2 <= each <= most for each, most in zip(waited, longest, strict=True))
    assert len({round(each / most, 6) for each, most in zip(waited, longest, strict=True)}) > 6
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(": ", 1)[1] for line in said] == [
        "nobody there; trying again until it is otherwise",
        "the coordinator answers again, after 0 s",
    ]


def test_every_wait_ends(settings, monkeypatch):
    """By patience, by the deadline of what is waited for, or because the node is to stop."""
    seconds = iter(range(1000))
    monkeypatch.setattr(service, "monotonic", lambda: float(next(seconds)))
    impatient = Line(replace(settings, patience_s=5.0), Clock())
    with pytest.raises(FederationError, match=r"gave up after 5 s \(patience_s\)"):
        impatient.call(failing(10**6))
    patient = Line(settings, Clock())
    with pytest.raises(RunOverError):
        patient.call(failing(10**6), until=float(next(seconds) + 20))
    patient.stopping.set()
    with pytest.raises(UnreachableError):
        patient.call(failing(10**6))


def test_what_will_not_pass_is_raised_at_once(line):
    with pytest.raises(NotAdmittedError):
        line.call(failing(1, NotAdmittedError))
    assert line.stopping.waited == []


def test_every_row_of_a_nodes_file_is_private_and_under_its_ledger(settings, store, tiny_csv):
    ledger = store.open("site-1", Terms("trial", 8.0, 1e-3, "1" * 64))
    site = open_site(settings, ledger)
    assert len(site.records) == len(tiny_csv.read_text().splitlines()) - 1
    assert (site.name, site.classes) == ("site-1", ("sport", "money"))
    assert site.policy == settings.node
    assert [entry.kind.value for entry in ledger.entries()] == ["GENESIS", "DATASET"]
    open_site(settings, ledger)
    assert ledger.head.seq == 2  # the same records are bound once


def test_records_of_another_ledger_of_the_file_are_refused(settings, store):
    terms = Terms("trial", 8.0, 1e-3, "1" * 64)
    open_site(settings, store.open("site-2", terms))
    ledger = store.open("site-1", terms)
    with pytest.raises(ConfigError, match="under #site-2"):
        open_site(settings, ledger)
    assert ledger.head.seq == 1


def test_a_ledger_of_persons_needs_their_column(settings, store):
    ledger = store.open("site-1", Terms("trial", 8.0, 1e-3, "1" * 64, "person"))
    with pytest.raises(ConfigError, match=r"data\.person_column=''"):
        open_site(settings, ledger)


@pytest.mark.parametrize("state", ["nothing", "reserved", "lost", "prepared", "released"])
def test_only_a_round_that_was_charged_and_not_prepared_is_reported_lost(
    settings, store, tiny_config, tmp_path, state
):
    """The coordinator then pays for another attempt; what was prepared is sent as it is."""
    ledger = store.open("site-1", Terms("trial", 100.0, 1e-3, "1" * 64))
    event = round_event(tiny_config)
    ledger.commit("run", event, rounds=2, spare_rounds=1, plan="0" * 64, model="m", unit="record")
    if state != "nothing":
        at = ledger.reserve("run", 1, event)
        if state in ("prepared", "released"):
            ledger.prepare(at, b"update", steps=event.steps)
        if state == "released":
            ledger.release(at)
        if state == "lost":
            ledger.lose(at)
    model = build_model(tiny_config)
    layout, vector = Layout.of(model), parameters.flatten(model)
    content = pack_instruction(Instruction("run", 1, tiny_config, layout.digest, vector))
    facts = Metadata(7, "m-1", 1, 2, "", "1", 1_800_000_000.0, 60.0, "train")
    inbox = Inbox(tmp_path / "inbox")
    site = Site("site-1", open_site(settings, None).records, ("sport", "money"), ledger)
    node = Node(settings, site, None, Line(settings, Clock()), inbox)
    assert node._was_lost(Message(content, metadata=facts)) is (state in ("reserved", "lost"))
    inbox.close()


@pytest.mark.parametrize(
    "case",
    [
        ({}, {}, None),
        ({}, {"noise": NoiseSource.seeded}, messages.INVALID_INSTRUCTION),
        ({"allow_unprotected": True}, {"noise": NoiseSource.seeded}, None),
        ({"node": NodeConfig(max_epsilon=0.1)}, {}, messages.AGAINST_POLICY),
    ],
    ids=["private", "seeded", "seeded, and allowed by the site", "against the site's policy"],
)
def test_the_sites_own_settings_decide_whatever_a_coordinator_writes(
    settings, store, tiny_config, tmp_path, case
):
    """The coordinator's idea of a policy travels with its config, and is not read."""
    own, asked, code = case
    settings = replace(settings, **{"node": NodeConfig(), **own})
    ledger = store.open("site-1", Terms("trial", 100.0, 1e-3, "1" * 64))
    site = open_site(settings, ledger)
    before, inbox = ledger.head, Inbox(tmp_path / "inbox")
    config = replace(
        tiny_config, privacy=replace(tiny_config.privacy, **asked), node=NodeConfig(max_epsilon=1e9)
    )
    model = build_model(config)
    layout, vector = Layout.of(model), parameters.flatten(model)
    content = pack_instruction(Instruction("run", 1, config, layout.digest, vector))
    facts = Metadata(7, "m-1", 1, 2, "", "1", 1_800_000_000.0, 60.0, "train")
    node = Node(settings, site, None, Line(settings, Clock()), inbox)
    reply = node._app(Message(content, metadata=facts), Context(7, 2, {}, RecordDict(), {}))
    assert (reply.error.code if reply.has_error() else None) == code
    assert (ledger.head == before) is (code is not None)
    inbox.close()


def test_what_the_next_answer_says_is_priced_while_nothing_is_asked(
    settings, store, tiny_config, tmp_path, monkeypatch
):
    """Half a second of each round in which a coordinator would wait; and what it freed is given
    back, or a node would grow by a third of a megabyte a round.
    """
    trimmed = []
    monkeypatch.setattr(service, "trim_freed_memory", lambda: trimmed.append(True))
    ledger = store.open("site-1", Terms("trial", 100.0, 1e-3, "1" * 64))
    event = replace(round_event(tiny_config), noise_multiplier=2.125)  # priced by nobody before
    ledger.commit("run", event, rounds=3, spare_rounds=0, plan="0" * 64, model="m", unit="record")
    inbox = Inbox(tmp_path / "inbox")
    site = Site("site-1", open_site(settings, None).records, ("sport", "money"), ledger)
    node = Node(settings, site, None, Line(settings, Clock()), inbox)
    for number in (1, 2, 3):
        at = ledger.reserve("run", number, event)
        before = accounting._epsilon_pld.cache_info().misses
        ledger.books.spent()
        priced = accounting._epsilon_pld.cache_info().misses - before
        assert priced == (1 if number == 1 else 0)
        ledger.prepare(at, b"update", steps=event.steps)
        ledger.release(at)
        node._rest()
        node._rest()
        assert len(trimmed) == number
    inbox.close()


class Kept:
    """An instruction on its way."""

    def __init__(self, content):
        facts = Metadata(7, "m-1", 1, 2, "", "1", 1_800_000_000.0, 60.0, "train")
        self.root, self._whole = "m-1", Message(content, metadata=facts)
        self.envelope = b""

    def message(self):
        return self._whole

    addressed = message


@pytest.fixture
def asked(tiny_config):
    model = build_model(tiny_config)
    layout, vector = Layout.of(model), parameters.flatten(model)
    config = replace(tiny_config, privacy=replace(tiny_config.privacy, spare_rounds=1))
    instruction = Instruction("run", 1, config, layout.digest, vector)
    return Kept(pack_instruction(instruction))


@pytest.fixture
def node(settings, store, tmp_path):
    """A node whose coordinator takes everything."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 1
    ledger = store.open("site-1", Terms("trial", 100.0, 1e-3, "1" * 64))
    site = Site("site-1", open_site(settings, None).records, ("sport", "money"), ledger)
    inbox, sent = Inbox(tmp_path / "inbox"), []
    fleet = SimpleNamespace(
        node_id=2, confirm=lambda *_: None, send=lambda reply, *_: sent.append(reply)
    )
    yield Node(replace(settings, threads=1), site, fleet, Line(settings, Clock()), inbox), sent
    inbox.close()


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "books.db")


def test_a_full_disk_costs_an_attempt_and_not_the_round(node, asked, monkeypatch):
    """The ledger could not even say that the attempt was lost; asked again, the node says it."""
    one, _ = node
    ledger = one._site.ledger
    with monkeypatch.context() as disk:
        disk.setattr(Ledger, "prepare", full)
        disk.setattr(Ledger, "lose", full)
        disk.setattr(Ledger, "lose_unfinished", full)
        one._answer(asked)
        # It is full still: the node refuses once more, and stays.
        again = one._reply(asked, asked.addressed(), left_over=False)
        assert again.error.code == messages.LOCAL_FAILURE
    assert [each.state for each in ledger.books.reservations.values()] == ["reserved"]
    reply = one._reply(asked, asked.addressed(), left_over=False)
    assert not reply.has_error()
    assert [each.state for each in ledger.books.reservations.values()] == ["lost", "released"]


def test_an_instruction_that_cannot_be_kept_is_refused_and_not_begun(node, asked, monkeypatch):
    """The node stays: another one it may have room for."""
    one, sent = node
    fleet = one._fleet
    fleet.receive, fleet.fetch = (lambda: (b"", None)), (lambda *_: asked)
    monkeypatch.setattr(service, "run_of", lambda _: 7)
    monkeypatch.setattr(Inbox, "put", full)
    assert one._receive() is None
    assert [reply.error.code for reply in sent] == [messages.LOCAL_FAILURE]
    assert one._site.ledger.books.reservations == {}


@pytest.fixture
def away(node, monkeypatch):
    """A node, what its SuperLink answers next, and how long the node was away, each time."""
    one, _ = node
    answers, absences = [], []

    def receive():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def step_away(rest):
        before = len(waited := one._line.stopping.waited)
        rest()
        absences.extend(waited[before:])

    one._fleet.receive, one._fleet.step_away = receive, step_away
    one._fleet.fetch = lambda *_: Parcel(b"", "root", {})
    monkeypatch.setattr(service, "run_of", lambda _: 7)
    return one, answers, absences


def test_where_an_instruction_may_have_been_lost_the_coordinator_hears_of_it(away):
    one, answers, absences = away
    answers += [None, None]
    assert one._receive() is one._receive() is None
    assert absences == []  # each look was answered
    one._inbox.asking()  # by an earlier process, which died there
    answers += [None, None]
    assert one._receive() is one._receive() is None
    assert absences == [service.STAY_S]  # once


def test_a_look_whose_answer_was_lost_on_the_line_is_such_a_case(away):
    one, answers, absences = away
    answers += [UnreachableError("cut"), None, None]
    assert one._receive() is one._receive() is None
    assert absences == [service.STAY_S]


@pytest.mark.parametrize("error", [NotReachedError("nobody"), NotAdmittedError("not now")])
def test_a_look_that_did_not_get_there_lost_nothing(away, error):
    one, answers, absences = away
    answers += [error, None, None]
    with suppress(NotAdmittedError):
        one._receive()
    assert not one._inbox.unsure
    while answers:
        one._receive()
    assert absences == []
    one._inbox.asking()  # what was in doubt before is so still
    answers += [NotAdmittedError("not now")]
    with suppress(NotAdmittedError):
        one._receive()
    assert one._inbox.unsure


def test_what_comes_at_the_next_look_was_not_lost(away):
    one, answers, absences = away
    answers += [UnreachableError("cut"), (b"", None), None]
    assert one._receive() is not None
    one._inbox.clear()
    assert one._receive() is None
    assert absences == []


def test_a_line_of_the_log_is_one_line_whatever_a_coordinator_writes():
    formatter = OneLine("%(message)s")
    record = logging.LogRecord("n", logging.INFO, "p", 1, "model %s", ("a\nb\x1b[2Jc",), None)
    assert formatter.format(record) == "model a b [2Jc"


def test_a_reply_says_nothing_of_the_nodes_clock():
    facts = Metadata(7, "m-1", 1, 2, "", "1", 1_800_000_000.0, 60.0, "train")
    asked = Message(messages.RecordDict(), metadata=facts)
    reply = service._dated(Message(Error(603, "local failure"), reply_to=asked), asked)
    assert (reply.metadata.created_at, reply.metadata.ttl) == (1_800_000_000.0, 60.0)


@pytest.mark.parametrize("folds", [True, False])
def test_an_answer_travels_as_its_instruction_did(node, asked, folds):
    one, _ = node
    if folds:
        asked._whole.content = folded(asked._whole.content)
    reply = one._reply(asked, asked.addressed(), left_over=False)
    assert unfold(reply) == folds
    assert messages.read_update(reply).round == 1


def test_a_folded_answer_that_is_made_again_is_the_same_to_the_last_part(node, asked):
    """Flower names a message by its bytes: another name would be a second answer."""
    one, _ = node
    asked._whole.content = folded(asked._whole.content)
    names = []
    for _ in range(2):
        reply = service._dated(
            one._reply(asked, asked.addressed(), left_over=False), asked.addressed()
        )
        names.append([*get_all_nested_objects(reply)])
        asked._whole.content = folded(asked._whole.content)
    assert len(names[0]) == 3
    assert names[0] == names[1]


def test_of_a_folded_instruction_a_lost_attempt_is_known(node, asked, monkeypatch):
    one, _ = node
    with monkeypatch.context() as disk:
        disk.setattr(Ledger, "prepare", full)
        disk.setattr(Ledger, "lose", full)
        one._answer(asked)
    asked._whole.content = folded(asked._whole.content)
    again = one._reply(asked, asked.addressed(), left_over=True)
    assert again.error.code == messages.LOCAL_FAILURE
    assert [each.state for each in one._site.ledger.books.reservations.values()] == ["lost"]


def test_a_witness_is_told_once_the_answer_has_left_and_whenever_nothing_is_asked(node, asked):
    one, sent = node
    told = []
    one._anchor = SimpleNamespace(keep_up=lambda: told.append(len(sent)))
    one._answer(asked)
    assert told == [1]
    one._rest()
    assert told == [1, 1]


def test_rows_that_are_left_out_are_told_to_the_sites_operator_alone(settings, tmp_path, caplog):
    """In the node's own log; how many there are is private, and in nothing that leaves the site."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"goal {n},sport\n" for n in range(9)) + " ,sport\n")
    with caplog.at_level(logging.INFO, logger=service.__name__):
        records = service.read_records(
            replace(settings, data=replace(settings.data, path=str(path)))
        )
    assert len(records) <= 9
    assert caplog.messages == ["site-1: data: rows: 1 without a text left out"]
