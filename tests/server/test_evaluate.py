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
