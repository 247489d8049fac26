"""The machine that a node or a coordinator stands on: disk, GPU, versions, model."""

import os
import shutil
from importlib import metadata
from pathlib import Path

from common.code import check_flower, code_digest
from common.config import ModelConfig
from common.doctor import DoubtError
from common.embedded import EMBEDDED
from common.errors import ConfigError

NEEDED_BYTES, WANTED_BYTES = 256 << 20, 4 << 30
"""Free on a disk: less, and an instruction or a checkpoint may not fit; less, and somebody should
know."""


def check_versions() -> str:
    """Which programs these are. Raises: ConfigError if flwr is of a minor version not known."""
    flwr = metadata.version("flwr")
    check_flower(flwr)
    return f"coterie {metadata.version('coterie')} (code {code_digest()[:12]}), flwr {flwr}"


def check_room(folder: Path, what: str) -> str:
    """Whether the disk of a folder can be written, and has room.

    Raises: ConfigError; DoubtError if it is little.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{there}: cannot be written, and {what} stand there; chown it to the "
            "user that this program runs as"
        )
    free = shutil.disk_usage(there).free
    words = f"{free / 1e9:.1f} GB are free for {what} at {there}"
    if free < NEEDED_BYTES:
        raise ConfigError(f"{words}; make room, at least {WANTED_BYTES / 1e9:.0f} GB")
    if free < WANTED_BYTES:
        raise DoubtError(f"{words}; make room, {WANTED_BYTES / 1e9:.0f} GB are no luxury")
    return words


def check_gpu() -> str:
    """Which GPUs torch can use. Raises: ConfigError if there is none."""
    import torch  # noqa: PLC0415 - only who asks for a GPU waits for it

    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no device"
        raise ConfigError(
            f"no GPU that torch {torch.__version__} can use ({built}); install the driver and a "
            "torch built for CUDA, or leave out --gpu and device=cuda"
        )
    names = [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())]
    return ", ".join(names)


def check_model(name: str) -> str:
    """Whether a model can be opened here: weights in safetensors, and no code of its own.

    Raises: ConfigError; DoubtError for a name of the hub that is not on this machine.
    """
    # torch comes with it.
    from common.pretrained import load_encoder, locate  # noqa: PLC0415

    source = locate(name)
    if source == name and name not in EMBEDDED and not Path(name).is_dir() and _is_absent(name):
        raise DoubtError(
            f"{name}: is not on this machine; fetch it from the hub beforehand, or save it in a "
            "folder, if this machine has no network"
        )
    load_encoder(ModelConfig(name=name, feature_scale=1.0))
    return f"{name}: can be opened"


def _is_absent(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - it is slow to import

    from common.made_models import PREFIX  # noqa: PLC0415

    return not name.startswith(PREFIX) and not isinstance(
        try_to_load_from_cache(name, "config.json"), str
    )
