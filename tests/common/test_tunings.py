"""The contract of every task under every way of tuning: whoever adds either gets all of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BartConfig, BartForConditionalGeneration

from client.site import Site
from client.train import Trainer
from common import parameters
from common.config import HeadName, NoiseSource, TaskName, TuningMethod
from common.errors import ConfigError
from common.model import read_of, targets_of
from common.parameters import Layout
from common.tasks import TASKS, build_model

from .toy import WORDS, save_model, toy_config

RECORDS = 5
FFA = "ffa"
WAYS = [*(method.name for method in TuningMethod), FFA]
HEADS = ("mean", "native")
NO_HEAD = (TaskName.causal_lm, TaskName.seq2seq)
"""Tasks that put nothing on the model, of which `head` would train nothing."""
CELLS = [
    (task, way, head)
    for task in TASKS
    for way in WAYS
    for head in (HEADS if task.has_classes else HEADS[:1])
    if not (task in NO_HEAD and way == TuningMethod.head.name)
]
QUICK_ROUNDS = [("lora", "mean"), ("head", "mean"), (FFA, "native")]
"""Ways and heads whose private round every task takes in the quick suite; the slow one has all."""
PLAIN = {
    TaskName.question_answering: "AutoModelForQuestionAnswering",
    TaskName.causal_lm: "AutoModelForCausalLM",
    TaskName.seq2seq: "AutoModelForSeq2SeqLM",
}


def save_bart(folder):
    """Two blocks a side, learned positions; the words of the suite's T5."""
    made = BartConfig(
        vocab_size=len(WORDS),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=2,
        forced_eos_token_id=None,
        decoder_start_token_id=2,
        init_std=0.2,
    )
    save_model(lambda: BartForConditionalGeneration(made), folder)


def cell_id(cell):
    return "-".join(getattr(part, "name", part) for part in cell)


def cell_config(cell, tiny_config, folder):
    task, way, head = cell
    config = toy_config(task, tiny_config, folder)
    if (task, way) == (TaskName.seq2seq, TuningMethod.bitfit.name):
        save_bart(folder)  # T5 has no biases
    method = TuningMethod.lora if way == FFA else TuningMethod[way]
    tuning = replace(config.tuning, method=method, freeze_a=way == FFA, adapter_learning_rate=0.1)
    return replace(config, tuning=tuning, model=replace(config.model, head=HeadName[head]))


def test_every_task_is_tried_under_every_way_of_tuning():
    """An empty list would make the whole suite below pass by testing nothing."""
    assert {task for task, _, _ in CELLS} == {*TASKS} == {*TaskName}
    for task in TASKS:
        ways = {way for each, way, _ in CELLS if each is task}
        assert ways == {*WAYS} - ({"head"} if task in NO_HEAD else set())
    assert {head for _, _, head in CELLS} == {each.name for each in HeadName}
    assert len(CELLS) == 6 * 6 - 2 + 3 * 6


@pytest.fixture(scope="module", params=CELLS, ids=cell_id)
def cell(request):
    return request.param


@pytest.fixture(scope="module")
def config(cell, tiny_config, tmp_path_factory):
    return cell_config(cell, tiny_config, tmp_path_factory.mktemp("cell"))


@pytest.fixture(scope="module")
def task(config):
    return TASKS[config.task.name]


@pytest.fixture(scope="module")
def encoded(task, config):
    processor = task.load_processor(config.model)
    return task.encode(processor, task.toy_examples(RECORDS), config.task)


def stirred(config):
    """A built model with no trainable parameter as it was drawn, and the vector that says so."""
    model = build_model(config)
    size = Layout.of(model).size
    vector = parameters.flatten(model)
    vector += 0.2 * np.random.default_rng(2).normal(size=size).astype(np.float32)
    parameters.load(model, vector)
    return model.eval()


def losses(task, model, inputs):
    return task.loss_vector(model(**read_of(inputs)), targets_of(inputs))


def test_each_record_has_its_own_finite_loss_and_gradient(task, config, encoded):
    """Micro-batches of one and the whole batch agree: the sum of what each record pulls at."""
    model = stirred(config).double()
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in encoded.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = losses(task, model, inputs)
    assert whole.shape == (RECORDS,)
    assert torch.isfinite(whole).all()
    together = torch.autograd.grad(whole.sum(), trained)
    apart = [torch.zeros_like(parameter) for parameter in trained]
    for record in range(RECORDS):
        alone = losses(task, model, {n: t[record : record + 1] for n, t in inputs.items()})
        assert alone.item() == pytest.approx(whole[record].item(), rel=1e-9)
        gradients = torch.autograd.grad(alone.sum(), trained)
        apart = [total + own for total, own in zip(apart, gradients, strict=True)]
    scale = max(float(gradient.abs().max()) for gradient in together)
    assert scale > 0
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-8 * scale)


def test_prepared_records_give_the_loss_of_raw_ones(task, config, encoded):
    """What is kept of a record instead of running its frozen part in every step."""
    model = stirred(config)
    with torch.no_grad():
        raw = losses(task, model, encoded)
        kept = losses(task, model, model.prepare(encoded, batch=2))
    assert kept.tolist() == pytest.approx(raw.tolist(), rel=1e-4, abs=1e-5)


def test_our_engine_is_exact(config):
    """The clipped sum of one backward pass, against a loop of batches of one."""
    verdict = Trainer(config).preflight(precision=torch.float64)
    assert verdict.engine is not None, verdict.refused
    assert verdict.engine.name.name == "single_backward", verdict.refused
    assert verdict.max_rel_error <= 1e-5


def test_a_step_on_nobody_is_noise_alone(task, config):
    """A Poisson sample may be empty, and a site without records does what any other does."""
    trainer, start = Trainer(config), parameters.flatten(build_model(config))
    nobody = Site("site-1", task.toy_examples(1).subset([]), tuple(config.data.labels), None)
    updated, measured = trainer.train(nobody, start, round_number=1)
    assert updated.shape == start.shape
    assert np.isfinite(updated).all()
    assert measured is not None
    assert (updated != start).mean() > 0.99


def plain_outputs(config, folder, inputs):
    """What transformers itself gives of a released folder."""
    name = config.task.name
    native = config.model.head is HeadName.native
    family = PLAIN.get(name) or (TASKS[name].FAMILY.__name__ if native else "AutoModel")
    plain = getattr(transformers, family).from_pretrained(folder).eval()
    read = dict(read_of(inputs))
    if name is TaskName.seq2seq:
        written = read.pop("writes_ids")
        start = torch.full((len(written), 1), plain.config.decoder_start_token_id)
        read["decoder_input_ids"] = torch.cat((start, written[:, :-1]), 1)
    output = plain(**read)
    if name is TaskName.question_answering:
        unread = (read["attention_mask"] == 0).unsqueeze(-1)
        return torch.stack((output.start_logits, output.end_logits), 2).masked_fill(unread, -1e4)
    if name.has_classes and not native:
        states, mask = output.last_hidden_state, read.get("attention_mask")
        weights = torch.ones(states.shape[:2]) if mask is None else mask.float()
        mean = (states * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)
        scaled = torch.nn.functional.normalize(mean, dim=1) * config.model.feature_scale
        head = load_file(folder / "model.safetensors")
        return scaled @ head["mean_pooled_head.weight"].T + head["mean_pooled_head.bias"]
    return output.logits


def test_a_released_model_answers_as_the_trained_one_here_and_in_transformers(
    task, config, encoded, tmp_path
):
    """And, saved once more, is the same to the last weight."""
    model = stirred(config)
    with torch.no_grad():
        before = model(**read_of(encoded))
    facts = {"task": config.task.name.name, "feature_scale": config.model.feature_scale}
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    task.save(model, first, facts)
    restored = task.restore(first, json.loads((first / "config.json").read_text())).eval()
    with torch.no_grad():
        assert torch.allclose(restored(**read_of(encoded)), before, rtol=1e-4, atol=1e-4)
        assert torch.allclose(plain_outputs(config, first, encoded), before, rtol=1e-4, atol=1e-4)
    task.save(restored, second, facts)
    weights, again = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert {*weights} == {*again}
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not [name for name in weights if "lora" in name]


RATES = {"full": 0.05, "last_layers": 0.05}
"""Step sizes of what is trained below the head; 0.2 elsewhere."""


def private_round(config, *, steps=40):
    """Mean loss of the records of two sites before and after one private round of both."""
    task = TASKS[config.task.name]
    rate = RATES.get(config.tuning.method.name, 0.2)
    config = replace(
        config,
        privacy=replace(config.privacy, noise_multiplier=0.3, noise=NoiseSource.seeded),
        federation=replace(config.federation, local_steps=steps),
        tuning=replace(config.tuning, adapter_learning_rate=rate, head_learning_rate=0.2),
    )
    toys = task.toy_examples(84)
    labels = tuple(config.data.labels)
    sites = [Site(f"site-{i}", toys.subset(range(i, 84, 2)), labels, None) for i in range(2)]
    trainer, model = Trainer(config), build_model(config)
    start = parameters.flatten(model)
    updates = [trainer.train(site, start, round_number=1)[0] for site in sites]
    inputs = task.encode(task.load_processor(config.model), toys, config.task)
    measured = []
    for vector in (start, np.mean(updates, axis=0, dtype=np.float32)):
        parameters.load(model, vector)
        with torch.no_grad():
            measured.append(float(losses(task, model.eval(), inputs).mean()))
    return measured


ROUNDS = [
    pytest.param(cell, id=cell_id(cell), marks=() if cell[1:] in QUICK_ROUNDS else pytest.mark.slow)
    for cell in CELLS
]


@pytest.mark.parametrize("each", ROUNDS)
def test_a_private_round_of_two_sites_lowers_the_loss(each, tiny_config, tmp_path):
    before, after = private_round(cell_config(each, tiny_config, tmp_path))
    print(f"ROUND {cell_id(each)} {before:.4f} {after:.4f}")
    assert after < 0.97 * before


def test_a_model_without_biases_is_refused_for_bitfit(tiny_config, tmp_path):
    config = toy_config(TaskName.seq2seq, tiny_config, tmp_path)
    bitfit = replace(config.tuning, method=TuningMethod.bitfit)
    with pytest.raises(ConfigError, match=r"^tuning\.method=bitfit: the model has no biases"):
        build_model(replace(config, tuning=bitfit))


@pytest.mark.parametrize("name", NO_HEAD, ids=lambda name: name.name)
def test_head_tuning_of_a_task_without_a_head_is_refused(name, tiny_config, tmp_path):
    with pytest.raises(ConfigError, match=r"^tuning\.method=head: would train nothing"):
        build_model(cell_config((name, "head", "mean"), tiny_config, tmp_path))
