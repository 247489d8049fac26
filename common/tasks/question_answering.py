"""Extractive question answering: the answer is a piece of a context."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.answers import accepted, found, read_answers
from common.classes import COTERIE_KEY, WEIGHTS
from common.config import Config, ModelConfig, TaskConfig
from common.errors import ConfigError
from common.generation import made_texts
from common.model import FineTuned, pieces, read_of, targets_of
from common.prefix import Inputs
from common.pretrained import load_encoder, load_tokenizer
from common.records import Records
from common.squad import best_of, exact_match, word_f1
from common.tuning import tune

STATES, MASK = "states", "attention_mask"
START, END, OFFSETS = "target_start", "target_end", "target_offsets"
BEGIN, STOP = "begin", "stop"
FAR = -1e4
"""Logit of padding, which no softmax sees."""
LONGEST = 30
"""Tokens of an answer, at most, as in SQuAD's baselines."""
HEAD = "qa_outputs"
"""What transformers calls the head, too."""
FILLING = ("the", "a", "of", "in", "was", "on", "today", "said")
ANSWERS = ("goal", "match", "team", "coach", "cup", "score", "bank", "shares", "market", "profit")


class SpanFinder(FineTuned):
    """Encoder with a linear head: of each token, whether an answer starts, and ends, there."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__(encoder)
        self.qa_outputs = nn.Linear(encoder.config.hidden_size, 2)
        nn.init.zeros_(self.qa_outputs.weight)
        nn.init.zeros_(self.qa_outputs.bias)
        # One number on all tokens changes no softmax over them: noise alone would train it.
        self.qa_outputs.bias.requires_grad = False

    def forward(self, **inputs: Tensor) -> Tensor:
        """(B, T, 2) logits of start and end, from raw inputs or from what `prepare` made."""
        states = inputs[STATES] if STATES in inputs else self._states(dict(inputs))
        logits: Tensor = self.qa_outputs(states)
        return logits.masked_fill((inputs[MASK] == 0).unsqueeze(-1), FAR)

    @torch.no_grad()
    def prepare(self, inputs: Mapping[str, Tensor], *, batch: int = 64) -> Inputs:
        """As `FineTuned.prepare`; head tuning keeps the last states (N, T, d)."""
        if any(parameter.requires_grad for parameter in self.encoder.parameters()):
            return super().prepare(inputs, batch=batch)
        states = [self._states(piece) for piece in pieces(read_of(inputs), batch)]
        if not states:
            return {}
        return {STATES: torch.cat(states), MASK: inputs[MASK], **targets_of(inputs)}


class QuestionAnswering:
    """Finds where in the context the answer stands. A record is question, context and the answers
    that people accept, as `common.answers` keeps them in one text: an empty one says that the
    context holds none.
    """

    CLASSES, LOWER_IS_BETTER = False, False
    UNFIT = "an answer that does not stand in its context"
    BLANK = "without an answer: trained to say so"

    def load_processor(self, model: ModelConfig) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises: ConfigError if it cannot say where a token stands."""
        tokenizer = load_tokenizer(model)
        if not tokenizer.is_fast:
            raise ConfigError(
                f"model.name={model.name}: its tokenizer does not say where a token stands in the "
                "text; task=question_answering needs one with a tokenizer.json"
            )
        return tokenizer

    def build(self, config: Config) -> FineTuned:
        """Encoder and span head. Raises: ConfigError."""
        ones = torch.ones((2, config.task.max_tokens), dtype=torch.long)
        model = SpanFinder(load_encoder(config.model))
        return tune(model, config, {"input_ids": ones, MASK: ones})

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, records: Records, task: TaskConfig
    ) -> Inputs:
        """(N, T) ids of question and context, where the answer starts and ends (N,), and where in
        the context each token stands (N, T, 2), zeros elsewhere.

        That answer is the first accepted one that stands in the context. Both ends are 0, the first
        token, where there is none, as of SQuAD 2's questions that have none, or where it is not
        wholly within the kept tokens, as is usual.
        """
        questions, contexts, answers = records.parts("question", "context", "answer")
        inputs = _read(tokenizer, questions, contexts, task)
        places = [
            _place(offsets, found(line, context))
            for offsets, context, line in zip(inputs[OFFSETS], contexts, answers, strict=True)
        ]
        ends = torch.tensor(places, dtype=torch.long).reshape(-1, 2)
        return {**inputs, START: ends[:, 0], END: ends[:, 1]}

    def read_last(self, values: Sequence[Any]) -> str | None:
        """The accepted answers, see `common.answers.read_answers`. Raises: ValueError."""
        _, context, answers = values
        return read_answers(answers, context if isinstance(context, str) else "")

    def toy_examples(self, count: int) -> Records:
        """The answer is the one word of a context that is not a filling word."""
        draw = random.Random(0)  # noqa: S311 - made texts, no secret
        contents = []
        for _ in range(count):
            answer, words = draw.choice(ANSWERS), draw.sample(FILLING, 5)
            words.insert(draw.randrange(6), answer)
            contents.append((" ".join(draw.sample(FILLING, 2)), " ".join(words), answer))
        return Records(tuple(contents), np.zeros(count, dtype=np.int64))

    def made(self, tokenizer: PreTrainedTokenizerBase, records: int, config: Config) -> Inputs:
        """Random token ids, every second record padded from its middle on, and random answers.
        What else the tokenizer gives is as in a record of nothing.
        """
        tokens = config.task.max_tokens
        empty = _read(tokenizer, [""] * records, [""] * records, config.task)
        ids, mask = made_texts(tokenizer, records, tokens, seed=0)
        start = torch.arange(records) % ((tokens + 1) // 2)
        return {**empty, "input_ids": ids, MASK: mask, START: start // 2, END: start}

    def loss_vector(self, output: Tensor, targets: Inputs) -> Tensor:
        """(B,) mean of the cross entropies of each record's start and end."""
        start = functional.cross_entropy(output[:, :, 0], targets[START], reduction="none")
        end = functional.cross_entropy(output[:, :, 1], targets[END], reduction="none")
        return (start + end) / 2

    def correct(self, output: Tensor, targets: Inputs) -> Tensor:
        """(B,) whether the likeliest span is, to the token, that of the answer trained on."""
        found = _best_spans(output, targets[OFFSETS])
        return (found[:, 0] == targets[START]) & (found[:, 1] == targets[END])

    def score(self, model: FineTuned, inputs: Inputs) -> Inputs:
        """(B,) where in the context the likeliest answer begins and stops, in characters."""
        offsets = inputs[OFFSETS]
        best, rows = _best_spans(model(**read_of(inputs)), offsets), torch.arange(len(offsets))
        return {BEGIN: offsets[rows, best[:, 0], 0], STOP: offsets[rows, best[:, 1], 1]}

    def metrics(
        self, scores: Inputs, records: Records, _processor: Any, _config: Config
    ) -> dict[str, float]:
        """Mean exact match and word F1 as SQuAD defines them, on the texts; both in [0, 1]: of each
        record the best over its accepted answers, and 1 or 0 where it has none.
        """
        _, contexts, answers = records.parts("question", "context", "answer")
        spans = zip(contexts, scores[BEGIN].tolist(), scores[STOP].tolist(), strict=True)
        cut = [context[begin:stop] for context, begin, stop in spans]
        wanted = [[answer.text for answer in accepted(line)] for line in answers]
        return {
            "exact_match": round(float(np.mean([*map(best_of(exact_match), cut, wanted)])), 4),
            "f1": round(float(np.mean([*map(best_of(word_f1), cut, wanted)])), 4),
        }

    def save(self, model: FineTuned, folder: Path, facts: dict[str, Any]) -> None:
        """Writes encoder and head: `AutoModelForQuestionAnswering` opens the folder."""
        assert isinstance(model, SpanFinder)
        encoder = model.merged_encoder()
        setattr(encoder.config, COTERIE_KEY, facts)
        prefix = encoder.base_model_prefix
        weights = {f"{prefix}.{name}": t.contiguous() for name, t in encoder.state_dict().items()}
        for name, tensor in model.qa_outputs.state_dict(prefix=f"{HEAD}.").items():
            weights[name] = tensor.contiguous()
        encoder.config.save_pretrained(folder)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    def restore(self, folder: Path, _settings: dict[str, Any]) -> FineTuned:
        """Opens what `save` wrote. Raises: ConfigError, or OSError if it is not that."""
        model = SpanFinder(load_encoder(ModelConfig(str(folder.resolve()))))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            head = {name: file.get_tensor(f"{HEAD}.{name}") for name in ("weight", "bias")}
        if any(head[name].shape != t.shape for name, t in model.qa_outputs.state_dict().items()):
            raise ConfigError(f"{folder}: its head does not fit its encoder")
        model.qa_outputs.load_state_dict(head)
        return model

    def answer(
        self,
        model: FineTuned,
        tokenizer: PreTrainedTokenizerBase,
        asked: list[str],
        task: TaskConfig,
    ) -> list[dict[str, Any]]:
        """Each is `QUESTION? CONTEXT`, in one text. Raises: ConfigError if it is not."""
        if unclear := [text for text in asked if not text.partition("?")[2].strip()]:
            raise ConfigError(
                f"{unclear[0]!r}: must be a question up to its ?, and after it the text to look in"
            )
        split = [text.partition("?") for text in asked]
        contexts = [context.strip() for _, _, context in split]
        inputs = _read(tokenizer, [f"{q}?" for q, _, _ in split], contexts, task)
        score = self.score(model, inputs)
        spans = zip(asked, contexts, score[BEGIN].tolist(), score[STOP].tolist(), strict=True)
        answers = [(text, context[begin:stop]) for text, context, begin, stop in spans]
        return [{"text": t, "answer": a, "sentence": a or "no answer found"} for t, a in answers]


def _read(
    tokenizer: PreTrainedTokenizerBase, questions: list[str], contexts: list[str], task: TaskConfig
) -> Inputs:
    """What the model reads of each pair, and `target_offsets`, (N, T, 2) places in the context.

    The longer of the two is cut: to cut contexts alone would fail at a record with a long question.
    """
    encoded = tokenizer(
        questions,
        contexts,
        truncation="longest_first",
        max_length=task.max_tokens,
        padding="max_length",
        padding_side="right",
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    inputs = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    sides = [[side == 1 for side in encoded.sequence_ids(i)] for i in range(len(questions))]
    return {**inputs, OFFSETS: encoded["offset_mapping"] * torch.tensor(sides).unsqueeze(-1)}


def _place(offsets: Tensor, answer: tuple[int, str] | None) -> tuple[int, int]:
    """First and last token of the answer, by the (T, 2) places of a record's tokens."""
    if answer is None:
        return 0, 0
    begin, stop = answer[0], answer[0] + len(answer[1])
    inside = (offsets[:, 1] > begin) & (offsets[:, 0] < stop) & (offsets[:, 1] > 0)
    tokens = inside.nonzero().flatten().tolist()
    if not tokens:
        return 0, 0
    first, last = tokens[0], tokens[-1]
    whole = int(offsets[first, 0]) <= begin and stop <= int(offsets[last, 1])
    return (first, last) if whole else (0, 0)


def _best_spans(logits: Tensor, offsets: Tensor) -> Tensor:
    """(B, 2) first and last token of each record's likeliest answer within its context; zeros where
    that is less likely than none.
    """
    tokens = logits.shape[1]
    spans = logits[:, :, 0].unsqueeze(2) + logits[:, :, 1].unsqueeze(1)
    context = offsets[:, :, 1] > 0
    square = torch.ones(tokens, tokens, dtype=torch.bool, device=logits.device)
    ordered = square.triu().tril(LONGEST - 1)
    allowed = context.unsqueeze(2) & context.unsqueeze(1) & ordered
    best = spans.masked_fill(~allowed, -torch.inf).flatten(1).max(1)
    ends = torch.stack((best.indices // tokens, best.indices % tokens), 1)
    return ends * (best.values > spans[:, 0, 0]).unsqueeze(1)
