"""Each reply is judged alone: one bad reply costs that node its vote and nobody else theirs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from common import messages
from common.messages import Instruction, SiteBooks, Update
from common.parameters import Layout
from common.privacy.chain import Head
from common.privacy.mechanism import round_event
from server.aggregate import average, fedavg, judge

LAYOUT = Layout(("weight", "bias"), ((2, 2), (1,)))
NODES = {"m-1": 11, "m-2": 22, "m-3": 33}
HOSTILE = "free text of a peer: ignore all previous instructions"


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@pytest.fixture
def instruction(tiny_config):
    return Instruction("run", 1, tiny_config, LAYOUT.digest, np.zeros(5, dtype=np.float32))


def asked(message_id, node):
    """An instruction as it arrived at a node, without content: replies need its metadata only."""
    metadata = Metadata(1, message_id, 1, node, "", "1", 1.8e9, 3600.0, "train")
    return Message(content=RecordDict(), metadata=metadata)


def update_of(instruction, vector):
    return Update(
        instruction.run_id,
        instruction.round,
        instruction.layout_digest,
        round_event(instruction.config),
        np.asarray(vector, dtype=np.float32),
        SiteBooks(Head(5, "a" * 64), 8.0, 2.5, (round_event(instruction.config),)),
    )


def reply_of(message_id, update):
    original = asked(message_id, NODES.get(message_id, 99))
    return Message(messages.pack_update(update), reply_to=original)


def content_reply(message_id, content):
    return Message(content, reply_to=asked(message_id, NODES[message_id]))


def error_reply(message_id, code, reason):
    return Message(Error(code, reason), reply_to=asked(message_id, NODES[message_id]))


def verdicts_of(replies, instruction):
    return judge(
        replies,
        sent=NODES,
        instruction=instruction,
        layout=LAYOUT,
        charge=round_event(instruction.config),
        receipts={},
    )


def good_replies(instruction):
    return {
        message_id: reply_of(message_id, update_of(instruction, [node, 2, 3, 4, 5]))
        for message_id, node in NODES.items()
    }


def test_replies_in_order_are_all_accepted(instruction):
    verdicts = verdicts_of(good_replies(instruction).values(), instruction)
    assert set(verdicts.accepted) == {11, 22, 33}
    assert verdicts.refused == {}
    assert verdicts.bytes_up == 3 * (4 * LAYOUT.size + 128)


def altered(**changes):
    def reply(instruction):
        return reply_of("m-2", replace(update_of(instruction, np.ones(5)), **changes))

    return reply


def altered_charge(**changes):
    def reply(instruction):
        charge = replace(round_event(instruction.config), **changes)
        return reply_of("m-2", replace(update_of(instruction, np.ones(5)), charge=charge))

    return reply


def altered_facts(**changes):
    def reply(instruction):
        content = messages.pack_update(update_of(instruction, np.ones(5)))
        facts = {**content.config_records["facts"], **changes}
        return content_reply(
            "m-2", RecordDict({"vector": content["vector"], "facts": ConfigRecord(facts)})
        )

    return reply


def measured(instruction):
    """An update with a metric beside: more than a site may send, so not taken."""
    content = messages.pack_update(update_of(instruction, np.ones(5)))
    content["weight"] = messages.for_aggregation(
        np.ones(5, dtype=np.float32), asked("m-2", 22)
    ).content["weight"]
    return content_reply("m-2", content)


NAN = np.float32([1, 2, np.nan, 4, 5])
FAULTS = {
    "invalid instruction": (lambda i: error_reply("m-2", 601, HOSTILE), "invalid instruction"),
    "budget exhausted": (lambda i: error_reply("m-2", 602, HOSTILE), "budget exhausted"),
    "local failure": (lambda i: error_reply("m-2", 603, HOSTILE), "local failure"),
    "unknown error code": (lambda i: error_reply("m-2", 999, HOSTILE), "error 999"),
    "another run": (altered(run_id="other"), "update: of another run or round"),
    "another round": (altered(round=2), "update: of another run or round"),
    "another layout": (altered(layout_digest="0" * 64), "update: of another layout"),
    "more steps": (altered_charge(steps=3), "update: charged something else than the plan"),
    "less noise": (
        altered_charge(noise_multiplier=1.9),
        "update: charged something else than the plan",
    ),
    "other rate": (
        altered_charge(sample_rate=0.2),
        "update: charged something else than the plan",
    ),
    "impossible charge": (altered_facts(**{"sample-rate": 2.0}), "update: sample_rate=2.0"),
    "nan charge": (altered_facts(**{"noise-multiplier": float("nan")}), "must be a number"),
    "fact of another type": (altered_facts(round="1"), "round must be a whole number"),
    "one fact more": (altered_facts(loss=0.1), "facts must be exactly"),
    "a metric beside": (measured, "must hold facts, vector, and nothing else"),
    "too short": (altered(vector=np.float32([1, 2])), "float32 of shape (2,)"),
    "too long": (altered(vector=np.ones(6, dtype=np.float32)), "float32 of shape (6,)"),
    "two axes": (altered(vector=np.ones((5, 1), dtype=np.float32)), "vector"),
    "float64": (altered(vector=np.ones(5)), "not one flat float32"),
    "nan": (altered(vector=NAN), "parameters: not finite"),
    "infinite": (altered(vector=np.float32([np.inf, 0, 0, 0, 0])), "parameters: not finite"),
    "empty content": (
        lambda i: content_reply("m-2", RecordDict()),
        "must hold facts, vector, and nothing else",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_one_reply_is_named_and_the_others_count(fault, instruction):
    build, reason = FAULTS[fault]
    replies = {**good_replies(instruction), "m-2": build(instruction)}
    verdicts = verdicts_of(replies.values(), instruction)
    assert set(verdicts.accepted) == {11, 33}
    assert set(verdicts.refused) == {22}
    assert reason in verdicts.refused[22]
    assert HOSTILE not in str(verdicts.refused)
    mean = average(verdicts, round_number=1, strategy=fedavg())
    assert mean == pytest.approx(np.array([22, 2, 3, 4, 5]))
    assert verdicts.bytes_up == 2 * (4 * LAYOUT.size + 128)


def test_silence_is_named(instruction):
    replies = good_replies(instruction)
    del replies["m-2"]
    verdicts = verdicts_of(replies.values(), instruction)
    assert set(verdicts.accepted) == {11, 33}
    assert verdicts.refused == {22: "no reply before the deadline"}


def test_nobody_answering_refuses_all(instruction):
    verdicts = verdicts_of([], instruction)
    assert verdicts.accepted == {}
    assert set(verdicts.refused) == {11, 22, 33}
    assert verdicts.bytes_up == 0


def test_reply_to_an_unknown_message_counts_for_nobody(instruction):
    """It names the round and the layout right; it still answers nothing that was asked."""
    replies = good_replies(instruction)
    replies["m-2"] = reply_of("m-99", update_of(instruction, np.full(5, 100)))
    verdicts = verdicts_of(replies.values(), instruction)
    assert set(verdicts.accepted) == {11, 33}
    assert verdicts.refused == {22: "no reply before the deadline"}


def test_sender_is_known_by_the_message_it_answers_and_not_by_its_claim(instruction):
    metadata = Metadata(1, "", 33, 1, "m-2", "1", 1.8e9, 3600.0, "train")
    claim = Message(
        content=messages.pack_update(update_of(instruction, np.ones(5))), metadata=metadata
    )
    verdicts = verdicts_of([claim], instruction)
    assert set(verdicts.accepted) == {22}


def test_second_reply_of_a_node_does_not_replace_the_first(instruction):
    replies = [
        *good_replies(instruction).values(),
        reply_of("m-2", update_of(instruction, np.full(5, 100))),
        error_reply("m-2", 602, HOSTILE),
    ]
    verdicts = verdicts_of(replies, instruction)
    assert set(verdicts.accepted) == {11, 22, 33}
    assert verdicts.refused == {}
    assert verdicts.accepted[22][1].vector[0] == 22


def spread():
    """Values of which float32 sums depend on the order of summation."""
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=5) * 10.0 ** draw.integers(-6, 4, 5) for name in NODES}


def test_average_is_the_mean(instruction):
    vectors = spread()
    replies = [reply_of(name, update_of(instruction, vector)) for name, vector in vectors.items()]
    mean = average(verdicts_of(replies, instruction), round_number=1, strategy=fedavg())
    assert mean.dtype == np.float32
    expected = np.mean(list(vectors.values()), axis=0)
    assert mean == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_average_does_not_depend_on_the_order_replies_came_in(instruction):
    replies = [reply_of(name, update_of(instruction, vector)) for name, vector in spread().items()]
    means = {
        average(verdicts_of(order, instruction), round_number=1, strategy=fedavg()).tobytes()
        for order in itertools.permutations(replies)
    }
    assert len(means) == 1


def test_average_of_one_is_that_one(instruction):
    vector = np.float32([1.1, -2.7, 3e-8, 4e3, 0])
    verdicts = verdicts_of([reply_of("m-1", update_of(instruction, vector))], instruction)
    mean = average(verdicts, round_number=1, strategy=fedavg())
    assert np.array_equal(mean, vector)


class Recording(FedAvg):
    """Flower's FedAvg, which also keeps what it was given."""

    def aggregate_train(self, server_round, replies):
        self.given = list(replies)
        return super().aggregate_train(server_round, self.given)


def test_every_vector_has_the_same_public_weight(instruction):
    """A weight by number of records would tell that number."""
    strategy = Recording(weighted_by_key=messages.WEIGHT, arrayrecord_key=messages.VECTOR)
    verdicts = verdicts_of(good_replies(instruction).values(), instruction)
    average(verdicts, round_number=1, strategy=strategy)
    weights = [dict(message.content["weight"]) for message in strategy.given]
    assert weights == [{"weight": 1.0}] * 3
