"""Flower's grid over a network: one reply that cannot be read ends nothing but itself."""

import threading
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from common.folding import folded
from common.messages import pack_vector
from server.aggregate import SILENT, reason_of
from server.wire import AT_ONCE, WireGrid

from .fake_grid import FakeGrid, Line


@pytest.fixture
def line(monkeypatch):
    held = Line()
    monkeypatch.setattr(HttpGrid, "_runtime_client", property(lambda _: held.client))
    return held


@pytest.fixture
def wire(line):
    """Over Flower's own grid."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    grid = HttpGrid(token="t")
    grid.set_run(Run.create_empty(1))
    return WireGrid(grid, lambda _: None)


def answering(number, content=None):
    """A reply to message m-`number`; no two alike."""
    facts = Metadata(1, f"m-{number}", 1, number + 1, "", "1", 1e9, 60.0, "train")
    content = content or RecordDict({"facts": ConfigRecord({"round": number})})
    return Message(content, reply_to=Message(RecordDict(), metadata=facts))


def all_wrong(parts, _):
    return dict.fromkeys(parts, b"not an object")


def no_message(parts, name):
    """A record where the message should be."""
    record = ConfigRecord({"round": 1})
    return {**parts, name: record.deflate()}


def one_missing(parts, name):
    return {each: part for each, part in parts.items() if each == name}


NAMES = {1: "site-1", 2: "site-2", 3: "site-3"}
ALL = ["m-1", "m-2", "m-3"]


@pytest.mark.parametrize("garbled", [all_wrong, no_message])
def test_a_reply_that_cannot_be_read_is_an_error_of_its_sender_alone(wire, line, garbled):
    for number in (1, 2, 3):
        line.holds(
            answering(number), answers=f"m-{number}", garbled=garbled if number == 2 else None
        )
    replies = {m.metadata.reply_to_message_id: m for m in wire.pull_messages(ALL)}
    assert [*replies] == ALL
    assert [replies[each].has_error() for each in ALL] == [False, True, False]
    assert reason_of(replies["m-2"]) == "the reply could not be read"
    assert line.asked == [ALL]


def test_a_reply_of_which_a_part_never_comes_is_silence_of_its_sender_alone(wire, line):
    line.holds(answering(1), answers="m-1", garbled=one_missing)
    line.holds(answering(2), answers="m-2")
    first, second = wire.pull_messages(ALL)
    assert (reason_of(first), first.metadata.reply_to_message_id) == (SILENT, "m-1")
    assert not second.has_error()


def test_what_a_reply_answers_is_what_the_superlink_says_and_not_what_it_says_itself(wire, line):
    """A site whose reply names the message of another would answer in its place."""
    line.holds(answering(1), answers="m-2")
    [reply] = wire.pull_messages(ALL)
    assert reply.metadata.reply_to_message_id == "m-2"


def test_replies_are_read_one_by_one_and_told_of_to_the_superlink(wire, line):
    names = [line.holds(answering(number), answers=f"m-{number}") for number in (1, 2)]
    coming = wire.pull_messages(ALL)
    next(coming)
    assert line.confirmed == names[:1]
    assert [reply.content["facts"]["round"] for reply in coming] == [2]
    assert line.confirmed == names


@pytest.fixture
def waits(monkeypatch):
    """The rests between two looks for a part; none is taken."""

    class Rests(threading.Event):
        def wait(self, timeout=None):
            taken.append(timeout)
            return super().wait(0)

    taken = []
    known = SimpleNamespace(Event=Rests, Lock=threading.Lock)
    monkeypatch.setattr(inflatable_utils, "threading", known)
    return taken


def test_a_part_that_is_still_on_its_way_is_asked_for_again_soon(wire, line, waits):
    """Flower's own grid would wait for 1, 2, 4, 8 and 10 s here, and everybody with it."""
    name = line.holds(answering(1), answers="m-1")
    line.not_yet[name] = 5
    [reply] = wire.pull_messages(ALL)
    assert not reply.has_error()
    assert waits == [pytest.approx(each, rel=0.21) for each in (0.1, 0.2, 0.4, 0.5, 0.5)]


def test_a_part_is_waited_for_as_long_as_its_sender_sends(wire, line, waits):
    """Flower gives up after 500 looks, which were an hour and a half, and would be four minutes."""
    name = line.holds(answering(1), answers="m-1")
    line.not_yet[name] = 600
    [reply] = wire.pull_messages(ALL)
    assert not reply.has_error()
    assert len(waits) == 600


def test_what_nobody_asked_for_is_not_fetched(wire, line):
    line.replies_to_all = True
    line.holds(answering(9), answers="", garbled=one_missing)
    line.holds(answering(8), answers="m-8")
    name = line.holds(answering(1), answers="m-1")
    [reply] = wire.pull_messages(ALL)
    assert reply.metadata.reply_to_message_id == "m-1"
    assert line.confirmed == [name]


def test_of_many_some_are_asked_for_at_once(wire, line):
    """Of an answer that is lost on its way, the replies are lost."""
    ids = [f"m-{number}" for number in range(2 * AT_ONCE + 1)]
    assert list(wire.pull_messages(ids)) == []
    assert [len(each) for each in line.asked] == [AT_ONCE, AT_ONCE, 1]
    assert [each for lot in line.asked for each in lot] == ids


def test_an_answer_that_is_none_is_not_believed(wire, line, monkeypatch):
    """As of a proxy; Flower's client raises ValueError for it."""
    line.holds(answering(1), answers="m-1")
    monkeypatch.setattr(line, "pull_object", lambda _: int("no protobuf"))
    [reply] = wire.pull_messages(ALL)
    assert reason_of(reply) == "the reply could not be read"


def test_flowers_client_has_what_is_called():
    """The contract with flwr 1.41, whose names these are."""
    assert HttpGrid(token="t").node.node_id == 1
    for name in ("PullMessages", "PullObject", "ConfirmMessageReceived"):
        assert callable(getattr(RuntimeHttpClient, name))


def test_a_network_that_fails_is_not_laid_to_a_site(wire, line):
    line.fault = httpx.ConnectError("refused")
    with pytest.raises(httpx.ConnectError):
        list(wire.pull_messages(ALL))


def test_of_nothing_new_there_is_nothing(wire):
    assert list(wire.pull_messages(ALL)) == []


def echo(_, message):
    return Message(RecordDict(), reply_to=message)


def asked(grid):
    return [Message(RecordDict(), dst_node_id=node, message_type="train") for node in grid.names]


def test_messages_go_out_in_one_call_and_none_that_was_not_taken_has_an_id():
    calls = []

    class Choosy(FakeGrid):
        def push_messages(self, messages):
            calls.append(len(messages))
            ids = super().push_messages(messages)
            return [None if n == 1 else each for n, each in enumerate(ids)]

    wire = WireGrid(Choosy(NAMES, echo), lambda _: None)
    assert wire.push_messages(asked(wire._grid)) == ["m-1", "", "m-3"]
    assert calls == [3]


def test_a_push_that_flower_gives_up_sends_nothing():
    class Full(FakeGrid):
        def push_messages(self, messages):
            return []

    grid = Full(NAMES, echo)
    assert WireGrid(grid, lambda _: None).push_messages(asked(grid)) == ["", "", ""]


def test_whoever_watches_is_told_who_is_there():
    seen = []
    wire = WireGrid(FakeGrid({5: "site-1", 6: ""}, echo), seen.append)
    assert list(wire.get_node_ids()) == [5, 6]
    assert seen == [{5: "site-1", 6: "node-6"}]


def test_small_vectors_travel_folded_and_nobody_above_sees_it(wire, line):
    content = RecordDict(
        {"vector": pack_vector(np.float32([1, 2])), "facts": ConfigRecord({"round": 1})}
    )
    grid = FakeGrid(NAMES, echo)
    WireGrid(grid, lambda _: None).push_messages(
        [Message(content, dst_node_id=node, message_type="train") for node in NAMES]
    )
    assert [[*each.content] for each in grid.pushed.values()] == [["facts"]] * 3
    line.holds(answering(1, folded(content)), answers="m-1")
    [reply] = wire.pull_messages(ALL)
    assert {**reply.content} == {**content}
