"""The ServerApp of the bundle, over a fake Grid: from a run config to a report, or to one line."""

import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from common import messages
from common.config import (
    EngineName,
    PrivacyMode,
    Resume,
    SuperlinkConfig,
    config_hash,
    from_yaml,
    to_canonical,
)
from common.data import load_splits
from common.errors import ConfigError, VerificationError
from common.messages import Update
from common.privacy.mechanism import round_event
from server import bundled
from server.app import CONFIG_KEY
from server.bundled import HASH_KEY, bundled_app, public_records
from server.interrupted import occupied
from server.occupation import is_occupied
from server.plan import make_plan
from server.report import read_report
from server.standing import State, read_standing

from .fake_grid import OverLine

NAMES = {1: "site-1", 2: "site-2"}


def update(_, message):
    instruction = messages.read_instruction(message)
    released = Update(
        instruction.run_id,
        instruction.round,
        instruction.layout_digest,
        round_event(instruction.config),
        instruction.vector + np.float32(0.001),
    )
    return Message(messages.pack_update(released), reply_to=message)


def silent(_node, _message):
    return None


@pytest.fixture
def deployed(tiny_config, tiny_csv, tmp_path):
    """A run without privacy, which a fake site can answer, as `coterie submit` hands it over."""
    config = replace(
        tiny_config,
        engine=replace(tiny_config.engine, name=EngineName.superlink),
        data=replace(tiny_config.data, path="", test_path=str(tiny_csv)),
        privacy=replace(tiny_config.privacy, mode=PrivacyMode.none),
        federation=replace(tiny_config.federation, round_timeout_s=20.0),
        run_dir=str(tmp_path / "run"),
        superlink=SuperlinkConfig(),
    )
    return make_plan(config).config


def context_of(config, number, changes):
    settings = {CONFIG_KEY: to_canonical(config), HASH_KEY: config_hash(config)}
    return Context(
        run_id=number,
        node_id=1,
        node_config={},
        state=RecordDict(),
        run_config={**settings, **changes},
    )


def go(config, grid, number=5, changes=MappingProxyType({})):
    bundled_app()(grid, context_of(config, number, changes))


def test_a_run_leaves_what_a_simulation_leaves(deployed, tmp_path):
    grid = OverLine(NAMES, update)
    go(deployed, grid)
    run_dir = tmp_path / "run"
    report, _ = read_report(run_dir)
    assert report["engine"] == "superlink"
    assert report["rounds"] == 2
    assert set(report["evaluation"]) >= {"accuracy"}
    assert report["evaluation_records"] == 120
    assert {path.name for path in run_dir.iterdir()} >= {
        *("config.yaml", "report.html", "metrics.jsonl", "checkpoints", "model", "standing.json")
    }
    now = read_standing(run_dir)
    assert (now.state, now.round, now.rounds, now.flower_run) == (State.finished, 2, 2, 5)
    assert now.here == NAMES
    assert not is_occupied(run_dir)


def test_sites_are_not_told_where_the_coordinator_keeps_its_files(deployed):
    grid = OverLine(NAMES, update)
    go(deployed, grid)
    told = [messages.read_instruction(message).config for message in grid.pushed.values()]
    assert told
    assert all(each.run_dir == each.heads == "" for each in told)
    assert all(config_hash(each) == config_hash(told[0]) for each in told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({CONFIG_KEY: ""}, "start runs by coterie submit"),
        ({HASH_KEY: "0" * 64}, "config and config-hash disagree"),
        ({CONFIG_KEY: "{}"}, "no value for"),
    ],
)
def test_a_run_config_that_submit_did_not_make_starts_nothing(deployed, changes, message, tmp_path):
    with pytest.raises((VerificationError, ConfigError), match=message):
        go(deployed, OverLine(NAMES, update), changes=changes)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_a_simulations_starts_nothing(tiny_config):
    with pytest.raises(VerificationError, match="not one that coterie submit makes"):
        go(replace(tiny_config, run_dir="/tmp/x"), OverLine(NAMES, update))


def test_packages_of_two_programs_start_nothing(deployed, monkeypatch, tmp_path):
    monkeypatch.setattr(bundled.common, "__file__", str(tmp_path / "common" / "__init__.py"))
    with pytest.raises(VerificationError, match="the packages common and server come from"):
        go(deployed, OverLine(NAMES, update))


def test_how_a_run_failed_is_told_and_it_can_be_taken_up_again(deployed, tmp_path):
    """The second round never ends; what is left goes on by the same run id, to the same bits."""
    patient = replace(deployed, federation=replace(deployed.federation, round_timeout_s=1.0))

    def first_only(node, message):
        return update(node, message) if messages.read_instruction(message).round == 1 else None

    with pytest.raises(Exception, match="0 of 2 sites"):
        go(patient, OverLine(NAMES, first_only))
    run_dir = tmp_path / "run"
    now = read_standing(run_dir)
    assert (now.state, now.round, now.fault.code) == (State.failed, 1, 4)
    with pytest.raises(ConfigError, match="holds a run already"):
        go(patient, OverLine(NAMES, update), 6)
    go(replace(patient, resume=Resume.auto), OverLine(NAMES, update), 7)
    now, (report, _) = read_standing(run_dir), read_report(run_dir)
    assert (now.state, now.round, now.began_after, now.flower_run) == (State.finished, 2, 1, 7)
    assert report["resumed_after"] == [1]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert from_yaml((run_dir / "config.yaml").read_text()).privacy == deployed.privacy


ORPHAN = """
import os, sys, time
from server.bundled import ending_with_parent
if os.fork():
    time.sleep(0.2)
    os._exit(0)
with ending_with_parent(grace_s=0.5):
    print("orphan", flush=True)
    time.sleep(60)
print("went on", flush=True)
"""


def test_an_orphan_ends_by_itself():
    """Whoever goes on with the run waits for it, and Flower's own way out may hang."""
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.stdout == "orphan\n"  # which closed it within the time


def hold(run_dir, ready, seconds):
    with occupied(run_dir):
        ready.set()
        seconds.wait()


def test_one_folder_is_written_by_one_process(deployed, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "PATIENCE_S", 0.5)
    context = multiprocessing.get_context("fork")
    ready, over = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", ready, over))
    other.start()
    try:
        assert ready.wait(30)
        assert is_occupied(tmp_path / "run")
        with pytest.raises(ConfigError, match="another process is writing into it"):
            go(deployed, OverLine(NAMES, update))
    finally:
        over.set()
        other.join()
    assert not is_occupied(tmp_path / "run")


def test_public_records_are_the_test_files(deployed, tiny_csv):
    config = replace(deployed.data, path=str(tiny_csv), test_path="", holdout_fraction=0.99)
    assert len(public_records(deployed)) == 120
    assert {*load_splits(config).holdout.contents} <= {*public_records(deployed).contents}


def test_a_public_file_without_records_is_refused(deployed, tmp_path):
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n")
    with pytest.raises(ConfigError, match=r"data\.test_path"):
        public_records(replace(deployed, data=replace(deployed.data, test_path=str(empty))))
