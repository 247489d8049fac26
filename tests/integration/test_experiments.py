"""Each experiment runs offline from its own file; a table of runs says what reports say."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import experiments
from benchmarks.experiments import (
    HEADLINE,
    NONE,
    WITHOUT_PRIVACY,
    Cell,
    outcome,
    rows,
    table,
    unigram_perplexity,
)
from common.composition import CONF
from common.config import PrivacyMode, TaskName

FEW = [
    "federation.sites=2",
    "federation.rounds=1",
    "federation.local_steps=1",
    "privacy.sample_rate=0.02",
    "engine.threads=1",
    "task.max_tokens=8",
]
FEWER = {
    "questions": ["data.toy_records=80", "task.max_tokens=16", "privacy.delta=1e-2"],
    "summaries": ["data.toy_records=80", "task.max_target_tokens=3", "privacy.delta=1e-2"],
    "tones": ["data.toy_records=40", "privacy.delta=1e-2"],
}
"""What makes made data small; real data keep their size."""


def test_every_task_has_an_experiment_and_a_row_in_the_table(compose_config):
    names = {path.stem for path in (CONF / "experiment").glob("*.yaml")} - {"leave_one_site_out"}
    assert names == {*WITHOUT_PRIVACY}
    tasks = [compose_config(f"+experiment={name}").task.name for name in names]
    assert sorted(task.name for task in tasks) == sorted(task.name for task in TaskName)


@pytest.mark.parametrize("name", WITHOUT_PRIVACY)
@pytest.mark.parametrize("epsilon", [NONE, "1"])
def test_every_row_composes_as_the_script_runs_it(compose_config, name, epsilon):
    config = compose_config(*Cell(name, epsilon, 2).overrides())
    assert config.seed == 2
    assert (config.privacy.mode is PrivacyMode.none) == (epsilon == NONE)
    assert epsilon == NONE or config.privacy.epsilon == 1


@pytest.mark.parametrize("name", WITHOUT_PRIVACY)
@pytest.mark.slow  # models and data of real size
def test_every_experiment_runs_offline(coterie, tmp_path, name):
    settings = [*FEW, *FEWER.get(name, [])]
    answer = coterie("simulate", f"+experiment={name}", *settings, f"run_dir={tmp_path}", "--json")
    assert answer.code == 0, answer.err
    found = outcome(Cell(name, "8" if name != "bbc_news" else "3", 0), answer.json)
    assert HEADLINE.get(name) in (None, next(iter(found.metrics)))
    assert found.split == "holdout"
    assert (tmp_path / "model" / "model.safetensors").is_file()


REPORT = {
    "privacy": {"mode": "record", "epsilon": {"pld": 2.9997}},
    "seed": 1,
    "evaluation": {"perplexity": 150.0, "token_accuracy": 0.2},
    "evaluation_records": 415,
    "evaluation_split": "holdout",
    "timing": {"total_s": 61.2},
}
CELL = Cell("bbc_lm", "3", 1)


def report(**changes):
    return {**json.loads(json.dumps(REPORT)), **changes}


def test_a_report_becomes_a_row_with_mean_spread_and_every_seed():
    one = outcome(CELL, report())
    two = replace(one, cell=replace(CELL, seed=2), metrics={**one.metrics, "perplexity": 154.0})
    (row,) = rows([one, two])
    assert (row["n"], row["seeds"], row["split"], row["records"]) == (2, [1, 2], "holdout", 415)
    assert row["spent"] == 2.9997
    assert row["metrics"]["perplexity"] == {
        "mean": 152.0,
        "sd": pytest.approx(8**0.5),
        "by_seed": [150.0, 154.0],
    }
    assert "| bbc_lm | 3 | perplexity | 152.00 (2.8284) | 150.00, 154.00 | 2 |" in table([one, two])


def test_one_run_has_no_spread():
    (row,) = rows([outcome(CELL, report())])
    assert row["metrics"]["perplexity"]["sd"] is None
    assert "| 150.00 | 150.00 | 1 |" in table([outcome(CELL, report())])


def test_the_headline_of_summaries_is_not_bleu():
    measured = {"bleu": 0.0, "rouge_l": 0.6}
    found = outcome(replace(CELL, experiment="summaries"), report(evaluation=measured))
    assert [*found.metrics] == ["rouge_l", "bleu"]


@pytest.mark.parametrize(
    ("cell", "changes"),
    [
        (replace(CELL, epsilon=NONE), {}),
        (replace(CELL, epsilon="8"), {}),
        (replace(CELL, epsilon="1"), {}),
        (replace(CELL, seed=0), {}),
        (CELL, {"privacy": {"mode": "none", "epsilon": {"pld": "inf"}}}),
    ],
)
def test_a_report_of_another_run_stands_in_no_row(cell, changes):
    with pytest.raises(ValueError, match="the report"):
        outcome(cell, report(**changes))


def test_a_finished_run_is_read_and_not_run_again(tmp_path, monkeypatch, capsys):
    folder = CELL.folder(tmp_path, "holdout")
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(REPORT))
    words = ["--experiments", "bbc_lm", "--epsilons", "3", "--seeds", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["experiments", str(tmp_path), *words])
    experiments.main()
    shown = json.loads(capsys.readouterr().out)
    assert [row["metrics"]["perplexity"]["mean"] for row in shown["rows"]] == [150.0]
    assert "commit" in shown["machine"]
    assert "| bbc_lm | 3 |" in (tmp_path / "table.md").read_text()


def test_unigram_perplexity_is_that_of_frequencies_alone():
    """Of two pieces seen 3 and 1 times, counted once more: 4/6 and 2/6; the first is not asked."""
    known = torch.tensor([[0, 0, 0], [1, -100, -100]])
    asked = torch.tensor([[1, 0, 1], [0, 0, -100]])
    expected = ((4 / 6) * (2 / 6) * (4 / 6)) ** (-1 / 3)
    assert unigram_perplexity(known, asked, pieces=2) == pytest.approx(expected)
    assert unigram_perplexity(known[:0], asked, pieces=2) == pytest.approx(2)
