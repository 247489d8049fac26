"""Tasks without classes go the whole way: run, report, card and answers, and no labels anywhere."""

import json
import re
import subprocess
import sys

import pytest

from common.config import TaskName
from common.data import Splits
from common.tasks import TASKS
from tests.common.toy import TINY

METRICS = {
    "causal_lm": ["perplexity", "token_accuracy"],
    "question_answering": ["exact_match", "f1"],
    "seq2seq": ["bleu", "rouge_l"],
}
ASKED = {"question_answering": "said on? the team was"}


def test_every_task_without_classes_is_here():
    assert {*METRICS} == {name.name for name in TASKS if not name.has_classes}


@pytest.fixture(scope="module", params=list(METRICS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def run(name, tiny_overrides, tmp_path_factory):
    """A private run on toy records, whatever reads them from files."""
    from common import cli

    folder, tiny = tmp_path_factory.mktemp(name), TINY[TaskName[name]]
    records = TASKS[TaskName[name]].toy_examples(300)
    first = {content: i for i, content in reversed([*enumerate(records.identities())])}
    kept = sorted(first.values())[:110]  # one ledger, and no other, knows a record
    parts = (kept[:-26], kept[-26:-13], kept[-13:])
    own = [o for o in tiny_overrides if not o.startswith("data.labels=")]
    if tiny.save is not None:
        tiny.save(folder / "model")
        own = [o for o in own if not o.startswith("model.name=")]
        own += [f"model.name={folder / 'model'}", "tuning.last_layers=0"]
    sizes = ["task.max_target_tokens=4", "privacy.count_noise=5"]
    with pytest.MonkeyPatch.context() as patch:
        splits = Splits(*(records.subset(part) for part in parts), duplicates=0)
        patch.setattr("simulations.run.load_splits", lambda *_: splits)
        run = f"run_dir={folder / 'run'}"
        assert cli.main(["simulate", *own, *sizes, f"task={name}", run]) == 0
    return folder / "run"


def test_the_report_gives_the_metrics_of_the_task(run, name):
    report = json.loads((run / "report.json").read_text())
    assert [*report["evaluation"]] == METRICS[name]
    assert f"{METRICS[name][0]} on public records" in (run / "report.html").read_text()
    assert report["evaluation_private"]["sites"] == 2


def test_the_model_answers(coterie, run, name):
    asked = ASKED.get(name, "goal match")
    answer = coterie("predict", run, asked, "--json")
    assert answer.code == 0, answer.err
    (prediction,) = answer.json["predictions"]
    assert prediction["text"] == asked
    assert isinstance(prediction["sentence"], str)


def test_code_of_the_card_runs_as_it_stands(run):
    """A reader copies it, and has no coterie."""
    card = (run / "model" / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ran = subprocess.run(
        [sys.executable, "-I", "-c", block],
        cwd=run / "model",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_card_names_a_task_of_the_hub(run, name):
    tags = {"causal_lm": "text-generation", "seq2seq": "text2text-generation"}
    card = (run / "model" / "README.md").read_text()
    assert f"pipeline_tag: {tags.get(name, 'question-answering')}\n" in card
