"""Rows of the fault table that no other test makes: what hangs, is cut off, or is full.

Each run ends right, and no ledger holds less than was accepted of its site.
`benchmarks.faults` makes the faults, on real processes.
"""

import pytest

from benchmarks.faults import FAULTS, ROUNDS, Ground, SkippedError, make

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    with Ground(tmp_path_factory.mktemp("ground")) as made:
        yield made


def made(ground, name):
    """The row of a fault, of which what every fault must end with is asserted."""
    try:
        row = make(ground, name)
    except SkippedError as error:
        pytest.skip(str(error))
    assert (row.exit_code, row.rounds, row.under_counted) == (0, ROUNDS, ())
    return row


@pytest.mark.parametrize("name", ["network", "coordinator-disk"])
def test_what_costs_time_alone_ends_with_the_same_weights(ground, name):
    row = made(ground, name)
    assert row.same_weights
    assert row.without_it == ()
    assert row.taken_up_again == (name == "coordinator-disk")


@pytest.mark.parametrize("name", ["hang", "node-disk"])
def test_a_site_that_does_not_answer_costs_the_others_no_round_and_comes_back(ground, name):
    """With a quorum below 1: its late reply is not taken, and the last round has it again."""
    row = made(ground, name)
    assert FAULTS[name].settings
    assert row.without_it
    assert ROUNDS not in row.without_it
    assert row.reported >= row.charged
