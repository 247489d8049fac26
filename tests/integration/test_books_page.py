"""The worked example of docs/privacy-books.md, computed again."""

import re
from pathlib import Path

import pytest

from common.privacy.accounting import Event, epsilon_pld, epsilon_rdp, shown, within
from common.privacy.books import filter_order

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "privacy-books.md").read_text()
ROW = re.compile(r"^\| (\d+) \| (\d\.\d{3}) \| (\d\.\d{3}) \|", re.MULTILINE)
ROWS = [(int(rounds), pld, filtered) for rounds, pld, filtered in ROW.findall(PAGE)]
CAP, DELTA = 6.0, 1e-4


def history(rounds):
    return [Event(2.9222, 0.5, 2 * rounds)]


@pytest.mark.parametrize(("rounds", "pld", "filtered"), ROWS)
def test_the_table_is_right(rounds, pld, filtered):
    assert shown(epsilon_pld(history(rounds), DELTA)) == pld
    order = filter_order(CAP, DELTA)
    assert f"{epsilon_rdp(history(rounds), DELTA, order):.3f}" == filtered


def test_the_story_of_the_table_is_right():
    assert [row[0] for row in ROWS] == [1, 10, 20, 30]
    order = filter_order(CAP, DELTA)
    assert within(history(10), epsilon=CAP, delta=DELTA)
    assert epsilon_rdp(history(20), DELTA, order) <= CAP
    assert within(history(30), epsilon=CAP, delta=DELTA)
    assert epsilon_rdp(history(30), DELTA, order) > CAP


def test_the_odds_of_the_text_are_right():
    for epsilon, factor in ((1, "2.7"), (3, "20"), (6, "400")):
        assert float(factor) == pytest.approx(2.718281828**epsilon, rel=0.02)
        assert factor in PAGE
