"""Answers cut from a context: where they stand, how they are found, and how they are judged."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from common import parameters
from common.config import TaskName, TuningMethod
from common.errors import ConfigError
from common.model import read_of
from common.records import Records
from common.squad import exact_match, word_f1
from common.tasks import TASKS, build_model
from common.tasks.question_answering import END, OFFSETS, START, _best_spans

from .toy import private_run, toy_config

TASK = TASKS[TaskName.question_answering]


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    config = toy_config(TaskName.question_answering, tiny_config, tmp_path_factory.mktemp("toy"))
    return replace(config, task=replace(config.task, max_tokens=14))


def records(*contents):
    return Records(contents, np.zeros(len(contents), dtype=np.int64))


def encoded(config, *contents):
    return TASK.encode(TASK.load_processor(config.model), records(*contents), config.task)


@pytest.mark.parametrize(
    ("context", "answer", "place"),
    [
        ("the team was in", "team", (5, 5)),
        ("the team was in", "team was", (5, 6)),
        ("cup team cup", "cup", (4, 4)),  # the first of two
        ("the team was in", "bank", (0, 0)),
        ("the team was in", "", (0, 0)),
        ("a a a a a a a a a a cup", "cup", (0, 0)),  # beyond the kept tokens
        ("a a a a a a a a team cup", "team cup", (0, 0)),  # half of it is
        ("", "cup", (0, 0)),
    ],
)
def test_the_answer_is_placed_where_it_first_stands(config, context, answer, place):
    """[CLS] said on [SEP] and then the context; nine of its tokens are kept."""
    inputs = encoded(config, ("said on", context, answer))
    assert (int(inputs[START][0]), int(inputs[END][0])) == place


def test_a_question_longer_than_all_tokens_is_cut_as_well(config):
    inputs = encoded(config, ("said " * 40, "the team", "team"))
    assert inputs["input_ids"].shape == (1, 14)
    assert int(inputs[START][0]) > 0


def test_contents_that_are_not_three_texts_are_refused(config):
    with pytest.raises(ConfigError, match="must be 3 texts"):
        encoded(config, "the team")


def test_the_likeliest_span_is_in_the_context_and_in_order(config):
    inputs = encoded(config, ("said on", "the team was", "team"))
    logits = torch.zeros(1, 14, 2)
    logits[0, 1, 0] = 9.0  # in the question
    logits[0, 6, 0], logits[0, 5, 0] = 3.0, 2.0
    logits[0, 5, 1] = 4.0  # before 6
    found = _best_spans(logits, inputs[OFFSETS])
    assert found.tolist() == [[5, 5]]
    assert TASK.correct(logits, inputs).tolist() == [True]
    logits[0, 0] = 4.0  # no answer: 8 beats 6
    assert _best_spans(logits, inputs[OFFSETS]).tolist() == [[0, 0]]


def test_a_number_on_all_tokens_is_not_trained(config):
    """No loss depends on it, so it would be released as pure noise."""
    assert "qa_outputs.weight" in parameters.Layout.of(build_model(config)).names
    assert "qa_outputs.bias" not in parameters.Layout.of(build_model(config)).names


def test_loss_is_the_mean_of_both_ends(config):
    inputs = encoded(config, ("said on", "the team was", "team was"))
    logits = torch.randn(1, 14, 2, generator=torch.Generator().manual_seed(0))
    shares = logits.log_softmax(1)
    expected = -(shares[0, 5, 0] + shares[0, 6, 1]) / 2
    assert float(TASK.loss_vector(logits, inputs)[0]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("predicted", "answer", "exact", "f1"),
    [
        ("The Team!", "team", 1.0, 1.0),
        ("the cup team", "cup", 0.0, 2 / 3),  # precision 1/2, recall 1
        ("cup cup team", "cup score", 0.0, 0.4),  # one of three, one of two
        ("bank", "team", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("", "team", 0.0, 0.0),
        ("the", "", 1.0, 1.0),
    ],
)
def test_answers_are_judged_as_by_hand(predicted, answer, exact, f1):
    assert exact_match(predicted, answer) == exact
    assert word_f1(predicted, answer) == pytest.approx(f1)


def test_metrics_judge_the_texts_that_spans_cut_out(config):
    """The first is exact; of the second's two words, one is the answer: (1 + 2/3) / 2."""
    public = records(("said", "the team was", "team"), ("said", "cup score", "score"))
    scores = {"begin": torch.tensor([4, 0]), "stop": torch.tensor([8, 9])}
    assert TASK.metrics(scores, public, None, config) == {"exact_match": 0.5, "f1": 0.8333}


@pytest.mark.parametrize(("method", "enough"), [("head", 0.1), ("lora", 0.3), ("full", 0.5)])
def test_a_private_run_finds_more_answers(config, method, enough):
    tuning = replace(config.tuning, method=TuningMethod[method])
    before, after = private_run(replace(config, tuning=tuning), steps=20, rate=0.3)
    assert before["exact_match"] < 0.1
    assert after["exact_match"] > enough
    assert after["f1"] >= after["exact_match"]


def test_transformers_opens_a_released_folder_with_the_same_logits(config, tmp_path):
    model = build_model(config).eval()
    draw = np.random.default_rng(2)
    size = parameters.Layout.of(model).size
    parameters.load(model, (0.2 * draw.normal(size=size)).astype(np.float32))
    inputs = encoded(config, ("said on", "the team was in the cup", "team"))
    read = {name: tensor[:, :12] for name, tensor in read_of(inputs).items()}
    with torch.no_grad():
        ours = model(**read)
        TASK.save(model, tmp_path, {})
        plain = AutoModelForQuestionAnswering.from_pretrained(tmp_path)(**read)
    theirs = torch.stack((plain.start_logits, plain.end_logits), 2)
    read_tokens = read["attention_mask"] > 0
    torch.testing.assert_close(ours[read_tokens], theirs[read_tokens], rtol=1e-4, atol=1e-4)


def test_a_person_gives_question_and_context_in_one_text(config):
    model, tokenizer = build_model(config).eval(), TASK.load_processor(config.model)
    with torch.no_grad():
        (answer,) = TASK.answer(model, tokenizer, ["said on? the team was"], config.task)
    assert answer["sentence"] == "no answer found"  # a new head tells nothing apart
    with pytest.raises(ConfigError, match=r"must be a question up to its \?"):
        TASK.answer(model, tokenizer, ["the team was"], config.task)
