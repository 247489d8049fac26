"""LocalGrid keeps the contract of Flower's Grid: what runs over it would run over a SuperLink."""

import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from simulations.grid import LocalGrid

NAMES = ["site-1", "site-2", "site-3"]


class Counting:
    """A real ClientApp that adds its partition's number to what it gets, and counts its calls."""

    def __init__(self):
        self.calls = []
        self.app = ClientApp()

        @self.app.train()
        def train(message, context):
            partition = context.node_config["partition-id"]
            self.calls.append(partition)
            values = message.content["arrays"]["w"].numpy() + partition
            return self.reply(message, {"w": Array(values)}, {"num-examples": 1.0})

        @self.app.evaluate()
        def evaluate(message, context):
            mean = float(message.content["arrays"]["w"].numpy().mean())
            return self.reply(message, {}, {"num-examples": 1.0, "mean": mean})

    def reply(self, message, arrays, metrics):
        content = {"metrics": MetricRecord(metrics)}
        if arrays:
            content["arrays"] = ArrayRecord(arrays)
        return Message(RecordDict(content), reply_to=message)


@pytest.fixture
def counting():
    return Counting()


@pytest.fixture
def grid(counting):
    return LocalGrid(counting.app, NAMES)


def outgoing(grid, values=0.0):
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.full(3, values))})})
    return [Message(content, node, "train") for node in grid.get_node_ids()]


def test_grid_is_a_grid_of_flower(grid):
    assert isinstance(grid, Grid)


def test_unmodified_fedavg_runs_over_it(grid):
    """Partitions add 0, 1 and 2, so that each round adds 1 to the mean."""
    result = FedAvg(min_train_nodes=3, min_evaluate_nodes=3, min_available_nodes=3).start(
        grid, ArrayRecord({"w": Array(np.zeros(3))}), num_rounds=3, timeout=30
    )
    assert result.arrays["w"].numpy() == pytest.approx(np.full(3, 3.0))
    means = [result.evaluate_metrics_clientapp[number]["mean"] for number in (1, 2, 3)]
    assert means == pytest.approx([1.0, 2.0, 3.0])


def test_nodes_have_their_names_and_ids_apart_from_the_coordinator(grid):
    nodes = {node.node_id: node.name for node in grid.get_nodes()}
    assert list(nodes.values()) == NAMES
    assert list(nodes) == list(grid.get_node_ids())
    assert len(set(nodes)) == 3
    assert 1 not in nodes


def test_ids_are_unique_over_all_pushes(grid):
    ids = [identity for _ in range(4) for identity in grid.push_messages(outgoing(grid))]
    assert len(set(ids)) == len(ids) == 12
    assert all(ids)


def test_pushing_takes_any_iterable(grid):
    assert len(list(grid.push_messages(iter(outgoing(grid))))) == 3


def test_every_message_is_answered_once(grid, counting):
    ids = list(grid.push_messages(outgoing(grid)))
    replies = [reply for _ in range(6) for reply in grid.pull_messages(ids)]
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    assert counting.calls == [0, 1, 2]


def test_only_the_messages_asked_for_are_answered(grid, counting):
    ids = list(grid.push_messages(outgoing(grid)))
    (reply,) = grid.pull_messages([ids[1]])
    assert reply.metadata.reply_to_message_id == ids[1]
    assert list(grid.pull_messages([ids[1]])) == []
    assert list(grid.pull_messages(["unknown"])) == []
    assert list(grid.pull_messages([])) == []
    assert counting.calls == [1]


def test_one_pull_handles_one_site(grid, counting):
    """So that a deadline can pass between two sites."""
    ids = list(grid.push_messages(outgoing(grid)))
    assert len(list(grid.pull_messages(ids))) == 1
    assert counting.calls == [0]


def test_nothing_is_computed_before_it_is_pulled(grid, counting):
    grid.push_messages(outgoing(grid))
    assert counting.calls == []


def test_reply_comes_from_the_node_that_was_asked(grid):
    replies = grid.send_and_receive(outgoing(grid))
    assert [reply.metadata.src_node_id for reply in replies] == grid.get_node_ids()
    assert {reply.metadata.dst_node_id for reply in replies} == {1}
    values = [reply.content["arrays"]["w"].numpy()[0] for reply in replies]
    assert values == [0, 1, 2]


def test_message_keeps_what_the_sender_wrote_on_it(grid, counting):
    seen = []
    app = ClientApp()

    @app.train()
    def train(message, context):
        seen.append(message.metadata)
        return counting.reply(message, {}, {})

    content = RecordDict({"config": ConfigRecord({"a": 1})})
    local = LocalGrid(app, ["site-1"])
    (node,) = local.get_node_ids()
    local.send_and_receive([Message(content, node, "train", ttl=12.5, group_id="7")])
    assert (seen[0].ttl, seen[0].group_id, seen[0].message_type) == (12.5, "7", "train")
    assert seen[0].dst_node_id == node
    assert seen[0].message_id


def test_deprecated_way_to_make_a_message_makes_the_same(grid):
    node = grid.get_node_ids()[0]
    made = grid.create_message(RecordDict(), "train", node, "3", ttl=9.0)
    assert (made.metadata.dst_node_id, made.metadata.group_id) == (node, "3")
    assert (made.metadata.message_type, made.metadata.ttl) == ("train", 9.0)


def test_no_time_gives_no_replies(grid, counting):
    assert list(grid.send_and_receive(outgoing(grid), timeout=0)) == []
    assert counting.calls == []


def test_deadline_passes_between_sites(grid, counting):
    slow = ClientApp()

    @slow.train()
    def train(message, context):
        time.sleep(0.1)
        return counting.reply(message, {}, {})

    local = LocalGrid(slow, NAMES)
    assert len(list(local.send_and_receive(outgoing(local), timeout=0.05))) == 1


def test_error_reply_is_carried_like_any_other():
    app = ClientApp()

    @app.train()
    def train(message, context):
        return Message(Error(602, "budget exhausted"), reply_to=message)

    local = LocalGrid(app, NAMES)
    replies = local.send_and_receive(outgoing(local))
    assert [reply.error.code for reply in replies] == [602] * 3


def test_context_of_a_site_lives_as_long_as_the_grid():
    """Flower keeps a node's state from one message to the next."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        known = context.state.metric_records.get("calls", MetricRecord({"n": 0}))
        context.state["calls"] = MetricRecord({"n": known["n"] + 1})
        metrics = RecordDict({"metrics": context.state["calls"]})
        return Message(metrics, reply_to=message)

    local = LocalGrid(app, NAMES)
    local.send_and_receive(outgoing(local))
    replies = local.send_and_receive(outgoing(local))
    assert [reply.content["metrics"]["n"] for reply in replies] == [2, 2, 2]
