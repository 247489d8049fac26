"""Trackers are told what the run's own files hold, and a run does not depend on them."""

import logging
from dataclasses import replace

import pytest

from common.config import TrackerName, TrackingConfig, as_told, config_hash
from common.errors import ConfigError
from server import tracking
from server.record import read_lines
from server.tracking import check_tracker, tracked
from tests.server.test_monitor import line


def config_of(tiny_config, name, uri=""):
    return replace(tiny_config, tracking=TrackingConfig(TrackerName[name], uri))


def follow(config, run_dir, lines, *, after=0):
    run_dir.mkdir(exist_ok=True)
    with tracked(config, run_dir, after=after) as tracker:
        for each in lines:
            tracker.follow(each)


def test_tensorboard_shows_each_round(tiny_config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(tiny_config, "tensorboard")
    follow(config, tmp_path / "run", [line(1), line(2, epsilon="inf")])
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    told = [(event.step, event.value) for event in read.Scalars("evaluation/accuracy")]
    assert told == [(1, pytest.approx(0.6)), (2, pytest.approx(0.7))]
    assert [event.step for event in read.Scalars("privacy/epsilon")] == [1]  # inf is no number
    assert read.Scalars("bytes/up")[0].value == 50


@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow")
def test_mlflow_shows_each_round_and_goes_on_with_the_same_run(tiny_config, tmp_path):
    from mlflow import MlflowClient

    config = config_of(tiny_config, "mlflow", str(tmp_path / "all"))
    follow(config, tmp_path / "run", [line(1)])
    follow(config, tmp_path / "run", [line(2)], after=1)
    client = MlflowClient(tracking_uri=(tmp_path / "all").as_uri())
    (experiment,) = [each for each in client.search_experiments() if each.name == "coterie"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["evaluation/accuracy"] == 0.7
    history = client.get_metric_history(run.info.run_id, "bytes/down")
    assert [(each.step, each.value) for each in history] == [(1, 100), (2, 100)]
    assert run.data.params["privacy.epsilon"] == "8.0"
    assert run.data.tags["private"] == "true"
    told = " ".join([*run.data.params, *run.data.params.values()])
    assert tiny_config.data.path not in told


def test_a_simulated_run_is_followed_and_tells_what_its_own_file_tells(
    tiny_overrides, tmp_path, coterie
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    settings = ("tuning=head", "tracking=tensorboard", f"run_dir={run_dir}")
    assert coterie("simulate", *tiny_overrides, *settings, "--json").code == 0
    read = EventAccumulator(str(run_dir / "tensorboard"))
    read.Reload()
    lines = read_lines(run_dir)
    assert len(lines) == 2
    for name, value in (("privacy/epsilon", "epsilon"), ("bytes/down", "bytes_down")):
        told = [event.value for event in read.Scalars(name)]
        assert told == pytest.approx([getattr(each, value) for each in lines])


def test_a_tracker_that_breaks_costs_a_line_of_the_log_and_no_round(
    tiny_config, tmp_path, monkeypatch, caplog
):
    class Broken:
        def follow(self, line):
            raise OSError("the server has gone")

        def end(self, *, well):
            raise AssertionError("it was given up")

    monkeypatch.setattr(tracking, "_tracker", lambda *_: Broken())
    with caplog.at_level(logging.WARNING):
        follow(config_of(tiny_config, "mlflow"), tmp_path / "run", [line(1), line(2)])
    assert caplog.messages == ["tracking=mlflow: OSError; the run goes on without it"]


def test_what_is_not_installed_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"tracking=mlflow: mlflow is not installed; pip install"):
        check_tracker(TrackingConfig(TrackerName.mlflow))
    check_tracker(TrackingConfig())


def test_no_site_is_told_where_a_run_is_tracked_and_it_changes_no_run(tiny_config, compose_config):
    tracked_ = config_of(tiny_config, "mlflow", "https://tracker.example")
    assert config_hash(tracked_) == config_hash(tiny_config)
    deployed = replace(
        tracked_, engine=replace(tracked_.engine, name=type(tracked_.engine.name).superlink)
    )
    assert as_told(deployed).tracking == TrackingConfig()
    with pytest.raises(ConfigError, match=r"tracking.uri=.*: must be without a name and password"):
        compose_config("tracking=mlflow", "tracking.uri=https://me:secret@tracker.example")
