"""Privacy rests on two properties of the clipped sum: its sensitivity, and that cuts do not matter.

Models: tied GPT-2 (one weight as table and matrix), BERT (ids shared by the batch), a conv net.
"""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.preflight import preflight

from .oracle import distance, length
from .zoo import LISTED, OTHERS, tuned

RECORDS = 9
MODELS = ("GPT-2", "BERT", "conv net")
clip_norms = st.floats(1e-3, 1e3)
chosen = st.lists(st.integers(0, RECORDS - 1), min_size=1, max_size=RECORDS, unique=True)
modest = settings(derandomize=True, max_examples=25, deadline=None)


@cache
def bench(name):
    specimen = tuned({**LISTED, **OTHERS}[name], "full")
    engine = preflight(specimen.model, specimen.made).engine
    return engine, specimen.made(RECORDS)


def clipped_sum(name, pieces, clip_norm):
    engine, loss_of = bench(name)
    sums = {}
    for piece in pieces:
        if piece:
            engine.add_clipped(loss_of, np.array(piece), clip_norm, sums)
    return sums


@pytest.mark.parametrize("name", MODELS)
@given(records=chosen, clip_norm=clip_norms, data=st.data())
@modest
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(name, records, clip_norm, data):
    """Neighbours by adding or removing a record, which may be any of them."""
    gone = data.draw(st.sampled_from(records))
    whole = clipped_sum(name, [records], clip_norm)
    rest = clipped_sum(name, [[r for r in records if r != gone]], clip_norm)
    # Rounding of the other records' sum is relative to that sum and no part of sensitivity.
    assert distance(whole, rest) <= clip_norm * (1 + 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_bound_is_met_and_not_by_chance(name):
    """Unclipped, some record moves the sum by more; clipped to little, each by just that."""
    everyone = [*range(RECORDS)]
    for clip_norm, most in ((1e-3, 1e-3), (1e6, np.inf)):
        moved = [
            distance(
                clipped_sum(name, [everyone], clip_norm),
                clipped_sum(name, [[r for r in everyone if r != gone]], clip_norm),
            )
            for gone in everyone
        ]
        assert max(moved) > 0.99e-3
        assert max(moved) <= most * (1 + 1e-4)
        assert clip_norm < 1 or max(moved) > 2e-3


@pytest.mark.parametrize("name", MODELS)
@given(records=st.permutations(range(RECORDS)), cuts=st.sets(st.integers(1, RECORDS - 1)))
@modest
def test_order_and_cuts_do_not_matter(name, records, cuts):
    edges = [0, *sorted(cuts), RECORDS]
    pieces = [list(records[a:b]) for a, b in pairwise(edges)]
    whole = clipped_sum(name, [[*range(RECORDS)]], 0.7)
    assert distance(clipped_sum(name, pieces, 0.7), whole) <= 1e-6 * length(whole)
