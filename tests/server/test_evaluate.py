"""Evaluation takes a short cut through the frozen prefix, and gives the same numbers."""

import numpy as np
import pytest
import torch

from common import parameters
from common.data import load_splits
from common.pretrained import load_tokenizer
from common.tasks import TASKS, build_model
from server.evaluate import Evaluator


@pytest.fixture(scope="module", params=["lora", "head"])
def tuned(request, compose_config, tiny_overrides):
    """A config, public records, and a vector that is right on some of them only."""
    config = compose_config(*tiny_overrides, f"tuning={request.param}")
    public = load_splits(config.data).train
    draw = np.random.default_rng(3)
    size = parameters.Layout.of(build_model(config)).size
    return config, public, draw.normal(size=size).astype(np.float32)


def direct(config, public, vector):
    """Metrics of one whole forward pass, from token ids, with no prefix cut off."""
    model = build_model(config)
    parameters.load(model, vector)
    model.eval()
    task = TASKS[config.task.name]
    tokenizer = load_tokenizer(config.model)
    encoded = task.encode(tokenizer, public, config.task)
    with torch.no_grad():
        scores = task.score(model, encoded)
    return task.metrics(scores, public, tokenizer, config)


def test_metrics_equal_those_of_a_whole_forward_pass(tuned):
    config, public, vector = tuned
    measured = Evaluator(config, build_model(config), public).measure(vector)
    assert measured == direct(config, public, vector)
    assert set(measured) == {"accuracy", "macro_f1"}
    assert 0.05 < measured["accuracy"] < 0.95


def test_second_measurement_does_not_remember_the_first(tuned):
    config, public, vector = tuned
    evaluator = Evaluator(config, build_model(config), public)
    first = evaluator.measure(vector)
    assert evaluator.measure(-vector) == direct(config, public, -vector) != first
    assert evaluator.measure(vector) == first


def test_zero_head_predicts_one_class(tuned):
    config, public, vector = tuned
    measured = Evaluator(config, build_model(config), public).measure(np.zeros_like(vector))
    assert measured["accuracy"] == pytest.approx(np.mean(public.labels == 0), abs=1e-4)


def scored(config, predicted, labels, names):
    """The detail of a task with classes, of these predictions."""
    from dataclasses import replace

    config = replace(config, data=replace(config.data, labels=names))
    scores = {"predicted": torch.tensor(predicted), "target_labels": torch.tensor(labels)}
    return TASKS[config.task.name].detail(scores, config)


def test_classes_are_counted_as_by_hand(tiny_config):
    """Three classes, of which one is never predicted and one has no record."""
    detail = scored(tiny_config, [0, 0, 0, 2, 0], [0, 0, 1, 1, 1], ["a", "b", "c"])
    assert detail["confusion"] == [[2, 0, 0], [2, 0, 1], [0, 0, 0]]
    assert detail["classes"] == [
        {"class": "a", "precision": 0.5, "recall": 1.0, "f1": 0.6667, "support": 2},
        {"class": "b", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 3},
        {"class": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
    ]


def test_detail_agrees_with_the_metrics(tuned):
    config, public, vector = tuned
    evaluator = Evaluator(config, build_model(config), public)
    scores = evaluator.score(vector)
    metrics, detail = evaluator.metrics(scores), evaluator.detail(scores)
    counts = np.array(detail["confusion"])
    assert counts.trace() / counts.sum() == pytest.approx(metrics["accuracy"], abs=1e-4)
    assert counts.sum(1).tolist() == np.bincount(public.labels).tolist()
    f1 = [each["f1"] for each in detail["classes"]]
    assert np.mean(f1) == pytest.approx(metrics["macro_f1"], abs=1e-4)
    assert "groups" not in detail
    assert "samples" not in detail


def test_groups_are_measured_on_their_own_records(tuned):
    from dataclasses import replace

    config, public, vector = tuned
    names = tuple("odd" if row % 2 else "even" for row in range(len(public)))
    evaluator = Evaluator(config, build_model(config), replace(public, groups=names))
    found = evaluator.detail(evaluator.score(vector))["groups"]["groups"]
    for first, each in enumerate(found):
        alone = direct(config, public.subset(range(first, len(public), 2)), vector)
        assert each["value"] == alone["accuracy"]
        assert each["records"] == len(range(first, len(public), 2))


@pytest.mark.parametrize("name", ["causal_lm", "seq2seq"])
def test_samples_are_what_the_task_answers_to_public_records(name, tiny_config, tmp_path):
    from common.config import TaskName
    from tests.common.toy import toy_config

    config = toy_config(TaskName[name], tiny_config, tmp_path / "model")
    task, public = TASKS[config.task.name], TASKS[config.task.name].toy_examples(9)
    model = build_model(config)
    evaluator = Evaluator(config, model, public)
    samples = evaluator.detail(evaluator.score(parameters.flatten(model)))["samples"]
    assert 3 <= len(samples) <= 5
    processor = task.load_processor(config.model)
    for sample, content in zip(samples, public.contents, strict=False):
        (answer,) = task.answer(model, processor, [sample["prompt"]], config.task)
        assert sample["written"] == answer[task.ANSWER]
        if name == "seq2seq":
            assert (sample["prompt"], sample["reference"]) == content
        else:
            assert f"{sample['prompt']} {sample['reference']}" == content


def test_a_report_shows_no_more_of_a_text_than_it_has_room_for():
    from server.evaluate import LONGEST, _cut

    assert _cut("a" * LONGEST) == "a" * LONGEST
    assert len(_cut("a" * (LONGEST + 1))) == LONGEST
