import ast
import io
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import messages
from common.config import config_hash, to_canonical
from common.errors import ConfigError, VerificationError
from common.messages import (
    FACTS,
    MAX_VECTOR_BYTES,
    VECTOR,
    WEIGHT,
    Instruction,
    SiteBooks,
    Update,
    content_bytes,
    for_aggregation,
    pack_instruction,
    pack_update,
    pack_vector,
    read_instruction,
    read_update,
    unpack_arrays,
)
from common.privacy.accounting import Event
from common.privacy.chain import Head

VALUES = np.array([0.5, -1.25, 3e-38, 7.0], np.float32)
# "Raises: ..., never anything else" holds whatever a library warns of on the way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning"),
    pytest.mark.usefixtures("coordinator"),
]


def sent(content):
    """A message with this content, after the encoding it has on the wire."""
    arrived = recorddict_from_proto(recorddict_to_proto(content))
    return Message(arrived, dst_node_id=2, message_type="train")


def update(**changes):
    values = {
        "run_id": "run-1",
        "round": 3,
        "layout_digest": "d" * 64,
        "charge": Event(1.5, 0.25, 4),
        "vector": VALUES,
        "books": SiteBooks(Head(7, "a" * 64), 8.0, 2.5, (Event(1.5, 0.25, 12),)),
    }
    return Update(**{**values, **changes})


def instruction(config, **changes):
    values = {
        "run_id": "run-1",
        "round": 3,
        "config": config,
        "layout_digest": "d" * 64,
        "vector": VALUES,
    }
    return Instruction(**{**values, **changes})


def same(first, second):
    """Field by field; vectors by their bits."""
    return all(
        np.array_equal(value, vars(second)[name])
        if name == "vector"
        else value == vars(second)[name]
        for name, value in vars(first).items()
    )


def facts_of(content):
    return dict(content.config_records[FACTS])


def test_update_then_message_then_update():
    before = update()
    after = read_update(sent(pack_update(before)))
    assert same(before, after)
    assert after.vector.dtype == np.float32


def test_message_then_update_then_message():
    content = pack_update(update())
    again = pack_update(read_update(sent(content)))
    assert facts_of(again) == facts_of(content)
    assert again.array_records[VECTOR][VECTOR].data == content.array_records[VECTOR][VECTOR].data


def test_instruction_then_message_then_instruction(tiny_config):
    before = instruction(tiny_config)
    assert same(before, read_instruction(sent(pack_instruction(before))))


def test_message_then_instruction_then_message(tiny_config):
    content = pack_instruction(instruction(tiny_config))
    again = pack_instruction(read_instruction(sent(content)))
    assert facts_of(again) == facts_of(content)
    assert again.array_records[VECTOR][VECTOR].data == content.array_records[VECTOR][VECTOR].data


def test_an_update_tells_nothing_beyond_the_agreed_facts():
    """The whole egress of a round; a count or a loss among it would be an unpriced release."""
    content = pack_update(update())
    assert set(content) == {VECTOR, FACTS}
    assert facts_of(content) == {
        "run-id": "run-1",
        "round": 3,
        "layout-digest": "d" * 64,
        "noise-multiplier": 1.5,
        "sample-rate": 0.25,
        "steps": 4,
        "ledger-head": f"7:{'a' * 64}",
        "links": b"",
        "cap": 8.0,
        "spent": 2.5,
        "charged": [1.5, 0.25, 12.0],
    }


def test_an_update_without_books_round_trips():
    assert read_update(sent(pack_update(update(books=None)))).books is None


BOOKS = {
    "no head": {"ledger-head": ""},
    "head of another shape": {"ledger-head": "7:abc"},
    "no cap": {"cap": 0.0},
    "cap below zero": {"cap": -1.0},
    "cap not finite": {"cap": math.inf},
    "cap not a number": {"cap": "8"},
    "spent more than the cap": {"spent": 8.1},
    "spent below zero": {"spent": -0.1},
    "part of an event": {"charged": [1.5, 0.25]},
    "more steps than can be priced": {"charged": [1.5, 0.25, 1e300]},
    "a rate nobody can price": {"charged": [1.5, 1e-320, 1.0]},
    "half a step": {"charged": [1.5, 0.25, 0.5]},
    "steps below zero": {"charged": [1.5, 0.25, -1.0]},
    "rate above one": {"charged": [1.5, 1.25, 1.0]},
    "sigma not a number": {"charged": [math.nan, 0.25, 1.0]},
    "texts": {"charged": ["1.5", "0.25", "1"]},
    "no list": {"charged": 1.5},
    "too many events": {"charged": [1.5, 0.25, 1.0] * 10_001},
}


@pytest.mark.parametrize("fault", BOOKS)
def test_books_that_are_none_are_refused(fault):
    content = pack_update(update())
    content = RecordDict(
        {VECTOR: content[VECTOR], FACTS: ConfigRecord({**facts_of(content), **BOOKS[fault]})}
    )
    with pytest.raises(VerificationError):
        read_update(sent(content))


def test_an_update_without_noise_round_trips():
    assert read_update(sent(pack_update(update(charge=Event(0.0, 0.25, 4))))).charge == (
        Event(0.0, 0.25, 4)
    )


def array(data, dtype="float32", shape=(4,)):
    return ArrayRecord(
        {VECTOR: Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=bytes(data))}
    )


def npy(header, version=(1, 0)):
    """A .npy file with the header written by hand."""
    text = header.encode("latin-1") + b"\n"
    length = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + text + VALUES.tobytes()


def saved(values, allow_pickle=False):
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=allow_pickle)
    return buffer.getvalue()


GOOD = saved(VALUES)
HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }"
HUGE = HEADER.replace("(4,)", f"({2**40},)")

BROKEN_VECTORS = {
    "no bytes": array(b""),
    "not an array": array(b"not an array at all"),
    "truncated body": array(GOOD[:-1]),
    "truncated by a whole number": array(GOOD[:-4]),
    "truncated header": array(GOOD[:40]),
    "truncated magic": array(GOOD[:4]),
    "trailing bytes": array(GOOD + b"\x00"),
    "huge declared shape": array(npy(HUGE)),
    "negative shape": array(npy(HEADER.replace("(4,)", "(-4,)"))),
    "huge declared header": array(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + GOOD[10:]),
    "unknown version": array(npy(HEADER, version=(9, 0))),
    "float64": array(saved(VALUES.astype(np.float64)), dtype="float64"),
    "float64 that says float32": array(saved(VALUES.astype(np.float64))),
    "big-endian": array(saved(VALUES.astype(">f4"))),
    "int32": array(saved(VALUES.astype(np.int32))),
    "2-D": array(saved(VALUES.reshape(2, 2))),
    "0-D": array(saved(VALUES[0])),
    "pickled object array": array(saved(np.array([{}, 1], object), allow_pickle=True)),
    "pickle": array(pickle.dumps(VALUES)),
    "header with no end": array(npy("{'descr': '<f4', 'shape': (4,")),
    "header that is no dict": array(npy("[1, 2]")),
    "header with other keys": array(npy("{1: 2, 'descr': '<f4'}")),
    "header with an unhashable key": array(npy("{[]: 1}")),
    "header of a wrong indent": array(npy("  if\n x\n   y")),
    "header nested deeply": array(npy("(" * 3000 + ")" * 3000)),
    "header of many signs": array(npy("-" * 4000 + "1")),
    "header with a null": array(npy("{'descr': '<f4'\x00}")),
    "header with a wrong descr": array(npy(HEADER.replace("'<f4'", "('<f4', ('a',))"))),
    "header with a strange descr": array(npy(HEADER.replace("'<f4'", "[('a', '<f4', -1)]"))),
    "no array": ArrayRecord(),
    "array of another name": ArrayRecord({"weights": Array(VALUES)}),
    "two arrays": ArrayRecord({VECTOR: Array(VALUES), "more": Array(VALUES)}),
}


@pytest.mark.parametrize("record", BROKEN_VECTORS.values(), ids=BROKEN_VECTORS.keys())
def test_a_broken_vector_is_refused(record):
    with pytest.raises(VerificationError):
        unpack_arrays(record)


@pytest.mark.parametrize("record", BROKEN_VECTORS.values(), ids=BROKEN_VECTORS.keys())
def test_a_reply_with_a_broken_vector_is_refused(record):
    content = pack_update(update())
    content[VECTOR] = record
    with pytest.raises(VerificationError):
        read_update(sent(content))


def test_only_the_header_numpy_writes_is_accepted():
    """Each fault above must be refused for itself and not for how these tests write a file."""
    assert ast.literal_eval(HEADER)["shape"] == (4,)
    assert np.array_equal(unpack_arrays(array(GOOD)), VALUES)
    with pytest.raises(VerificationError):
        unpack_arrays(array(npy(HEADER, version=(2, 0))))


def test_a_huge_declared_shape_allocates_nothing(monkeypatch):
    """The bytes that arrived are compared before anything is made of the declared shape."""

    def allocate(*_args, **_kwargs):
        raise AssertionError("allocated")

    for name in ("frombuffer", "empty", "zeros", "ndarray", "fromfile", "load"):
        monkeypatch.setattr(np, name, allocate)
    with pytest.raises(VerificationError, match="one flat"):
        unpack_arrays(array(npy(HUGE)))


def test_more_bytes_than_a_frame_holds_are_refused(monkeypatch):
    monkeypatch.setattr("common.messages.MAX_VECTOR_BYTES", len(GOOD) - 1)
    assert MAX_VECTOR_BYTES == 2**31 - 1
    with pytest.raises(VerificationError):
        unpack_arrays(array(GOOD))


def with_facts(**changes):
    """An update's content with facts changed; None takes one away."""
    content = pack_update(update())
    facts = facts_of(content)
    for name, value in changes.items():
        facts[name.replace("_", "-")] = value
    content[FACTS] = ConfigRecord({k: v for k, v in facts.items() if v is not None})
    return content


def with_records(**changes):
    content = pack_update(update())
    for name, record in changes.items():
        if record is None:
            del content[name]
        else:
            content[name] = record
    return content


BROKEN_REPLIES = {
    "nothing": RecordDict,
    "no vector": lambda: with_records(vector=None),
    "no facts": lambda: with_records(facts=None),
    "extra record": lambda: with_records(metrics=MetricRecord({"loss": 0.1})),
    "facts that are metrics": lambda: with_records(facts=MetricRecord({"round": 3})),
    "vector that is facts": lambda: with_records(vector=ConfigRecord({"round": 3})),
    "vector that is metrics": lambda: with_records(vector=MetricRecord({"vector": [1.0]})),
    "missing fact": lambda: with_facts(round=None),
    "extra fact": lambda: with_facts(num_examples=17),
    "round of text": lambda: with_facts(round="3"),
    "round of a float": lambda: with_facts(round=3.0),
    "round of a bool": lambda: with_facts(round=True),
    "negative round": lambda: with_facts(round=-1),
    "run id of a number": lambda: with_facts(run_id=1),
    "run id of bytes": lambda: with_facts(run_id=b"run-1"),
    "run id of a list": lambda: with_facts(run_id=["run-1"]),
    "layout of a number": lambda: with_facts(layout_digest=1),
    "steps of a float": lambda: with_facts(steps=4.0),
    "steps of a bool": lambda: with_facts(steps=True),
    "negative steps": lambda: with_facts(steps=-4),
    "noise of text": lambda: with_facts(noise_multiplier="1.5"),
    "noise of an int": lambda: with_facts(noise_multiplier=1),
    "noise of a bool": lambda: with_facts(noise_multiplier=True),
    "noise of a list": lambda: with_facts(noise_multiplier=[1.5]),
    "NaN noise": lambda: with_facts(noise_multiplier=float("nan")),
    "negative noise": lambda: with_facts(noise_multiplier=-1.5),
    "NaN rate": lambda: with_facts(sample_rate=float("nan")),
    "rate above one": lambda: with_facts(sample_rate=1.5),
    "negative rate": lambda: with_facts(sample_rate=-0.1),
}


@pytest.mark.parametrize("content", BROKEN_REPLIES.values(), ids=BROKEN_REPLIES.keys())
def test_a_broken_reply_is_refused(content):
    with pytest.raises(VerificationError):
        read_update(sent(content()))


ALIKE = {
    "the same": {},
    "round of a float": {"round": 3.0},
    "steps of a float": {"steps": 4.0},
    "noise of an int": {"noise-multiplier": 1},
    "cap of an int": {"cap": 0},
    "spent of a bool": {"spent": False},
    "another round": {"round": 4},
    "another run": {"run-id": "run-2"},
    "another layout": {"layout-digest": "e" * 64},
    "another charge": {"sample-rate": 0.5},
    "links of a text": {"links": ""},
    "half a charge": {"charged": [1.5]},
    "a charge without a head": {"charged": [1.0, 0.25, 4.0]},
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_reader_takes_no_update_for_the_one_before(name):
    """Facts that are equal are parsed once; whatever differs is parsed as if it came first."""
    reader, before = messages.UpdateReader(), update(books=None, charge=Event(1.0, 0.25, 4))
    assert same(reader.read(sent(pack_update(before))), before)
    content = pack_update(replace(before, vector=VALUES + 1))
    content[FACTS] = ConfigRecord({**facts_of(content), **ALIKE[name]})
    try:
        expected = read_update(sent(content))
    except VerificationError:
        with pytest.raises(VerificationError):
            reader.read(sent(content))
    else:
        assert same(reader.read(sent(content)), expected)
        assert np.array_equal(expected.vector, VALUES + 1)


def test_a_reader_keeps_no_list_of_a_sender_and_no_books():
    reader, before = messages.UpdateReader(), update(books=None)
    content = pack_update(before)
    content[FACTS] = ConfigRecord({**facts_of(content), "charged": []})
    message = Message(content, dst_node_id=2, message_type="train")
    reader.read(message)
    content[FACTS]["charged"].append(1.5)
    with pytest.raises(VerificationError):
        reader.read(message)
    other = update(books=SiteBooks(Head(9, "b" * 64), 8.0, 2.5, (Event(1.5, 0.25, 12),)))
    for each in (update(), other, update()):
        assert same(reader.read(sent(pack_update(each))), each)


def test_a_reply_that_is_an_error_is_refused():
    asked = Message(pack_update(update()), dst_node_id=2, message_type="train")
    with pytest.raises(VerificationError, match="error"):
        read_update(Message(Error(603, "local failure"), reply_to=asked))


def test_an_instruction_is_no_update_and_an_update_no_instruction(tiny_config):
    with pytest.raises(VerificationError):
        read_update(sent(pack_instruction(instruction(tiny_config))))
    with pytest.raises(VerificationError):
        read_instruction(sent(pack_update(update())))


def with_config(config, text, hash_=None):
    content = pack_instruction(instruction(config))
    facts = {**facts_of(content), "config": text}
    facts["config-hash"] = config_hash(config) if hash_ is None else hash_
    content[FACTS] = ConfigRecord(facts)
    return content


def test_an_instruction_whose_config_was_altered_is_refused(tiny_config):
    altered = to_canonical(tiny_config).replace('"epsilon":8.0', '"epsilon":9.0')
    assert altered != to_canonical(tiny_config)
    with pytest.raises(VerificationError, match="disagree"):
        read_instruction(sent(with_config(tiny_config, altered)))


BROKEN_CONFIGS = {
    "empty": "",
    "null": "null",
    "list": "[]",
    "unknown key": '{"a": 1}',
    "number": 7,
    "bytes": b"{}",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS.keys())
def test_an_instruction_with_a_broken_config_is_refused(tiny_config, text):
    with pytest.raises((VerificationError, ConfigError)):
        read_instruction(sent(with_config(tiny_config, text)))


def test_an_instruction_whose_config_has_half_a_character_is_refused(tiny_config):
    """JSON can spell a lone surrogate, which no UTF-8 and so no hash can."""
    text = to_canonical(tiny_config).replace('"sport"', '"\\ud800"')
    with pytest.raises((VerificationError, ConfigError)):
        read_instruction(sent(with_config(tiny_config, text)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    edits=st.dictionaries(
        st.integers(0, len(GOOD) - 1), st.integers(0, 255), min_size=1, max_size=6
    ),
    keep=st.integers(0, len(GOOD)) | st.just(len(GOOD)),
)
def test_corrupted_bytes_are_refused_or_are_a_vector(edits, keep):
    data = bytearray(GOOD)
    for place, value in edits.items():
        data[place] = value
    try:
        vector = unpack_arrays(array(data[:keep]))
    except VerificationError:
        return
    assert vector.dtype == np.float32
    assert vector.ndim == 1
    assert vector.nbytes <= len(data)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    header=st.text(st.characters(max_codepoint=255), max_size=40) | st.text("()[]{}'\",:-+1aL\n ")
)
def test_any_header_is_refused_or_is_a_vector(header):
    try:
        vector = unpack_arrays(array(npy(header)))
    except VerificationError:
        return
    assert vector.dtype == np.float32


def test_for_aggregation_every_reply_weighs_one():
    """A weight counted by the site would tell how many records it has."""
    reply = for_aggregation(VALUES)
    assert set(reply.content) == {VECTOR, WEIGHT}
    assert dict(reply.content.metric_records[WEIGHT]) == {WEIGHT: 1.0}
    assert np.array_equal(unpack_arrays(reply.content.array_records[VECTOR]), VALUES)


def test_content_bytes_count_the_arrays():
    content = pack_update(update())
    assert content_bytes(content) == len(content.array_records[VECTOR][VECTOR].data)
    assert content_bytes(content) == 4 * VALUES.size + 128
    assert content_bytes(RecordDict({VECTOR: pack_vector(np.zeros(1000, np.float32))})) == 4128
