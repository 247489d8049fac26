"""What a node is told by its operator: every mistake is one line, before anything is started."""

import pytest

from client.settings import NODE, NodeSettings, read_settings
from common.config import TaskName

BARE = {
    "name": "name=ward-1",
    "superlink": "superlink=127.0.0.1:1",
    "authority": "authority=ca.crt",
    "key": "key=node.key",
    "ledger": "ledger=books.db",
    "data.path": "data.path=records.csv",
    "data.labels": "data.labels=[sport,money]",
}
MISTAKES = {
    "no name": (
        {"name": None},
        "no value for name: give each as NAME=VALUE",
    ),
    "an address with a scheme": (
        {"superlink": "superlink=http://127.0.0.1:80"},
        "superlink=http://127.0.0.1:80: must be HOST:PORT, without http:// or https://; TLS is "
        "always used",
    ),
    "no port": (
        {"superlink": "superlink=coordinator.example"},
        "superlink=coordinator.example: must be HOST:PORT, without http:// or https://; TLS is "
        "always used",
    ),
    "no ledger": (
        {"ledger": None},
        "ledger='': must name this site's books; make them with `coterie ledger init`",
    ),
    "an unknown policy": (
        {"policy": "node.max_epsilom=3"},
        "node.max_epsilom: no such setting; did you mean node.max_epsilon?",
    ),
    "a policy that limits nothing": (
        {"policy": "node.max_epsilon=-1"},
        "node.max_epsilon=-1.0: must be above 0, or null for no limit",
    ),
    "a coordinator's setting": (
        {"run": "federation.rounds=3"},
        "federation.rounds: no such setting; `coterie node --cfg job` shows them all",
    ),
    "no labels": (
        {"data.labels": None},
        "no value for data.labels: give each as NAME=VALUE",
    ),
    "public records": (
        {"data.test_path": "data.test_path=public.csv"},
        "data.holdout_fraction, data.validation_fraction, data.test_path, data.test_split: must be "
        "left out; a node has private records only",
    ),
    "another task's data": (
        {"task": "task=image_classification"},
        "task=image_classification: data=csv holds texts; choose other data or another task",
    ),
    "two faults": (
        {"name": "name=a/b", "poll": "poll_s=0"},
        "name=a/b: must be a name without # and /; poll_s=0.0: must be between 0.01 and 60",
    ),
    "no such file of records": ({}, "data.path=records.csv: no such file"),
}


@pytest.mark.parametrize(("changes", "line"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_starts_nothing(coterie, tmp_path, monkeypatch, changes, line):
    monkeypatch.chdir(tmp_path)
    words = [word for word in {**BARE, **changes}.values() if word]
    answer = coterie("node", *words)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == f"coterie node: {line}\n"
    assert [*tmp_path.iterdir()] == []


@pytest.fixture
def read(monkeypatch):
    """The settings of a command line."""
    from common.cli import Invocation
    from common.composition import run_with

    def composed(*words):
        got = []
        run_with(NODE, got.append, Invocation("node", words, json=False))
        return got[0]

    return composed


def test_a_node_has_its_own_settings_and_a_careful_policy(read):
    settings = read(*BARE.values())
    assert isinstance(settings, NodeSettings)
    assert settings.task.name is TaskName.text_classification
    assert (settings.node.min_noise_multiplier, settings.node.max_epsilon) == (0.5, 4.0)
    assert (settings.data.holdout_fraction, settings.data.validation_fraction) == (0.0, 0.0)
    assert not settings.allow_unprotected
    assert (str(settings.books[0]), settings.books[1]) == ("books.db", "ward-1")
    assert settings.inbox_path.name == "books.db.ward-1.inbox"


def test_a_ledger_of_several_sites_is_named_with_the_site(read):
    settings = read(*{**BARE, "ledger": "ledger='books.db#ward-7'"}.values())
    assert (str(settings.books[0]), settings.books[1]) == ("books.db", "ward-7")


def test_an_operator_keeps_settings_in_a_file_of_their_own(read, tmp_path):
    own = tmp_path / "site"
    own.mkdir()
    lines = [word.replace("data.", "").replace("=", ": ", 1) for word in BARE.values()]
    top, data = lines[:5], [f"  {line}" for line in lines[5:]]
    text = ["# @package _global_", "defaults:", "  - override /node: open", *top, "data:", *data]
    (own / "ward-1.yaml").write_text("\n".join(text))
    settings = read("--config-dir", str(tmp_path), "+site=ward-1", "poll_s=1")
    assert settings == read(*BARE.values(), "node=open", "poll_s=1")


def test_reading_settings_is_all_that_they_need():
    """They are no part of a run's configuration, which travels: it has no such names."""
    from common.config import field_names

    assert {"superlink", "key", "inbox", "allow_unprotected"}.isdisjoint(field_names()) or (
        "superlink.address" in set(field_names())  # the coordinator's own group of that name
    )
    assert read_settings is NODE.read
