"""What runs that leave a site out say together, and what all of them cost."""

import json
import math
from dataclasses import replace
from statistics import mean, stdev

import pytest
from rich.console import Console

from common.config import NoiseSource, TaskName
from common.privacy.accounting import Event, epsilon_pld
from simulations.finished import Finished
from simulations.left_out import FILE, show_summary, summary, write_summary

SIGMA, RATE, STEPS, DELTA = 2.0, 0.5, 4, 1e-3
SITES = ("site-1", "site-2", "site-3")
VALUES = dict(zip(SITES, (0.8, 0.6, 0.9), strict=True))


def finished(config, site, value, *, bound=1.0, metric="accuracy"):
    """A run without `site`; every other site was asked everything."""
    run = replace(config, federation=replace(config.federation, sites=3, leave_out=site))
    mechanism = {"noise_multiplier": SIGMA, "sample_rate": RATE, "steps": 2}
    report = {
        "run_id": f"run-{site}",
        "privacy": {"bound": bound, "mechanism": mechanism},
        "sites": [{"name": name, "steps": STEPS} for name in SITES if name != site],
        "evaluation_left_out": {"site": site, "records": 10, "metrics": {metric: value, "z": 0.1}},
    }
    return Finished(run, report)


@pytest.fixture
def runs(tiny_config):
    return [finished(tiny_config, site, value) for site, value in VALUES.items()]


def test_mean_spread_and_worst_site(runs):
    (together,) = summary(runs)["runs"]
    assert together["mean"] == pytest.approx(mean(VALUES.values()), abs=1e-4)
    assert together["spread"] == pytest.approx(stdev(VALUES.values()), abs=1e-4)
    assert together["worst"] == "site-2"
    assert {each["site"]: each["value"] for each in together["sites"]} == VALUES


def test_of_a_metric_that_is_better_where_lower_the_highest_is_worst(tiny_config):
    config = replace(tiny_config, task=replace(tiny_config.task, name=TaskName.causal_lm))
    runs = [finished(config, site, value, metric="perplexity") for site, value in VALUES.items()]
    assert summary(runs)["runs"][0]["worst"] == "site-3"


def test_epsilon_is_of_a_record_in_all_runs_that_its_site_was_in(runs):
    """Each of three sites trained in two runs; the price of one run would be too small."""
    together = summary(runs)["epsilon"]
    both = epsilon_pld([Event(SIGMA, RATE, 2 * STEPS)], DELTA)
    assert together == pytest.approx(both, rel=1e-9)
    assert together > epsilon_pld([Event(SIGMA, RATE, STEPS)], DELTA)


def test_a_run_of_the_sweep_that_left_nobody_out_is_in_the_price(tiny_config, runs):
    """`federation.leave_out='',site-1,site-2`: the first one trained on everybody, too."""
    whole = finished(tiny_config, "", 0.0)
    del whole.report["evaluation_left_out"]
    together = summary([whole, *runs])
    three = epsilon_pld([Event(SIGMA, RATE, 3 * STEPS)], DELTA)
    assert together["epsilon"] == pytest.approx(three, rel=1e-9)
    assert together["runs"] == summary(runs)["runs"]


def test_counts_are_in_the_price(tiny_config):
    config = replace(tiny_config, privacy=replace(tiny_config.privacy, count_noise=5.0))
    runs = [finished(config, site, value) for site, value in VALUES.items()]
    both = [Event(SIGMA, RATE, 2 * STEPS), Event(5.0, 1.0, 2)]
    assert summary(runs)["epsilon"] == pytest.approx(epsilon_pld(both, DELTA), rel=1e-9)


def test_books_that_last_may_tell_of_more(tiny_config):
    runs = [finished(tiny_config, site, value, bound=40.0) for site, value in VALUES.items()]
    assert summary(runs)["epsilon"] == 40.0


def test_between_seeds_records_may_have_moved_and_prices_add_up(tiny_config, runs):
    seeds = replace(tiny_config, seed=1)
    others = [finished(seeds, site, value) for site, value in VALUES.items()]
    together = summary([*runs, *others])
    assert [each["seed"] for each in together["runs"]] == [0, 1]
    four = epsilon_pld([Event(SIGMA, RATE, 4 * STEPS)], DELTA)
    assert together["epsilon"] == pytest.approx(four, rel=1e-9)


def test_one_run_without_protection_leaves_nothing_protected(tiny_config, runs):
    seeded = replace(tiny_config.privacy, noise=NoiseSource.seeded)
    odd = finished(replace(tiny_config, privacy=seeded), "site-3", 0.5)
    assert summary([*runs[:2], odd])["epsilon"] == "inf"
    assert not math.isfinite(float(summary([*runs[:2], odd])["epsilon"]))


def test_one_run_or_runs_of_all_sites_make_no_summary(tiny_config, runs):
    assert summary([]) is None
    assert summary(runs[:1]) is None
    assert summary([Finished(tiny_config, {}), Finished(tiny_config, {})]) is None


def test_nobody_reads_a_number_without_its_stamp(runs, tmp_path):
    together, console = summary(runs), Console(record=True, width=1000)
    assert together["private"] is False
    show_summary(together, console)
    text = console.export_text()
    assert "NOT PRIVATE" in text
    assert "epsilon says nothing about these numbers" in text
    assert "worst site-2" in text
    write_summary(tmp_path, together)
    assert json.loads((tmp_path / FILE).read_text()) == together
