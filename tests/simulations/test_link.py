"""What passes between a simulation and its workers is what was sent, and large things once."""

import gc
import os
from multiprocessing import Pipe

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from common import messages
from common.records import Records
from common.spool import Kind, Spooled, spooled
from simulations.answer import identify
from simulations.link import LARGE, SHARED, Link, Parcel, Shares

identify()


@pytest.fixture
def ends():
    one, other = (Link(connection) for connection in Pipe())
    yield one, other
    one.close()
    other.close()


def handles():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def message(values, node=2):
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": values if isinstance(values, Array) else Array(values)}),
            "facts": ConfigRecord({"a": 1, "b": ["x", "y"], "c": b"bytes", "d": 0.5}),
        }
    )
    return Message(content, node, "train", ttl=9.0, group_id="3")


def over(ends, value, shares=None):
    one, other = ends
    one.send(value, shares)
    return other.receive()


@pytest.mark.parametrize("size", [3, LARGE // 8 + 1])
def test_a_message_arrives_as_it_was_sent(ends, size):
    sent = message(np.random.default_rng(0).normal(size=size))
    got = over(ends, sent)
    assert vars(got.metadata) == vars(sent.metadata)
    assert got.content["facts"] == sent.content["facts"]
    assert np.array_equal(got.content["arrays"]["w"].numpy(), sent.content["arrays"]["w"].numpy())
    answered = over(ends[::-1], Message(Error(602, "no"), reply_to=got))
    assert answered.error == Error(602, "no")
    assert answered.metadata.src_node_id == 2


def test_a_large_array_is_not_copied_and_its_memory_goes_with_it(ends):
    before = handles()
    got = over(ends, message(np.zeros(LARGE)))
    data = got.content["arrays"]["w"].data
    assert isinstance(data, memoryview)
    assert data.readonly
    assert handles() == before + 1
    del got, data
    assert handles() == before


def test_our_own_vector_is_read_from_such_memory_without_a_copy(ends):
    vector = np.arange(LARGE, dtype=np.float32)
    content = RecordDict({"vector": messages.pack_vector(vector)})
    got = over(ends, Message(content, 2, "train")).content["vector"]
    read = messages.unpack_arrays(got)
    assert np.array_equal(read, vector)
    assert np.shares_memory(read, np.frombuffer(got["vector"].data, np.uint8))
    assert not read.flags.writeable


def test_what_messages_have_in_common_is_sent_once(ends):
    one, other = ends
    array, shares = Array(np.zeros(SHARED)), Shares()
    jobs = [[message(array, node) for node in (2, 3)] for _ in range(2)]
    shares.add([each.content["arrays"]["w"] for job in jobs for each in job])
    assert shares.numbers() == (0,)
    got = []
    for job in jobs:
        one.send(job, shares)
        got += other.receive()
    assert len(got) == 4
    assert len({id(each.content["arrays"]["w"].data) for each in got}) == 1
    other.keep_only(())
    shares.clear()
    one.send(message(array), shares)  # no longer shared: it travels by itself
    assert len(other.receive().content["arrays"]["w"].data) == len(array.data)


def test_what_is_in_one_message_only_is_not_shared():
    shares = Shares()
    shares.add([Array(np.zeros(SHARED)), Array(np.zeros(SHARED)), *[Array(np.zeros(2))] * 2])
    assert shares.numbers() == ()


def test_a_parcel_is_packed_once_and_arrives_everywhere():
    texts = spooled([[["a b", "c"]], [["d"]]], 1, kind=Kind.text)
    images = tuple(np.full((4, 4, 1), n, np.uint8) for n in range(3))
    sites = {
        "one": Records(texts[:2], np.array([0, 1])),
        "two": Records(texts[2:], np.array([1])),
        "three": Records(images, np.array([0, 1, 0])),
    }
    parcel, before = Parcel.of(sites), handles()
    for _ in range(2):
        one, other = (Link(connection) for connection in Pipe())
        one.send_parcel(parcel)
        got = other.receive_parcel()
        assert [*got["one"].contents, *got["two"].contents] == ["a b", "c", "d"]
        assert isinstance(got["one"].contents, Spooled)
        assert got["one"].contents._spool is got["two"].contents._spool
        assert [image.max() for image in got["three"].contents] == [0, 1, 2]
        got["three"].labels[0] = 9  # its own
        one.close()
        other.close()
        del got
    assert sites["three"].labels[0] == 0
    assert handles() == before
    parcel.segment.close()


def test_an_end_that_is_gone_is_said_to_be(ends):
    one, other = ends
    other.close()
    with pytest.raises(EOFError):
        one.receive()
    with pytest.raises(OSError, match="pipe"):
        one.send(message(np.zeros(LARGE)))
