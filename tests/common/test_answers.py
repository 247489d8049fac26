"""Answers as data sets of questions have them: several accepted, none, or out of their context."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, Features, Value

from common.answers import accepted, found, read_answers
from common.config import DataConfig, DataSource, EmptyTexts, TaskName
from common.data import load_splits
from common.errors import ConfigError
from common.records import Records
from common.squad import best_of, exact_match, word_f1
from common.tasks import TASKS

TASK = TASKS[TaskName.question_answering]
SECRET = "swordfish"  # stands in private texts; must stand in no message
CONTEXT = f"the {SECRET} won  the cup\nand the team won"
PLAIN = " ".join(CONTEXT.split())


def squad(*texts, starts=None):
    return {
        "text": [*texts],
        "answer_start": [CONTEXT.find(text) for text in texts] if starts is None else starts,
    }


SHAPES = {
    "a text": ("the cup", "the cup"),
    "blanks in it": ("the\n cup ", "the cup"),
    "nothing": (None, ""),
    "an empty text": (" \n", ""),
    "SQuAD": (squad("the cup"), "the cup"),
    "SQuAD, several": (squad("cup", "the cup", "cup"), "cup\nthe cup"),
    "SQuAD, none": (squad(), ""),
    "SQuAD, an empty one": (squad("", starts=[0]), ""),
    "SQuAD, the second place": (squad("won", starts=[CONTEXT.rfind("won")]), "won\t39"),
    "SQuAD, blanks before it": (squad(" won", starts=[CONTEXT.rfind(" won")]), "won\t39"),
    "SQuAD, a wrong place": (squad("won", starts=[1]), "won"),
    "SQuAD, no places": ({"text": ["cup"]}, "cup"),
    "SQuAD, one text": ({"text": "cup", "answer_start": CONTEXT.find("cup")}, "cup"),
    "SQuAD's own file": ([{"text": "cup", "answer_start": 9, "answer_id": 1}], "cup"),
    "texts": (["cup", "the cup"], "cup\nthe cup"),
    "the second stands there": (["ball", "cup"], "ball\ncup"),
    "a list of nothing": ([], ""),
    "none stands there": (["ball", "goal"], None),
    "another case": ("The Cup", None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_of_every_shape_become_one_text(shape):
    value, kept = SHAPES[shape]
    assert read_answers(value, CONTEXT) == kept
    if kept:
        assert [found(kept, PLAIN)[1]] == [a.text for a in accepted(kept) if a.text in PLAIN][:1]


WRONG = {
    "a number": 3,
    "a list of numbers": [3],
    "a list in a list": [["cup"]],
    "a text of numbers": {"text": [3], "answer_start": [0]},
    "a place that is a text": {"text": ["cup"], "answer_start": ["0"]},
    "fewer places": {"text": ["cup", "won"], "answer_start": [0]},
    "an answer that is null": {"text": [None], "answer_start": [0]},
    "places that are true": {"text": ["cup"], "answer_start": [True]},
    "an object of other names": {"answer": "cup", "text": 1},
    "half a character": ["the cup", "\ud800"],
}


def rows(*last, count=30):
    """Different questions; the last ones with these answers."""
    answers = [*["the cup"] * (count - len(last)), *last]
    return [
        {"question": f"who won {n}", "context": CONTEXT, "answers": answer}
        for n, answer in enumerate(answers)
    ]


def as_jsonl(folder, given):
    path = folder / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path, DataSource.jsonl


def as_parquet(folder, given):
    pd.DataFrame(given).to_parquet(folder / "r.parquet")
    return folder / "r.parquet", DataSource.parquet


def as_csv(folder, given):
    pd.DataFrame(given).to_csv(folder / "r.csv", index=False)
    return folder / "r.csv", DataSource.csv


def as_hub(folder, given):
    kind = datasets.Sequence({"text": Value("string"), "answer_start": Value("int32")})
    schema = {"question": Value("string"), "context": Value("string"), "answers": kind}
    Dataset.from_list(given, features=Features(schema)).save_to_disk(folder / "d")
    return folder / "d", DataSource.hub


def as_hub_parquet(folder, given):
    kind = datasets.Sequence({"text": Value("string"), "answer_start": Value("int32")})
    schema = {"question": Value("string"), "context": Value("string"), "answers": kind}
    (folder / "d").mkdir()
    Dataset.from_list(given, features=Features(schema)).to_parquet(folder / "d" / "train.parquet")
    return folder / "d", DataSource.hub


COLUMNS = ["question", "context", "answers"]


def load(place, **changes):
    path, source = place
    config = {"path": str(path), "source": source, "columns": COLUMNS, "labels": []}
    return load_splits(DataConfig(**{**config, **changes}), read=TASK)


def contents(splits):
    return {c for p in (splits.train, splits.validation, splits.holdout) for c in p.contents}


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_hub, as_hub_parquet])
def test_a_squad_of_every_format_is_read_and_its_rows_are_counted(write, tmp_path):
    given = rows(
        *[squad("cup")] * 26, squad("cup", "the cup"), squad(), squad("ball", starts=[4]), squad()
    )
    splits = load(write(tmp_path, given))
    tally = splits.tally
    assert (tally.empty, tally.unfit, tally.blank) == (0, 1, 2)
    assert {
        ("who won 4", PLAIN, "cup"),
        ("who won 26", PLAIN, "cup\nthe cup"),
        ("who won 27", PLAIN, ""),
        ("who won 29", PLAIN, ""),
    } <= contents(splits)
    assert len(contents(splits)) == 29
    assert tally.told(TASK) == [
        "1 left out that have an answer that does not stand in its context",
        "2 without an answer: trained to say so",
    ]


def test_plain_texts_in_a_table_are_read_as_before(tmp_path):
    splits = load(as_csv(tmp_path, rows("won", "", "ball")))
    assert ("who won 27", PLAIN, "won") in contents(splits)
    assert ("who won 28", PLAIN, "") in contents(splits)
    assert (splits.tally.unfit, splits.tally.blank) == (1, 1)


@pytest.mark.parametrize("name", ["question", "context"])
def test_a_row_without_a_question_or_context_is_left_out_as_of_other_tasks(name, tmp_path):
    given = rows("cup")
    given[-1][name] = " "
    assert load(as_jsonl(tmp_path, given)).tally.empty == 1
    with pytest.raises(ConfigError, match=f"row 30 has an empty {name}; data.empty=skip leaves"):
        load(as_jsonl(tmp_path, given), empty=EmptyTexts.refuse)


def test_an_answer_that_is_not_there_is_refused_by_its_row_where_that_is_asked(tmp_path):
    place = as_jsonl(tmp_path, rows("", SECRET.upper()))
    with pytest.raises(ConfigError) as refused:
        load(place, empty=EmptyTexts.refuse)
    assert str(refused.value).endswith(
        "row 30 has an answer that does not stand in its context; data.empty=skip leaves it out"
    )


@pytest.mark.parametrize("wrong", WRONG)
def test_answers_of_no_known_shape_are_one_line_with_the_row(wrong, tmp_path):
    with pytest.raises(ConfigError) as refused:
        load(as_jsonl(tmp_path, rows(WRONG[wrong], "cup")))
    assert "row 29 has " in str(refused.value)
    assert "in answers" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert SECRET not in str(refused.value)


def test_what_becomes_of_a_row_depends_on_no_other(tmp_path):
    """Else leaving one out would be more than a difference of one record."""
    (tmp_path / "more").mkdir()
    before = contents(load(as_jsonl(tmp_path, rows("", "ball"))))
    after = contents(load(as_jsonl(tmp_path / "more", [*rows("", "ball"), *rows("ball", "")[-2:]])))
    assert {each for each in after if each[0] != "who won 29"} == {
        each for each in before if each[0] != "who won 29"
    }


JUDGED = [  # exact match, F1: by hand, after SQuAD's script, evaluate-v2.0.py
    ("the cup", ["a ball", "cup"], 1.0, 1.0),
    ("red cup", ["cup", "ball"], 0.0, 2 / 3),
    ("", [], 1.0, 1.0),
    ("cup", [], 0.0, 0.0),
    ("", ["cup"], 0.0, 0.0),
    ("", ["the", "cup"], 0.0, 0.0),  # an answer of no word is none of the accepted ones
    ("", ["the"], 1.0, 1.0),
]


@pytest.mark.parametrize(("predicted", "answers", "exact", "f1"), JUDGED)
def test_the_best_of_all_accepted_answers_counts(predicted, answers, exact, f1):
    assert best_of(exact_match)(predicted, answers) == exact
    assert best_of(word_f1)(predicted, answers) == pytest.approx(f1)


def test_metrics_take_every_accepted_answer_and_an_empty_one_for_none():
    """Right by the second answer; right by saying nothing; wrong by saying something."""
    held = [("q", "the red cup", "red\ncup\t8"), ("q", "cup", ""), ("q", "cup", "")]
    public = Records(tuple(held), np.zeros(3, dtype=np.int64))
    scores = {"begin": torch.tensor([8, 0, 0]), "stop": torch.tensor([11, 0, 3])}
    assert TASK.metrics(scores, public, None, None) == {"exact_match": 0.6667, "f1": 0.6667}


def test_a_run_on_squad_says_what_it_left_out_and_ends(tmp_path, tiny_model, coterie):
    words = ["goal", "match", "team", "coach"]
    given = [
        {
            "id": str(n),
            "question": f"where is {n}",
            "context": f"{n} said the {words[n % 4]} was on",
            "answers": {"text": [words[n % 4]] * (n % 3 > 0), "answer_start": [9] * (n % 3 > 0)},
        }
        for n in range(60)
    ]
    given[7]["answers"] = {"text": ["ball"], "answer_start": [0]}
    path, _ = as_jsonl(tmp_path, given)
    answer = coterie(
        *("simulate", "task=question_answering", "data=jsonl", f"data.path={path}"),
        *("data.columns=[question,context,answers]", "data.labels=[]", f"model.name={tiny_model}"),
        *("task.max_tokens=16", "tuning=head", "privacy.epsilon=8", "privacy.delta=1e-3"),
        *("federation.sites=2", "federation.rounds=1", "federation.local_steps=1"),
        *("engine.threads=1", "data.holdout_fraction=0.4", f"run_dir={tmp_path / 'run'}"),
    )
    assert answer.code == 0, answer.err
    said = " ".join(answer.out.split())
    assert "1 left out that have an answer that does not stand in its context" in said
    assert "20 without an answer: trained to say so" in said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    # A new head says that there is no answer, and is right where there is none.
    assert 0 < report["evaluation"]["exact_match"] < 1
    assert "left out" not in json.dumps(report)
