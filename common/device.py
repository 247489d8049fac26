"""Where a model is trained: the processor, or a GPU of this machine."""

import torch

from common.errors import ConfigError

CPU = torch.device("cpu")


def gpus_of(name: str) -> int:
    """How many GPUs processes may take turns with: all that are there for `auto` and `cuda`."""
    return torch.cuda.device_count() if name in ("auto", "cuda") else 0


def device_of(name: str, *, setting: str = "engine.device") -> torch.device:
    """The device that is called so; `auto` is this process's GPU, or the processor without one. It
    starts nothing on it, so that a process may still be forked.

    Guarantee: float32 products stay float32: on a GPU the shorter ones of its tensor cores, whose
    norms are no bound, are off in this process from then on.
    Args: setting: by which it was named, for the message.
    Raises: ConfigError if it is not there.

    >>> device_of("cpu")
    device(type='cpu')
    """
    there = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not there):
        return CPU
    number = int(name.partition(":")[2] or 0)
    if number >= there:
        raise ConfigError(
            f"{setting}={name}: torch finds {there or 'no'} GPU{'' if there == 1 else 's'} on this "
            f"machine; take {'cuda:0 to cuda:' + str(there - 1) + ', or ' if there else ''}cpu"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(name if ":" in name else "cuda")


def prefer_gpu(place: int) -> None:
    """Makes the GPU of that place, counted round, the one of this process, if there is any."""
    if there := torch.cuda.device_count():
        torch.cuda.set_device(place % there)
