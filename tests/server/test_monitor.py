"""What Prometheus, probes and machines that read logs are told of a coordinator's runs."""

import json
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.errors import ConfigError
from common.exposition import health_at, metrics_at
from server.monitor import INTERRUPTED, Monitor
from server.occupation import is_locked
from server.record import RoundLine, append_line
from server.standing import Standing, Standings
from tests.integration.superlink import free_port

ROOT = Path(__file__).resolve().parents[2]
BOOKS = {"head": "3:ab", "cap": 8.0, "spent": 2.5, "charged": [[1.0, 0.5, 2]]}


def line(number, **changes):
    values = {
        "round": number,
        "metrics": {"accuracy": 0.5 + number / 10},
        "epsilon": float(number),
        "asked": ("ward-1", "ward-2"),
        "refused": {},
        "bytes_down": 100,
        "bytes_up": 50,
        "sites_s": 1.5,
        "private": True,
        "books": {"ward-1": BOOKS},
    }
    return RoundLine(**(values | changes))


@pytest.fixture
def run(tmp_path):
    """A run of four rounds after its second, which one site refused; its process is gone."""
    folder = tmp_path / "runs" / "march"
    folder.mkdir(parents=True)
    standings = Standings(folder, Standing(7, rounds=4))
    standings.heard("ward-1")
    append_line(folder, line(1))
    append_line(folder, line(2, refused={"ward-2": "silent"}))
    standings.over(line(2))
    return folder


def scraped(families):
    port = free_port()
    with metrics_at("--metrics", str(port), families):
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_a_scrape_tells_what_the_run_folder_holds(run):
    found = scraped(Monitor(run.parent).families)
    assert found["coterie_run_round", "march"] == 2
    assert found["coterie_run_rounds", "march"] == 4
    assert found["coterie_run_epsilon", "march"] == 2
    assert found["coterie_run_replies_total", "accepted", "march", "ward-1"] == 2
    assert found["coterie_run_replies_total", "accepted", "march", "ward-2"] == 1
    assert found["coterie_run_replies_total", "refused", "march", "ward-2"] == 1
    assert found["coterie_run_bytes_total", "down", "march"] == 200
    assert found["coterie_run_bytes_total", "up", "march"] == 100
    assert found["coterie_run_evaluation", "accuracy", "march"] == 0.7
    assert found["coterie_site_epsilon_spent", "march", "ward-1"] == 2.5
    assert found["coterie_site_epsilon_cap", "march", "ward-1"] == 8
    assert found["coterie_site_epsilon_remaining", "march", "ward-1"] == 5.5
    # What a site has not said, nobody is told.
    assert ("coterie_site_epsilon_spent", "march", "ward-2") not in found
    assert found["process_resident_memory_bytes",] > 0


def test_a_run_is_interrupted_once_nobody_holds_its_folder(run):
    def state():
        found = scraped(Monitor(run.parent).families)
        return {
            name[2] for name, value in found.items() if name[0] == "coterie_run_state" and value
        }

    assert state() == {INTERRUPTED}
    import os

    handle = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    assert is_locked(handle)
    try:
        assert state() == {"running"}
    finally:
        os.close(handle)


def test_one_run_is_watched_as_well_as_a_folder_of_them(run):
    assert [seen.name for seen in Monitor(run).look()] == ["march"]
    assert [seen.name for seen in Monitor(run.parent.parent).look()] == ["runs/march"]


def test_what_cannot_be_read_hides_no_other_run(run):
    broken = run.parent / "april"
    broken.mkdir()
    (broken / "standing.json").write_text("{")
    assert [seen.name for seen in Monitor(run.parent).look()] == ["march"]


def test_without_an_address_nothing_listens_and_a_taken_one_is_named(run, coterie):
    answer = coterie("monitor", run)
    assert answer.code == 2
    assert "--metrics='', --health='': give one of them" in answer.err
    assert "must be PORT" in coterie("monitor", run, "--metrics", "lots").err
    with health_at("--health", ""), metrics_at("--metrics", "", lambda: []):
        pass
    port = str(free_port())
    with (
        metrics_at("--metrics", port, list),
        pytest.raises(ConfigError, match=f"--metrics={port}: cannot be listened on"),
        metrics_at("--metrics", port, list),
    ):
        pass
    with (
        health_at("--health", port),
        pytest.raises(ConfigError, match=f"--health={port}: cannot be listened on"),
        health_at("--health", port),
    ):
        pass


def test_the_dashboard_asks_for_metrics_that_there_are(run):
    from client.vitals import Vitals
    from common.privacy.books import Books

    vitals = Vitals("ward-1")
    vitals._spent = (1.0, 8.0)
    assert isinstance(Books(), Books)
    known = {name for name, *_ in scraped(Monitor(run.parent).families)}
    known |= {name for name, *_ in scraped(vitals.families)} | {"coterie_gpu_memory_bytes"}
    dashboard = json.loads((ROOT / "deploy/grafana/coterie.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:coterie|process)_[a-z_]+", target["expr"])
    }
    assert len(asked) >= 12
    assert asked <= known
