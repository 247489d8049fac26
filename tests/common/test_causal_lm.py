"""Causal language models: what their loss is, and that every way of tuning fits them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, pipeline

from client.train import Trainer
from common.config import TaskName, TuningMethod
from common.errors import ConfigError
from common.generation import IGNORED, TARGET_IDS
from common.model import read_of, targets_of
from common.records import Records
from common.tasks import TASKS, build_model
from server.release import answers_of

from .toy import WORDS, private_run, save_model, save_tokenizer, toy_config

TASK = TASKS[TaskName.causal_lm]


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    return toy_config(TaskName.causal_lm, tiny_config, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def llama(config, tmp_path_factory):
    """The same on a Llama: rotary positions, RMS norms, an output layer of its own, no biases."""
    folder = tmp_path_factory.mktemp("llama")
    made = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        bos_token_id=2,
        eos_token_id=2,
    )
    save_model(lambda: LlamaForCausalLM(made), folder)
    save_tokenizer(folder)
    return replace(config, model=replace(config.model, name=str(folder)))


def tuned(config, method, **changes):
    return replace(config, tuning=replace(config.tuning, method=TuningMethod[method], **changes))


def encoded(config, *texts):
    records = Records(texts, torch.zeros(len(texts), dtype=torch.int64).numpy())
    return TASK.encode(TASK.load_processor(config.model), records, config.task)


def losses(config, model, *texts):
    inputs = encoded(config, *texts)
    return TASK.loss_vector(model(**read_of(inputs)), targets_of(inputs))


def test_loss_of_one_text_is_that_of_transformers(config):
    """Its mean is over the batch's tokens, which for one record alone is ours."""
    plain = AutoModelForCausalLM.from_pretrained(config.model.name)
    text = "goal match team coach the cup"
    ids = TASK.load_processor(config.model)(text, return_tensors="pt")["input_ids"]
    model = build_model(config).eval()
    with torch.no_grad():
        expected = float(plain(input_ids=ids, labels=ids).loss)
        assert float(losses(config, model, text)[0]) == pytest.approx(expected, rel=1e-5)
        metrics = TASK.metrics(TASK.score(model, encoded(config, text)), None, None, config)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_perplexity_counts_tokens_and_not_texts(config):
    """By hand: losses of 2, 4 and 6 nats in two texts of one and two next tokens; a perfect one."""
    tokens = torch.tensor([1, 2])
    score = {"negative_log_likelihood": torch.tensor([2.0, 10.0]), "tokens": tokens}
    metrics = TASK.metrics({**score, "hits": torch.tensor([0, 1])}, None, None, config)
    assert metrics == {"perplexity": round(math.exp(4), 4), "token_accuracy": 0.3333}
    assert next(iter(metrics)) == "perplexity"
    score["negative_log_likelihood"] = torch.tensor([math.nan, math.inf])
    worst = TASK.metrics({**score, "hits": torch.tensor([0, 0])}, None, None, config)
    assert json.dumps(worst, allow_nan=False)


def test_a_text_of_fewer_than_two_tokens_has_no_loss_and_no_gradient(config):
    model = build_model(config).eval()
    loss = losses(config, model, "", "goal", "goal match")
    assert loss[:2].tolist() == [0.0, 0.0]
    assert loss[2] > 0
    trained = [p for p in model.parameters() if p.requires_grad]
    for record in (0, 1):
        found = torch.autograd.grad(loss[record], trained, retain_graph=True, allow_unused=True)
        assert all(gradient is None or not gradient.any() for gradient in found)


def test_what_a_text_is_padded_with_changes_nothing(config):
    model, text = build_model(config).eval(), "goal match team"
    inputs = encoded(config, text)
    other = read_of(inputs)["input_ids"].clone()
    other[inputs[TARGET_IDS] == IGNORED] = 7
    first, second = (
        TASK.loss_vector(model(input_ids=ids), targets_of(inputs))
        for ids in (inputs["input_ids"], other)
    )
    torch.testing.assert_close(first, second)


def test_a_record_is_right_from_half_of_its_next_tokens_on(config):
    ids = torch.tensor([[5, 6, 7, IGNORED], [5, 6, 7, 8], [5, IGNORED, IGNORED, IGNORED]])
    logits = torch.nn.functional.one_hot(torch.full((3, 4), 6), 10).float()
    assert TASK.correct(logits, {TARGET_IDS: ids}).tolist() == [True, False, False]


WAYS = [("lora", {}), ("lora", {"last_layers": 1}), ("last_layers", {"k": 1}), ("full", {})]


@pytest.mark.parametrize("way", [*WAYS, ("bitfit", {})], ids=lambda way: "-".join(map(str, way)))
def test_every_way_of_tuning_gpt2_has_the_fast_engine(config, way):
    trainer = Trainer(tuned(config, way[0], **way[1]))
    verdict = trainer.preflight(precision=torch.float64)
    assert verdict.engine is not None, verdict.refused
    assert verdict.engine.name.name == "single_backward", verdict.refused


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_every_way_of_tuning_a_llama_has_the_fast_engine(llama, way):
    verdict = Trainer(tuned(llama, way[0], **way[1])).preflight(precision=torch.float64)
    assert verdict.engine is not None, verdict.refused
    assert verdict.engine.name.name == "single_backward", verdict.refused


def trained(config):
    return {name for name, p in build_model(config).named_parameters() if p.requires_grad}


def test_adapters_go_into_the_top_blocks_asked_for_and_where_peft_puts_them(config):
    top = trained(tuned(config, "lora", last_layers=1))
    assert top
    assert all(".h.1.attn.c_attn.lora_" in name for name in top)
    whole = trained(tuned(config, "lora", last_layers=0))
    assert {name.replace(".h.1.", ".h.0.") for name in top} == whole - top


def test_tied_embeddings_stay_tied(config, tmp_path):
    model = build_model(tuned(config, "full"))
    assert model.encoder.lm_head.weight is model.encoder.transformer.wte.weight
    TASK.save(model, tmp_path, {})
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.lm_head.weight is opened.transformer.wte.weight


def test_head_tuning_is_refused_as_it_would_train_nothing(config):
    with pytest.raises(ConfigError, match=r"^tuning\.method=head: would train nothing.*causal_lm"):
        build_model(tuned(config, "head"))


def test_biases_of_a_model_without_any_are_refused(llama):
    with pytest.raises(ConfigError, match=r"^tuning\.method=bitfit: the model has no biases"):
        build_model(tuned(llama, "bitfit"))


def test_a_private_run_lowers_perplexity(config):
    before, after = private_run(tuned(config, "full"))
    assert after["perplexity"] < 0.6 * before["perplexity"]
    assert after["token_accuracy"] > before["token_accuracy"]


def test_a_released_folder_writes_text_with_and_without_us(config, tmp_path):
    facts = {"task": "causal_lm", "max_tokens": 12, "feature_scale": 4.0}
    TASK.save(build_model(config), tmp_path, facts)
    TASK.load_processor(config.model).save_pretrained(tmp_path)
    ours = answers_of(tmp_path, ["goal match", ""])
    assert ours[0]["sentence"] == f"goal match {ours[0]['continuation']}"
    writer = pipeline("text-generation", model=str(tmp_path))
    theirs = writer("goal match", do_sample=False, max_new_tokens=6)[0]["generated_text"]
    written = "".join(theirs.split())  # these words have no rule for the blanks between them
    assert len(written) > len("goalmatch")
    assert written == "".join(ours[0]["sentence"].split())
