"""Digests as one array: the same answers as sets and sorted lists of them."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.digests import DigestSet, among, firsts_of, gathered, order_of

# Few different bytes, so that many begin alike, and ends of zeros, which numpy's own types drop.
DIGESTS = st.lists(
    st.binary(min_size=2, max_size=2).map(lambda ends: ends[:1] + bytes(30) + ends[1:])
)


@given(DIGESTS)
def test_they_are_ordered_as_their_bytes(digests):
    rows = gathered(digests)
    assert [rows[n].tobytes() for n in order_of(rows)] == sorted(digests)


@given(DIGESTS)
def test_the_first_of_equal_ones_is_kept(digests):
    firsts = firsts_of(gathered(digests)).tolist()
    assert firsts == [digest not in digests[:at] for at, digest in enumerate(digests)]


@given(DIGESTS, DIGESTS)
def test_those_that_stand_elsewhere_are_found(ours, theirs):
    found = among(gathered(ours), gathered(theirs)).tolist()
    assert found == [digest in theirs for digest in ours]


@given(DIGESTS, DIGESTS)
def test_a_set_of_them_is_like_any_other(ours, theirs):
    mine, plain = DigestSet(gathered(ours)), frozenset(ours)
    assert mine == plain
    assert [*mine] == sorted(plain)
    assert {digest for digest in [*ours, *theirs] if digest in mine} == plain
    assert mine & DigestSet(gathered(theirs)) == plain & frozenset(theirs)
    assert b"" not in mine


def test_a_set_takes_32_bytes_for_each():
    digests = [hashlib.sha256(bytes([n])).digest() for n in range(200)]
    assert DigestSet(gathered(digests))._sorted.nbytes == 200 * 32
    assert np.array_equal(gathered(digests)[7], np.frombuffer(digests[7], np.uint8))
