"""Causal language modelling: each record is a text, and each of its tokens is to be predicted."""

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from common.config import Config, ModelConfig, TaskConfig
from common.generation import (
    IGNORED,
    TARGET_IDS,
    GenerativeTask,
    made_texts,
    read_texts,
    record_means,
    token_losses,
    write_greedily,
)
from common.model import FineTuned, read_of
from common.prefix import Inputs
from common.pretrained import load_encoder, load_tokenizer
from common.records import Records
from common.tasks.text_classification import TOPICS
from common.tuning import tune

WRITTEN = 20
"""Tokens that `answer` adds to a prompt, at most."""
PROMPT_WORDS = 40
"""Words of a prompt in a report, at most."""
MOST_NATS = 100.0
"""Mean loss beyond which perplexity is not told apart: a report holds no infinity."""
LIKELIHOOD, TOKENS, HITS = "negative_log_likelihood", "tokens", "hits"


class LanguageModel(FineTuned):
    """A causal Transformer with its own output layer, tied to its embeddings or not.

    It has no head beside that, so `tuning=head` is refused.
    """

    def forward(self, **inputs: Tensor) -> Tensor:
        """(B, T, V) logits of the token after each."""
        logits: Tensor = self.encoder(**inputs, use_cache=False).logits
        return logits


class CausalLM(GenerativeTask):
    """Predicts each next token of a text. Padding is at the end, where no token of the text
    attends to it: no mask is read.
    """

    FAMILY, MODEL = AutoModelForCausalLM, LanguageModel
    ANSWER, LOWER_IS_BETTER = "continuation", True

    def load_processor(self, model: ModelConfig) -> PreTrainedTokenizerBase:
        """The model's tokenizer; if need be the end of a text pads. Raises: ConfigError."""
        return load_tokenizer(model, end_pads=True)

    def build(self, config: Config) -> FineTuned:
        """The language model. Raises: ConfigError, as for `tuning=head`."""
        model = LanguageModel(load_encoder(config.model, self.FAMILY))
        ones = torch.ones((2, config.task.max_tokens), dtype=torch.long)
        return tune(model, config, {"input_ids": ones})

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, records: Records, task: TaskConfig
    ) -> Inputs:
        """(N, T) token ids, as read and as to be predicted; T is `max_tokens`. The tokenizer's
        own special tokens count as the text's; none are added.
        """
        texts = [str(text) for text in records.contents]
        return _with_targets(*read_texts(tokenizer, texts, task.max_tokens))

    def toy_examples(self, count: int) -> Records:
        """Two songs, each six words over and over, begun anywhere."""
        draw = random.Random(0)  # noqa: S311 - made texts, no secret
        texts = []
        for _ in range(count):
            song, begin = draw.choice(TOPICS), draw.randrange(6)
            texts.append(" ".join(song[(begin + i) % 6] for i in range(draw.randint(5, 12))))
        return Records(tuple(texts), np.zeros(count, dtype=np.int64))

    def made(self, tokenizer: PreTrainedTokenizerBase, records: int, config: Config) -> Inputs:
        """(N, T) random token ids; every second record is padded from its middle on."""
        return _with_targets(*made_texts(tokenizer, records, config.task.max_tokens, seed=0))

    def loss_vector(self, output: Tensor, targets: Inputs) -> Tensor:
        """(B,) mean cross entropy of each record's own next tokens; 0, with no gradient, where it
        has fewer than two tokens.
        """
        following = targets[TARGET_IDS][:, 1:]
        return record_means(token_losses(output[:, :-1], following), following)

    def correct(self, output: Tensor, targets: Inputs) -> Tensor:
        """(B,) whether at least half of each record's next tokens are the likeliest; False where
        there are none.
        """
        counted = _counted(output, targets[TARGET_IDS])
        return (2 * counted[HITS] >= counted[TOKENS]) & (counted[TOKENS] > 0)

    def score(self, model: FineTuned, inputs: Inputs) -> Inputs:
        """(B,) summed loss in nats, number of next tokens, and how many were the likeliest."""
        return _counted(model(**read_of(inputs)), inputs[TARGET_IDS])

    def metrics(
        self, scores: Inputs, _records: Records, _processor: Any, _config: Config
    ) -> dict[str, float]:
        """Perplexity, exp of the mean loss of a token: lower is better, 1 is perfect. And the share
        of next tokens that were the likeliest. Tokens count alike, whosever text they are in.
        """
        tokens = max(int(scores[TOKENS].sum()), 1)
        nats = float(scores[LIKELIHOOD].double().sum()) / tokens
        bounded = min(nats, MOST_NATS) if math.isfinite(nats) else MOST_NATS
        accuracy = int(scores[HITS].sum()) / tokens
        return {"perplexity": round(math.exp(bounded), 4), "token_accuracy": round(accuracy, 4)}

    def prompts(self, records: Records) -> list[tuple[str, str]]:
        """Of each text its first words, at most half, and some of those that follow."""
        return [_halves(str(content).split()) for content in records.contents]

    def answer(
        self,
        model: FineTuned,
        tokenizer: PreTrainedTokenizerBase,
        asked: list[str],
        task: TaskConfig,
    ) -> list[dict[str, Any]]:
        """Each prompt, of which the end is read, continued by up to 20 tokens."""
        return [_continued(model, tokenizer, prompt, task) for prompt in asked]


def _halves(words: list[str]) -> tuple[str, str]:
    middle = min(len(words) // 2, PROMPT_WORDS)
    return " ".join(words[:middle]), " ".join(words[middle : middle + WRITTEN])


def _with_targets(ids: Tensor, mask: Tensor) -> Inputs:
    return {"input_ids": ids, TARGET_IDS: ids.where(mask > 0, IGNORED)}


def _counted(logits: Tensor, ids: Tensor) -> Inputs:
    """(B,) of each record's next tokens: their summed loss, how many, how many were likeliest."""
    following = ids[:, 1:]
    return {
        LIKELIHOOD: token_losses(logits[:, :-1], following).sum(1),
        TOKENS: (following != IGNORED).sum(1),
        HITS: (logits[:, :-1].argmax(2) == following).sum(1),
    }


def _continued(
    model: FineTuned, tokenizer: PreTrainedTokenizerBase, prompt: str, task: TaskConfig
) -> dict[str, Any]:
    new = min(WRITTEN, max(task.max_tokens // 2, 1))  # both fit into what the model was shown
    ids = tokenizer(prompt)["input_ids"][-max(task.max_tokens - new, 1) :]
    read = torch.tensor([ids or [tokenizer.pad_token_id]])
    inputs = {"input_ids": read, "attention_mask": torch.ones_like(read)}
    written = write_greedily(model, inputs, new, tokenizer.pad_token_id)
    text = str(tokenizer.decode(written[0, read.shape[1] :], skip_special_tokens=True)).strip()
    return {"text": prompt, "continuation": text, "sentence": f"{prompt} {text}"}
