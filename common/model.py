"""The model that is tuned: a pretrained Transformer, and what a task puts on top of it."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from common.prefix import FrozenPrefix, Inputs, NoPrefixError, find_blocks, trainable_depth

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

TARGET = "target_"
"""What names of targets begin with: the model does not read them, and its output is held
against them."""
HIDDEN, POOLED = "hidden", "pooled"


class FineTuned(nn.Module):
    """A pretrained Transformer under a task. Dropout is off: the frozen prefix is then a fixed map
    of a record, and two passes agree. A task's model says in `forward` what it answers.
    """

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.unused: list[str] = []
        """Parameters left frozen because the output does not depend on them, as BERT's pooler."""
        self.tables: list[str] = []
        """Parameters left frozen because the whole batch reads them at once, as T5's table of
        relative positions: no fast engine tells the records apart in their gradient."""
        self._prefix: FrozenPrefix | None = None
        # In a tuple, so that torch does not register the wrapper as a child beside what it wraps.
        self._adapters: tuple[PeftModel | None] = (None,)

    @property
    def adapters(self) -> "PeftModel | None":
        """The wrapper that holds the adapters of `encoder`, if it has any."""
        return self._adapters[0]

    def adopt(self, wrapper: "PeftModel") -> None:
        """Remembers the wrapper of adapters that are in `encoder` already."""
        self._adapters = (wrapper,)

    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        """What the task put on top, and trains in every way of tuning."""
        below = {id(parameter) for parameter in self.encoder.parameters()}
        below -= {id(parameter) for parameter in self.pooler_parameters()}
        head = (p for p in self.parameters() if id(p) not in below)
        return tuple(parameter for parameter in head if parameter.requires_grad)

    def adapter_parameters(self) -> tuple[nn.Parameter, ...]:
        """What is trained below the head."""
        head = {id(parameter) for parameter in self.head_parameters()}
        trained = (p for p in self.encoder.parameters() if p.requires_grad)
        return tuple(parameter for parameter in trained if id(parameter) not in head)

    def pooler_parameters(self) -> tuple[nn.Parameter, ...]:
        """What hangs in the encoder and belongs to the head."""
        return ()

    @property
    def device(self) -> torch.device:
        """Where its parameters are, and where it reads."""
        return next(self.parameters()).device

    def cut_frozen_prefix(self) -> None:
        """Finds what is frozen, so that `prepare` runs it once per record; see `FrozenPrefix`."""
        try:
            depth = trainable_depth(self.encoder)
            self._prefix = FrozenPrefix(self.encoder, depth) if depth else None
        except NoPrefixError as error:
            log.info("no frozen prefix: %s", error)

    @torch.no_grad()
    def prepare(self, inputs: Mapping[str, Tensor], *, batch: int = 64) -> Inputs:
        """Everything about some records that training cannot change, on the CPU; their targets
        as they are.

        Adapters on upper blocks keep the hidden state below them (N, T, d) with what else the
        blocks read; where nothing below is frozen, the inputs come back.
        """
        if self._prefix is None or self._prefix.depth == 0:
            return dict(inputs)
        read, targets = read_of(inputs), targets_of(inputs)
        hidden = [
            self._prefix.hidden(moved(filled(piece, batch), self.device))[:records].cpu()
            for piece, records in _apart(read, batch)
        ]
        del read[self.encoder.main_input_name]
        return {HIDDEN: torch.cat(hidden), **read, **targets}

    def merged_encoder(self) -> PreTrainedModel:
        """The encoder with its adapters folded into the weights: plain Hugging Face, no peft.

        The model shares it, and is used up.
        """
        if self.adapters is None:
            return self.encoder
        merged: PreTrainedModel = self.adapters.merge_and_unload()
        return merged

    def _states(self, inputs: Inputs) -> Tensor:
        """(B, T, d) last hidden states, from raw inputs or from the cut."""
        states: Tensor = self._run(self.encoder, inputs).last_hidden_state
        return states

    def _run(self, network: PreTrainedModel, inputs: Inputs) -> Any:
        """What `network`, the encoder or one around it, gives of raw inputs or from the cut."""
        hidden = inputs.pop(HIDDEN, None)
        if hidden is None:
            return network(**inputs)
        assert self._prefix is not None
        main = {self.encoder.main_input_name: self._placeholder(hidden)}
        with self._prefix.entered(hidden):
            return network(**main, **inputs)

    def _placeholder(self, hidden: Tensor) -> Tensor:
        """Zeros of the shape of the ids, or the pixels, that the encoder no longer reads."""
        if self.encoder.main_input_name != "pixel_values":
            return torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        size, channels = self.encoder.config.image_size, self.encoder.config.num_channels
        height, width = (size, size) if isinstance(size, int) else size
        return hidden.new_zeros(1).expand(len(hidden), channels, height, width)


class Classifier(FineTuned):
    """Mean-pooled encoder with a linear head; logits (B, K).

    The pooled feature is normalised to length `feature_scale`, so that one clip bound fits
    the head's gradient whatever the encoder.
    """

    def __init__(
        self, encoder: PreTrainedModel, *, labels: list[str], feature_scale: float
    ) -> None:
        super().__init__(encoder)
        self.classifier = nn.Linear(encoder.config.hidden_size, len(labels))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.feature_scale = feature_scale
        self.labels = labels

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits (B, K) from raw inputs or from what `prepare` made of them."""
        pooled = inputs[POOLED] if POOLED in inputs else self._pool(inputs)
        logits: Tensor = self.classifier(pooled)
        return logits

    @torch.no_grad()
    def prepare(self, inputs: Mapping[str, Tensor], *, batch: int = 64) -> Inputs:
        """As `FineTuned.prepare`; head tuning keeps the pooled feature (N, d) alone."""
        if any(parameter.requires_grad for parameter in self.encoder.parameters()):
            return super().prepare(inputs, batch=batch)
        read, targets = read_of(inputs), targets_of(inputs)
        pooled = [
            self._pool(moved(filled(piece, batch), self.device))[:records].cpu()
            for piece, records in _apart(read, batch)
        ]
        return {POOLED: torch.cat(pooled), **targets} if pooled else {}

    def _pool(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, d) mean of the states that are not padding, at length `feature_scale`."""
        states = self._states(dict(inputs))
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape != states.shape[:2]:  # images and sounds: all of them
            mean = states.mean(1)
        else:
            weights = mask.unsqueeze(-1).to(states.dtype)
            mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        return functional.normalize(mean, dim=1) * self.feature_scale


class NativeClassifier(FineTuned):
    """An encoder under the head that transformers itself gives it; logits (B, K).

    Untrained layers of that head are drawn from a seed; the last one starts at zero. A pooler
    that the head reads is trained with it. The length of what the last layer reads is not bounded
    here: the clip bound does all of it.
    """

    def __init__(self, native: PreTrainedModel, *, labels: list[str]) -> None:
        encoder = native.base_model
        assert isinstance(encoder, PreTrainedModel)
        super().__init__(encoder)
        self.native = native
        self.labels = labels

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits (B, K) from raw inputs or from what `prepare` made of them."""
        logits: Tensor = self._run(self.native, dict(inputs)).logits
        return logits

    def pooler_parameters(self) -> tuple[nn.Parameter, ...]:
        """Those of the encoder's pooler; none where it has none."""
        pooler = getattr(self.encoder, "pooler", None)
        return tuple(pooler.parameters()) if isinstance(pooler, nn.Module) else ()

    def cut_frozen_prefix(self) -> None:
        """As `FineTuned.cut_frozen_prefix`; the last block runs in every step, as what the head
        reads of it differs from model to model.
        """
        super().cut_frozen_prefix()
        if self._prefix is not None:
            last = len(find_blocks(self.encoder)[2]) - 1
            self._prefix.depth = min(self._prefix.depth, last)

    def merged_native(self) -> PreTrainedModel:
        """The whole network with its adapters folded in, which uses the model up."""
        merged = self.merged_encoder()
        assert merged is self.native.base_model
        return self.native


def targets_of(inputs: Mapping[str, Tensor]) -> Inputs:
    """What a model's output is held against."""
    return {name: tensor for name, tensor in inputs.items() if name.startswith(TARGET)}


def read_of(inputs: Mapping[str, Tensor]) -> Inputs:
    """What a model reads."""
    return {name: tensor for name, tensor in inputs.items() if not name.startswith(TARGET)}


def pieces(inputs: Mapping[str, Tensor], batch: int) -> list[Inputs]:
    """Some records at a time."""
    records = len(next(iter(inputs.values())))
    return [
        {name: tensor[start : start + batch] for name, tensor in inputs.items()}
        for start in range(0, records, batch)
    ]


def filled(inputs: Mapping[str, Tensor], rows: int) -> Inputs:
    """Some records, and as many rows of zeros as make `rows` rows of them.

    A filler is padding but for its first position, so that no batch is without padding: models
    take a shorter way, which rounds otherwise, where nobody has any.
    """
    missing = rows - len(next(iter(inputs.values())))
    if not missing:
        return dict(inputs)
    whole = {}
    for name, tensor in inputs.items():
        fillers = tensor.new_zeros(missing, *tensor.shape[1:])
        if name.endswith("mask"):
            fillers[:, :1] = 1
        whole[name] = torch.cat([tensor, fillers])
    return whole


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """The same on that device."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _apart(inputs: Inputs, rows: int) -> list[tuple[Inputs, int]]:
    """The records in batches of `rows` rows with room for a filler, and how many are in each."""
    return [(piece, len(next(iter(piece.values())))) for piece in pieces(inputs, max(1, rows - 1))]
