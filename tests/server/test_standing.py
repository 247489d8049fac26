"""The standing of a deployed run: what whoever watches is told, at every moment."""

import json
import sys

import pytest

from common.errors import ConfigError, FederationError, VerificationError
from server.record import RoundLine
from server.standing import FILE, Standing, Standings, State, read_standing


def line(number):
    return RoundLine(number, {}, 1.0, ("site-1",), {}, 0, 0, 0.1, private=True)


def test_each_event_is_on_disk_when_it_is_over(tmp_path):
    standings = Standings(tmp_path, Standing(7, rounds=3))
    seen = []
    with standings.kept():
        for event in (
            lambda: standings.waiting({11: "site-1"}),
            lambda: standings.heard("site-1"),
            lambda: standings.heard("site-2"),
            lambda: standings.over(line(1)),
        ):
            event()
            seen.append(read_standing(tmp_path))
    seen.append(read_standing(tmp_path))
    assert [each.state for each in seen] == ["waiting", "running", "running", "running", "finished"]
    assert [each.heard for each in seen] == [
        (),
        ("site-1",),
        ("site-1", "site-2"),
        (),
        (),
    ]
    assert [each.round for each in seen] == [0, 0, 0, 1, 1]
    assert seen[0].here == {11: "site-1"}
    assert {each.flower_run for each in seen} == {7}


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (FederationError("2 of 3 sites came"), 4, "2 of 3 sites came"),
        (ConfigError("data: none"), 2, "data: none"),
        (RuntimeError("whatever a library says"), 1, "see its log"),
    ],
)
def test_how_a_run_failed_is_told_with_its_code(tmp_path, error, code, text):
    with pytest.raises(type(error)), Standings(tmp_path, Standing(7)).kept():
        raise error
    now = read_standing(tmp_path)
    assert now.is_over
    assert (now.state, now.fault.code, now.fault.message) == (State.failed, code, text)


def test_a_run_that_is_stopped_from_outside_says_no_more(tmp_path):
    standings = Standings(tmp_path, Standing(7))
    with pytest.raises(SystemExit), standings.kept():
        sys.exit(0)
    assert read_standing(tmp_path).state is State.waiting


def test_the_time_left_follows_the_rounds_of_this_attempt():
    now = Standing(
        1,
        State.running,
        rounds=10,
        round=6,
        began_after=4,
        began_at=100.0,
        round_ended_at=120.0,
    )
    assert now.remaining_s == 40.0
    assert Standing(1, State.running, rounds=10, round=4, began_after=4).remaining_s is None


def test_a_run_that_has_none_has_none(tmp_path):
    assert read_standing(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"state": "elsewhere"})])
def test_a_malformed_one_is_refused_by_its_path(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(VerificationError, match=FILE):
        read_standing(tmp_path)
