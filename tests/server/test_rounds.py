"""The loop of rounds over a fake Grid: deadlines, quorum, and what a finished round leaves."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from safetensors import safe_open

from common import messages
from common.errors import FederationError
from common.messages import SiteBooks, Update
from common.parameters import Layout
from common.privacy.accounting import Event
from common.privacy.chain import Head
from common.strategies import StrategyName
from server.aggregate import LATE, SILENT
from server.checkpoint import RunState
from server.heads import HeadBook
from server.plan import make_plan
from server.rounds import run_rounds
from server.stragglers import Stragglers

from .fake_grid import FakeGrid

LAYOUT = Layout(("weight",), ((4,),))
START = np.zeros(4, dtype=np.float32)
BEGIN = RunState("run", 0, START)
RESUMED = RunState("run", 1, START, spares={}, resumed_after=(1,))
"""The first round is over; while the second was under way the run was interrupted."""


def update(node, message):
    """A valid update: the parameters sent, plus the node id."""
    instruction = messages.read_instruction(message)
    config = instruction.config
    charge = Event(
        config.privacy.noise_multiplier, config.privacy.sample_rate, config.federation.local_steps
    )
    released = Update(
        instruction.run_id,
        instruction.round,
        instruction.layout_digest,
        charge,
        instruction.vector + np.float32(node),
        SiteBooks(Head(5, "a" * 64), 8.0, 2.5, (charge,)),
    )
    return Message(messages.pack_update(released), reply_to=message)


def refuse(_, message):
    return Message(Error(602, "free text"), reply_to=message)


def silent(_node, _message):
    return None


def nodes_that(**answers):
    """An answer per node id, given as `n3=silent`; the others send an update."""

    def answer(node, message):
        return answers.get(f"n{node}", update)(node, message)

    return answer


def named(count):
    return {node: f"site-{node}" for node in range(1, count + 1)}


@pytest.fixture(scope="module")
def planned(tiny_config):
    """The plan of a tiny run with some federation settings changed."""

    def changed(**settings):
        settings = {"sites": 3, "round_timeout_s": 5.0, **settings}
        return make_plan(
            replace(tiny_config, federation=replace(tiny_config.federation, **settings))
        )

    return changed


@pytest.fixture
def go(tmp_path):
    """Starts the rounds; what they saw of replies is in `go.seen`."""

    def started(grid, plan, state=BEGIN):
        return run_rounds(
            grid,
            plan,
            state,
            layout=LAYOUT,
            heads=None,
            checkpoints=tmp_path / "checkpoints",
            on_reply=lambda number, site: started.seen.append((number, site)),
        )

    started.seen, started.checkpoints = [], tmp_path / "checkpoints"
    return started


def test_all_sites_answer_every_round(go, planned):
    outcomes = list(go(FakeGrid(named(3), update), planned()))
    assert [outcome.round for outcome in outcomes] == [1, 2]
    for outcome in outcomes:
        assert outcome.asked == ("site-1", "site-2", "site-3")
        assert outcome.refused == {}
        assert outcome.bytes_up == outcome.bytes_down == 3 * (16 + 128)
    assert outcomes[0].vector == pytest.approx(np.full(4, 2))
    assert outcomes[1].vector == pytest.approx(np.full(4, 4))
    assert sorted(go.seen) == [(r, f"site-{s}") for r in (1, 2) for s in (1, 2, 3)]


def test_each_round_sends_the_parameters_of_the_round_before(go, planned):
    grid = FakeGrid(named(3), update)
    outcomes = list(go(grid, planned()))
    sent = [messages.read_instruction(message) for message in grid.pushed.values()]
    assert [instruction.round for instruction in sent] == [1, 1, 1, 2, 2, 2]
    assert np.array_equal(sent[0].vector, START)
    assert np.array_equal(sent[3].vector, outcomes[0].vector)
    assert {message.metadata.group_id for message in grid.pushed.values()} == {"1", "2"}


def test_messages_expire_with_the_round(go, planned):
    grid = FakeGrid(named(3), update)
    list(go(grid, planned(round_timeout_s=7.0)))
    assert all(6.0 < message.metadata.ttl <= 7.0 for message in grid.pushed.values())


def test_missed_quorum_names_the_numbers_and_the_reasons(go, planned):
    grid = FakeGrid(named(3), nodes_that(n2=refuse))
    with pytest.raises(FederationError, match=r"round 1: 2 of 3 sites .*quorum=1.*budget") as error:
        list(go(grid, planned()))
    assert "free text" not in str(error.value)
    assert not go.checkpoints.exists()


def lost(_, message):
    return Message(Error(messages.LOCAL_FAILURE, "free text"), reply_to=message)


class LosesFirst:
    """A site that loses its first `attempts`, and answers every later one."""

    def __init__(self, attempts):
        self.left = attempts

    def __call__(self, node, message):
        self.left -= 1
        return (lost if self.left >= 0 else update)(node, message)


def with_spares(plan, spares):
    privacy = replace(plan.config.privacy, spare_rounds=spares)
    return replace(plan, config=replace(plan.config, privacy=privacy))


def test_a_lost_round_is_asked_for_again_while_there_are_spares(go, planned):
    grid = FakeGrid(named(3), nodes_that(n2=LosesFirst(2)))
    outcomes = list(go(grid, with_spares(planned(), 2)))
    assert [outcome.asked.count("site-2") for outcome in outcomes] == [3, 1]
    assert [outcome.asked.count("site-1") for outcome in outcomes] == [1, 1]
    assert [outcome.refused for outcome in outcomes] == [{}, {}]
    assert outcomes[0].bytes_down == 5 * (16 + 128)
    assert sorted(go.seen) == [(r, f"site-{s}") for r in (1, 2) for s in (1, 2, 3)]


@pytest.mark.parametrize("spares", [0, 1])
def test_without_a_spare_left_the_site_sits_the_round_out(spares, go, planned):
    grid = FakeGrid(named(3), nodes_that(n2=LosesFirst(spares + 1)))
    outcomes = list(go(grid, with_spares(planned(quorum=0.6), spares)))
    assert [outcome.asked.count("site-2") for outcome in outcomes] == [spares + 1, 1]
    assert [outcome.refused for outcome in outcomes] == [{"site-2": "local failure"}, {}]


def given_up(_, message):
    """What Flower answers for a node that it has not heard of for a minute."""
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, ""), reply_to=message)


class GoesAway:
    """Given up by Flower at its first message; back, and answering, from then on."""

    def __init__(self):
        self.asked = 0

    def __call__(self, node, message):
        self.asked += 1
        return (given_up if self.asked == 1 else update)(node, message)


def test_a_site_that_went_away_and_came_back_is_asked_again_on_a_spare(go, planned):
    grid = FakeGrid(named(3), nodes_that(n2=GoesAway()))
    outcomes = list(go(grid, with_spares(planned(), 1)))
    assert [outcome.asked.count("site-2") for outcome in outcomes] == [2, 1]
    assert [outcome.refused for outcome in outcomes] == [{}, {}]
    assert [outcome.state.spares["site-2"] for outcome in outcomes] == [0, 0]


def test_a_site_that_went_away_without_a_spare_is_not_waited_for(go, planned):
    grid = FakeGrid(named(3), nodes_that(n2=GoesAway()))
    outcomes = list(go(grid, planned(quorum=0.6)))
    assert [outcome.refused for outcome in outcomes] == [{"site-2": SILENT}, {}]
    assert [outcome.asked.count("site-2") for outcome in outcomes] == [1, 1]


class Away(FakeGrid):
    """Site 2 is not there any more, once it was asked."""

    def get_node_ids(self):
        return [node for node in self.names if node != 2 or not self.pushed]


def test_a_round_with_its_quorum_waits_for_nobody_who_went_away(go, planned):
    grid = Away(named(3), nodes_that(n2=given_up))
    started = time.monotonic()
    outcomes = list(go(grid, with_spares(planned(quorum=0.6, round_timeout_s=60.0), 1)))
    assert time.monotonic() - started < 30
    assert [outcome.refused for outcome in outcomes] == [{"site-2": SILENT}] * 2
    assert [outcome.asked.count("site-2") for outcome in outcomes] == [1, 1]


def test_a_round_without_its_quorum_waits_until_the_deadline(go, planned):
    grid = Away(named(3), nodes_that(n2=given_up))
    started = time.monotonic()
    with pytest.raises(FederationError, match="2 of 3 sites"):
        list(go(grid, with_spares(planned(round_timeout_s=1.0), 1)))
    assert 0.9 < time.monotonic() - started < 20


def test_a_run_that_ends_for_a_lost_attempt_says_what_would_have_paid_for_it(go, planned):
    grid = FakeGrid(named(3), nodes_that(n2=LosesFirst(1)))
    with pytest.raises(FederationError, match=r"local failure.*privacy\.spare_rounds pays.*quorum"):
        next(go(grid, planned()))


@pytest.mark.parametrize("code", sorted({*messages.REFUSALS} - {messages.LOCAL_FAILURE}))
def test_only_a_lost_round_is_asked_for_again(code, go, planned):
    def refused(_, message):
        return Message(Error(code, ""), reply_to=message)

    grid = FakeGrid(named(3), nodes_that(n2=refused))
    first = next(go(grid, with_spares(planned(quorum=0.6), 5)))
    assert first.asked.count("site-2") == 1
    assert first.refused == {"site-2": messages.REFUSALS[code]}


def test_an_update_that_came_is_countersigned_though_the_round_fails(planned, tmp_path):
    """Its site released it, and could else go back to before that."""
    heads = HeadBook(tmp_path / "heads.db")
    grid = FakeGrid(named(3), nodes_that(n2=refuse))
    settings = {"layout": LAYOUT, "checkpoints": tmp_path, "on_reply": print}
    with pytest.raises(FederationError):
        next(run_rounds(grid, planned(), BEGIN, heads=heads, **settings))
    assert {*heads.receipts()} == {"site-1", "site-3"}


def test_nobody_is_asked_again_after_the_deadline(go, planned):
    """A reply may come with its last moment; there is no time for another."""

    def late(node, message):
        time.sleep(0.4)
        return lost(node, message)

    grid = FakeGrid(named(3), nodes_that(n2=late))
    first = next(go(grid, with_spares(planned(quorum=0.6, round_timeout_s=0.3), 1)))
    assert first.asked.count("site-2") == 1
    assert first.refused == {"site-2": "local failure"}


@pytest.mark.parametrize("none", ["", None])
def test_a_message_that_could_not_be_sent_was_not_asked(none, go, planned):
    """As Flower says it, by no id in its place."""
    grid = FakeGrid(named(3), update)
    push = grid.push_messages
    grid.push_messages = lambda outgoing: [push(outgoing)[0], none, none]
    first = next(go(grid, planned(quorum=0.3)))
    assert first.asked == ("site-1",)
    assert first.refused == {}


def test_refusal_within_quorum_is_listed_and_the_round_counts(go, planned):
    grid = FakeGrid(named(3), nodes_that(n2=refuse))
    first = next(go(grid, planned(quorum=0.6)))
    assert first.refused == {"site-2": "budget exhausted"}
    assert first.asked == ("site-1", "site-2", "site-3")
    assert first.vector == pytest.approx(np.full(4, 2))
    assert first.bytes_up == 2 * (16 + 128)


@pytest.mark.parametrize(("quorum", "sites", "answering"), [(0.5, 4, 2), (0.28, 25, 7)])
def test_quorum_that_is_met_exactly_is_met(quorum, sites, answering, go, planned):
    """In floating point 0.28 * 25 is a little above 7."""
    refusing = {f"n{node}": refuse for node in range(answering + 1, sites + 1)}
    grid = FakeGrid(named(sites), nodes_that(**refusing))
    first = next(go(grid, planned(sites=sites, quorum=quorum)))
    assert len(first.refused) == sites - answering


def test_one_answer_less_than_the_quorum_is_not_enough(go, planned):
    grid = FakeGrid(named(4), nodes_that(n1=refuse, n2=refuse, n3=refuse))
    with pytest.raises(FederationError, match="1 of 4"):
        next(go(grid, planned(sites=4, quorum=0.5)))


def test_silent_site_is_left_behind_at_the_deadline(go, planned):
    grid = FakeGrid(named(3), nodes_that(n3=silent))
    started = time.monotonic()
    first = next(go(grid, planned(quorum=0.6, round_timeout_s=0.5)))
    assert 0.5 <= time.monotonic() - started < 3
    assert first.refused == {"site-3": "no reply before the deadline"}
    assert first.asked == ("site-1", "site-2", "site-3")
    assert first.vector == pytest.approx(np.full(4, 1.5))


def test_silence_below_the_quorum_ends_the_run(go, planned):
    grid = FakeGrid(named(3), nodes_that(n3=silent))
    with pytest.raises(FederationError, match=r"2 of 3 .*no reply before the deadline"):
        next(go(grid, planned(round_timeout_s=0.3)))


def test_site_silent_in_one_round_is_asked_again_in_the_next(go, planned):
    """It may have trained and paid all the same, so each asking is on record."""
    grid = FakeGrid(named(3), nodes_that(n3=silent))
    outcomes = list(go(grid, planned(quorum=0.6, round_timeout_s=0.3)))
    assert [outcome.asked for outcome in outcomes] == [("site-1", "site-2", "site-3")] * 2


def test_too_few_sites_end_the_wait_with_both_numbers(go, planned):
    started = time.monotonic()
    with pytest.raises(FederationError, match=r"2 of 3 sites came within 0\.3 s"):
        next(go(FakeGrid(named(2), update), planned(round_timeout_s=0.3)))
    assert time.monotonic() - started < 3


def test_site_that_comes_late_to_the_start_is_waited_for(go, planned):
    grid = FakeGrid(named(2), update)
    asked = []

    def nodes():
        asked.append(None)
        known = named(2) if len(asked) == 1 else named(3)
        return [NodeInfo(node_id=node, name=name) for node, name in known.items()]

    grid.get_nodes = nodes
    assert next(go(grid, planned())).asked == ("site-1", "site-2", "site-3")


def test_late_reply_of_an_earlier_round_is_ignored(go, planned):
    """It would be a valid update of round 1 counted into round 2."""
    late = []

    def answer_late(node, message):
        if messages.read_instruction(message).round == 1:
            late.append(update(node, message))

    grid = FakeGrid(named(3), nodes_that(n3=answer_late))
    rounds = go(grid, planned(quorum=0.6, round_timeout_s=0.4))
    first = next(rounds)
    grid.unsolicited = late
    second = next(rounds)
    assert len(late) == 1
    assert first.refused == second.refused == {"site-3": "no reply before the deadline"}
    assert second.vector == pytest.approx(np.full(4, 3))
    assert go.seen.count((2, "site-3")) == 0


def test_unsolicited_and_repeated_replies_are_ignored(go, planned):
    grid = FakeGrid(named(3), update)
    twice = []

    def answer(node, message):
        reply = update(node, message)
        twice.append(Message(reply.content, reply_to=message))
        grid.unsolicited = list(twice)
        return reply

    grid.answer = answer
    outcomes = list(go(grid, planned()))
    assert outcomes[0].vector == pytest.approx(np.full(4, 2))
    assert outcomes[1].vector == pytest.approx(np.full(4, 4))
    assert len(go.seen) == 6


def test_flood_of_unsolicited_replies_does_not_keep_the_processor_busy(go, planned):
    """A wait polls at intervals, whatever strangers send."""
    grid = FakeGrid(named(3), nodes_that(n3=silent))
    stranger = Message(
        content=RecordDict(),
        metadata=Metadata(1, "", 9, 1, "m-999", "1", 1.8e9, 60.0, "train"),
    )
    grid.unsolicited = [stranger]
    polls = []
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: polls.append(None) or pull(ids)
    next(go(grid, planned(quorum=0.6, round_timeout_s=0.5)))
    assert len(polls) < 20


def test_checkpoint_of_a_round_is_there_when_its_outcome_is(go, planned):
    for outcome in go(FakeGrid(named(3), update), planned()):
        path = go.checkpoints / f"round-{outcome.round:04d}.safetensors"
        with safe_open(path, framework="np") as file:
            assert file.keys() == ["vector"]
            assert np.array_equal(file.get_tensor("vector"), outcome.vector)
            facts = json.loads(file.metadata()["run"])
            assert (facts["run_id"], facts["round"], facts["private"]) == (
                "run",
                outcome.round,
                True,
            )
    assert len(list(go.checkpoints.iterdir())) == 2


def test_round_that_failed_leaves_the_checkpoints_before_it(go, planned):
    def once(node, message):
        number = messages.read_instruction(message).round
        return update(node, message) if number == 1 else refuse(node, message)

    with pytest.raises(FederationError, match="round 2: 0 of 3"):
        list(go(FakeGrid(named(3), once), planned()))
    assert [path.name for path in go.checkpoints.iterdir()] == ["round-0001.safetensors"]


def test_order_of_arrival_changes_nothing(go, planned):
    forwards = list(go(FakeGrid(named(3), update), planned()))
    backwards = list(go(FakeGrid(dict(reversed(named(3).items())), update), planned()))
    assert backwards[-1].asked == forwards[-1].asked
    assert np.array_equal(backwards[-1].vector, forwards[-1].vector)


def test_nodes_without_a_name_are_told_apart(go, planned):
    first = next(go(FakeGrid({1: "", 2: "", 3: ""}, update), planned()))
    assert first.asked == ("node-1", "node-2", "node-3")


def test_a_name_that_looks_like_another_ones_with_its_id_is_told_apart(go, planned):
    """A peer that knew the rule could else pass for a neighbour, and be charged as it."""
    names = {1: "site", 2: "site", 3: "site-2", 4: "site-2-2"}
    outcomes = list(go(FakeGrid(names, update), planned()))
    assert all(len(set(outcome.asked)) == 4 for outcome in outcomes)


def test_nodes_of_one_name_are_told_apart(go, planned):
    """Names come from peers: two of a kind would be charged as one and hide each other's fault."""
    first = next(go(FakeGrid({1: "hospital", 2: "hospital", 3: "clinic"}, update), planned()))
    assert len(set(first.asked)) == 3


def no_spare(_, message):
    return Message(Error(messages.NO_SPARE_ROUND, "free text"), reply_to=message)


def test_a_resumed_run_asks_for_the_rounds_that_are_left(go, planned):
    (outcome,) = go(FakeGrid(named(3), update), planned(), RESUMED)
    assert outcome.round == 2
    assert outcome.state.run_id == "run"
    assert outcome.state.resumed_after == (1,)
    assert [path.name for path in go.checkpoints.iterdir()] == ["round-0002.safetensors"]


def test_no_quorum_waits_for_sites_that_lost_the_round_in_the_interruption(go, planned):
    """They could answer it never more, and so no resumption would ever get past it."""
    grid = FakeGrid(named(3), nodes_that(n2=no_spare))
    (outcome,) = go(grid, planned(), RESUMED)
    assert outcome.refused == {"site-2": messages.REFUSALS[messages.NO_SPARE_ROUND]}
    assert outcome.vector == pytest.approx(np.full(4, 2))
    assert outcome.asked == ("site-1", "site-2", "site-3")


@pytest.mark.parametrize(
    ("answers", "state"),
    [
        ({"n2": no_spare}, BEGIN),
        ({"n2": no_spare}, RunState("run", 1, START)),
        ({"n2": no_spare, "n3": refuse}, RESUMED),
    ],
)
def test_the_quorum_waits_for_all_others(answers, state, go, planned):
    with pytest.raises(FederationError, match=r"asks for more"):
        next(go(FakeGrid(named(3), nodes_that(**answers)), planned(), state))


def test_a_round_that_all_lost_changes_nothing_and_is_over(go, planned):
    everybody = nodes_that(n1=no_spare, n2=no_spare, n3=no_spare)
    (outcome,) = go(FakeGrid(named(3), everybody), planned(), RESUMED)
    assert np.array_equal(outcome.vector, START)
    assert len(outcome.refused) == 3


def test_a_robust_strategy_rather_skips_a_round_than_break_its_promise(go, planned, compose_config):
    plan = planned(sites=3)
    strategy = compose_config("strategy=fedmedian").strategy
    plan = replace(plan, config=replace(plan.config, strategy=strategy))
    (outcome,) = go(FakeGrid(named(3), nodes_that(n2=no_spare)), plan, RESUMED)
    assert np.array_equal(outcome.vector, START)
    first = next(go(FakeGrid(named(3), update), plan))
    assert first.vector == pytest.approx(np.full(4, 2))


def test_of_silent_sites_an_attempt_before_the_interruption_is_counted(go, planned):
    """It may have been charged then, and its spare round be used by now."""
    plan = with_spares(planned(quorum=0.6, round_timeout_s=0.3), 2)
    state = replace(RESUMED, spares={"site-1": 2, "site-2": 2, "site-3": 1})
    (outcome,) = go(FakeGrid(named(3), nodes_that(n2=silent)), plan, state)
    assert outcome.asked == ("site-1", "site-2", "site-3", "site-2")
    assert outcome.state.spares == {"site-1": 2, "site-2": 1, "site-3": 1}
    without = replace(RESUMED, spares=dict.fromkeys(named(3).values(), 0))
    (outcome,) = go(FakeGrid(named(3), nodes_that(n2=silent)), plan, without)
    assert outcome.asked == ("site-1", "site-2", "site-3")


def test_spare_rounds_that_were_used_are_used_after_a_resumption(go, planned):
    grid = FakeGrid(named(3), nodes_that(n2=LosesFirst(1)))
    rounds = go(grid, with_spares(planned(quorum=0.6), 1))
    state = next(rounds).state
    assert state.spares == {"site-1": 1, "site-2": 0, "site-3": 1}
    grid = FakeGrid(named(3), nodes_that(n2=LosesFirst(1)))
    (outcome,) = go(grid, with_spares(planned(quorum=0.6), 1), state)
    assert outcome.asked.count("site-2") == 1
    assert outcome.refused == {"site-2": "local failure"}


def test_spare_rounds_that_books_tell_of_are_used(go, planned):
    def retried(node, message):
        reply = messages.read_update(update(node, message))
        charged = tuple(replace(each, steps=3 * each.steps) for each in reply.books.charged)
        books = replace(reply.books, charged=charged)
        return Message(messages.pack_update(replace(reply, books=books)), reply_to=message)

    (outcome,) = go(FakeGrid(named(3), nodes_that(n2=retried)), with_spares(planned(), 2), RESUMED)
    assert outcome.state.spares == {"site-1": 2, "site-2": 1, "site-3": 2}


@pytest.mark.parametrize("name", [each.name for each in StrategyName])
def test_rounds_go_on_under_every_strategy(name, go, planned, compose_config):
    """Over the real messages; what each makes of them is tests/server/test_strategy.py's."""
    plan = planned(sites=5)
    strategy = compose_config(f"strategy={name}").strategy
    plan = replace(plan, config=replace(plan.config, strategy=strategy))
    first, second = go(FakeGrid(named(5), update), plan)
    assert not np.array_equal(first.vector, START)
    assert not np.array_equal(second.vector, first.vector)
    forwards = second.state
    *_, last = go(FakeGrid(dict(reversed(named(5).items())), update), plan)
    assert np.array_equal(last.vector, forwards.vector)
    assert {*last.state.memory} == {*forwards.memory}


# ---- rounds that ask some sites, on terms of their own


@pytest.fixture(scope="module")
def half(tiny_config):
    """A plan of four sites, two of which a round asks."""
    federation = replace(
        tiny_config.federation, sites=4, participation=0.5, round_timeout_s=5.0, rounds=2
    )
    return make_plan(replace(tiny_config, federation=federation))


def test_a_round_asks_its_cohort_and_nobody_else(go, half):
    grid = FakeGrid(named(4), update)
    outcomes = list(go(grid, half))
    assert [outcome.asked for outcome in outcomes] == [*half.schedule.cohorts]
    assert len(grid.pushed) == 4
    assert {name for outcome in outcomes for name in outcome.asked} == {*named(4).values()}
    told = [messages.read_instruction(message).config for message in grid.pushed.values()]
    assert {config.asked_rounds for config in told} == {1}


def test_the_quorum_is_a_share_of_the_sites_asked(go, half):
    first, second = half.schedule.cohort(1)
    refusing = {f"n{second.removeprefix('site-')}": refuse}
    with pytest.raises(FederationError, match=r"1 of 2 sites .*quorum=1 asks for more") as failed:
        next(go(FakeGrid(named(4), nodes_that(**refusing)), half))
    assert "resume=auto goes on after the last whole round" in str(failed.value)
    assert "spare_rounds" not in str(failed.value)  # which pay for no refusal
    federation = replace(half.config.federation, quorum=0.5)
    lower = replace(half, config=replace(half.config, federation=federation))
    outcome = next(go(FakeGrid(named(4), nodes_that(**refusing)), lower))
    assert outcome.asked == (first, second)
    assert set(outcome.refused) == {second}


def test_sites_on_terms_of_their_own_need_the_names_of_the_plan(go, half):
    names = {**named(4), 3: "clinic"}
    with pytest.raises(FederationError, match=r"1 of 4 sites are not in the plan.*site-1 to"):
        next(go(FakeGrid(names, update), half))


def test_a_site_that_charges_the_price_of_another_is_refused(go, tiny_config):
    """Each is judged by what it was told; the cheaper price would be an under-count."""
    privacy = replace(
        tiny_config.privacy, noise_multiplier=None, site_epsilons=[4.0, 8.0], epsilon=8.0
    )
    federation = replace(tiny_config.federation, quorum=0.5, round_timeout_s=5.0)
    plan = make_plan(replace(tiny_config, privacy=privacy, federation=federation))

    def as_the_other(node, message):
        instruction = messages.read_instruction(message)
        other = plan.of("site-2").event
        released = Update(
            *(instruction.run_id, instruction.round, instruction.layout_digest, other),
            instruction.vector,
            SiteBooks(Head(5, "a" * 64), 8.0, 2.5, (other,)),
        )
        return Message(messages.pack_update(released), reply_to=message)

    outcome = next(go(FakeGrid(named(2), as_the_other), plan))
    assert outcome.refused == {"site-1": "update: charged something else than the plan"}


# ---- rounds that ask more sites than they wait for


def test_a_round_closes_with_enough_updates_and_charges_who_is_later(go, planned):
    """Two of four do not answer, and the deadline is far: nobody waits for it."""
    grid = FakeGrid(named(4), nodes_that(n1=silent, n3=silent))
    began = time.monotonic()
    first = next(go(grid, planned(sites=4, quorum=0.5, enough=0.5, round_timeout_s=60.0)))
    assert time.monotonic() - began < 5
    assert first.asked == ("site-1", "site-2", "site-3", "site-4")
    assert first.refused == dict.fromkeys(("site-1", "site-3"), LATE)
    assert first.vector == pytest.approx(np.full(4, 3))  # the mean of the two that came


def test_updates_beyond_enough_are_not_averaged_and_counted_as_late(go, planned):
    first, second = go(FakeGrid(named(4), update), planned(sites=4, quorum=0.5, enough=0.75))
    assert first.vector == pytest.approx(np.full(4, 2))  # of sites 1, 2 and 3
    assert first.refused == second.refused == {"site-4": LATE}
    assert first.late == second.late == ("site-4",)
    assert second.asked == ("site-1", "site-2", "site-3", "site-4")
    assert first.bytes_up == 3 * (16 + 128)


def test_who_is_still_at_work_is_asked_again_once_it_has_answered(go, planned):
    grid = FakeGrid(named(3), nodes_that(n1=silent))
    rounds = go(grid, planned(rounds=4, quorum=0.6, enough=0.6, round_timeout_s=60.0))
    first, second = next(rounds), next(rounds)
    assert first.refused == {"site-1": LATE}
    assert first.late == second.late == ()
    assert second.asked == ("site-2", "site-3")
    grid.unsolicited = [update(1, grid.pushed["m-1"])]  # its update of the first round
    third = next(rounds)
    grid.unsolicited = []
    assert third.late == ("site-1",)
    assert third.vector == pytest.approx(np.full(4, 3 * 2.5))  # and no part of it is used
    assert next(rounds).asked == ("site-1", "site-2", "site-3")


@pytest.mark.parametrize(
    ("quorum", "asked"),
    [
        pytest.param(0.6, ("site-2", "site-3", "site-1"), id="it would fail"),
        pytest.param(0.3, ("site-2", "site-3"), id="it will do"),
    ],
)
def test_who_was_late_is_asked_once_it_is_through_where_the_round_would_fail(
    go, planned, quorum, asked
):
    """The first is late, and then the second hangs. Of three two are enough: two are there."""
    grid = FakeGrid(named(3), nodes_that(n1=silent))
    rounds = go(grid, planned(rounds=3, quorum=quorum, enough=0.6, round_timeout_s=6.0))
    assert next(rounds).refused == {"site-1": LATE}
    grid.answer = nodes_that(n2=silent)
    grid.unsolicited = [update(1, grid.pushed["m-1"])]  # of the first round, while the second waits
    began = time.monotonic()
    second = next(rounds)
    assert second.asked == asked
    if "site-1" in asked:
        assert 3 <= time.monotonic() - began < 5.9  # in half of the time, and not at the deadline
        assert second.refused == {"site-2": LATE}
        assert second.late == ("site-1",)
        assert second.vector == pytest.approx(np.full(4, 2.5 + 2.0))  # of sites 3 and 1


@pytest.mark.parametrize("answer", [silent, refuse])
def test_who_is_at_work_or_has_failed_is_not_asked_in_between(go, planned, answer):
    grid = FakeGrid(named(3), nodes_that(n1=silent))
    rounds = go(grid, planned(rounds=3, quorum=0.6, enough=0.6, round_timeout_s=2.0))
    next(rounds)
    late = answer(1, grid.pushed["m-1"])
    grid.answer, grid.unsolicited = nodes_that(n2=silent), [late] if late else []
    with pytest.raises(FederationError, match="1 of 3 sites answered"):
        next(rounds)
    assert len(grid.pushed) == 5  # three, and then two


def test_no_round_asks_fewer_sites_than_are_enough():
    stragglers, left = Stragglers(FakeGrid({}, silent)), {"m-1": 4, "m-2": 2, "m-3": 3}
    stragglers.remember(left, time.monotonic() + 60)
    assert stragglers.spared((1, 2, 3, 4), enough=1) == (1,)
    assert stragglers.spared((1, 2, 3, 4), enough=3) == (1, 2, 4)  # 4 began first, 3 last
    assert stragglers.spared((1, 2, 3, 4), enough=4) == (1, 2, 3, 4)


def test_nobody_is_at_work_any_more_when_the_time_of_the_instruction_is_over():
    grid = FakeGrid({}, silent)
    grid.handled = {"m-1", "m-2"}
    stragglers, soon = Stragglers(grid), time.monotonic() + 0.05
    stragglers.remember({"m-1": 1}, time.monotonic() - 1)
    stragglers.remember({"m-2": 2}, soon)
    assert stragglers.spared((1, 2), enough=1) == (1,)
    time.sleep(0.06)
    assert stragglers.heard() == ()
    assert stragglers.spared((1, 2), enough=1) == (1, 2)


def test_enough_does_not_make_up_for_a_quorum_that_is_missed(go, planned):
    grid = FakeGrid(named(4), nodes_that(n1=refuse, n2=refuse, n3=refuse))
    with pytest.raises(FederationError, match=r"1 of 4 sites answered.*quorum=0\.5"):
        next(go(grid, planned(sites=4, quorum=0.5, enough=0.75)))
