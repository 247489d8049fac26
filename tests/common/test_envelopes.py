"""Envelopes: what Flower's own constructor makes of the same content and address."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from common.envelopes import Envelopes
from simulations.answer import identify

APART = "_created_at"
"""What the time of making decides."""


@pytest.fixture(autouse=True)
def _sender():
    identify()


def content(text: str) -> RecordDict:
    return RecordDict({"facts": ConfigRecord({"text": text})})


def facts_of(message: Message) -> dict[str, object]:
    return {n: v for n, v in message.metadata.__dict__.items() if n not in (APART, "_ttl")}


def asked(node: int, *, group: str = "3") -> Message:
    message = Message(content("asked"), node, "train", ttl=60.0, group_id=group)
    message.metadata.__dict__["_message_id"] = f"id-{node}"
    return message


def test_instructions_are_what_flower_makes_of_the_same():
    envelopes = Envelopes()
    for node in (5, 6, 7):
        made = envelopes.instruction(content(str(node)), node, "train", ttl=60.0, group="3")
        theirs = Message(content(str(node)), node, "train", ttl=60.0, group_id="3")
        assert facts_of(made) == facts_of(theirs)
        assert made.metadata.ttl == 60.0
        assert vars(made).keys() == vars(theirs).keys()
        assert made.content == theirs.content
        assert not made.has_error()


def test_replies_are_what_flower_makes_of_the_same():
    envelopes, first = Envelopes(), asked(5)
    for node in (5, 6, 7):
        question = asked(node)
        question.metadata.__dict__[APART] = first.metadata.created_at
        made = envelopes.reply(content(str(node)), question)
        theirs = Message(content(str(node)), reply_to=question)
        assert facts_of(made) == facts_of(theirs)
        assert made.metadata.ttl == pytest.approx(theirs.metadata.ttl, abs=1.0)
        assert vars(made).keys() == vars(theirs).keys()
        assert made.content == theirs.content


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_run_id", 9), ("_src_node_id", 9), ("_group_id", "4"), ("_message_type", "evaluate"),
        ("_created_at", 1.0), ("_ttl", 7.0), ("_src_task_id", 9), ("_dst_task_id", 9),
    ],
)  # fmt: skip
def test_a_reply_to_another_instruction_is_made_anew(name, value):
    """Alike but for one fact, which is that of the reply."""
    envelopes, first, question = Envelopes(), asked(5), asked(6)
    question.metadata.__dict__[APART] = first.metadata.created_at
    envelopes.reply(content("first"), first)
    question.metadata.__dict__[name] = value
    made = envelopes.reply(content("second"), question)
    theirs = Message(content("second"), reply_to=question)
    assert facts_of(made) == facts_of(theirs)
    assert made.metadata.ttl == pytest.approx(theirs.metadata.ttl, abs=1.0)


def test_an_instruction_of_another_group_or_kind_is_made_anew():
    envelopes = Envelopes()
    for kind, group in (("train", "1"), ("train", "2"), ("evaluate", "2")):
        made = envelopes.instruction(content("x"), 5, kind, ttl=60.0, group=group)
        assert (made.metadata.message_type, made.metadata.group_id) == (kind, group)


def test_what_becomes_of_one_message_becomes_of_no_other():
    envelopes = Envelopes()
    one, two = (
        envelopes.instruction(content("x"), node, "train", ttl=60.0, group="1") for node in (5, 6)
    )
    one.metadata.__dict__["_message_id"] = "sent"
    three = envelopes.instruction(content("x"), 7, "train", ttl=60.0, group="1")
    assert [two.metadata.message_id, three.metadata.message_id] == ["", ""]
    assert one.metadata is not two.metadata
