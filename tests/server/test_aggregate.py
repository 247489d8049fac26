"""Each reply is judged alone: one bad reply costs that node its vote and nobody else theirs."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from common import messages
from common.coding import coded_bytes, encoded
from common.config import Coding
from common.messages import Instruction, SiteBooks, Update
from common.parameters import Layout
from common.privacy.chain import Head
from common.privacy.mechanism import round_event
from common.privacy.noise import Randomness
from server.aggregate import Judge
from server.strategy import Summed

LAYOUT = Layout(("weight", "bias"), ((2, 2), (1,)))
NODES = {"m-1": 11, "m-2": 22, "m-3": 33, "m-4": 11}
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


def judged(replies, instruction):
    """The verdicts on replies, and the sum of the accepted updates."""
    gathered = Summed(LAYOUT.size, capacity=3)
    judge = Judge(
        gathered,
        sent=NODES,
        instruction=instruction,
        layout=LAYOUT,
        charges=dict.fromkeys(NODES.values(), round_event(instruction.config)),
        receipts={},
    )
    for reply in replies:
        judge.read(reply)
    return judge.verdicts(), gathered.sum


def verdicts_of(replies, instruction):
    return judged(replies, instruction)[0]


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


@pytest.mark.parametrize("coding", [Coding.float16, Coding.int8])
def test_coded_updates_are_decoded_judged_and_counted(instruction, coding):
    federation = replace(instruction.config.federation, coding=coding)
    config = replace(instruction.config, federation=federation)
    instruction = replace(instruction, config=config, vector=np.float32([1, 2, 3, 4, 5]))

    def reply(message_id, vector, **changes):
        update = update_of(instruction, vector)
        data = encoded(update.vector, instruction.vector, coding, Randomness.seeded("coded"))
        return reply_of(message_id, replace(update, **{"coded": data, **changes}))

    spoilt = [
        reply("m-1", [1.5, 2, 3, 4, 6]),
        reply("m-2", np.ones(5), coded=None),
        reply("m-3", np.ones(5), coded=b"123456"),
    ]
    verdicts, total = judged(spoilt, instruction)
    assert verdicts.accepted == {11}
    assert verdicts.refused == {
        22: "message: not one coded vector",
        33: f"update: not 5 parameters in {coding.name}",
    }
    assert verdicts.bytes_up == coded_bytes(5, coding) + 128
    assert np.allclose(total.mean(), [1.5, 2, 3, 4, 6], atol=0.01)


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
    content["weight"] = messages.for_aggregation(np.ones(5, dtype=np.float32)).content["weight"]
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
    verdicts, total = judged(replies.values(), instruction)
    assert verdicts.accepted == {11, 33}
    assert set(verdicts.refused) == {22}
    assert reason in verdicts.refused[22]
    assert HOSTILE not in str(verdicts.refused)
    mean = total.mean()
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
    assert verdicts.accepted == set()
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
    verdicts, total = judged(replies, instruction)
    assert verdicts.accepted == {11, 22, 33}
    assert verdicts.refused == {}
    assert total.mean()[0] == 22
    assert verdicts.bytes_up == 3 * (4 * LAYOUT.size + 128)


def test_a_site_that_failed_first_and_answered_then_is_accepted(instruction):
    """A spare round pays for a second message to a node; either reply may come first."""
    good, failed = reply_of("m-1", update_of(instruction, np.ones(5))), error_reply("m-4", 603, "")
    for replies in ([good, failed], [failed, good]):
        verdicts = verdicts_of(replies, instruction)
        assert verdicts.accepted == {11}
        assert set(verdicts.refused) == {22, 33}


def test_updates_are_let_go_as_they_come(instruction):
    """So that memory does not grow with the number of sites: here 64 of 256 kB each."""
    wide = Layout(("weight",), ((1 << 16,),))
    instruction = replace(instruction, layout_digest=wide.digest)
    sent = {f"m-{number}": number for number in range(64)}
    judge = Judge(
        Summed(wide.size, capacity=64),
        sent=sent,
        instruction=instruction,
        layout=wide,
        charges=dict.fromkeys(sent.values(), round_event(instruction.config)),
        receipts={},
    )
    peaks = []
    tracemalloc.start()
    for name in sent:
        tracemalloc.reset_peak()
        judge.read(reply_of(name, update_of(instruction, np.ones(wide.size))))
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert len(judge.verdicts().accepted) == 64
    assert max(peaks[4:]) - min(peaks[4:]) < 100_000
