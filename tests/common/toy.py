"""A tiny real model for each task, and a config that trains it on the task's toy examples."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from common.config import DataSource, NoiseSource, TaskName

WORDS = [
    *("<pad>", "<unk>", "<end>", "the", "a", "of", "in", "was", "on", "today", "said"),
    *("goal", "match", "team", "coach", "cup", "score"),
    *("bank", "shares", "market", "profit", "loan", "trade"),
    *("where", "is"),
]


def save_tokenizer(folder: Path, *, ends: bool = False) -> None:
    """Whole words of the suite; `ends` closes each text, as encoder-decoders expect."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <end>", special_tokens=[("<end>", 2)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<pad>"
    ).save_pretrained(folder)


def save_gpt2(folder: Path) -> None:
    """Two blocks, output tied to the embeddings."""
    made = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.2,
        eos_token_id=2,
        bos_token_id=2,
    )
    save_model(lambda: GPT2LMHeadModel(made), folder)
    save_tokenizer(folder)


def save_t5(folder: Path) -> None:
    """Two blocks a side, relative positions, output tied to the embeddings."""
    made = T5Config(
        vocab_size=len(WORDS),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    save_model(lambda: T5ForConditionalGeneration(made), folder)
    save_tokenizer(folder, ends=True)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,  # different inputs get different features
}


def save_vit(folder: Path) -> None:
    """For 8x8 gray images, in four patches."""
    made = ViTConfig(image_size=8, patch_size=4, num_channels=1, **SMALL)
    save_model(lambda: ViTModel(made), folder)
    side = {"height": 8, "width": 8}
    ViTImageProcessorPil(size=side, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)


def save_wav2vec2(folder: Path) -> None:
    """Two convolutions and two blocks; no masking, no dropped layers."""
    made = Wav2Vec2Config(
        conv_dim=(16, 16),
        conv_kernel=(40, 8),
        conv_stride=(20, 8),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        **SMALL,
    )
    save_model(lambda: Wav2Vec2Model(made), folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


def save_model(build: Callable[[], PreTrainedModel], folder: Path) -> None:
    """The same weights on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        build().save_pretrained(folder)


@dataclass(frozen=True)
class Tiny:
    """What a tiny config of a task changes in the suite's own."""

    labels: list[str] = field(default_factory=list)
    save: Callable[[Path], None] | None = None
    """Writes the model; None: the suite's own BERT."""
    tuning: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)


EVERY_BLOCK = {"last_layers": 0}
TINY: dict[TaskName, Tiny] = {
    TaskName.text_classification: Tiny(["sport", "money"]),
    TaskName.image_classification: Tiny(["down", "across"], save_vit),
    TaskName.audio_classification: Tiny(["low", "high"], save_wav2vec2, task={"max_seconds": 0.3}),
    TaskName.causal_lm: Tiny(save=save_gpt2, tuning=EVERY_BLOCK),
    TaskName.question_answering: Tiny(),
    TaskName.seq2seq: Tiny(save=save_t5, tuning=EVERY_BLOCK, task={"max_target_tokens": 4}),
}


def toy_config(task: TaskName, tiny_config, folder: Path):
    """The tiny private run, of this task, on a model in `folder` where the task needs another."""
    tiny, model = TINY[task], tiny_config.model
    if tiny.save is not None:
        tiny.save(folder)
        model = replace(model, name=str(folder))
    return replace(
        tiny_config,
        task=replace(tiny_config.task, name=task, **tiny.task),
        model=model,
        data=replace(tiny_config.data, labels=tiny.labels),
        tuning=replace(tiny_config.tuning, **tiny.tuning),
    )


def private_run(config, *, steps: int = 30, rate: float = 0.1):
    """Metrics of public toy records before and after three private rounds at two sites.

    Little noise: what is tried is the way, and not what privacy costs.
    """
    from client.site import Site
    from client.train import Trainer
    from common.parameters import flatten
    from common.tasks import TASKS, build_model
    from server.evaluate import Evaluator

    config = replace(
        config,
        privacy=replace(config.privacy, noise_multiplier=0.3, noise=NoiseSource.seeded),
        federation=replace(config.federation, local_steps=steps),
        tuning=replace(config.tuning, adapter_learning_rate=rate, head_learning_rate=rate),
    )
    toys = TASKS[config.task.name].toy_examples(110)
    evaluator = Evaluator(config, build_model(config), toys.subset(range(84, 110)))
    sites = [Site(f"site-{i}", toys.subset(range(i, 84, 2)), (), None) for i in range(2)]
    trainer, vector = Trainer(config), flatten(build_model(config))
    before = evaluator.measure(vector)
    for number in (1, 2, 3):
        updates = [trainer.train(site, vector, round_number=number)[0] for site in sites]
        vector = sum(updates) / len(updates)
    return before, evaluator.measure(vector)


def losses_around_a_round(config) -> tuple[float, float]:
    """Mean loss of toy records under the model that a run begins with, and under the one that it
    releases, after one private round at one site: through plan, ledger, grid, rounds and release,
    as `coterie simulate` goes.
    """
    import json

    from rich.console import Console

    from common.model import read_of, targets_of
    from common.tasks import TASKS, build_model
    from simulations.run import run_simulation

    task, model = TASKS[config.task.name], build_model(config)
    processor = task.load_processor(config.model)
    encoded = task.encode(processor, task.toy_examples(60), config.task)

    def loss(model) -> float:
        with torch.no_grad():
            output = model.eval()(**read_of(encoded))
            return float(task.loss_vector(output, targets_of(encoded)).mean())

    run_dir = run_simulation(config, Console(quiet=True))
    settings = json.loads((run_dir / "model" / "config.json").read_text())
    return loss(model), loss(task.restore(run_dir / "model", settings))


def one_round(config, folder: Path):
    """The config of one private round at one site on toy records, as the command line composes it
    but for the model. With so many records and steps of the whole site the noise of epsilon 50 is a
    hundredth of what is learned.
    """
    return replace(
        config,
        run_dir=str(folder / "run"),
        data=replace(
            config.data, source=DataSource.toy, path="", toy_records=300, declared_records=None
        ),
        privacy=replace(
            config.privacy, epsilon=12.0, noise_multiplier=1.0, sample_rate=1.0, delta=1e-3
        ),
        federation=replace(config.federation, sites=1, rounds=1, local_steps=5),
        tuning=replace(config.tuning, adapter_learning_rate=0.3, head_learning_rate=0.3),
    )
