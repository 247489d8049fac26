"""The rows of a sweep, its price as a whole, and what is written about it."""

import json
import math
from dataclasses import replace
from statistics import mean, stdev

import pytest
from rich.console import Console

from common.cli import main
from common.config import PrivacyMode, to_yaml
from common.errors import ConfigError
from common.privacy.accounting import Event, epsilon_pld
from simulations.finished import Finished, price_together
from simulations.frontier import Curve, frontier_of
from simulations.sweep import show_sweep, sweep_object, write_sweep

RATE, STEPS, DELTA = 0.5, 4, 1e-3
SIGMAS = {1.0: 4.0, 3.0: 2.0}
SITES = ("site-1", "site-2")


def finished(config, *, epsilon=3.0, seed=0, value=0.9, sigma=None, **changes):
    """A run that spent what was asked, at sigma of its epsilon."""
    sigma = sigma or SIGMAS[epsilon]
    privacy = replace(config.privacy, epsilon=epsilon, noise_multiplier=sigma, **changes)
    private = privacy.mode is not PrivacyMode.none
    report = {
        "privacy": {
            "bound": epsilon if private else "inf",
            "private": private,
            "mechanism": {"noise_multiplier": sigma, "sample_rate": RATE, "steps": 2},
        },
        "sites": [{"name": name, "steps": STEPS} for name in SITES],
        "evaluation": {"accuracy": value, "macro_f1": value / 2},
        "timing": {"total_s": 10.0},
    }
    return Finished(replace(config, privacy=privacy, seed=seed), report)


@pytest.fixture
def runs(tiny_config):
    return [
        finished(tiny_config, epsilon=epsilon, seed=seed, value=0.5 + epsilon / 10 + seed / 100)
        for epsilon in (1.0, 3.0)
        for seed in (0, 1, 2)
    ]


def test_runs_that_differ_in_their_seed_alone_are_a_row(runs):
    content = sweep_object(runs)
    assert content["settings"] == ["privacy.epsilon"]  # sigma follows from it
    low, high = content["rows"]
    assert (low["settings"], high["settings"]) == ({"privacy.epsilon": 1}, {"privacy.epsilon": 3})
    assert low["mean"] == pytest.approx(mean([0.6, 0.61, 0.62]), abs=1e-6)
    assert low["spread"] == pytest.approx(stdev([0.6, 0.61, 0.62]), abs=1e-6)
    assert (low["n"], low["seeds"], low["epsilon"]) == (3, [0, 1, 2], 1.0)


def test_a_sigma_given_by_hand_names_its_row(tiny_config):
    content = sweep_object([finished(tiny_config, sigma=sigma) for sigma in (2.0, 2.5)])
    assert content["settings"] == ["privacy.noise_multiplier"]
    assert [row["n"] for row in content["rows"]] == [1, 1]


def test_one_run_has_no_spread(runs):
    assert "spread" not in sweep_object(runs[:1])["rows"][0]


def test_the_price_of_the_sweep_is_of_all_its_runs(tiny_config, runs):
    """The same deal twice: both runs charged one record. Another seed deals anew."""
    low, high = runs[0], runs[3]
    for run in (low, high):
        run.report["privacy"]["bound"] = 0.0
    events = [Event(SIGMAS[1.0], RATE, STEPS), Event(SIGMAS[3.0], RATE, STEPS)]
    assert price_together([low, high]) == pytest.approx(epsilon_pld(events, DELTA), rel=1e-9)
    elsewhere = finished(tiny_config, epsilon=3.0, seed=7)
    elsewhere.report["privacy"]["bound"] = 0.0
    thrice = [*events, Event(SIGMAS[3.0], RATE, STEPS)]
    together = price_together([low, high, elsewhere])
    assert together == pytest.approx(epsilon_pld(thrice, DELTA), rel=1e-9)


def test_the_worst_site_is_the_one_that_paid_most_and_not_the_one_asked_most(tiny_config):
    """Site 1 took part in the run with little noise, site 2 in more steps of the other."""
    quiet, loud = finished(tiny_config, epsilon=1.0), finished(tiny_config, epsilon=3.0)
    quiet.report["sites"] = [{"name": "site-2", "steps": STEPS + 1}]
    loud.report["sites"] = [{"name": "site-1", "steps": STEPS}]
    worst = epsilon_pld([Event(SIGMAS[3.0], RATE, STEPS)], DELTA)
    for run in (quiet, loud):
        run.report["privacy"]["bound"] = 0.0
    assert price_together([quiet, loud]) == pytest.approx(worst, rel=1e-9)


def test_one_run_without_privacy_leaves_the_sweep_without(runs, tiny_config):
    content = sweep_object([*runs, finished(tiny_config, mode=PrivacyMode.none)])
    assert (content["epsilon_together"], content["private"]) == ("inf", False)


def test_a_metric_that_a_run_lacks_is_refused(runs):
    with pytest.raises(ConfigError, match=r"--metric=bleu: .* all have accuracy, macro_f1"):
        sweep_object(runs, "bleu")


@pytest.fixture
def folder(tmp_path, runs):
    for index, run in enumerate(runs):
        job = tmp_path / f"job-{index}"
        job.mkdir()
        fields = ("task", "model", "tuning", "rounds", "engine", "communication", "versions")
        whole = dict.fromkeys(fields, "") | {"config_hash": "", "seed": run.config.seed}
        (job / "report.json").write_text(json.dumps(whole | run.report))
        (job / "config.yaml").write_text(to_yaml(run.config))
        line = {"round": 1, "metrics": {}, "epsilon": 1.0, "asked": [], "refused": {}}
        rest = {"bytes_down": 0, "bytes_up": 0, "sites_s": 0.0, "private": True}
        (job / "metrics.jsonl").write_text(json.dumps(line | rest) + "\n")
    return tmp_path


def test_a_folder_of_runs_becomes_a_table_a_page_and_a_picture(folder, runs, capsys):
    assert main(["sweep-report", str(folder), "--metric", "macro_f1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((folder / "sweep.json").read_text())
    assert told["metric"] == "macro_f1"
    assert told["rows"] == sweep_object(runs, "macro_f1")["rows"]
    page, picture = (folder / "sweep.html").read_text(), (folder / "frontier.svg").read_text()
    assert picture.startswith("<?xml")
    assert "<svg" in page
    assert "0.3050" in page
    assert "over the whole sweep" in page


def test_a_run_that_did_not_finish_is_named_and_in_no_row(folder, capsys):
    (folder / "job-2" / "report.json").unlink()
    content = write_sweep(folder)
    assert (content["unfinished"], content["runs"]) == (["job-2"], 5)
    show_sweep(content, folder, Console(markup=False))
    assert "job-2: did not finish" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_runs_is_one_line_and_nothing_is_written(tmp_path, name, capsys):
    assert main(["sweep-report", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "give the run_dir of a sweep" in error
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_run_is_named(folder, capsys):
    (folder / "job-1" / "config.yaml").write_text("a: [")
    assert main(["sweep-report", str(folder)]) == 5
    assert "job-1: its config.yaml is not one of ours" in capsys.readouterr().err
    assert not (folder / "sweep.json").exists()


def test_the_picture_has_a_bar_a_point_and_a_line_for_no_privacy():
    points = [(1.0, 0.6, 0.01), (3.0, 0.8, 0.02), (math.inf, 0.9, 0.0)]
    picture = frontier_of([Curve("tuning.method=head", points)], "accuracy")
    assert picture.count("<svg") == 1
    assert "without privacy" in picture


def test_over_two_deals_no_site_pays_more_than_is_told(tiny_config):
    """In each deal one site had much noise for long, another little for a short time."""
    runs = [finished(tiny_config, epsilon=1.0, seed=seed) for seed in (0, 1)]
    for run in runs:
        run.report["privacy"]["bound"] = 0.0
        few = {"name": "site-1", "steps": 1, "noise_multiplier": 1.0}
        run.report["sites"] = [few, {"name": "site-2", "steps": 60, "noise_multiplier": 6.0}]
    loud, long = Event(1.0, RATE, 1), Event(6.0, RATE, 60)
    together = price_together(runs)
    for one, other in ((loud, loud), (loud, long), (long, long)):
        assert epsilon_pld([one, other], DELTA) <= together
