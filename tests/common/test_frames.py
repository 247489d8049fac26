"""A vector that lies in its frame is packed as it is; any other is copied, and reads the same."""

import io

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common import messages
from common.frames import frame_of, framed, header_of

FLOATS = hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))


def saved(vector):
    """What numpy itself writes."""
    buffer = io.BytesIO()
    np.save(buffer, vector, allow_pickle=False)
    return buffer.getvalue()


@given(st.lists(FLOATS, max_size=4))
def test_a_frame_is_what_numpy_saves_of_the_parts_end_to_end(parts):
    vector = framed(parts)
    assert frame_of(vector) == saved(np.concatenate([*parts, np.float32([])]))
    assert frame_of(vector) is frame_of(vector)
    assert not vector.flags.writeable


def test_a_matrix_is_framed_row_by_row():
    assert framed([np.arange(6, dtype=np.float32).reshape(2, 3)]).tolist() == [0, 1, 2, 3, 4, 5]


def test_packing_a_framed_vector_copies_nothing_and_reads_it_where_it_lies():
    vector = framed([np.arange(9, dtype=np.float32)])
    record = messages.pack_vector(vector)
    assert record["vector"].data is frame_of(vector)
    found = messages.unpack_arrays(record)
    assert np.shares_memory(found, vector)
    assert messages.pack_vector(found)["vector"].data is record["vector"].data
    assert np.array_equal(record["vector"].numpy(), vector)


INSIDE = framed([np.arange(32, dtype=np.float32)])
OTHERS = {
    "reversed": INSIDE[::-1],
    "shorter": INSIDE[:-1],
    "one value, again and again": np.broadcast_to(INSIDE[1:2], (32,)),
    "another type": INSIDE.view(np.int32).astype(np.float32),
    "of its own memory": INSIDE.copy(),
    "of bytes that begin elsewhere": np.frombuffer(frame_of(INSIDE), np.float32, count=32),
    "of bytes without a header": np.frombuffer(
        bytes(len(header_of(8)) + 32), np.float32, offset=len(header_of(8))
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_in_a_frame_of_its_own_is_copied(name):
    vector = OTHERS[name]
    assert frame_of(vector) == saved(np.ascontiguousarray(vector)) == Array(vector.copy()).data
    assert frame_of(vector) is not frame_of(vector)
