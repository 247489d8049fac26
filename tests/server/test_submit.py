"""What `coterie submit` refuses before anything is started, and what it leaves when it is not."""

import json
import re
from pathlib import Path

import pytest

from common.config import from_canonical
from server.app import CONFIG_KEY
from server.bundled import HASH_KEY
from server.control import Link
from server.record import RoundLine, append_line
from server.standing import Fault, Standing, Standings, State
from server.submission import FILE, Submission, read_submission


@pytest.fixture
def ca(tmp_path):
    path = tmp_path / "ca.crt"
    path.touch()
    return path


@pytest.fixture
def settings(tiny_overrides, tiny_csv, ca, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    others = [each for each in tiny_overrides if not each.startswith("data.path")]
    return [
        *others,
        f"data.test_path={tiny_csv}",
        "data.declared_records=84",
        "superlink.address=127.0.0.1:1",
        f"superlink.ca={ca}",
    ]


@pytest.fixture
def flower(monkeypatch):
    """In the place of a SuperLink: what it was asked, and what becomes of the run there."""

    class Flower:
        started, stopped, state, events = [], [], "running", ()

    def start(_, run_config):
        Flower.started.append(run_config)
        run_dir = Path(from_canonical(run_config[CONFIG_KEY]).run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        standings = Standings(run_dir, Standing(len(Flower.started), rounds=2))
        for event in Flower.events:
            event(run_dir, standings)
        return len(Flower.started)

    Flower.started, Flower.stopped, Flower.events = [], [], ()
    monkeypatch.setattr(Link, "start", start)
    monkeypatch.setattr(Link, "status", lambda *_: Flower.state)
    monkeypatch.setattr(Link, "nodes", lambda _: {11: "online", 12: "offline"})
    monkeypatch.setattr(Link, "stop", lambda _, run: Flower.stopped.append(run))
    return Flower


def failing(code, message):
    def event(_, standings):
        standings._write(state=State.failed, fault=Fault(code, "Error", message))

    return event


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["engine=local", "data.path=x.csv"], "engine=local: must be superlink"),
        (["superlink.ca=''"], "superlink.ca=''"),
        (["superlink.address=https://host:1"], "superlink.address=https://host:1"),
        (["data.declared_records=null"], "data.declared_records=None: must be given"),
        (["data.test_path=nowhere.csv"], "data.test_path=.*nowhere.csv: no such file"),
        (["privacy.delta=0.5"], "privacy.delta=0.5: must be below 1/N"),
        (["privacy.noise_multiplier=0.01"], "privacy.noise_multiplier=0.01: spends epsilon"),
        (["resume=auto"], "resume=auto: which run"),
        (["-m", "seed=1,2"], "submit without it"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_started(
    coterie, settings, flower, change, message
):
    answer = coterie("submit", *settings, *change)
    assert answer.code == 2
    (line,) = answer.err.strip().splitlines()
    assert re.search(message, line), line
    assert flower.started == []
    assert {path.name for path in Path.cwd().iterdir()} == {"ca.crt"}


def test_what_is_handed_over_is_the_planned_config_without_where_it_went(
    coterie, settings, flower, tmp_path
):
    run_dir = tmp_path / "run"
    answer = coterie("submit", *settings, "superlink.detach=true", f"run_dir={run_dir}", "--json")
    assert answer.code == 0
    assert answer.json == {"run_dir": str(run_dir)}
    ((told),) = flower.started
    config = from_canonical(told[CONFIG_KEY])
    assert told[HASH_KEY] == config.digest
    assert config.privacy.noise_multiplier > 0
    assert config.privacy.spare_rounds == 2
    assert config.run_dir == str(run_dir)
    assert config.superlink.ca == ""
    assert "127.0.0.1:1" not in told[CONFIG_KEY]
    assert read_submission(run_dir).flower_run == 1
    assert "spare rounds" in answer.err


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_a_run_that_fails_gives_its_own_code_and_line(coterie, settings, flower, tmp_path, code):
    flower.events = (failing(code, "round 1: 1 of 2 sites answered"),)
    answer = coterie("submit", *settings, f"run_dir={tmp_path / 'run'}")
    assert answer.code == code
    assert answer.err.strip() == "coterie submit: round 1: 1 of 2 sites answered"


def test_a_run_that_dies_without_a_word_is_told_from_its_superlink(
    coterie, settings, flower, tmp_path, monkeypatch
):
    monkeypatch.setattr("server.following.ASK_S", 0.0)
    flower.state = "finished:failed"
    answer = coterie("submit", *settings, f"run_dir={tmp_path / 'run'}")
    assert answer.code == 4
    assert "ended without a word (finished:failed)" in answer.err
    assert "coterie logs" in answer.err


def test_a_taken_folder_is_refused_and_one_that_never_began_is_not(
    coterie, settings, flower, tmp_path
):
    flower.events = (failing(4, "0 of 2 sites came"),)
    run_dir = tmp_path / "run"
    assert coterie("submit", *settings, f"run_dir={run_dir}").code == 4
    assert {path.name for path in run_dir.iterdir()} == {FILE, "standing.json"}
    assert coterie("submit", *settings, f"run_dir={run_dir}").code == 4
    assert len(flower.started) == 2
    (run_dir / "letters").touch()
    answer = coterie("submit", *settings, f"run_dir={run_dir}")
    assert answer.code == 2
    assert "is not an empty folder" in answer.err
    assert len(flower.started) == 2


def test_ctrl_c_leaves_the_run_and_says_how_to_follow_and_end_it(
    coterie, settings, flower, tmp_path, monkeypatch
):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("server.following.sleep", interrupt)
    run_dir = tmp_path / "run"
    answer = coterie("submit", *settings, f"run_dir={run_dir}")
    assert answer.code == 130
    assert f"coterie status {run_dir}" in answer.err
    assert f"coterie stop {run_dir}" in answer.err
    assert flower.stopped == []


def line(number, **changes):
    books = {"head": "5:aa", "cap": 8.0, "spent": 1.5, "charged": []}
    facts = {"refused": {"site-2": "budget exhausted"}, "books": {"site-1": books}}
    asked = ("site-1", "site-2")
    return RoundLine(
        number,
        {"accuracy": 0.5},
        1.5,
        asked,
        bytes_down=1,
        bytes_up=1,
        sites_s=1.0,
        private=True,
        **{**facts, **changes},
    )


def test_status_tells_rounds_sites_and_what_they_said_of_their_ledgers(
    coterie, settings, flower, tmp_path, monkeypatch
):
    def first_round(run_dir, standings):
        standings.waiting({11: "site-1", 12: "site-2"})
        append_line(run_dir, line(1))
        standings.over(line(1))
        standings.heard("site-1")

    flower.events = (first_round,)
    run_dir = tmp_path / "run"
    coterie("submit", *settings, f"run_dir={run_dir}", "superlink.detach=true")
    monkeypatch.setattr("server.following.is_occupied", lambda _: True)
    answer = coterie("status", run_dir, "--json").json
    assert answer["state"] == "running"
    assert (answer["round"], answer["rounds"], answer["heard"]) == (1, 2, ["site-1"])
    assert answer["nodes"] == {"site-1": "online", "site-2": "offline"}
    assert answer["epsilon"] == 1.5
    assert answer["evaluation"] == {"accuracy": 0.5}
    assert answer["remaining_s"] >= 0
    assert answer["sites"] == [
        {
            **{"name": "site-1", "rounds": 1, "refused": 0},
            **{"epsilon": 1.5, "cap": 8.0, "head": "5:aa"},
        },
        {"name": "site-2", "rounds": 0, "refused": 1},
    ]
    text = coterie("status", run_dir).out
    assert "1 of 2" in text
    assert "site-2 offline" in text


def test_a_run_whose_process_is_gone_is_interrupted_whatever_it_last_said(
    coterie, settings, flower, tmp_path
):
    flower.events = (lambda _, standings: standings.heard("site-1"),)
    run_dir = tmp_path / "run"
    coterie("submit", *settings, f"run_dir={run_dir}", "superlink.detach=true")
    assert coterie("status", run_dir, "--json").json["state"] == "interrupted"


def test_stop_ends_flowers_run_and_says_how_to_go_on(coterie, settings, flower, tmp_path):
    run_dir = tmp_path / "run"
    coterie("submit", *settings, f"run_dir={run_dir}", "superlink.detach=true")
    answer = coterie("stop", run_dir, "--json")
    assert answer.json == {"flower_run": "1", "stopped": True}
    assert flower.stopped == [1]


@pytest.mark.parametrize("command", ["status", "stop", "logs"])
def test_a_folder_that_nothing_was_submitted_into_is_named(coterie, tmp_path, command):
    answer = coterie(command, tmp_path)
    assert answer.code == 2
    assert f"{tmp_path}: no run was submitted into it" in answer.err


def test_a_malformed_submission_is_refused(coterie, tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"address": "127.0.0.1:1"}))
    assert coterie("status", tmp_path).code == 5


def test_a_simulation_is_not_asked_of_a_superlink(coterie, settings, tmp_path):
    answer = coterie("simulate", *settings, "engine=superlink", f"run_dir={tmp_path / 'run'}")
    assert answer.code == 2
    assert "give it to coterie submit" in answer.err
    assert not (tmp_path / "run").exists()


def test_a_submission_reads_back(tmp_path, ca):
    from server.control import Address
    from server.submission import write_submission

    submission = Submission(Address("h:1", ca), 2**64 - 1)
    write_submission(tmp_path, submission)
    assert read_submission(tmp_path) == submission
