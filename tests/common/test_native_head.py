"""`model.head=native`: the head that transformers gives an encoder itself."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import (
    BertGenerationConfig,
    BertGenerationEncoder,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from client.train import Trainer
from common.classes import load_native
from common.config import DataSource, HeadName, TaskName, check
from common.errors import ConfigError
from common.model import HIDDEN, NativeClassifier
from common.parameters import flatten
from common.pretrained import load_encoder
from common.tasks import TASKS, build_model

from .toy import TINY, toy_config

CLASSES = [name for name in TASKS if name.has_classes]
SMALL = {"vocab_size": 40, "pad_token_id": 0}


@pytest.fixture(params=CLASSES, ids=lambda name: name.name)
def config(request, tiny_config, tmp_path):
    return native(toy_config(request.param, tiny_config, tmp_path))


def native(config):
    return replace(config, model=replace(config.model, head=HeadName.native))


def saved(config, model, folder):
    """The tiny config on another model, with the same tokenizer."""
    shutil.copytree(config.model.name, folder)
    model.save_pretrained(folder)
    return native(replace(config, model=replace(config.model, name=str(folder))))


def test_what_files_do_not_hold_comes_from_the_seed_alone(config):
    """Else two sites would begin with different heads, and nobody would know."""
    torch.manual_seed(98)
    first = flatten(build_model(config))
    torch.manual_seed(99)
    assert (flatten(build_model(config)) == first).all()
    state = torch.random.get_rng_state()
    build_model(config)
    assert torch.equal(state, torch.random.get_rng_state())
    if config.task.name is TaskName.audio_classification:  # its projector is drawn
        assert (flatten(build_model(replace(config, seed=1))) != first).any()


def test_before_training_each_class_is_as_likely(config):
    task = TASKS[config.task.name]
    made = task.made(task.load_processor(config.model), 3, config)
    model = build_model(config).eval()
    assert isinstance(model, NativeClassifier)
    logits = model(**{n: t for n, t in made.items() if not n.startswith("target")})
    assert logits.shape == (3, len(TINY[config.task.name].labels))
    assert not logits.any()


def test_the_encoder_is_the_pretrained_one(config):
    built = build_model(replace(config, tuning=replace(config.tuning, last_layers=1)))
    pretrained = load_encoder(config.model).state_dict()
    own = {n.replace(".base_layer", ""): t for n, t in built.encoder.state_dict().items()}
    shared = {*own} & {*pretrained}
    assert len(shared) >= len(pretrained) - 2  # a pooler that the native head does not read
    assert all(torch.equal(own[name], pretrained[name]) for name in shared)


def test_a_pooler_that_the_head_reads_is_trained_with_it(tiny_config):
    model = build_model(native(tiny_config))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"encoder.pooler.dense.weight", "native.classifier.weight"} <= names
    assert model.unused == []
    head, below = model.head_parameters(), model.adapter_parameters()
    assert len(head) == 4
    assert len(below) == 4
    assert not {id(p) for p in head} & {id(p) for p in below}


def test_frozen_blocks_below_run_once_per_record(tiny_config):
    task = TASKS[tiny_config.task.name]
    model = build_model(native(tiny_config))
    encoded = task.encode(
        task.load_processor(tiny_config.model), task.toy_examples(3), tiny_config.task
    )
    assert HIDDEN in model.prepare(encoded)


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_heads_of_other_families_are_exact(family, tiny_config, tmp_path):
    """Of several layers, on the first token."""
    if family == "roberta":
        made = RobertaModel(
            RobertaConfig(
                **SMALL,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=40,
            )
        )
    else:
        made = DistilBertModel(
            DistilBertConfig(
                **SMALL, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=40
            )
        )
    config = saved(tiny_config, made, tmp_path / "model")
    targets = [] if family == "roberta" else ["q_lin", "v_lin"]
    config = replace(config, tuning=replace(config.tuning, targets=targets))
    verdict = Trainer(config).preflight(precision=torch.float64)
    assert verdict.engine is not None, verdict.refused
    assert verdict.engine.name.name == "single_backward"
    assert verdict.max_rel_error <= 1e-5


def test_an_encoder_without_such_a_head_is_one_line(tiny_config, tmp_path):
    made = BertGenerationEncoder(
        BertGenerationConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
    )
    config = saved(tiny_config, made, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"^model\.head=native: BertGenerationEncoder[^\n]*out$"):
        build_model(config)
    mean = replace(config, model=replace(config.model, head=HeadName.mean))
    assert build_model(mean).labels == ["sport", "money"]


class NoLinear:
    """A family whose classifier is something else."""

    @staticmethod
    def from_config(config):
        from transformers import BertModel

        return BertModel(config)


def test_a_head_that_ends_in_no_linear_layer_is_one_line(tiny_config):
    with pytest.raises(ConfigError, match=r"^model\.head=native: BertModel ends in no linear"):
        load_native(native(tiny_config), NoLinear)


@pytest.mark.parametrize("name", [n for n in TaskName if not n.has_classes], ids=lambda n: n.name)
def test_tasks_without_classes_refuse_the_choice(name, tiny_config):
    made = replace(tiny_config.data, source=DataSource.toy)
    config = replace(tiny_config, task=replace(tiny_config.task, name=name), data=made)
    check(config)
    with pytest.raises(ConfigError, match=rf"^model\.head=native: .*task={name.name}"):
        check(native(config))
