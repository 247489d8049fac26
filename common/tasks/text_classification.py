"""Text classification: one label per text."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from common.classes import ClassTask, build_classifier, class_targets, likeliest
from common.config import Config, ModelConfig, TaskConfig
from common.model import FineTuned
from common.prefix import Inputs
from common.pretrained import load_tokenizer
from common.records import Records

TOPICS = (
    ("goal", "match", "team", "coach", "cup", "score"),
    ("bank", "shares", "market", "profit", "loan", "trade"),
)
FILLING = ("the", "a", "of", "in", "was", "on", "today", "said")


class TextClassification(ClassTask):
    """One label per text."""

    FAMILY = AutoModelForSequenceClassification

    def load_processor(self, model: ModelConfig) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises: ConfigError."""
        return load_tokenizer(model)

    def build(self, config: Config) -> FineTuned:
        """Text encoder with a head. Raises: ConfigError."""
        ones = torch.ones((2, config.task.max_tokens), dtype=torch.long)
        return build_classifier(config, {"input_ids": ones, "attention_mask": ones}, self.FAMILY)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, records: Records, task: TaskConfig
    ) -> Inputs:
        """(N, T) token ids and attention mask; T is `max_tokens` whatever the texts hold."""
        texts = [str(text) for text in records.contents]
        return {**_read(tokenizer, texts, task), **class_targets(records)}

    def toy_examples(self, count: int) -> Records:
        """Short texts of two classes, sport and money, that share their filling words."""
        draw = random.Random(0)  # noqa: S311 - made texts, no secret
        labels, texts = [], []
        for _ in range(count):
            labels.append(draw.randrange(len(TOPICS)))
            words = [*draw.sample(FILLING, 4), *draw.sample(TOPICS[labels[-1]], 3)]
            texts.append(" ".join(words))
        return Records(tuple(texts), np.array(labels, dtype=np.int64))

    def made(self, tokenizer: PreTrainedTokenizerBase, records: int, config: Config) -> Inputs:
        """(N, T) random token ids; every second record is padded from its middle on."""
        tokens = config.task.max_tokens
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(len(tokenizer), (records, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[1::2, (tokens + 1) // 2 :] = 0
        ids = torch.where(mask > 0, ids, tokenizer.pad_token_id)
        labels: Tensor = torch.arange(records) % len(config.data.labels)
        return {"input_ids": ids, "attention_mask": mask, "target_labels": labels}

    def answer(
        self,
        model: FineTuned,
        tokenizer: PreTrainedTokenizerBase,
        asked: list[str],
        task: TaskConfig,
    ) -> list[dict[str, Any]]:
        """Label and probability of each text."""
        return likeliest(model, model(**_read(tokenizer, asked, task)), asked)


def _read(tokenizer: PreTrainedTokenizerBase, texts: list[str], task: TaskConfig) -> Inputs:
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=task.max_tokens,
        padding="max_length",
        return_tensors="pt",
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
