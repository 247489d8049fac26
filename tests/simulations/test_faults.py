"""Faults on purpose: which ones happen, what the coordinator makes of them, and that books hold."""

import json
from collections import Counter
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Error, Message

from common import messages
from common.config import FAULTS, FaultsConfig
from common.parameters import MAX_MAGNITUDE
from common.privacy.accounting import Event
from server.aggregate import SILENT
from server.record import RoundLine
from simulations.faults import Clock, FaultyGrid, fault_of, faults_section

from ..server.fake_grid import FakeGrid

NAMES = {node: f"site-{node - 1}" for node in range(2, 7)}
LOST = messages.REFUSALS[messages.LOCAL_FAILURE]
REFUSED = {
    "dropout": SILENT,
    "straggler": SILENT,
    "not_finite": "parameters: not finite",
    "wrong_length": "parameters: float32 of shape",
    "wrong_layout": "update: of another layout",
    "oversized": "parameters: larger than 10000",
    "other_round": "update: of another run or round",
    "other_site": "does not go on from the head",
    "crash": LOST,
    "crash_prepared": LOST,
}
"""What the coordinator says of a site that a fault hits; the others it cannot tell from honest."""
UNSEEN = ("extreme", "flipped", "scaled")


def test_every_fault_is_tried_here():
    assert {*REFUSED, *UNSEEN} == {*FAULTS}


@pytest.mark.parametrize("kind", FAULTS)
def test_the_rate_is_met_and_higher_ones_hit_what_lower_ones_do(kind):
    """4,000 pairs: three deviations at a rate of 0.2 are 0.019."""
    pairs = [*product(range(1, 101), (f"site-{n}" for n in range(1, 41)))]

    def hit(rate):
        faults = replace(FaultsConfig(), **{kind: rate})
        return {pair for pair in pairs if fault_of(faults, *pair)}

    assert len(hit(0.2)) / len(pairs) == pytest.approx(0.2, abs=0.019)
    assert hit(0.05) < hit(0.2) < hit(1.0) == {*pairs}
    assert hit(0.0) == set()


def test_faults_follow_from_their_seed_round_and_site_alone():
    """Golden: another machine, another version, another order of asking must say the same."""
    faults = FaultsConfig(dropout=0.3, scaled=0.3)
    hit = {pair: fault_of(faults, *pair) for pair in product((1, 2, 3), ("site-1", "site-2"))}
    assert hit == {
        (1, "site-1"): "",
        (1, "site-2"): "",
        (2, "site-1"): "dropout",
        (2, "site-2"): "scaled",
        (3, "site-1"): "",
        (3, "site-2"): "dropout",
    }
    assert {pair: fault_of(faults, *pair) for pair in reversed([*hit])} == hit
    other = replace(faults, seed=1)
    assert {pair: fault_of(other, *pair) for pair in hit} != hit


def test_kinds_are_independent_and_the_first_in_order_goes_first():
    pairs = [*product(range(200), ("site-1", "site-2"))]
    both = [fault_of(FaultsConfig(crash=0.5, dropout=0.5), *pair) for pair in pairs]
    assert Counter(both)["crash"] / len(pairs) == pytest.approx(0.5, abs=0.08)
    assert Counter(both)["dropout"] / len(pairs) == pytest.approx(0.25, abs=0.08)
    assert [kind for kind in both if kind == "crash"] == [
        kind for pair in pairs if (kind := fault_of(FaultsConfig(crash=0.5), *pair))
    ]


def test_only_the_named_sites_are_befallen():
    faults = FaultsConfig(dropout=1.0, sites=["site-2"])
    assert [fault_of(faults, 1, name) for name in NAMES.values()] == ["", "dropout", "", "", ""]


# ---- the grid


@pytest.fixture
def faulty(tiny_config):
    """A faulty grid over a fake one that answers with real updates; `seen` is what sites got."""

    def made(answer=None, mode="record", **faults):
        privacy = replace(tiny_config.privacy, mode=type(tiny_config.privacy.mode)[mode])
        config = replace(tiny_config, faults=FaultsConfig(**faults), privacy=privacy)
        inner = FakeGrid(NAMES, answer or update)
        inner.push_messages = recording(inner, seen := [])
        return FaultyGrid(inner, config), config, seen

    return made


def recording(grid, seen):
    push = grid.push_messages

    def pushed(outgoing):
        outgoing = list(outgoing)
        seen.extend(NAMES[message.metadata.dst_node_id] for message in outgoing)
        return push(outgoing)

    return pushed


def update(node, message):
    """The parameters sent, plus the node's number."""
    instruction = messages.read_instruction(message)
    charge = Event(2.0, 0.5, instruction.config.federation.local_steps)
    ids = instruction.run_id, instruction.round, instruction.layout_digest
    vector = instruction.vector + np.float32(node)
    return Message(messages.pack_update(messages.Update(*ids, charge, vector)), reply_to=message)


def asked(config, number=1):
    instruction = messages.Instruction(
        "run", number, config, "d" * 64, np.ones(3, dtype=np.float32)
    )
    content = messages.pack_instruction(instruction)
    return [Message(content, node, "train", group_id=str(number)) for node in NAMES]


def exchange(grid, config, number=1):
    """What the coordinator hears from each site; every message is answered within a few pulls."""
    ids = grid.push_messages(asked(config, number))
    sites = dict(zip(ids, NAMES.values(), strict=True))
    heard = {}
    for _ in range(3 * len(ids)):
        for reply in grid.pull_messages(sorted(set(ids) - set(heard))):
            heard[reply.metadata.reply_to_message_id] = reply
    assert set(heard) == set(ids)
    return {sites[identity]: reply for identity, reply in heard.items()}


def vector_of(reply):
    return messages.read_update(reply).vector.tolist()


HONEST = {name: [1.0 + node] * 3 for node, name in NAMES.items()}
VECTORS = {
    "wrong_length": [4.0, 4.0],
    "oversized": [2 * MAX_MAGNITUDE, 4.0, 4.0],
    "wrong_layout": [4.0] * 3,
    "other_round": [4.0] * 3,
    "other_site": [5.0] * 3,
    "extreme": [-MAX_MAGNITUDE] * 3,
    "flipped": [-2.0] * 3,
    "scaled": [31.0] * 3,
}


@pytest.mark.parametrize("kind", VECTORS)
def test_a_reply_on_its_way_becomes_what_the_fault_says_and_others_stay(kind, faulty):
    grid, config, seen = faulty(sites=["site-2"], **{kind: 1.0})
    heard = exchange(grid, config)
    assert seen == [*NAMES.values()]
    assert vector_of(heard["site-2"]) == VECTORS[kind]
    others = {name: vector_of(reply) for name, reply in heard.items() if name != "site-2"}
    assert others == {name: honest for name, honest in HONEST.items() if name != "site-2"}


def test_a_value_that_is_no_number(faulty):
    grid, config, _ = faulty(sites=["site-2"], not_finite=1.0)
    assert np.isnan(vector_of(exchange(grid, config)["site-2"])).tolist() == [True, False, False]


def test_what_an_update_says_of_itself(faulty):
    for kind, name in (("wrong_layout", "layout_digest"), ("other_round", "round")):
        grid, config, _ = faulty(sites=["site-2"], **{kind: 1.0})
        heard = exchange(grid, config, number=4)
        told = {site: getattr(messages.read_update(reply), name) for site, reply in heard.items()}
        assert told.pop("site-2") not in set(told.values())
        assert len(set(told.values())) == 1


def test_everybody_may_send_the_reply_of_the_next(faulty):
    grid, config, _ = faulty(other_site=1.0)
    names = [*NAMES.values()]
    heard = {name: vector_of(reply) for name, reply in exchange(grid, config).items()}
    assert heard == {
        name: HONEST[after] for name, after in zip(names, [*names[1:], names[0]], strict=True)
    }


def test_a_reply_that_stands_for_one_that_failed_is_silence(faulty):
    def answer(node, message):
        failed = Message(Error(messages.LOCAL_FAILURE, ""), reply_to=message)
        return failed if NAMES[node] == "site-3" else update(node, message)

    grid, config, _ = faulty(answer, sites=["site-2"], other_site=1.0)
    heard = exchange(grid, config)
    assert heard["site-2"].has_error()
    assert heard["site-3"].error.code == messages.LOCAL_FAILURE


def test_a_site_that_dropped_out_never_hears_of_the_round(faulty):
    grid, config, seen = faulty(sites=["site-2"], dropout=1.0)
    heard = exchange(grid, config)
    assert "site-2" not in seen
    assert heard["site-2"].has_error()
    assert vector_of(heard["site-3"]) == HONEST["site-3"]


def test_a_straggler_works_and_is_not_heard(faulty):
    grid, config, seen = faulty(sites=["site-2"], straggler=1.0, deadline_s=599.0)
    heard = exchange(grid, config)
    assert "site-2" in seen
    assert heard["site-2"].has_error()
    grid, config, seen = faulty(sites=["site-2"], straggler=1.0, deadline_s=600.0)
    assert vector_of(exchange(grid, config)["site-2"]) == HONEST["site-2"]


def test_a_slow_site_is_late_without_being_hit(faulty):
    grid, config, _ = faulty(speeds=[1.0, 0.1], round_s=10.0, deadline_s=30.0)
    late = {name for name, reply in exchange(grid, config).items() if reply.has_error()}
    assert "site-2" in late
    assert "site-1" not in late


def test_a_repeated_attempt_is_not_hit_again(faulty):
    grid, config, seen = faulty(dropout=1.0)
    assert all(reply.has_error() for reply in exchange(grid, config).values())
    assert not any(reply.has_error() for reply in exchange(grid, config).values())
    assert seen == [*NAMES.values()]
    assert all(reply.has_error() for reply in exchange(grid, config, number=2).values())


def test_without_books_a_site_dies_before_it_begins(faulty):
    for kind in ("crash", "crash_prepared"):
        grid, config, seen = faulty(mode="none", sites=["site-2"], **{kind: 1.0})
        heard = exchange(grid, config)
        assert heard["site-2"].error.code == messages.LOCAL_FAILURE
        assert "site-2" not in seen
        assert not exchange(grid, config)["site-2"].has_error()


def test_a_count_is_nobodys_to_corrupt(faulty):
    grid, config, _ = faulty(dropout=1.0, scaled=1.0)
    outgoing = [
        Message(message.content, message.metadata.dst_node_id, "evaluate", group_id="1")
        for message in asked(config)
    ]
    ids = grid.push_messages(outgoing)
    assert not any(reply.has_error() for reply in grid.pull_messages(ids))


# ---- the clock and the report


def line(number, names, refused=(), **settings):
    reasons = dict.fromkeys(refused, SILENT)
    return RoundLine(number, {}, 1.0, tuple(names), reasons, 0, 0, 0.0, private=True, **settings)


def test_the_clock_of_a_round_stops_at_the_last_answer_or_at_the_deadline(tiny_config):
    def clock(**settings):
        return Clock(replace(tiny_config, faults=FaultsConfig(round_s=10.0, **settings)))

    names = ["site-1", "site-2"]
    assert clock().round_s(line(1, names)) == 10
    assert clock(speeds=[1.0, 0.5]).round_s(line(1, names)) == 20
    assert clock(speeds=[1.0, 0.5]).round_s(line(1, [*names, "site-2"])) == 40
    assert clock(speeds=[1.0, 0.5], deadline_s=15.0).round_s(line(1, names)) == 15
    assert clock(dropout=1.0, deadline_s=99.0).round_s(line(1, names)) == 99
    assert clock(dropout=1.0).deadline_s == tiny_config.federation.round_timeout_s


def test_the_report_says_what_was_injected_and_what_became_of_it(tiny_config):
    faults = FaultsConfig(dropout=1.0, sites=["site-2"])
    config = replace(tiny_config, faults=faults)
    lines = [line(1, ["site-1", "site-2"], refused=["site-2"]), line(2, ["site-1", "site-2"] * 2)]
    section = faults_section(config, lines)
    assert section["injected"] == [
        {"round": 1, "site": "site-2", "fault": "dropout", "outcome": SILENT},
        {"round": 2, "site": "site-2", "fault": "dropout", "outcome": "repeated"},
    ]
    assert section["counts"] == {"dropout": 2}
    assert section["clock_s"] == 2 * 3600


# ---- whole runs


@pytest.fixture
def run(coterie, tiny_overrides, tmp_path):
    """A whole tiny run with faults: its answer, its report, and the entries of a ledger by kind."""

    def started(*overrides):
        folder = tmp_path / f"run-{len([*tmp_path.iterdir()])}"
        answer = coterie("simulate", *tiny_overrides, *overrides, f"run_dir={folder}", "--json")
        if answer.code:
            return SimpleNamespace(answer=answer, code=answer.code)
        return SimpleNamespace(
            answer=answer,
            code=0,
            report=answer.json,
            page=(folder / "report.html").read_text(),
            sites={site["name"]: site for site in answer.json["sites"]},
            injected=answer.json.get("faults", {}).get("injected"),
            kinds=lambda name: Counter(entries(coterie, folder, name, tmp_path)),
        )

    return started


def entries(coterie, folder, name, tmp_path):
    """Exports the ledger of a site, has it verified, and returns the kinds of its entries."""
    path = tmp_path / "export.jsonl"
    path.unlink(missing_ok=True)
    ledger = f"{folder}/ledgers/sites.db#{name}"
    assert coterie("ledger", "export", ledger, "--output", path, "--json").code == 0
    assert coterie("ledger", "verify", path, "--json").code == 0
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return [entry["kind"] for entry in lines if "kind" in entry]


HALF = ["federation.quorum=0.5", "faults.sites=[site-2]"]


@pytest.mark.parametrize("kind", sorted({*REFUSED} - {"other_site"}))
def test_each_fault_is_refused_by_name_and_the_books_stay_right(kind, run):
    """Released but uncharged: nothing, whatever happens on the way."""
    one = run(*HALF, f"faults.{kind}=1", "faults.deadline_s=120")
    assert one.code == 0, one.answer.err
    outcomes = [hit["outcome"] for hit in one.injected if hit["site"] == "site-2"]
    assert len(outcomes) == 2
    assert all(REFUSED[kind] in outcome for outcome in outcomes)
    assert one.report["sites"][0]["not_answered"] == {}
    for name, site in one.sites.items():
        kinds = one.kinds(name)
        assert kinds["RELEASE"] <= kinds["PREPARE"] <= kinds["RESERVE"] <= site["steps"] / 2 == 2
        assert kinds["RESERVE"] == kinds["PREPARE"] + kinds["LOST"]
    hit = one.kinds("site-2")
    assert (hit["RESERVE"], hit["LOST"], hit["RELEASE"]) == {
        "dropout": (0, 0, 0),
        "crash": (2, 2, 0),
        "crash_prepared": (2, 0, 0),
    }.get(kind, (2, 0, 2))


@pytest.mark.parametrize("kind", ["crash", "crash_prepared"])
def test_a_spare_round_repeats_what_a_crash_took(kind, run):
    one = run("faults.sites=[site-2]", f"faults.{kind}=1", "privacy.spare_rounds=2")
    assert one.code == 0, one.answer.err
    assert [hit["outcome"] for hit in one.injected] == ["repeated", "repeated"]
    assert f"<td>{kind}</td><td>repeated</td>" in one.page
    assert one.sites["site-2"]["repeated"] == 2
    assert one.sites["site-1"]["repeated"] == 0
    kinds = one.kinds("site-2")
    assert kinds["RELEASE"] == 2
    # The one charges its second attempt, the other sends the bytes that were paid for.
    assert (kinds["RESERVE"], kinds["LOST"]) == ((4, 2) if kind == "crash" else (2, 0))
    assert "Traceback" not in one.answer.err


def test_a_missed_quorum_ends_the_run_and_names_the_reason(run):
    one = run("faults.sites=[site-2]", "faults.dropout=1")
    assert one.code == 4
    assert SILENT in one.answer.err
    assert one.answer.err.splitlines()[-1].startswith(
        "coterie simulate: round 1: 1 of 2 sites answered"
    )
    assert "Traceback" not in one.answer.err


def test_books_of_another_site_do_not_go_on_from_those_the_coordinator_knew(run):
    """Seed 9 hits the second round and not the first, which is taken on trust."""
    one = run(*HALF, "faults.other_site=0.5", "faults.seed=9")
    assert [(hit["round"], hit["fault"]) for hit in one.injected] == [(2, "other_site")]
    assert REFUSED["other_site"] in one.injected[0]["outcome"]


def test_the_same_seed_gives_the_same_faults_and_nothing_else_decides(run):
    settings = ["federation.quorum=0.01", "federation.sites=4", "federation.rounds=3"]
    rough = [
        *settings,
        "faults.dropout=0.3",
        "faults.flipped=0.3",
        "privacy=none",
        "privacy.delta=1e-3",
    ]
    first, again = run(*rough), run(*rough, "seed=5", "federation.local_steps=1")
    assert first.injected
    assert [(h["round"], h["site"], h["fault"]) for h in first.injected] == [
        (h["round"], h["site"], h["fault"]) for h in again.injected
    ]
    assert first.report["faults"]["counts"] == dict(Counter(hit["fault"] for hit in first.injected))


def test_one_byzantine_site_of_four_ruins_a_mean(run):
    """What strategies are for that compare updates; a mean follows whoever goes furthest."""
    settings = [
        *("privacy=none", "privacy.delta=1e-3", "federation.sites=4", "federation.rounds=5"),
        *("federation.local_steps=10", "tuning=full"),
        *("tuning.head_learning_rate=0.1", "tuning.adapter_learning_rate=0.02"),
    ]
    honest = run(*settings)
    attacked = run(*settings, "faults.sites=[site-2]", "faults.scaled=1", "faults.scale=-20")
    assert attacked.code == 0, attacked.answer.err
    assert {hit["outcome"] for hit in attacked.injected} == {"accepted"}
    assert honest.report["evaluation"]["accuracy"] >= 0.85
    assert attacked.report["evaluation"]["accuracy"] <= 0.6


def test_a_run_without_faults_says_nothing_of_them(run):
    one = run()
    assert "faults" not in one.report
    assert one.kinds("site-1")["RELEASE"] == 2
