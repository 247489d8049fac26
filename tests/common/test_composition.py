import os
import sys

import pytest

from common.cli import Invocation
from common.composition import explain, run_job, sweep_index
from common.errors import ConfigError

MISTAKES = {
    "unknown key, near one": (
        ["privacy.epsilom=1"],
        "privacy.epsilom: no such setting; did you mean privacy.epsilon?",
    ),
    "unknown key, near none": (
        ["zzz=1"],
        "zzz: no such setting; `coterie simulate --cfg job` shows them all",
    ),
    "unknown key, forced": (["+a=1"], "a: no such setting"),
    "no number": (["privacy.epsilon=abc"], "privacy.epsilon=abc: must be a number"),
    "no whole number": (
        ["federation.rounds=1.5"],
        "federation.rounds=1.5: must be a whole number",
    ),
    "no list": (
        ["data.labels=3"],
        "data.labels: Invalid value assigned: int is not a ListConfig, list or tuple",
    ),
    "wrong enum": (["privacy.noise=foo"], "privacy.noise=foo: must be one of entropy, seeded"),
    "wrong group": (["privacy=foo"], "privacy=foo: must be one of none, person, record"),
    "no group": (
        ["model=null"],
        "model=null: must be one of gpt2_tiny, minilm, t5_tiny, vit_digits, wav2vec2_tiny",
    ),
    "unreadable": (
        ["privacy.epsilon"],
        "an argument cannot be read (Error parsing override 'privacy.epsilon' missing EQUAL "
        "at '<EOF>'): write NAME=VALUE, quoted for your shell",
    ),
    "missing labels": (
        ["data=csv", "data.path=records.csv"],
        "no value for data.labels: give each as NAME=VALUE",
    ),
    "broken rule": (
        ["privacy.epsilon=-1"],
        "privacy.epsilon=-1.0: must be a finite number above 0",
    ),
}


@pytest.mark.parametrize("command", ["plan", "simulate"])
@pytest.mark.parametrize(("overrides", "line"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_with_name_rule_and_remedy(coterie, command, overrides, line):
    answer = coterie(command, *overrides)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == f"coterie {command}: {line}\n"


def test_a_mistake_in_a_sweep_is_one_line_too(coterie, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Hydra leaves an empty folder for the sweep
    answer = coterie("plan", "seed=a,b", "-m")
    assert (answer.code, answer.err) == (2, "coterie plan: seed=a: must be a whole number\n")


def test_what_no_phrase_knows_is_still_one_line():
    assert explain("something\n  new\n\nfrom Hydra\n") == "something new from Hydra"


def test_the_job_gets_the_composed_config_outside_a_sweep(tiny_overrides):
    seen = []
    run_job(
        lambda config: seen.append((config.federation.rounds, sweep_index())),
        Invocation("plan", (*tiny_overrides, "federation.rounds=3"), json=False),
    )
    assert seen == [(3, None)]
    assert sweep_index() is None


def test_a_sweep_runs_the_job_on_each_and_numbers_them(tiny_overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    run_job(
        lambda config: seen.append((config.seed, sweep_index())),
        Invocation("simulate", (*tiny_overrides, "seed=4,5", "-m"), json=False),
    )
    assert seen == [(4, 0), (5, 1)]


def test_a_sweep_stops_at_the_first_refusal(tiny_overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def job(config):
        seen.append(config.seed)
        raise ConfigError(f"seed={config.seed}")

    with pytest.raises(ConfigError, match="seed=4"):
        run_job(job, Invocation("simulate", (*tiny_overrides, "seed=4,5", "-m"), json=False))
    assert seen == [4]


@pytest.mark.parametrize("before", [None, "0"])
def test_the_process_is_left_as_it_was(tiny_overrides, tmp_path, monkeypatch, before):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    if before is not None:
        monkeypatch.setenv("HYDRA_FULL_ERROR", before)
    argv = list(sys.argv)
    run_job(lambda _config: None, Invocation("plan", tuple(tiny_overrides), json=False))
    with pytest.raises(ConfigError):
        run_job(lambda _config: None, Invocation("plan", ("zzz=1",), json=False))
    assert sys.argv == argv
    assert os.environ.get("HYDRA_FULL_ERROR") == before
    assert list(tmp_path.iterdir()) == []
