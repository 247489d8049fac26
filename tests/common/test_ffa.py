"""FFA-LoRA: A stays as the public seed drew it, and B alone is trained and travels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from client.site import Site
from client.train import Trainer
from common import parameters
from common.config import TuningMethod, check
from common.errors import ConfigError
from common.model import read_of
from common.parameters import Layout
from common.tasks import TASKS, build_model


@pytest.fixture
def config(tiny_config):
    return replace(tiny_config, tuning=replace(tiny_config.tuning, freeze_a=True))


def matrices(model, which):
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if f".lora_{which}." in name}


def test_the_vector_holds_b_and_the_head_alone(config, tiny_config):
    """Two matrices of 32 x 8 on the top block, and a head of two classes."""
    layout = Layout.of(build_model(config))
    assert layout.size == 2 * 32 * 8 + 2 * 32 + 2
    assert not [name for name in layout.names if "lora_A" in name]
    assert Layout.of(build_model(tiny_config)).size == layout.size + 2 * 8 * 32


def test_a_is_the_same_at_every_site_and_comes_from_the_seed(config):
    one, other = (matrices(build_model(config), "A") for _ in range(2))
    again = matrices(build_model(replace(config, seed=1)), "A")
    assert one
    for name, matrix in one.items():
        assert torch.equal(matrix, other[name])
        assert not torch.equal(matrix, again[name])
        assert matrix.abs().max() > 0


def test_private_rounds_leave_a_as_it_was_and_train_b(config):
    """The steps are taken at two sites; the coordinator's model takes their mean."""
    task = TASKS[config.task.name]
    toys, labels = task.toy_examples(84), tuple(config.data.labels)
    sites = [Site(f"site-{i}", toys.subset(range(i, 84, 2)), labels, None) for i in range(2)]
    model, trainer = build_model(config), Trainer(config)
    before = {which: matrices(model, which) for which in "AB"}
    vector = parameters.flatten(model)
    for number in (1, 2):
        updates = [trainer.train(site, vector, round_number=number)[0] for site in sites]
        vector = np.mean(updates, axis=0, dtype=np.float32)
    parameters.load(model, vector)
    for at_site in (model, trainer._model):
        for name, matrix in matrices(at_site, "A").items():
            assert torch.equal(matrix, before["A"][name])
    for name, matrix in matrices(model, "B").items():
        assert not before["B"][name].any()
        assert matrix.any()


def test_merged_it_answers_as_it_did(config):
    """W + BA, of the trained B and the drawn A."""
    model, task = build_model(config).eval(), TASKS[config.task.name]
    vector = np.random.default_rng(1).normal(size=Layout.of(model).size).astype(np.float32)
    parameters.load(model, vector)
    made = read_of(task.made(task.load_processor(config.model), 4, config))
    with torch.no_grad():
        before = model(**made)
        model.encoder = model.merged_encoder()
        assert torch.allclose(model(**made), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [m for m in TuningMethod if m is not TuningMethod.lora])
def test_a_way_of_tuning_without_a_is_refused(config, method):
    other = replace(config.tuning, method=method, adapter_learning_rate=0.1)
    with pytest.raises(ConfigError, match=rf"^tuning\.freeze_a=True: .*tuning={method.name}"):
        check(replace(config, tuning=other))
    check(config)
