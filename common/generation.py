"""What tasks that write text share: the loss of tokens, greedy writing, and plain folders."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase

from common.classes import COTERIE_KEY
from common.config import ModelConfig, TaskConfig
from common.model import FineTuned
from common.prefix import Inputs
from common.pretrained import load_encoder
from common.records import Records

IGNORED = -100
"""Stands in targets where a record has no token."""
TARGET_IDS = "target_ids"
"""(B, T) tokens that should have been written."""
SAMPLES = 4
"""Public records of which a report shows what the model writes."""


class GenerativeTask(ABC):
    """A task whose model writes text, and is saved and opened as transformers does it itself."""

    CLASSES = False
    LOWER_IS_BETTER = False
    ANSWER: ClassVar[str]
    """Under which `answer` gives what was written."""
    FAMILY: ClassVar[Any]
    """The Auto class of transformers that opens the model."""
    MODEL: ClassVar[type[FineTuned]]

    @abstractmethod
    def prompts(self, records: Records) -> list[tuple[str, str]]:
        """What to ask of each record, and what should be written."""

    @abstractmethod
    def answer(
        self,
        model: FineTuned,
        tokenizer: PreTrainedTokenizerBase,
        asked: list[str],
        task: TaskConfig,
    ) -> list[dict[str, Any]]:
        """What is written from each, greedily."""

    def samples(
        self,
        model: FineTuned,
        tokenizer: PreTrainedTokenizerBase,
        records: Records,
        task: TaskConfig,
    ) -> list[dict[str, str]]:
        """Of the first few records what is written, greedily, and what should be."""
        pairs = self.prompts(records.subset(range(min(SAMPLES, len(records)))))
        answers = self.answer(model, tokenizer, [prompt for prompt, _ in pairs], task)
        return [
            {"prompt": prompt, "written": str(answer[self.ANSWER]), "reference": reference}
            for (prompt, reference), answer in zip(pairs, answers, strict=True)
        ]

    def save(self, model: FineTuned, folder: Path, facts: dict[str, Any]) -> None:
        """Writes the whole model, with its adapters merged; tied weights are written once."""
        merged = model.merged_encoder()
        setattr(merged.config, COTERIE_KEY, facts)
        merged.save_pretrained(folder)

    def restore(self, folder: Path, _settings: dict[str, Any]) -> FineTuned:
        """Opens what `save` wrote. Raises: ConfigError."""
        return self.MODEL(load_encoder(ModelConfig(str(folder.resolve())), self.FAMILY))


def read_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], tokens: int, *, written: bool = False
) -> tuple[Tensor, Tensor]:
    """(N, T) ids and mask of texts cut or padded at their end to `tokens`.

    Args: written: they are to be written, for which some tokenizers, as Marian's, have other words.
    """
    encoded = tokenizer(
        **{"text_target" if written else "text": texts},
        truncation=True,
        max_length=tokens,
        padding="max_length",
        padding_side="right",
        return_tensors="pt",
    )
    return encoded["input_ids"], encoded["attention_mask"]


def made_texts(
    tokenizer: PreTrainedTokenizerBase, records: int, tokens: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """(N, T) random ids and their mask; every second record is padded from its middle on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(tokenizer), (records, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, (tokens + 1) // 2 :] = 0
    return ids.where(mask > 0, tokenizer.pad_token_id), mask


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, T) cross entropy of each token, from (B, T, V) logits; 0 where there is none.

    Never the model's own `loss`, a mean over the tokens of the batch: how much one record counts
    in it depends on the lengths of the others, and no clip bound would hold.
    """
    losses = functional.cross_entropy(
        logits.flatten(0, 1), ids.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.reshape(ids.shape)


def record_means(values: Tensor, ids: Tensor) -> Tensor:
    """(B,) mean of (B, T) values over each record's own tokens; 0 where it has none."""
    own = ids != IGNORED
    return (values * own).sum(1) / own.sum(1).clamp(min=1)


def write_greedily(model: FineTuned, inputs: Inputs, tokens: int, pad: int) -> Tensor:
    """(B, up to `tokens` more) what the model writes, the likeliest token at each step."""
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, num_beams=1, max_new_tokens=tokens, pad_token_id=pad
    )
    written: Tensor = model.encoder.generate(**inputs, generation_config=settings)  # type: ignore[operator]
    return written
