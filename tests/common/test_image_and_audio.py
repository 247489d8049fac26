"""What is particular to images and sounds; what they share with all tasks is in test_tasks.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from client.site import Site
from client.train import Trainer
from common import parameters
from common.config import NoiseSource, TaskName, TuningMethod
from common.errors import ConfigError
from common.model import HIDDEN, POOLED, read_of, targets_of
from common.pretrained import load_feature_extractor, load_image_processor
from common.records import Records
from common.tasks import TASKS, build_model

from .toy import toy_config

BOTH = [TaskName.image_classification, TaskName.audio_classification]


@pytest.fixture(scope="module", params=BOTH, ids=lambda name: name.name)
def config(request, tiny_config, tmp_path_factory):
    return toy_config(request.param, tiny_config, tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def images(tiny_config, tmp_path_factory):
    return toy_config(BOTH[0], tiny_config, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def sounds(tiny_config, tmp_path_factory):
    return toy_config(BOTH[1], tiny_config, tmp_path_factory.mktemp("sounds"))


def tuned(config, method, **settings):
    rates = {"head_learning_rate": 1.0, "adapter_learning_rate": 0.1, **settings}
    return replace(config, tuning=replace(config.tuning, method=method, **rates))


def encoded(config, *contents):
    task = TASKS[config.task.name]
    records = Records(contents, np.zeros(len(contents), dtype=np.int64))
    return task.encode(task.load_processor(config.model), records, config.task)


def mean_loss(config, vector, records):
    task, model = TASKS[config.task.name], build_model(config).eval()
    parameters.load(model, vector)
    inputs = task.encode(task.load_processor(config.model), records, config.task)
    with torch.no_grad():
        return float(task.loss_vector(model(**read_of(inputs)), targets_of(inputs)).mean())


@pytest.mark.parametrize("method", [TuningMethod.full, TuningMethod.head], ids=lambda m: m.name)
def test_private_rounds_of_two_sites_lower_the_loss(config, method):
    """Sites step with noise, and the coordinator's mean of them is better than what they had."""
    config = tuned(config, method, head_learning_rate=2.0, adapter_learning_rate=0.03)
    seeded = replace(config.privacy, noise_multiplier=0.2, noise=NoiseSource.seeded)
    config = replace(config, privacy=seeded)
    records = TASKS[config.task.name].toy_examples(84)
    halves = [records.subset(np.arange(start, 84, 2)) for start in (0, 1)]
    labels = tuple(config.data.labels)
    sites = [Site(f"site-{n}", half, labels, None) for n, half in enumerate(halves)]
    trainer = Trainer(config)
    start = vector = parameters.flatten(build_model(config))
    for number in range(1, 13):
        updated = [trainer.train(site, vector, round_number=number)[0] for site in sites]
        vector = np.mean(updated, axis=0, dtype=np.float32)
    assert mean_loss(config, vector, records) < 0.9 * mean_loss(config, start, records)


@pytest.mark.parametrize("method", [*TuningMethod], ids=lambda method: method.name)
def test_every_tuning_of_a_vit_is_exact_by_our_engine(images, method):
    verdict = Trainer(tuned(images, method)).preflight(precision=torch.float64)
    assert verdict.engine is not None
    assert verdict.engine.name.name == "single_backward"


@pytest.mark.parametrize("method", [*TuningMethod], ids=lambda method: method.name)
def test_every_tuning_of_a_wav2vec2_is_exact_by_our_engine(sounds, method):
    verdict = Trainer(tuned(sounds, method)).preflight(precision=torch.float64)
    assert verdict.engine is not None
    assert verdict.engine.name.name == "single_backward"


def test_a_vit_keeps_the_states_below_its_adapters(images):
    """Else every step would run the frozen blocks again."""
    inputs = encoded(images, *TASKS[images.task.name].toy_examples(3).contents)
    kept = build_model(images).prepare(inputs)
    assert {*kept} == {HIDDEN, "target_labels"}
    assert kept[HIDDEN].shape == (3, 5, 32)
    assert {*build_model(tuned(images, TuningMethod.head)).prepare(inputs)} == {
        POOLED,
        "target_labels",
    }


KINDS_OF_WAV2VEC2 = {
    "small": {},
    "norms in front, as large ones have them": {
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
    },
    "masks and drops blocks in training": {"mask_time_prob": 0.5, "layerdrop": 0.5},
    "with an adapter behind its blocks": {"add_adapter": True, "num_adapter_layers": 1},
}


@pytest.fixture(params=KINDS_OF_WAV2VEC2.values(), ids=KINDS_OF_WAV2VEC2.keys())
def wav2vec2(request, sounds, tmp_path):
    settings = Wav2Vec2Config.from_pretrained(sounds.model.name).to_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        made = Wav2Vec2Config(**{**settings, "num_hidden_layers": 3, **request.param})
        Wav2Vec2Model(made).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    return replace(sounds, model=replace(sounds.model, name=str(tmp_path)))


@pytest.mark.parametrize("method", [TuningMethod.lora, TuningMethod.last_layers])
def test_a_wav2vec2_cut_below_its_top_block_is_the_whole_one(wav2vec2, method):
    """Values and gradients: what is kept below the cut stands for all that comes before it."""
    model = stirred(build_model(tuned(wav2vec2, method)).eval())
    inputs = encoded(wav2vec2, *TASKS[wav2vec2.task.name].toy_examples(3).contents)
    kept = model.prepare(inputs, batch=2)
    assert {*kept} == {HIDDEN, "target_labels"}
    assert not kept[HIDDEN].requires_grad
    whole, cut = (model(**read_of(each)) for each in (inputs, kept))
    assert whole.std() > 0.01
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(model, cut), gradients(model, whole), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    after = model(**read_of(inputs))
    assert torch.equal(after, whole)


def test_nothing_below_the_cut_of_a_wav2vec2_runs_again(sounds):
    """Its convolutions are most of the work of a step."""
    model = build_model(tuned(sounds, TuningMethod.last_layers)).eval()
    kept = model.prepare(encoded(sounds, *TASKS[sounds.task.name].toy_examples(2).contents))
    ran = []
    for name, module in model.encoder.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_args, name=name: ran.append(name))
    model(**read_of(kept))
    assert not [name for name in ran if "conv" in name or "layers.0" in name]
    assert [name for name in ran if "layers.1" in name]


def stirred(model):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def gradients(model, logits):
    weights = torch.arange(logits.numel(), dtype=logits.dtype).view_as(logits)
    return torch.autograd.grad(
        (logits * weights).sum(), [p for p in model.parameters() if p.requires_grad]
    )


def test_images_of_any_size_come_to_the_processors(images):
    gray = encoded(images, np.zeros((30, 9, 1), np.uint8), np.zeros((8, 8), np.uint8))
    assert gray["pixel_values"].shape == (2, 1, 8, 8)


def test_a_gray_image_serves_a_model_of_colours(images, tmp_path):
    ViTModel(ViTConfig(image_size=8, patch_size=4, hidden_size=12)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    colours = replace(images, model=replace(images.model, name=str(tmp_path)))
    pixels = encoded(colours, np.full((8, 8, 1), 128, np.uint8))["pixel_values"]
    assert pixels.shape == (1, 3, 8, 8)
    assert torch.equal(pixels[:, 0], pixels[:, 2])


def test_colours_are_turned_gray_for_a_model_of_grays(images):
    """A record is the same for every model, so that its split and its ledger are."""
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    gray = np.full((8, 8, 1), 60, np.uint8)  # 0.299 of 200
    assert torch.equal(*encoded(images, red, gray)["pixel_values"])


BROKEN_IMAGES = {
    "a text": "goal",
    "float pixels": np.zeros((8, 8, 1), np.float32),
    "two channels": np.zeros((8, 8, 2), np.uint8),
    "a film": np.zeros((2, 8, 8, 1), np.uint8),
    "a line": np.zeros(8, np.uint8)[:, None, None, None],
    "no pixels": np.zeros((0, 8, 1), np.uint8),
    "no channels": np.zeros((8, 8, 0), np.uint8),
}


@pytest.mark.parametrize("content", BROKEN_IMAGES.values(), ids=BROKEN_IMAGES.keys())
def test_a_record_that_is_no_image_is_refused_by_number(images, content):
    with pytest.raises(ConfigError, match=r"^record 2: [^\n]*$"):
        encoded(images, np.zeros((8, 8, 1), np.uint8), content)


BROKEN_SOUNDS = {
    "a text": "goal",
    "numbers of 64 bits": np.zeros(9),
    "two channels": np.zeros((9, 2), np.float32),
    "empty": np.zeros(0, np.float32),
    "not a number": np.array([0, np.nan], np.float32),
    "infinite": np.array([0, np.inf], np.float32),
}


@pytest.mark.parametrize("content", BROKEN_SOUNDS.values(), ids=BROKEN_SOUNDS.keys())
def test_a_record_that_is_no_sound_is_refused_by_number(sounds, content):
    with pytest.raises(ConfigError, match=r"^record 2: [^\n]*$"):
        encoded(sounds, np.zeros(9, np.float32), content)


def test_sounds_are_cut_or_padded_to_max_seconds(sounds):
    draw = np.random.default_rng(0)
    long = draw.normal(size=9_000).astype(np.float32)
    rows = encoded(sounds, long, long[:4_800], long[:100])["input_values"]
    assert rows.shape == (3, 4_800)
    assert torch.equal(rows[0], rows[1])
    assert len(rows[2, 100:].unique()) == 1


def test_a_silent_sound_is_finite(sounds):
    assert torch.isfinite(encoded(sounds, np.zeros(50, np.float32))["input_values"]).all()


@pytest.mark.parametrize("load", [load_image_processor, load_feature_extractor])
def test_a_folder_without_a_processor_is_one_line(load, tiny_config):
    """transformers would guess one from the kind of model."""
    with pytest.raises(ConfigError, match=r"^model\.name=.*expected preprocessor_config\.json"):
        load(tiny_config.model)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"image_processor_type": "Unheard"}'])
def test_a_broken_processor_is_one_line(images, sounds, tmp_path, text):
    for config, load in ((images, load_image_processor), (sounds, load_feature_extractor)):
        settings = json.loads((Path(config.model.name) / "config.json").read_text())
        settings["model_type"] = "bert"
        (tmp_path / "config.json").write_text(json.dumps(settings))
        (tmp_path / "model.safetensors").write_bytes(b"")
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"^model\.name=[^\n]*$"):
            load(replace(config.model, name=str(tmp_path)))


def test_a_processor_of_another_kind_is_one_line(images, sounds):
    with pytest.raises(ConfigError, match=r"^model\.name=[^\n]*$"):
        load_image_processor(sounds.model)
    with pytest.raises(ConfigError, match=r"^model\.name=[^\n]*$"):
        load_feature_extractor(images.model)


def with_processor(config, folder, processor):
    ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=12)).save_pretrained(
        folder
    )
    processor.save_pretrained(folder)
    return replace(config, model=replace(config.model, name=str(folder)))


def test_a_processor_of_another_size_than_the_models_is_one_line(images, tmp_path):
    larger = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0], image_std=[1])
    with pytest.raises(ConfigError, match=r"cannot read .* pixel_values \(1, 16, 16\).*another"):
        build_model(with_processor(images, tmp_path, larger))


def test_a_processor_that_fixes_no_size_is_refused(images, tmp_path):
    edge = ViTImageProcessorPil(size={"shortest_edge": 8}, image_mean=[0], image_std=[1])
    with pytest.raises(ConfigError, match="fixes no size in pixels"):
        build_model(with_processor(images, tmp_path, edge))


def test_a_processor_that_does_not_resize_refuses_another_size(images, tmp_path):
    size = {"height": 8, "width": 8}
    still = ViTImageProcessorPil(size=size, do_resize=False, image_mean=[0], image_std=[1])
    config = with_processor(images, tmp_path, still)
    assert encoded(config, np.zeros((8, 8, 1), np.uint8))["pixel_values"].shape == (1, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"^record 1: is an image of 9 x 8 pixels"):
        encoded(config, np.zeros((9, 8, 1), np.uint8))


def test_sounds_too_short_for_the_model_are_refused_before_any_record(sounds):
    short = replace(sounds, task=replace(sounds.task, max_seconds=0.001))
    with pytest.raises(ConfigError, match=r"cannot read.*raise task\.max_seconds$"):
        build_model(short)


def test_a_model_of_texts_is_refused_for_images(images, tiny_config):
    texts = replace(images, model=tiny_config.model)
    with pytest.raises(ConfigError, match=r"expected preprocessor_config\.json"):
        build_model(texts)
