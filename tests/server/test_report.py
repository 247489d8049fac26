"""The report charges what was asked, and shows the worst site."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from common import cli
from common.errors import VerificationError
from common.privacy.accounting import Epsilons, Event, epsilon_pld
from server import spending
from server.checkpoint import RunState
from server.count import Counted
from server.plan import make_plan
from server.record import RoundLine, SiteLine
from server.report import read_report, render_html
from server.rounds import RoundOutcome
from server.spending import round_line
from server.summary import RunFacts, build_report

FACTS = RunFacts("0123456789abcdef", 10.0, 24)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_overrides):
    run_dir = tmp_path_factory.mktemp("report") / "run"
    assert cli.main(["simulate", *tiny_overrides, f"run_dir={run_dir}", "--json"]) == 0
    return run_dir


@pytest.fixture(scope="module")
def plan(tiny_config):
    return make_plan(replace(tiny_config, federation=replace(tiny_config.federation, rounds=3)))


def line(number, asked, refused=()):
    metrics = {"accuracy": 0.5, "macro_f1": 0.25}
    return RoundLine(
        number, metrics, 1.0, tuple(asked), dict.fromkeys(refused, "silent"), 10, 5, 2.0, True
    )


LINES = [
    line(1, ["site-1", "site-2", "site-10"]),
    line(2, ["site-1", "site-2"], refused=["site-2"]),
    line(3, ["site-2"], refused=["site-2"]),
]


@pytest.fixture(scope="module")
def built(plan):
    return build_report(plan, LINES, FACTS)


def test_site_is_charged_for_every_round_asked_even_unanswered(built):
    """A silent site may have trained, and paid, all the same."""
    rounds = {site["name"]: site["rounds"] for site in built["sites"]}
    assert rounds == {"site-1": 2, "site-2": 3, "site-10": 1}
    assert [site["steps"] for site in built["sites"]] == [4, 6, 2]


def test_sites_stand_in_natural_order(built):
    assert [site["name"] for site in built["sites"]] == ["site-1", "site-2", "site-10"]


def test_names_of_any_length_stand_in_natural_order(plan):
    long = f"site-{'9' * 5000}"  # more digits than Python reads as a number
    built = build_report(plan, [line(1, [long, "site-2", "site-10"])], FACTS)
    assert [site["name"] for site in built["sites"]] == ["site-2", "site-10", long]


def test_epsilon_of_a_site_is_that_of_its_rounds_composed(built, plan):
    for site in built["sites"]:
        whole = epsilon_pld([plan.event] * site["rounds"], plan.config.privacy.delta)
        assert site["epsilon"] == pytest.approx(whole, rel=1e-9)


def test_headline_is_the_worst_site(built):
    epsilons = {site["name"]: site["epsilon"] for site in built["sites"]}
    assert built["privacy"]["epsilon"]["pld"] == max(epsilons.values()) == epsilons["site-2"]
    assert len(set(epsilons.values())) == 3


def test_three_accountants_agree(built):
    priced = built["privacy"]["epsilon"]
    assert priced["pld"] <= priced["rdp"]
    assert abs(priced["pld"] - priced["prv"]) < 0.03


def test_report_is_not_built_on_accountants_that_disagree(plan, monkeypatch):
    monkeypatch.setattr(spending, "epsilons", lambda *_: Epsilons(pld=1.0, rdp=0.5, prv=1.0))
    with pytest.raises(VerificationError, match="disagree"):
        build_report(plan, LINES, FACTS)


def test_a_count_that_nobody_answered_is_no_accuracy_of_zero(tiny_config):
    """It is charged, and each site says why there is none."""
    plan = make_plan(replace(tiny_config, privacy=replace(tiny_config.privacy, count_noise=9.0)))
    lines, names = [line(1, ["site-1", "site-2"])], ("site-1", "site-2")
    silent = Counted(names, 0.0, 42.0, 0.0, dict.fromkeys(names, "budget exhausted"))
    report = build_report(plan, lines, FACTS, silent)
    assert "evaluation_private" not in report
    assert {site["not_answered"]["count"] for site in report["sites"]} == {"budget exhausted"}
    alone = build_report(plan, lines, FACTS)["privacy"]["epsilon"]["pld"]
    assert report["privacy"]["epsilon"]["pld"] > alone
    assert "site-1, count: budget exhausted" in render_html(report, lines)


def test_traffic_and_time_are_summed_over_rounds(built):
    assert built["communication"] == {"bytes_up": 15, "bytes_down": 30}
    assert built["timing"] == {"total_s": 10.0, "train_s": 6.0, "overhead_s": 4.0}
    assert built["evaluation_records"] == 24


def state(number):
    return RunState("run", number, np.zeros(1, np.float32))


def test_line_of_a_round_prices_the_site_asked_most(plan):
    outcome = RoundOutcome(state(3), {}, ("site-2",), {}, 10, 5, 2.0)
    made = round_line(outcome, {"accuracy": 0.5}, LINES[:2], plan)
    assert made.epsilon == plan.epsilon_by_round[2]
    rested = replace(outcome, asked=("site-10",))
    assert (
        round_line(rested, {"accuracy": 0.5}, LINES[:2], plan).epsilon == (plan.epsilon_by_round[1])
    )


def test_line_of_a_round_in_which_a_site_with_lasting_books_was_silent(plan):
    """What its ledger held when it last answered, and what it was asked since."""
    lasting = replace(plan, config=replace(plan.config, ledger="books.db"))
    sigma, q = plan.event.noise_multiplier, plan.event.sample_rate
    spent = epsilon_pld([Event(sigma, q, 20)], plan.config.privacy.delta)
    books = {
        "site-1": SiteLine(head="9:" + "a" * 64, cap=50.0, spent=spent, charged=[[sigma, q, 20.0]])
    }
    before = [replace(line(1, ["site-1"]), epsilon=spent, books=books)]
    silent = RoundOutcome(state(2), {}, ("site-1",), {"site-1": "silent"}, 10, 5, 2.0)
    made = round_line(silent, {"accuracy": 0.5}, before, lasting)
    since = replace(plan.event, steps=20 + plan.event.steps)
    assert made.epsilon >= epsilon_pld([since], plan.config.privacy.delta)


def test_epsilon_of_a_finished_run_is_within_the_budget_and_the_plan(finished):
    content, lines = read_report(finished)
    assert content["privacy"]["epsilon"]["pld"] <= 8
    assert lines[-1].epsilon == pytest.approx(content["privacy"]["epsilon"]["pld"], abs=0.01)


def test_report_command_shows_what_is_on_disk(coterie, finished):
    answer = coterie("report", finished, "--json")
    assert answer.code == 0
    assert answer.json == json.loads((finished / "report.json").read_text())


def damaged(finished, folder, fault):
    """A copy of a finished run with one thing wrong."""
    shutil.copytree(finished, folder)
    fault(folder)
    return folder


FAULTS = {
    "no folder": shutil.rmtree,
    "no report": lambda folder: (folder / "report.json").unlink(),
    "no rounds": lambda folder: (folder / "metrics.jsonl").unlink(),
    "report is cut off": lambda folder: (folder / "report.json").write_text('{"privacy": {'),
    "report is empty": lambda folder: (folder / "report.json").write_text(""),
    "report is not text": lambda folder: (folder / "report.json").write_bytes(b"\xff\xfe\x00"),
    "report is a list": lambda folder: (folder / "report.json").write_text("[]"),
    "report holds nothing": lambda folder: (folder / "report.json").write_text("{}"),
    "rounds are cut off": lambda folder: (folder / "metrics.jsonl").write_text('{"round": 1'),
    "a round is a list": lambda folder: (folder / "metrics.jsonl").write_text("[1]\n"),
    "a round is of another shape": lambda folder: (folder / "metrics.jsonl").write_text(
        '{"round": 1}\n'
    ),
    "rounds are empty": lambda folder: (folder / "metrics.jsonl").write_text(""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_folder_that_is_no_finished_run_is_refused(fault, coterie, finished, tmp_path):
    folder = damaged(finished, tmp_path / "run", FAULTS[fault])
    answer = coterie("report", folder, "--json")
    assert answer.code == 5
    assert answer.json["error"]["kind"] == "VerificationError"
    assert str(folder) in answer.json["error"]["message"]


def test_baseline_that_is_no_finished_run_is_refused(coterie, finished, tmp_path):
    before = (finished / "report.json").read_bytes()
    assert coterie("report", finished, "--baseline", tmp_path, "--json").code == 5
    assert (finished / "report.json").read_bytes() == before


HOSTILE = '<script>alert("x")</script>'


def hostile_everywhere(value):
    """Every text of a report replaced; what a template branches on stays."""
    if isinstance(value, dict):
        return {key: hostile_everywhere(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile_everywhere(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_page_escapes_every_text(finished):
    content, lines = read_report(finished)
    hostile = hostile_everywhere(copy.deepcopy(content))
    hostile["sites"][0]["name"] = "<img src=x onerror=alert(1)>"
    odd = [replace(one, metrics={HOSTILE: 0.5}, asked=(HOSTILE,)) for one in lines]
    page = render_html(hostile, odd)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;") >= 8
    assert "&lt;img src=x" in page


def test_page_of_a_private_run_says_what_is_protected_and_what_is_not_counted(finished):
    page = (finished / "report.html").read_text()
    assert "NOT PRIVATE" not in page
    assert "one record, added or removed" in page
    assert "Not counted:" in page
    assert "worst site" in page


def test_page_escapes_what_a_model_writes_and_how_a_public_group_is_called(finished):
    """A model's text is untrusted: it may have learned to write markup."""
    content, lines = read_report(finished)
    sample = dict.fromkeys(("prompt", "written", "reference"), HOSTILE)
    group = {
        "group": HOSTILE,
        "records": 30,
        "value": 0.5,
        "interval": [0.1, 0.9],
        "compared": True,
    }
    content["evaluation_detail"] |= {
        "samples": [sample],
        "groups": {
            **{"column": HOSTILE, "metric": "accuracy", "lower_is_better": False, "fewest": 20},
            **{"worst": HOSTILE, "best": HOSTILE, "gap": 0.1, "groups": [group]},
        },
    }
    content["evaluation_detail"]["classes"][0]["class"] = HOSTILE
    before = render_html(read_report(finished)[0], lines).count("&lt;script&gt;")
    page = render_html(content, lines)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") - before == 3 + 4 + 3  # texts, group, class


def test_page_shows_every_class_and_count(finished):
    page, (content, _) = (finished / "report.html").read_text(), read_report(finished)
    detail = content["evaluation_detail"]
    assert sum(map(sum, detail["confusion"])) == content["evaluation_records"]
    for each in detail["classes"]:
        assert f"<td>{each['class']}</td><td>{each['precision']:.4f}</td>" in page
    for row in detail["confusion"]:
        assert all(f">{count}</td>" in page for count in row)


def test_page_of_a_run_that_is_older_than_detail_is_still_drawn(finished):
    content, lines = read_report(finished)
    del content["evaluation_detail"]
    assert "By class" not in render_html(content, lines)
    assert "By class" in (finished / "report.html").read_text()
