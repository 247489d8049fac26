"""Pretrained Transformers and what prepares their input, from files that are no code."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from common.config import ModelConfig
from common.embedded import EMBEDDED, embedded
from common.errors import ConfigError, first_line
from common.made_models import PREFIX, make_encoder, make_processor

# transformers leaves its logging functions untyped.
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
# At WARNING it lists the head's weights as unexpected each time a released model is opened.
transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]

PROCESSOR_FILE = "preprocessor_config.json"
REMOTE_CODE = "trust_remote_code"
"""What transformers speaks of where a model would need code of its own."""
SETTINGS = ("config.json", "tokenizer_config.json", PROCESSOR_FILE, "processor_config.json")
"""Files that may name such code."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")


def load_encoder(config: ModelConfig, family: Any = AutoModel) -> PreTrainedModel:
    """Loads pretrained weights from safetensors; never pickle, never remote code.

    Args: family: the Auto class of transformers that says which head the model comes with.
    Raises: ConfigError if there is no such model, or no safetensors weights in it.
    """
    if config.name.startswith(PREFIX):
        return make_encoder(config.name, family)
    source = locate(config.name)
    try:
        encoder: PreTrainedModel
        encoder, loading = family.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # files that anybody may have made trip many libraries
        if REMOTE_CODE in str(error):
            raise _own_code(config.name) from error
        raise ConfigError(
            f"model.name={config.name}: cannot be loaded ({first_line(error)}); "
            "give a folder with config.json and *.safetensors"
        ) from error
    _check_weights(config.name, encoder, loading)
    return encoder


def _check_weights(name: str, encoder: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Refuses a model that is not what its own files say, all of it and nothing else.

    Raises: ConfigError.
    """
    if getattr(encoder.config, "auto_map", None):
        raise _own_code(name)
    if getattr(encoder, "_hf_peft_config_loaded", False):
        raise _adapter(name)
    # transformers would fill a gap with random numbers; a pooler is not used here.
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ConfigError(
            f"model.name={name}: {len(missing)} weights are not in its files, "
            f"among them {missing[0]}"
        )
    for each, parameter in encoder.named_parameters():
        if not parameter.isfinite().all():
            raise ConfigError(
                f"model.name={name}: its weight {each} holds values that are no finite numbers; "
                "choose another copy of the model"
            )


def load_tokenizer(config: ModelConfig, *, end_pads: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to the encoder.

    Args: end_pads: the end of a text pads where there is no token for it, as with GPT-2 and Llama;
    for tasks that tell padding from text by their own count.
    Raises: ConfigError.
    """
    if config.name.startswith(PREFIX):
        made = make_processor(config.name)
        if not isinstance(made, PreTrainedTokenizerBase):
            raise ConfigError(f"model.name={config.name}: has no tokenizer; it reads no texts")
        return made
    source = locate(config.name)
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
        words = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    except Exception as error:  # as of weights
        if REMOTE_CODE in str(error):
            raise _own_code(config.name) from error
        raise ConfigError(
            f"model.name={config.name}: has no tokenizer ({first_line(error)})"
        ) from error
    if tokenizer.init_kwargs.get("auto_map"):
        raise _own_code(config.name)
    if len(tokenizer) > (size := getattr(words, "vocab_size", len(tokenizer))):
        raise ConfigError(
            f"model.name={config.name}: its tokenizer has {len(tokenizer)} tokens, and the model "
            f"only {size}; give the one that it was trained with"
        )
    if tokenizer.pad_token is None and end_pads:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"model.name={config.name}: its tokenizer has no padding token; set one and save it"
        )
    return tokenizer


def load_image_processor(config: ModelConfig) -> Any:
    """Loads what makes images into `pixel_values`, by PIL. Raises: ConfigError."""
    return _load_processor(config, AutoImageProcessor, "pixel_values", backend="pil")


def load_feature_extractor(config: ModelConfig) -> Any:
    """Loads what makes sounds into `input_values`. Raises: ConfigError."""
    return _load_processor(config, AutoFeatureExtractor, "input_values")


def _load_processor(config: ModelConfig, family: Any, gives: str, **settings: str) -> Any:
    """One that gives the model what is called `gives`. Raises: ConfigError."""
    if config.name.startswith(PREFIX):
        processor = make_processor(config.name)
    else:
        source = locate(config.name)
        if Path(source).is_dir() and not (Path(source) / PROCESSOR_FILE).is_file():
            raise ConfigError(
                f"model.name={config.name}: has no processor of {gives}; expected "
                f"{PROCESSOR_FILE} in the folder"
            )
        try:
            processor = family.from_pretrained(source, trust_remote_code=False, **settings)
        except Exception as error:  # as of weights
            if REMOTE_CODE in str(error):
                raise _own_code(config.name) from error
            raise ConfigError(
                f"model.name={config.name}: has no processor of {gives} ({first_line(error)})"
            ) from error
    if getattr(processor, "auto_map", None):
        raise _own_code(config.name)
    if gives not in processor.model_input_names:
        raise ConfigError(
            f"model.name={config.name}: its processor gives "
            f"{', '.join(processor.model_input_names)}, not {gives}; choose another task or model"
        )
    return processor


def locate(name: str) -> str:
    """Path or hub name of a model; a folder is checked before any library opens it."""
    if name in EMBEDDED:
        return str(embedded(name))
    folder = Path(name).expanduser()
    looks_like_path = name.startswith((".", "/", "~")) or folder.is_dir()
    if not looks_like_path:
        return name
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.name={name}: no folder with a config.json; save a model there")
    if (folder / "adapter_config.json").is_file():
        raise _adapter(name)
    if any(map(_names_code, (folder / each for each in SETTINGS))):
        raise _own_code(name)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model.name={name}: no weights in the folder; expected *.safetensors "
            "(pickled weights are never opened)"
        )
    return str(folder)


def _names_code(settings: Path) -> bool:
    """Whether a file of settings, if there is one and it is whole, names code of the model's."""
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # whoever opens it as what it should be has more to say
    return isinstance(values, dict) and bool(values.get("auto_map"))


def _own_code(name: str) -> ConfigError:
    return ConfigError(
        f"model.name={name}: names code of its own (auto_map), which is never run beside records "
        "(docs/decisions/0012); if a class of transformers fits it, give a copy without that entry"
    )


def _adapter(name: str) -> ConfigError:
    return ConfigError(
        f"model.name={name}: holds an adapter, for which another model would be fetched; merge it "
        "into its model, and give that"
    )
