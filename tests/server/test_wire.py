"""Flower's grid over a network: one reply that cannot be read ends nothing but itself."""

import httpx
import pytest
from flwr.app import Message, RecordDict

from server.aggregate import reason_of
from server.wire import WireGrid

from .fake_grid import FakeGrid


class Garbled(FakeGrid):
    """As Flower's: it raises for a whole batch in which one reply is no message, and has then
    let go of all of them.
    """

    def __init__(self, names, answer, error):
        super().__init__(names, answer)
        self.error = error

    def pull_messages(self, message_ids):
        wanted = list(message_ids)
        garbled = any(self.pushed[each].metadata.dst_node_id == 2 for each in wanted)
        replies = super().pull_messages(wanted)
        if garbled and replies:
            raise self.error
        return replies


def echo(_, message):
    return Message(RecordDict(), reply_to=message)


def asked(grid):
    return [Message(RecordDict(), dst_node_id=node, message_type="train") for node in grid.names]


NAMES = {1: "site-1", 2: "site-2", 3: "site-3"}


@pytest.mark.parametrize("error", [ValueError("no array"), TypeError("x"), KeyError("y")])
def test_a_reply_that_cannot_be_read_is_an_error_of_its_sender_alone(error):
    grid = Garbled(NAMES, echo, error)
    wire = WireGrid(grid, lambda _: None)
    ids = wire.push_messages(asked(grid))
    replies = {m.metadata.reply_to_message_id: m for m in wire.pull_messages(ids)}
    assert set(replies) == set(ids)
    assert [replies[each].has_error() for each in ids] == [False, True, False]
    assert reason_of(replies[ids[1]]) == "the reply could not be read"


def test_a_network_that_fails_is_not_laid_to_a_site():
    grid = Garbled(NAMES, echo, httpx.ConnectError("refused"))
    wire = WireGrid(grid, lambda _: None)
    ids = wire.push_messages(asked(grid))
    with pytest.raises(httpx.ConnectError):
        wire.pull_messages(ids)


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
