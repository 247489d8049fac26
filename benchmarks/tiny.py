"""A tiny model and tiny records, for tests, and for measurements of everything but the training."""

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = {
    "sport": ["goal", "match", "team", "coach", "cup", "score"],
    "money": ["bank", "shares", "market", "profit", "loan", "trade"],
}
FILLER = ["the", "a", "of", "in", "was", "on", "today", "said"]
PUBLIC, SHARE = 30, 30
"""Records that are public, and of each site."""
NODE = ("data.labels=[sport,money]", "node=open", "allow_unprotected=true", "poll_s=0.05")
"""What a node of such a run is told; seeded noise, so that weights can be compared to the bit."""


@dataclass(frozen=True)
class Job:
    """A run of seeded noise on tiny records."""

    settings: tuple[str, ...]
    """Of `coterie submit`."""
    rounds: int
    spares: int


def make_job(folder: Path, sites: Sequence[Path], *, rounds: int, spares: int = 2) -> Job:
    """Writes the model, the public records, and those of each site into the files `sites`."""
    folder.mkdir(parents=True)
    held = rows(PUBLIC + SHARE * len(sites))
    write(folder / "public.csv", held[:PUBLIC])
    for place, path in enumerate(sites):
        write(path, held[PUBLIC + place :: len(sites)])
    save_model(folder / "model")
    settings = (
        *("data=csv", f"data.test_path={folder / 'public.csv'}", "data.labels=[sport,money]"),
        *(f"data.declared_records={SHARE * len(sites)}", f"model.name={folder / 'model'}"),
        *("task.max_tokens=12", "privacy.delta=1e-3", "privacy.epsilon=8", "privacy.noise=seeded"),
        *(f"federation.sites={len(sites)}", f"federation.rounds={rounds}"),
        *("federation.local_steps=2", f"privacy.spare_rounds={spares}"),
        *("federation.round_timeout_s=120", "engine.threads=1", "engine.together=1"),
    )
    return Job(settings, rounds, spares)


def rows(number: int) -> list[tuple[str, str]]:
    """Different one-line texts of two classes that can be told apart."""
    draw, found = random.Random(0), dict[str, str]()  # noqa: S311 - no secret
    while len(found) < number:
        label = draw.choice([*WORDS])
        found[" ".join([*draw.sample(FILLER, 4), *draw.sample(WORDS[label], 3)])] = label
    return [*found.items()]


def write(path: Path, held: Sequence[tuple[str, str]]) -> None:
    """A CSV file of texts and labels."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(held)


def save_model(folder: Path, shape: BertConfig | None = None) -> None:
    """A BERT with random weights, of two blocks or another shape, and a whole-word tokenizer."""
    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *FILLER, *(word for each in WORDS.values() for word in each)]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        BertModel(shape or _two_blocks(len(words))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _two_blocks(words: int) -> BertConfig:
    return BertConfig(
        vocab_size=words,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
