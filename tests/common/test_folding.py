"""What is folded is the same message in fewer parts; what is not ours is refused as it came."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import VerificationError
from common.folding import MOST_BYTES, PLACES, folded, unfold
from common.frames import header_of
from common.messages import (
    FACTS,
    VECTOR,
    Count,
    UpdateReader,
    pack_count,
    pack_instruction,
    pack_update,
    pack_vector,
    read_count,
    read_instruction,
    read_update,
)

from .test_messages import VALUES, instruction, same, sent, update

pytestmark = pytest.mark.usefixtures("coordinator")
FLOAT, BYTE = PLACES["float32"], PLACES["uint8"]
LARGEST = (MOST_BYTES - len(header_of(0))) // 4
"""Values of the largest vector that is folded."""


def parts(content):
    return len(get_all_nested_objects(Message(content, dst_node_id=2, message_type="train")))


def unfolded(content):
    message = sent(content)
    assert unfold(message)
    return message


def test_an_update_comes_out_as_it_went_in_and_takes_half_the_parts():
    before = update()
    content = folded(pack_update(before))
    assert (parts(pack_update(before)), parts(content)) == (6, 3)
    assert same(read_update(unfolded(content)), before)


def test_an_instruction_comes_out_as_it_went_in(tiny_config):
    before = instruction(tiny_config)
    assert same(read_instruction(unfolded(folded(pack_instruction(before)))), before)


def test_a_coded_update_comes_out_as_it_went_in():
    data = bytes(range(200))
    message = unfolded(folded(pack_update(update(coded=data))))
    array = message.content[VECTOR][VECTOR]
    assert (array.dtype, array.shape) == ("uint8", (len(data),))
    assert array.data == header_of(len(data), "|u1") + data


def test_what_is_folded_is_not_altered():
    content = pack_update(update())
    facts, array = dict(content[FACTS]), content[VECTOR][VECTOR].data
    folded(content)
    assert (dict(content[FACTS]), content[VECTOR][VECTOR].data) == (facts, array)


@pytest.mark.parametrize(("values", "is_folded"), [(LARGEST, True), (LARGEST + 1, False)])
def test_a_large_vector_stays_apart(values, is_folded):
    content = pack_update(update(vector=np.zeros(values, np.float32)))
    assert (folded(content) is not content) == is_folded


def test_what_has_no_vector_stays_as_it_is():
    content = pack_count(Count("run-1", 3.0, update().books))
    message = sent(folded(content))
    assert not unfold(message)
    assert read_count(message).correct == 3.0


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({VECTOR: pack_vector(VALUES)}),
        RecordDict({FACTS: ConfigRecord({"round": 3})}),
        RecordDict({VECTOR: MetricRecord({"x": 1.0}), FACTS: ConfigRecord({"round": 3})}),
        RecordDict({VECTOR: pack_vector(VALUES), FACTS: MetricRecord({"x": 1.0})}),
        RecordDict({VECTOR: ArrayRecord(), FACTS: ConfigRecord({"round": 3})}),
        RecordDict({VECTOR: pack_vector(VALUES.astype(float)), FACTS: ConfigRecord({"round": 3})}),
        RecordDict(
            {
                VECTOR: pack_vector(VALUES),
                FACTS: ConfigRecord({"round": 3}),
                "more": ConfigRecord({"round": 3}),
            }
        ),
    ],
    ids=str,
)
def test_content_of_another_shape_is_not_folded(content):
    assert folded(content) is content


def broken(**changes):
    """The folded update with other facts; None takes one away."""
    content = folded(pack_update(update()))
    facts = {**content[FACTS], **changes}
    return RecordDict({FACTS: ConfigRecord({n: v for n, v in facts.items() if v is not None})})


GOOD = folded(pack_update(update()))[FACTS][FLOAT]
BROKEN = {
    "no vector": broken(**{FLOAT: None}),
    "two vectors": broken(**{BYTE: GOOD}),
    "text for a vector": broken(**{FLOAT: "0.5"}),
    "numbers for a vector": broken(**{FLOAT: [0.5, 1.0]}),
    "too large": broken(
        **{FLOAT: header_of(LARGEST + 1) + np.zeros(LARGEST + 1, np.float32).tobytes()}
    ),
    "no header": broken(**{FLOAT: GOOD[128:]}),
    "nothing": broken(**{FLOAT: b""}),
    "a byte short": broken(**{FLOAT: GOOD[:-1]}),
    "of another type": broken(**{FLOAT: None, BYTE: GOOD}),
    "one fact more": broken(loss=0.5),
    "a fact short": broken(round=None),
    "a record more": RecordDict({FACTS: broken()[FACTS], "more": ConfigRecord({"loss": 0.5})}),
    "unfolded beside it": RecordDict({FACTS: broken()[FACTS], VECTOR: pack_vector(VALUES)}),
    "facts of another kind": RecordDict({FACTS: MetricRecord({FLOAT: 0.5})}),
    "arrays for facts": RecordDict({FACTS: ArrayRecord({FLOAT: Array(VALUES)})}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_badly_folded_is_refused(content):
    message = sent(content)
    unfold(message)
    with pytest.raises(VerificationError):
        UpdateReader().read(message)


def test_the_whole_one_is_read():
    """Which the broken ones each differ from in one thing."""
    message = sent(broken())
    assert unfold(message)
    assert same(UpdateReader().read(message), update())


def test_an_error_is_no_folded_message():
    asked = sent(pack_update(update()))
    reply = Message(Error(603, "local failure"), reply_to=asked)
    assert not unfold(reply)
    assert reply.error.code == 603


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=300), name=st.sampled_from([FLOAT, BYTE]))
def test_any_bytes_are_refused_or_are_a_vector(data, name):
    message = sent(broken(**{FLOAT: None, name: data}))
    assert unfold(message)
    try:
        read = read_update(message)
    except VerificationError:
        return
    assert read.vector.nbytes + len(header_of(0)) == len(data)
