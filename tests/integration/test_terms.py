"""Whole runs in which sites differ: in epsilon, in rounds, in what their updates count."""

import json
from collections import Counter

import pytest

from common.privacy.accounting import Event, epsilon_pld
from server.record import read_lines

DELTA = 1e-3


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_overrides):
    """Three sites of epsilons 2, 8 and 2, two of which a round asks; four rounds, one spare."""
    from common import cli

    folder = tmp_path_factory.mktemp("terms") / "run"
    settings = [
        *("federation.sites=3", "federation.rounds=4", "federation.participation=0.6"),
        *("privacy.site_epsilons=[2,8]", "federation.local_steps=1", "privacy.count_noise=20"),
        "federation.weighting=inverse_variance",
    ]
    assert cli.main(["simulate", *tiny_overrides, *settings, f"run_dir={folder}", "--json"]) == 0
    return folder


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_each_site_is_charged_its_own_and_no_more_than_its_own_cap(finished, coterie, tmp_path):
    """By the report, and again from the exported books of each site."""
    sites = {site["name"]: site for site in report_of(finished)["sites"]}
    assert {name: site["cap"] for name, site in sites.items()} == {
        "site-1": 2.0,
        "site-2": 8.0,
        "site-3": 2.0,
    }
    for name, site in sites.items():
        events = [
            Event(site["noise_multiplier"], 0.5, site["rounds"]),
            Event(20.0, 1.0, 1),
        ]
        assert site["epsilon"] == pytest.approx(epsilon_pld(events, DELTA), abs=1e-3)
        assert 0.95 * site["cap"] <= site["epsilon"] <= site["cap"]
        path = tmp_path / f"{name}.jsonl"
        ledger = f"{finished}/ledgers/sites.db#{name}"
        assert coterie("ledger", "export", ledger, "--output", path, "--json").code == 0
        assert coterie("ledger", "verify", path, "--json").code == 0
        entries = [json.loads(text) for text in path.read_text().splitlines()]
        plans = [entry["body"] for entry in entries if entry.get("kind") == "PLAN"]
        assert [plan["rounds"] for plan in plans] == [site["rounds"], 1]
        kinds = Counter(entry.get("kind") for entry in entries)
        assert kinds["RESERVE"] == kinds["RELEASE"] == site["rounds"] + 1
    assert sites["site-2"]["noise_multiplier"] < sites["site-1"]["noise_multiplier"]


def test_a_round_asks_those_of_the_schedule_and_prices_each(finished):
    lines, sites = read_lines(finished), report_of(finished)["sites"]
    assert [len(line.asked) for line in lines] == [2, 2, 2, 2]
    times = Counter(name for line in lines for name in line.asked)
    assert times == {site["name"]: site["rounds"] for site in sites}
    assert max(times.values()) - min(times.values()) <= 1
    for line in lines:
        assert line.epsilon == max(line.epsilons.values())
        assert set(line.asked) <= set(line.epsilons)
    own = [line.epsilons.get("site-1", 0.0) for line in lines]
    assert own == sorted(own)
    for line, before in zip(lines[1:], lines, strict=False):
        rested = set(before.epsilons) - set(line.asked)
        assert all(line.epsilons[name] == before.epsilons[name] for name in rested)


def test_the_headline_is_the_worst_site(finished):
    report = report_of(finished)
    epsilons = {site["name"]: site["epsilon"] for site in report["sites"]}
    assert report["privacy"]["epsilon"]["pld"] == max(epsilons.values()) == epsilons["site-2"]
    assert report["privacy"]["private"] is True
    rows = {row["unit"]: row["epsilon"] for row in report["privacy"]["guarantees"]}
    assert rows["one record at each of two sites"] <= sum(sorted(epsilons.values())[-2:]) + 1
    models = report["privacy"]["guarantees"][1]
    assert models["epsilon"] <= epsilons["site-2"] + 1e-3


def test_the_same_schedule_and_terms_by_the_plan(coterie, tiny_overrides, finished):
    settings = [
        *("federation.sites=3", "federation.rounds=4", "federation.participation=0.6"),
        *("privacy.site_epsilons=[2,8]", "federation.local_steps=1", "privacy.count_noise=20"),
    ]
    answer = coterie("plan", *tiny_overrides, *settings, "--json")
    assert answer.code == 0
    rounds = {site["name"]: site["rounds"] for site in report_of(finished)["sites"]}
    plans = answer.json["site_plans"]
    assert {plan["site"]: plan["rounds"] for plan in plans} == rounds
    assert answer.json["bytes"] == 2 * 8 * answer.json["bytes_per_message"]
    table = coterie("plan", *tiny_overrides, *settings).out
    shown = " ".join(table.replace("│", " ").split())
    assert "a round asks 2 of them" in shown
    assert "site-2" in shown
    assert "epsilon 8.000" in shown or "epsilon 7.9" in shown


def test_a_site_that_is_away_is_not_asked_and_not_charged(coterie, tiny_overrides, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("site,round\nsite-2,2\n")
    folder = tmp_path / "run"
    answer = coterie(
        "simulate",
        *tiny_overrides,
        f"federation.availability={trace}",
        "federation.local_steps=1",
        "privacy.noise=seeded",
        f"run_dir={folder}",
        "--json",
    )
    assert answer.code == 0, answer.err
    assert [line.asked for line in read_lines(folder)] == [("site-1",), ("site-1", "site-2")]
    assert {site["name"]: site["rounds"] for site in answer.json["sites"]} == {
        "site-1": 2,
        "site-2": 1,
    }
    assert "NOT PRIVATE" in answer.json["privacy"]["private_reason"]
