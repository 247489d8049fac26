"""A node looks often when an instruction is due, and seldom when none is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.looks import LATENESS, MOST_FIRST, MOST_S, Looks


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def rested(looks, clock, until):
    """Looks from now on, and the time of the one that sees what comes at `until`."""
    count = 0
    while clock.now < until:
        clock.now += looks.rest_s()
        count += 1
    looks.came()
    return count


def test_rounds_of_one_length_are_met_by_a_few_looks(clock):
    looks = Looks(0.1, clock)
    counts, late = [], []
    for _ in range(6):
        looks.answered()
        due = clock.now + 0.75
        counts.append(rested(looks, clock, due))
        late.append(clock.now - due)
    assert counts[0] == 8  # nothing is known of the first
    assert max(counts[1:]) <= 4
    assert max(late) < 0.1 + 1e-9


def test_a_long_round_delays_a_short_one_by_five_looks_at_most(clock):
    looks = Looks(0.2, clock)
    looks.answered()
    rested(looks, clock, clock.now + 600)
    looks.answered()
    assert looks.rest_s() == MOST_FIRST * 0.2
    assert looks.rest_s() == 0.2


def test_who_waits_long_looks_seldom(clock):
    looks = Looks(0.2, clock)
    assert looks.rest_s() == 0.2
    clock.now += 20
    assert looks.rest_s() == pytest.approx(20 * LATENESS)
    clock.now += 3600
    assert looks.rest_s() == MOST_S


def test_what_came_before_any_answer_foretells_nothing(clock):
    looks = Looks(0.2, clock)
    clock.now += 50
    looks.came()
    looks.answered()
    assert looks.rest_s() == 0.2


@given(
    poll=st.floats(0.01, 60),
    steps=st.lists(st.tuples(st.sampled_from(["look", "came", "answered"]), st.floats(0, 1000))),
)
def test_no_rest_is_shorter_than_asked_or_longer_than_promised(poll, steps):
    clock = Clock()
    looks, since, first = Looks(poll, clock), clock.now, False
    for what, seconds in steps:
        clock.now += seconds
        if what == "came":
            looks.came()
        elif what == "answered":
            looks.answered()
            since, first = clock.now, True
        else:
            most = MOST_FIRST * poll if first else LATENESS * (clock.now - since)
            assert poll <= looks.rest_s() <= max(poll, min(most, MOST_S))
            first = False
