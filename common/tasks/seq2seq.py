"""Text to text: a target, as a summary or a translation, is written from a source."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from common.config import Config, ModelConfig, TaskConfig
from common.errors import ConfigError
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
from common.tasks.text_classification import FILLING, TOPICS
from common.tuning import tune

WRITES = "writes_ids"
"""(B, U) target tokens as the model reads them; it shifts them itself."""
WRITTEN = "written"


class Writer(FineTuned):
    """An encoder-decoder with its own output layer. `tuning.last_layers` and `tuning.k` count
    blocks of the decoder; it has no head beside that layer, so `tuning=head` is refused.
    """

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__(encoder)
        start = getattr(encoder.config, "decoder_start_token_id", None)
        if start is None:
            raise ConfigError(
                f"model.name={encoder.config.name_or_path}: its config names no "
                "decoder_start_token_id, from which a target is begun"
            )
        self.start = int(start)

    def forward(self, **inputs: Tensor) -> Tensor:
        """(B, U, V) logits of each target token, from the source and the true tokens before it."""
        before = functional.pad(inputs.pop(WRITES)[:, :-1], (1, 0), value=self.start)
        logits: Tensor = self.encoder(**inputs, decoder_input_ids=before, use_cache=False).logits
        return logits


class Seq2Seq(GenerativeTask):
    """Writes a target from a source; a record is the two. Padding of a target is at its end, where
    no token of the target attends to it.
    """

    FAMILY, MODEL, ANSWER = AutoModelForSeq2SeqLM, Writer, "written"

    def load_processor(self, model: ModelConfig) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises: ConfigError."""
        return load_tokenizer(model)

    def build(self, config: Config) -> FineTuned:
        """The encoder-decoder. Raises: ConfigError, as for `tuning=head`."""
        model = Writer(load_encoder(config.model, self.FAMILY))
        source = torch.ones((2, config.task.max_tokens), dtype=torch.long)
        target = torch.ones((2, config.task.max_target_tokens), dtype=torch.long)
        probe = {"input_ids": source, "attention_mask": source, WRITES: target}
        return tune(model, config, probe)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, records: Records, task: TaskConfig
    ) -> Inputs:
        """(N, T) ids and mask of sources, (N, U) ids of targets, as read and as to be written; T is
        `max_tokens` and U `max_target_tokens`.
        """
        sources, targets = records.parts("source", "target")
        written = read_texts(tokenizer, targets, task.max_target_tokens, written=True)
        return _inputs(read_texts(tokenizer, sources, task.max_tokens), written)

    def toy_examples(self, count: int) -> Records:
        """A text, and its words that are no filling words, all of one topic."""
        draw = random.Random(0)  # noqa: S311 - made texts, no secret
        contents = []
        for _ in range(count):
            said = draw.sample(draw.choice(TOPICS), 2)
            source = [*draw.sample(FILLING, 2), said[0], draw.choice(FILLING), said[1]]
            contents.append((" ".join(source), " ".join(said)))
        return Records(tuple(contents), np.zeros(count, dtype=np.int64))

    def made(self, tokenizer: PreTrainedTokenizerBase, records: int, config: Config) -> Inputs:
        """Random tokens of full size; every second record is padded from its middle on."""
        source = made_texts(tokenizer, records, config.task.max_tokens, seed=0)
        return _inputs(
            source, made_texts(tokenizer, records, config.task.max_target_tokens, seed=1)
        )

    def loss_vector(self, output: Tensor, targets: Inputs) -> Tensor:
        """(B,) mean cross entropy of each record's own target tokens, each after the true ones
        before it; 0, with no gradient, where it has none.
        """
        return record_means(token_losses(output, targets[TARGET_IDS]), targets[TARGET_IDS])

    def correct(self, output: Tensor, targets: Inputs) -> Tensor:
        """(B,) whether each of a record's target tokens is the likeliest after the true ones before
        it, which is easier than to write them all alone.
        """
        ids = targets[TARGET_IDS]
        return ((output.argmax(2) == ids) | (ids == IGNORED)).all(1)

    def score(self, model: FineTuned, inputs: Inputs) -> Inputs:
        """(B, U) what the model writes itself, greedily, in no more than U tokens."""
        pad, most = model.encoder.config.pad_token_id, inputs[WRITES].shape[1]
        source = {name: t for name, t in read_of(inputs).items() if name != WRITES}
        written = write_greedily(model, source, most, pad)[:, 1:]
        return {WRITTEN: functional.pad(written, (0, most - written.shape[1]), value=pad)}

    def metrics(
        self,
        scores: Inputs,
        records: Records,
        tokenizer: PreTrainedTokenizerBase,
        _config: Config,
    ) -> dict[str, float]:
        """BLEU of the whole, in [0, 100], as sacrebleu computes it, and mean ROUGE-L F in [0, 1],
        without stemming, of what the model wrote. ROUGE-L sees letters a to z and digits only.

        Sources: Post (2018), arXiv:1804.08771; Lin (2004), aclanthology.org/W04-1013.
        """
        _, targets = records.parts("source", "target")
        written = tokenizer.batch_decode(scores[WRITTEN], skip_special_tokens=True)
        return judged([text.strip() for text in written], targets)

    def prompts(self, records: Records) -> list[tuple[str, str]]:
        """Each source with its target."""
        sources, targets = records.parts("source", "target")
        return [*zip(sources, targets, strict=True)]

    def answer(
        self,
        model: FineTuned,
        tokenizer: PreTrainedTokenizerBase,
        asked: list[str],
        task: TaskConfig,
    ) -> list[dict[str, Any]]:
        """What the model writes from each, greedily."""
        ids, mask = read_texts(tokenizer, asked, task.max_tokens)
        source = {"input_ids": ids, "attention_mask": _read_somewhere(mask)}
        written = write_greedily(
            model, source, task.max_target_tokens, model.encoder.config.pad_token_id
        )
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        pairs = zip(asked, (text.strip() for text in texts), strict=True)
        return [{"text": text, "written": said, "sentence": said} for text, said in pairs]


def judged(written: list[str], targets: list[str]) -> dict[str, float]:
    """BLEU and ROUGE-L of texts against one target each."""
    # nltk, scikit-learn and pandas come with them, for this task and after training only.
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415
    from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415

    rouge = RougeScorer(["rougeL"])
    shared = [
        rouge.score(target, text)["rougeL"].fmeasure
        for target, text in zip(targets, written, strict=True)
    ]
    bleu = BLEU().corpus_score(written, [targets]).score
    return {"bleu": round(float(bleu), 4), "rouge_l": round(float(np.mean(shared)), 4)}


def _inputs(source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Inputs:
    ids, mask = target
    return {
        "input_ids": source[0],
        "attention_mask": _read_somewhere(source[1]),
        WRITES: ids,
        TARGET_IDS: ids.where(mask > 0, IGNORED),
    }


def _read_somewhere(mask: Tensor) -> Tensor:
    """(B, T) the mask with its first token read: attention to nothing at all is not a number."""
    return torch.cat((torch.ones_like(mask[:, :1]), mask[:, 1:]), 1)
