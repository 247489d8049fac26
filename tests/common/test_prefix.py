import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from common.model import HIDDEN, POOLED, Classifier
from common.prefix import FrozenPrefix, NoPrefixError, trainable_depth
from common.tasks import build_model

HIDDEN_SIZE, TOKENS, RECORDS = 32, 10, 5


def bert():
    return BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=HIDDEN_SIZE,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    )


def roberta():
    return RobertaModel(
        RobertaConfig(
            vocab_size=50,
            hidden_size=HIDDEN_SIZE,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=40,
        )
    )


def distilbert():
    return DistilBertModel(
        DistilBertConfig(vocab_size=50, dim=HIDDEN_SIZE, n_layers=3, n_heads=2, hidden_dim=64)
    )


FAMILIES = {
    "bert": (bert, ["query", "value"], 3),
    "roberta": (roberta, ["query", "value"], 2),
    "distilbert": (distilbert, ["q_lin", "v_lin"], 3),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A saved encoder with random weights; dropout is at its default, which is not zero."""
    make, targets, blocks = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        make().save_pretrained(folder)
    return SimpleNamespace(folder=folder, targets=targets, blocks=blocks)


def changed(config, *, model=None, **tuning):
    config = dataclasses.replace(config, tuning=dataclasses.replace(config.tuning, **tuning))
    if model is None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=str(model)))


def stirred(model):
    """Random trained values: the head and half of every adapter start at zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def model(family, tiny_config):
    return stirred(
        build_model(
            changed(tiny_config, model=family.folder, targets=family.targets, last_layers=1)
        )
    )


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([10, 7, 1, 3, 9])
    mask = (torch.arange(TOKENS)[None] < lengths[:, None]).long()
    ids = torch.randint(5, 50, (RECORDS, TOKENS), generator=generator)
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def gradients(model, logits):
    model.zero_grad()
    (logits * torch.arange(logits.numel()).view_as(logits)).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_prefix_then_suffix_is_the_whole_model(model, inputs, family):
    whole = model(**inputs)
    prepared = model.prepare(inputs)
    assert set(prepared) == {HIDDEN, "attention_mask"}
    assert prepared[HIDDEN].shape == (RECORDS, TOKENS, HIDDEN_SIZE)
    assert not prepared[HIDDEN].requires_grad
    assert trainable_depth(model.encoder) == family.blocks - 1
    torch.testing.assert_close(model(**prepared), whole, rtol=1e-5, atol=1e-5)
    assert whole.std() > 0.01


def test_gradients_of_the_suffix_are_those_of_the_whole_model(model, inputs):
    whole = gradients(model, model(**inputs))
    cut = gradients(model, model(**model.prepare(inputs)))
    assert len(whole) >= 6
    for a, b in zip(whole, cut, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_logits_of_a_prepared_record_depend_on_that_record_only(model, inputs):
    prepared = model.prepare(inputs)
    alone = {name: tensor[2:3] for name, tensor in prepared.items()}
    torch.testing.assert_close(model(**alone), model(**prepared)[2:3], rtol=1e-5, atol=1e-5)


def test_size_of_the_pieces_does_not_matter(model, inputs):
    at_once, in_twos = model.prepare(inputs), model.prepare(inputs, batch=2)
    torch.testing.assert_close(at_once[HIDDEN], in_twos[HIDDEN], rtol=1e-5, atol=1e-5)


def test_the_encoder_is_unharmed_afterwards(model, inputs):
    logits = model(**inputs)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model(**model.prepare(inputs))
    assert torch.equal(model(**inputs), logits)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_the_encoder_is_unharmed_by_a_failure_inside(model, inputs):
    logits = model(**inputs)
    prefix = FrozenPrefix(model.encoder, trainable_depth(model.encoder))
    hidden = prefix.hidden(inputs)

    def fail():
        with prefix.entered(hidden):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises((TypeError, ValueError)):
        prefix.hidden({"unknown": inputs["input_ids"]})
    assert torch.equal(model(**inputs), logits)


def test_the_blocks_above_the_cut_do_not_run_for_the_prefix(model, inputs, family):
    ran = []
    prefix = FrozenPrefix(model.encoder, family.blocks - 1)
    blocks = max((m for m in model.encoder.modules() if isinstance(m, nn.ModuleList)), key=len)
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_args, number=number: ran.append(number))
    prefix.hidden(inputs)
    assert ran == list(range(family.blocks - 1))
    ran.clear()
    with prefix.entered(prefix.hidden(inputs)):
        ran.clear()
        model.encoder(**inputs)
    assert len(ran) == 1


def test_adapters_in_every_block_leave_nothing_to_prepare(family, tiny_config, inputs):
    model = stirred(
        build_model(
            changed(
                tiny_config,
                model=family.folder,
                targets=family.targets,
                last_layers=family.blocks,
            )
        )
    )
    assert trainable_depth(model.encoder) == 0
    prepared = model.prepare(inputs)
    assert set(prepared) == set(inputs)
    assert torch.equal(model(**prepared), model(**inputs))


def test_head_tuning_keeps_the_pooled_feature_only(family, tiny_config, inputs, compose_config):
    method = compose_config("tuning=head").tuning.method
    model = stirred(build_model(changed(tiny_config, model=family.folder, method=method)))
    prepared = model.prepare(inputs)
    assert set(prepared) == {POOLED}
    assert prepared[POOLED].shape == (RECORDS, HIDDEN_SIZE)
    torch.testing.assert_close(
        prepared[POOLED].norm(dim=1),
        torch.full((RECORDS,), tiny_config.model.feature_scale),
    )
    torch.testing.assert_close(model(**prepared), model(**inputs), rtol=1e-5, atol=1e-5)


class Blockless(nn.Module):
    """An encoder of another shape: no list of blocks to cut."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=HIDDEN_SIZE)
        self.embeddings = nn.Embedding(50, HIDDEN_SIZE)
        self.mix = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, input_ids, attention_mask):
        states = self.mix(self.embeddings(input_ids)) * attention_mask.unsqueeze(-1)
        return SimpleNamespace(last_hidden_state=states)


def test_an_encoder_without_blocks_runs_whole(inputs):
    model = Classifier(Blockless(), labels=["a", "b"], feature_scale=4.0)
    stirred(model)
    with pytest.raises(NoPrefixError):
        trainable_depth(model.encoder)
    model.cut_frozen_prefix()
    prepared = model.prepare(inputs)
    assert set(prepared) == set(inputs)
    assert torch.equal(model(**prepared), model(**inputs))
    assert model(**prepared).std() > 0.01
