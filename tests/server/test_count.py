"""Counting on private records: who is asked, what is believed, what it adds up to."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from common import messages
from common.messages import Count, Instruction, SiteBooks
from common.privacy.accounting import Event
from common.privacy.chain import Head, continued
from server.count import count_correct
from server.heads import HeadBook
from server.plan import make_plan

from .fake_grid import FakeGrid

NAMES = {11: "site-1", 12: "site-2", 13: "site-3"}
SIGMA = 4.0
LINK = bytes(range(32))


@pytest.fixture
def plan(tiny_config):
    config = replace(
        tiny_config,
        privacy=replace(tiny_config.privacy, count_noise=SIGMA),
        federation=replace(tiny_config.federation, sites=3, round_timeout_s=1.0),
    )
    return make_plan(config)


def final(plan):
    return Instruction("run", 2, plan.config, "d" * 64, np.zeros(4, np.float32))


def counts(node, message):
    """Twenty correct, and one for each node number above ten."""
    receipt = messages.read_instruction(message).receipt
    head, links = Head(9, "a" * 64), b""
    if receipt is not None:
        head, links = continued(receipt.head, LINK), LINK
    books = SiteBooks(head, 8.0, 2.5, (Event(2.0, 0.5, 4), Event(SIGMA, 1.0, 1)), links)
    return Message(messages.pack_count(Count("run", 10.0 + node, books)), reply_to=message)


def refuses(_, message):
    return Message(Error(602, "free text"), reply_to=message)


def edited(**facts):
    def answer(node, message):
        content = counts(node, message).content
        changed = ConfigRecord({**content["facts"], **facts})
        return Message(RecordDict({"facts": changed}), reply_to=message)

    return answer


def with_a_vector(node, message):
    content = counts(node, message).content
    content["vector"] = messages.pack_vector(np.zeros(4, np.float32))
    return Message(content, reply_to=message)


def go(plan, odd=None, heads=None):
    def answer(node, message):
        return (odd if odd and node == 12 else counts)(node, message)

    grid = FakeGrid(NAMES, answer)
    return count_correct(grid, plan, final(plan), heads, NAMES), grid


def test_counts_of_all_sites_add_up(plan):
    counted, grid = go(plan)
    assert {m.metadata.message_type for m in grid.pushed.values()} == {"evaluate"}
    assert counted.correct == 21 + 22 + 23
    assert counted.records == pytest.approx(84)
    assert counted.section() == {
        "accuracy": round(66 / 84, 4),
        "standard_error": round(SIGMA * 3**0.5 / 84, 4),
        "correct": 66.0,
        "records": pytest.approx(84),
        "sites": 3,
        "not_answered": {},
    }
    question = counted.question(Event(SIGMA, 1.0, 1))
    assert question.names == ("site-1", "site-2", "site-3")
    assert {*question.books} == {*question.names}


FAULTS = {
    "budget exhausted": refuses,
    "of another run": edited(**{"run-id": "other"}),
    "no whole number": edited(correct=float("inf")),
    "must be a number": edited(correct=float("nan")),
    "is no whole number": edited(correct=-1e300),
    "or is no whole number": edited(correct=0.5),
    "comes without books": edited(
        **{"ledger-head": "", "links": b"", "cap": 0.0, "spent": 0.0, "charged": []}
    ),
    "must hold facts": with_a_vector,
    "facts must be exactly": edited(loss=0.25),
    "no reply before the deadline": lambda *_: None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_site_without_a_sound_count_is_left_out_and_named(fault, plan):
    counted, _ = go(plan, FAULTS[fault])
    assert [*counted.refused] == ["site-2"]
    assert fault in counted.refused["site-2"]
    assert "free text" not in counted.refused["site-2"]
    assert counted.correct == 21 + 23
    assert counted.records == pytest.approx(56)
    assert counted.deviation == pytest.approx(SIGMA * 2**0.5)
    assert counted.asked == ("site-1", "site-2", "site-3")  # it may have counted, and paid


def test_nobody_who_answers_is_no_error(plan):
    grid = FakeGrid(NAMES, refuses)
    counted = count_correct(grid, plan, final(plan), None, NAMES)
    assert counted.books == {}
    assert counted.refused == dict.fromkeys(NAMES.values(), "budget exhausted")


def test_the_sites_keep_the_names_they_had_in_the_rounds(plan):
    """Under another name a site would be priced for its count alone."""
    grid = FakeGrid({**NAMES, 99: "site-2"}, counts)
    counted = count_correct(grid, plan, final(plan), None, NAMES)
    assert counted.asked == ("site-1", "site-2", "site-3")
    assert {*counted.books} == {*NAMES.values()}
    assert {m.metadata.dst_node_id for m in grid.pushed.values()} == {*NAMES}


def test_a_plan_without_a_count_asks_nobody(tiny_config):
    plan = make_plan(tiny_config)
    grid = FakeGrid(NAMES, counts)
    assert count_correct(grid, plan, final(plan), None, NAMES) is None
    assert grid.pushed == {}


def test_a_count_goes_on_from_the_head_that_was_signed(plan, tmp_path):
    heads = HeadBook(tmp_path / "heads.db")
    heads.countersign(dict.fromkeys(NAMES.values(), Head(7, "b" * 64)))
    counted, _ = go(plan, edited(links=LINK[::-1]), heads)
    assert "an older copy, or a fork" in counted.refused["site-2"]
    signed = {site: receipt.head for site, receipt in heads.receipts().items()}
    on = continued(Head(7, "b" * 64), LINK)
    assert signed == {"site-1": on, "site-2": Head(7, "b" * 64), "site-3": on}
