"""Models without a hub are the same on every side, and read what their tasks give them."""

import hashlib

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.made_models import MADE, make_encoder, make_processor
from common.pretrained import load_encoder, load_tokenizer
from common.tasks import TASKS, build_model

RUNS = {
    "made/vit-digits": ["task=image_classification", "model=vit_digits", "data=digits"],
    "made/wav2vec2-tiny": [
        "task=audio_classification",
        "model=wav2vec2_tiny",
        "data=audio_folder",
        "data.path=x.csv",
        "data.labels=[low,high]",
    ],
}
WEIGHTS = {
    "made/vit-digits": "a1073f19507f6f44",
    "made/wav2vec2-tiny": "ef32a5b278ecfd87",
}
"""SHA-256 of all weights, of the first edition: results are reported under these names."""


def digest(encoder):
    parts = (p.detach().numpy().tobytes() for _, p in sorted(encoder.named_parameters()))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def test_every_made_model_is_tried_here():
    assert {*RUNS} == {*WEIGHTS} == {*MADE}


@pytest.mark.parametrize("name", MADE)
def test_weights_are_those_of_the_first_edition_whatever_was_drawn_before(name):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert digest(make_encoder(name)) == digest(make_encoder(name)) == WEIGHTS[name]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", MADE)
def test_different_records_get_different_features(compose_config, name):
    """Or nothing but full tuning could learn anything, and that only slowly."""
    config = compose_config(*RUNS[name], "tuning=head")
    task = TASKS[config.task.name]
    assert config.model.name == name
    inputs = task.encode(make_processor(name), task.toy_examples(12), config.task)
    features = build_model(config).prepare(inputs)["pooled"]
    assert torch.isfinite(features).all()
    assert float(torch.cdist(features, features)[np.triu_indices(12, 1)].min()) > 0.02


def test_an_unknown_made_model_is_one_line_that_names_the_known(compose_config):
    config = compose_config("model.name=made/nothing")
    with pytest.raises(ConfigError, match=r"^model\.name=made/nothing: .*made/vit-digits"):
        load_encoder(config.model)


def test_a_made_model_has_no_tokenizer(compose_config):
    with pytest.raises(ConfigError, match=r"^model\.name=made/vit-digits: has no tokenizer"):
        load_tokenizer(compose_config("model=vit_digits").model)
