import dataclasses
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from common.errors import ConfigError
from common.parameters import Layout, flatten
from common.pretrained import load_encoder, load_tokenizer
from common.tasks import build_model


def with_model(config, name):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=str(name)))


def with_tuning(config, **changes):
    return dataclasses.replace(config, tuning=dataclasses.replace(config.tuning, **changes))


def stirred(model):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def inputs():
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9)[None] < torch.tensor([9, 4, 1, 6])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model that a test may break."""
    return shutil.copytree(tiny_model, tmp_path / "model")


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_refused_and_never_opened(tiny_config, folder, tmp_path):
    trap = tmp_path / "opened"
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ConfigError, match=r"model\.name=.*no weights.*never opened"):
        build_model(with_model(tiny_config, folder))
    assert not trap.exists()


def test_a_pickle_beside_the_weights_is_not_opened(tiny_config, folder, tmp_path):
    trap = tmp_path / "opened"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
    build_model(with_model(tiny_config, folder))
    assert not trap.exists()


def test_a_folder_without_weights_is_refused(tiny_config, folder):
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ConfigError, match=r"model\.name=.*expected \*\.safetensors"):
        load_encoder(with_model(tiny_config, folder).model)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere-at-all", "."])
def test_a_folder_that_is_not_there_or_holds_no_model_is_refused(
    tiny_config, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    for load in (load_encoder, load_tokenizer):
        with pytest.raises(ConfigError, match=r"model\.name=.*no folder with a config\.json"):
            load(with_model(tiny_config, name).model)


@pytest.mark.parametrize("load", [load_encoder, load_tokenizer])
def test_a_hub_name_without_a_hub_is_refused(tiny_config, load):
    with pytest.raises(ConfigError, match=r"^model\.name=nobody/nothing") as refused:
        load(with_model(tiny_config, "nobody/nothing").model)
    assert "\n" not in str(refused.value)


def test_truncated_weights_are_refused(tiny_config, folder):
    """As an interrupted download leaves them."""
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"^model\.name="):
        load_encoder(with_model(tiny_config, folder).model)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "unheard-of"}', "{}"])
def test_a_broken_config_of_a_model_is_refused(tiny_config, folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^model\.name="):
        load_encoder(with_model(tiny_config, folder).model)


def test_code_that_comes_with_a_model_is_not_run(tiny_config, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(ConfigError, match=r"^model\.name="):
        load_encoder(with_model(tiny_config, folder).model)
    assert not (tmp_path / "ran").exists()


def test_a_model_without_tokenizer_is_refused(tiny_config, folder):
    for path in [*folder.glob("*token*"), *folder.glob("vocab*")]:
        path.unlink()
    with pytest.raises(ConfigError, match=r"^model\.name="):
        load_tokenizer(with_model(tiny_config, folder).model)


def test_targets_that_no_block_has_are_refused_with_those_it_has(tiny_config):
    with pytest.raises(ConfigError, match=r"^tuning\.targets=\['q_lin'\].*\bquery\b.*\bvalue\b"):
        build_model(with_tuning(tiny_config, targets=["q_lin"]))


def test_more_layers_than_the_model_has_are_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"^tuning\.last_layers=3: must be at most 2"):
        build_model(with_tuning(tiny_config, last_layers=3))


def test_initialisation_depends_on_the_seed_only(tiny_config):
    """Every site builds the model itself; what differed would be averaged away or worse."""
    torch.manual_seed(1)
    first = flatten(build_model(tiny_config))
    torch.manual_seed(2)
    second = flatten(build_model(tiny_config))
    other = flatten(build_model(dataclasses.replace(tiny_config, seed=1)))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_what_is_trained_is_the_head_and_the_adapters_of_the_last_blocks(tiny_config):
    names = Layout.of(build_model(tiny_config)).names
    assert len(names) == 2 + 2 * len(["query", "value"])
    assert {name for name in names if "lora_" not in name} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert all("layer.1." in name for name in names if "lora_" in name)
    both = Layout.of(build_model(with_tuning(tiny_config, last_layers=2))).names
    assert {name for name in both if "layer.0." in name}


def test_rank_and_alpha_reach_the_adapters(tiny_config, inputs):
    layouts = [Layout.of(build_model(with_tuning(tiny_config, rank=rank))).size for rank in (2, 4)]
    head = 2 * 32 + 2
    assert layouts[1] - head == 2 * (layouts[0] - head)
    logits = [
        stirred(build_model(with_tuning(tiny_config, alpha=alpha)))(**inputs) for alpha in (8, 16)
    ]
    assert not torch.allclose(*logits)


def test_a_new_model_favours_no_class(tiny_config, inputs):
    assert torch.equal(build_model(tiny_config)(**inputs), torch.zeros(4, 2))


def test_padding_does_not_change_the_logits(tiny_config, inputs):
    model = stirred(build_model(tiny_config))
    short = {name: tensor[1:2, :4] for name, tensor in inputs.items()}
    torch.testing.assert_close(model(**short), model(**inputs)[1:2], rtol=1e-5, atol=1e-5)


def roberta():
    return RobertaModel(
        RobertaConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dropout_prob=0.5,
            attention_probs_dropout_prob=0.5,
        )
    )


def distilbert():
    return DistilBertModel(
        DistilBertConfig(
            vocab_size=50,
            dim=32,
            n_layers=2,
            n_heads=2,
            hidden_dim=64,
            dropout=0.5,
            attention_dropout=0.5,
        )
    )


@pytest.mark.parametrize(
    ("make", "targets"), [(roberta, ["query", "value"]), (distilbert, ["q_lin", "v_lin"])]
)
def test_dropout_is_off_in_train_mode(tiny_config, tmp_path, inputs, make, targets):
    encoder = make()
    encoder.save_pretrained(tmp_path)
    encoder.train()
    first, second = (encoder(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)  # it is on before us
    model = build_model(with_tuning(with_model(tiny_config, tmp_path), targets=targets))
    stirred(model).train()
    assert torch.equal(model(**inputs), model(**inputs))
    prepared = model.prepare(inputs)
    assert torch.equal(model(**prepared), model(**prepared))
    trained = model(**inputs)
    torch.testing.assert_close(trained, model.eval()(**inputs), rtol=1e-5, atol=1e-5)


def test_the_merged_encoder_gives_the_logits_of_the_adapters(tiny_config, inputs):
    model = stirred(build_model(tiny_config))
    logits = model(**inputs)
    plain = build_model(tiny_config)(**inputs)
    merged = model.merged_encoder()
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    assert set(merged.state_dict()) == set(load_encoder(tiny_config.model).state_dict())
    after = model(**inputs)
    torch.testing.assert_close(after, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, plain)


def test_without_adapters_the_merged_encoder_is_the_encoder(tiny_config, compose_config):
    method = compose_config("tuning=head").tuning.method
    model = build_model(with_tuning(tiny_config, method=method))
    assert model.merged_encoder() is model.encoder
    assert Layout.of(model).names == ("classifier.weight", "classifier.bias")
