"""One contract for every model and tuning: the clipped sum is that of a loop, or a refusal by name.

Engines: `client.preflight` picks one, as training does. Oracle: a float64 loop of our own.
"""

import math

import numpy as np
import pytest
import torch

from client.clipping import tape
from client.clipping.engines import ENGINES, EngineName, Hooks, SingleBackward, completed
from client.preflight import preflight
from client.private_step import ParameterGroup, private_steps, sgd
from common.errors import PrivacyRefusedError
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness
from common.processor import steady_products

from .oracle import assert_exact, oracle
from .zoo import LISTED, OTHERS, TUNINGS, tuned

RECORDS = 7
ASKED = {
    *("BERT", "DistilBERT", "RoBERTa", "ALBERT", "DeBERTa", "DeBERTa-v2", "ELECTRA", "GPT-2"),
    *("OPT", "Llama", "Mistral", "Qwen2", "T5", "BART", "ViT", "DeiT", "BEiT", "Swin"),
    *("Wav2Vec2", "Whisper encoder"),
}
LOOPED = {
    ("T5", "full"): "Hugging Face adds the mask to the trained position bias only where a batch "
    "has padding: another path; with eager attention it does so always",
    ("XLNet", "full"): "records lie along the second axis",
    ("Longformer", "full"): "records lie along the second axis",
    ("WavLM", "full"): "records lie along the second axis of its attention",
    ("Mixtral", "full"): "a router picks rows for each expert",
    ("SigLIP vision", "full"): "records lie along the second axis of nn.MultiheadAttention",
    ("nn.MultiheadAttention", "full"): "records lie along the second axis",
    ("nn.LSTM", "full"): "the state's records lie along the second axis",
    ("packed", "full"): "rows are picked by the mask",
}
"""What no single backward covers, and why; exact all the same, one record at a time."""
ROUNDED_BY_COMPANY = {("Mistral", "full"), ("Qwen2", "LoRA"), ("Qwen3", "full")}
"""What a single backward covers, and on AMD's processors is refused, for its last bit: Hugging Face
makes no mask where nobody in a batch is padded, and attention without one rounds otherwise there.
"""
REFUSED = {
    ("LeViT", "full"): "levit.*attention_biases: trainable, but no loss depends on it",
    ("batch statistics", "full"): "the model failed .*more than 1 value per channel",
    ("mixing", "full"): "the loss of a record depends on the other records",
}
"""What cannot be trained privately, and what is said."""
ROUTES = {
    "as measured": {},
    "Grams": {"KEPT_ELEMENTS": 0, "INSTANTIATE_COST": math.inf},
    "instantiated": {"KEPT_ELEMENTS": 0, "INSTANTIATE_COST": 0.0},
}
"""Tiny weights would all be kept; each form of the norm must be right."""

quick = [(name, "full") for name in [*LISTED, *OTHERS]]
tunings = [tuning for tuning in TUNINGS if tuning != "full"]
PAIRS = [
    *quick,
    *((name, tuning) for name in LISTED for tuning in tunings),
    *(
        (name, "LoRA")
        for name in ("ModernBERT", "GPT-NeoX", "Falcon", "ResNet", "DINOv2", "Hubert")
    ),
]


def marked(name, tuning):
    """Every architecture promptly; its further tunings in the slow suite, a few excepted."""
    prompt = tuning == "full" or name in ("BERT", "GPT-2", "ViT")
    marks = () if prompt else pytest.mark.slow
    return pytest.param(name, tuning, id=f"{name}-{tuning}", marks=marks)


def make(name):
    return {**LISTED, **OTHERS}[name]


def test_everything_asked_for_is_listed():
    assert set(LISTED) == ASKED
    assert set(TUNINGS) == {"full", "LoRA", "head", "BitFit"}
    asked = {(name, tuning) for name in ASKED for tuning in TUNINGS}
    assert asked <= set(PAIRS)
    assert len(asked & set(REFUSED)) <= 0.1 * len(asked)


@pytest.mark.parametrize(("name", "tuning"), [marked(*pair) for pair in PAIRS])
def test_the_clipped_sum_is_that_of_batches_of_one(name, tuning, monkeypatch):
    specimen = tuned(make(name), tuning)
    verdict = preflight(specimen.model, specimen.made)
    if (name, tuning) in REFUSED:
        assert verdict.engine is None
        assert any(match(REFUSED[name, tuning], reason) for reason in verdict.refused)
        return
    engine = verdict.engine
    wanted = EngineName.loop if (name, tuning) in LOOPED else EngineName.single_backward
    assert engine is not None, verdict.refused
    if engine.name is not wanted:
        assert steady_products(), verdict.refused
        assert (name, tuning) in ROUNDED_BY_COMPANY, verdict.refused
        assert verdict.refused
        assert all("how a record's gradient is rounded" in each for each in verdict.refused)
        engine.close()  # its hooks would hear the oracle's backward passes, too
    expected, loss_of = oracle(specimen, RECORDS), specimen.made(RECORDS)
    clip_norm = float(expected.norms.median())  # some records are clipped, some are not
    engine = engine if engine.name is wanted else ENGINES[engine.name](specimen.model)
    for route, constants in ROUTES.items():
        for constant, value in constants.items():
            monkeypatch.setattr(tape, constant, value)
        for records in ([*range(RECORDS)], [RECORDS - 1]):
            sums = {}
            norms = engine.add_clipped(loss_of, np.array(records), clip_norm, sums)
            assert_exact(completed(sums, engine), norms, expected, records, clip_norm)
        if engine.name is not EngineName.single_backward:
            break
        assert engine.plan, route
    nobody_comes(engine)
    assert all(parameter.grad is None for parameter in specimen.model.parameters())


def match(pattern, text):
    return pytest.raises(PrivacyRefusedError, match=pattern).matches(PrivacyRefusedError(text))


def nobody_comes(engine):
    """A batch of 0 runs no model and is noised like any other."""

    def loss_of(piece):
        raise AssertionError("a forward pass for nobody")

    before = {p: p.detach().clone() for p in engine.parameters}
    private_steps(
        engine,
        sgd([ParameterGroup(tuple(engine.parameters), 1.0)]),
        loss_of,
        mechanism=Mechanism(3.0, 0.5, 1.0, 1),
        randomness=Randomness.from_entropy(),
        records=0,
        steps=1,
        physical_batch=4,
    )
    change = torch.cat([(p.detach() - old).flatten() for p, old in before.items()])
    assert torch.isfinite(change).all()
    # 1.5 is noise multiplier times clip norm; six standard errors of a standard deviation.
    assert abs(float(change.norm()) / len(change) ** 0.5 / 1.5 - 1) < 6 / (2 * len(change)) ** 0.5
    with torch.no_grad():
        for parameter, old in before.items():
            parameter.copy_(old)


@pytest.mark.parametrize(
    ("name", "tuning"),
    [("BERT", "LoRA"), ("ViT", "head"), ("conv net", "full"), ("Whisper encoder", "LoRA")],
)
def test_opacus_gives_the_same_sum(name, tuning):
    """An implementation that is not ours, on models that it can read."""
    specimen = tuned(make(name), tuning)
    expected, loss_of = oracle(specimen, RECORDS), specimen.made(RECORDS)
    clip_norm = float(expected.norms.median())
    ours, theirs = SingleBackward(specimen.model), {}
    sums = {}
    ours.add_clipped(loss_of, np.arange(RECORDS), clip_norm, sums)
    hooks = Hooks(specimen.model)
    norms = hooks.add_clipped(loss_of, np.arange(RECORDS), clip_norm, theirs)
    hooks.close()
    assert_exact(theirs, norms, expected, [*range(RECORDS)], clip_norm)
    for parameter, total in sums.items():
        torch.testing.assert_close(total, theirs[parameter], rtol=1e-5, atol=1e-6 * clip_norm)
