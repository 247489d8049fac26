"""Encoder-decoders: what their loss is, how what they write is judged, and what is saved."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
)

from client.train import Trainer
from common.config import TaskName, TuningMethod
from common.errors import ConfigError
from common.generation import IGNORED, TARGET_IDS
from common.model import read_of, targets_of
from common.records import Records
from common.tasks import TASKS, build_model
from common.tasks.seq2seq import WRITTEN, judged
from server.release import answers_of

from .toy import WORDS, private_run, save_model, save_tokenizer, toy_config

TASK = TASKS[TaskName.seq2seq]


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    return toy_config(TaskName.seq2seq, tiny_config, tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def bart(config, tmp_path_factory):
    """The same on a BART: learned positions, layer norms, biases."""
    folder = tmp_path_factory.mktemp("bart")
    made = BartConfig(
        vocab_size=len(WORDS),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        forced_eos_token_id=2,
        decoder_start_token_id=2,
    )
    save_model(lambda: BartForConditionalGeneration(made), folder)
    save_tokenizer(folder, ends=True)
    return replace(config, model=replace(config.model, name=str(folder)))


@pytest.fixture(params=["config", "bart"])
def either(request):
    return request.getfixturevalue(request.param)


def tuned(config, method, **changes):
    return replace(config, tuning=replace(config.tuning, method=TuningMethod[method], **changes))


def encoded(config, *contents):
    records = Records(contents, np.zeros(len(contents), dtype=np.int64))
    return TASK.encode(TASK.load_processor(config.model), records, config.task)


def test_loss_of_one_record_is_that_of_transformers(either):
    """Its decoder reads the target one place later, behind the token that begins it."""
    plain = AutoModelForSeq2SeqLM.from_pretrained(either.model.name)
    inputs = encoded(either, ("the goal was a cup", "goal cup"))
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    model = build_model(either).eval()
    with torch.no_grad():
        expected = float(plain(**source, labels=inputs[TARGET_IDS]).loss)
        ours = TASK.loss_vector(model(**read_of(inputs)), targets_of(inputs))
    assert inputs[TARGET_IDS].tolist() == [[11, 15, 2, IGNORED]]
    assert float(ours[0]) == pytest.approx(expected, rel=1e-5)


def test_what_a_target_is_padded_with_changes_nothing(either):
    inputs, model = encoded(either, ("the goal was a cup", "goal")), build_model(either).eval()
    other = {**read_of(inputs), "writes_ids": inputs["writes_ids"].clone()}
    other["writes_ids"][inputs[TARGET_IDS] == IGNORED] = 7
    first, second = (
        TASK.loss_vector(model(**read), targets_of(inputs)) for read in (read_of(inputs), other)
    )
    torch.testing.assert_close(first, second)


def test_an_empty_source_and_an_empty_target_have_finite_losses(either):
    inputs, model = encoded(either, ("", "goal"), ("the", "")), build_model(either).eval()
    inputs[TARGET_IDS][1] = IGNORED
    loss = TASK.loss_vector(model(**read_of(inputs)), targets_of(inputs))
    assert torch.isfinite(loss).all()
    assert loss[1].item() == 0


WAYS = [
    ("lora", {}),
    ("lora", {"last_layers": 1}),
    ("last_layers", {"k": 1}),
    ("full", {}),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_every_way_of_tuning_has_the_fast_engine(either, way):
    trainer = Trainer(tuned(either, way[0], **way[1]))
    verdict = trainer.preflight(precision=torch.float64)
    assert verdict.engine is not None, verdict.refused
    assert verdict.engine.name.name == "single_backward", verdict.refused


def test_tables_of_relative_positions_are_frozen_and_named(config):
    """A T5 looks each up once for the whole batch; BART's positions the engine looks up again."""
    tables = [note for note in Trainer(tuned(config, "full")).adapted if "relative" in note]
    assert len(tables) == 2
    assert all(note.endswith("frozen, the whole batch reads it at once") for note in tables)
    assert Trainer(config).adapted == ()


def test_biases_of_a_bart_can_be_tuned(bart):
    verdict = Trainer(tuned(bart, "bitfit")).preflight(precision=torch.float64)
    assert verdict.engine is not None, verdict.refused


def test_adapters_of_the_top_blocks_are_in_the_decoder(config):
    """A T5 block holds a list of its own, by whose numbers peft would choose."""
    top = tuned(config, "lora", last_layers=1)
    names = {n for n, p in build_model(top).named_parameters() if p.requires_grad}
    assert {n.split(".lora_")[0] for n in names} == {
        f"encoder.decoder.block.1.layer.{attention}.{matrix}"
        for attention in ("0.SelfAttention", "1.EncDecAttention")
        for matrix in ("q", "v")
    }
    every = build_model(config).named_parameters()
    assert any("encoder.encoder.block.0." in n for n, p in every if p.requires_grad)


def test_head_tuning_is_refused_as_it_would_train_nothing(config):
    with pytest.raises(ConfigError, match=r"^tuning\.method=head: would train nothing.*seq2seq"):
        build_model(tuned(config, "head"))


def test_what_is_written_is_bounded_and_the_same_again(either):
    inputs, model = encoded(either, ("the goal was a cup", "goal"), ("a", "a")), build_model(either)
    with torch.no_grad():
        first, again = (TASK.score(model.eval(), inputs)[WRITTEN] for _ in range(2))
    assert first.shape == (2, either.task.max_target_tokens)
    assert torch.equal(first, again)


def test_bleu_and_rouge_are_as_by_hand():
    """One text of six words beside one of six. Shared n-grams: 5 of 6 words, 3 of 5 pairs, 2 of 4
    triples, 1 of 3 of four. The longest common subsequence has five words, of six and six."""
    judgement = judged(["the cat sat on a mat"], ["the cat sat on the mat"])
    expected = 100 * math.exp(sum(map(math.log, (5 / 6, 3 / 5, 2 / 4, 1 / 3))) / 4)
    assert judgement["bleu"] == pytest.approx(expected, abs=1e-3)
    assert judgement["rouge_l"] == pytest.approx(5 / 6, abs=1e-4)
    assert judged(["a b c d e"], ["a b c d e"]) == {"bleu": 100.0, "rouge_l": 1.0}
    assert judged([""], ["team cup"]) == {"bleu": 0.0, "rouge_l": 0.0}


def test_metrics_judge_the_words_and_not_the_padding(config):
    """<pad> and <end> are no words."""
    tokenizer = TASK.load_processor(config.model)
    public = Records(
        (("the", "goal match team cup"), ("a", "bank loan")), np.zeros(2, dtype=np.int64)
    )
    ids = tokenizer(["goal match team cup", "bank loan"], padding=True, return_tensors="pt")
    metrics = TASK.metrics({WRITTEN: ids["input_ids"]}, public, tokenizer, config)
    assert metrics == {"bleu": 100.0, "rouge_l": 1.0}


def test_a_private_run_writes_better(config):
    before, after = private_run(tuned(config, "full"), steps=30, rate=0.2)
    assert after["rouge_l"] > before["rouge_l"] + 0.1


def test_a_released_folder_writes_the_same_without_us(config, tmp_path):
    facts = {"task": "seq2seq", "max_tokens": 12, "max_target_tokens": 4}
    TASK.save(build_model(config), tmp_path, facts)
    tokenizer = TASK.load_processor(config.model)
    tokenizer.save_pretrained(tmp_path)
    (ours,) = answers_of(tmp_path, ["the goal was a cup"])
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    source = tokenizer(["the goal was a cup"], return_tensors="pt")
    ids = model.generate(
        input_ids=source["input_ids"], max_new_tokens=4, do_sample=False, num_beams=1
    )
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == ours["sentence"]
