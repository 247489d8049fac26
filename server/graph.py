"""A model as an ONNX graph, of 32 bits or with weights of 8: it runs without torch or Coterie."""

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import ConfigError, VerificationError, first_line
from common.model import FineTuned
from common.prefix import Inputs

FILE, OUTPUT, RECORDS = "model.onnx", "output", "records"
LARGEST = 1_900_000_000
"""Bytes of weights that fit into one file of this format."""
NEEDED = ("onnx", "onnxscript", "onnxruntime")
QUANTISED = ("MatMul", "Gemm", "Gather")
"""Operations whose weights get 8 bits: linear layers and embeddings. Convolutions stay: there is
no kernel for all of them."""


class _Positional(nn.Module):
    """A model whose inputs come in an order, as those of a graph do."""

    def __init__(self, model: FineTuned, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """What the model gives of inputs of these names."""
        output: Tensor = self.model(**dict(zip(self.names, tensors, strict=True)))
        return output


def write(model: FineTuned, made: Inputs, folder: Path) -> None:
    """Writes `model.onnx`: inputs named as `made`, of their size but for the number of records.

    Raises: ConfigError if the `export` extra is not installed, or torch cannot export this model.
    """
    _check_installed()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > LARGEST:
        raise ConfigError(
            f"--format=onnx: the model has {size / 1e9:.1f} GB of weights, and one file of ONNX "
            f"holds {LARGEST / 1e9:g}; choose merged or adapter"
        )
    names = list(made)
    shapes = (tuple({0: torch.export.Dim(RECORDS)} for _ in names),)
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                _Positional(model, names).eval(),
                tuple(made.values()),
                folder / FILE,
                input_names=names,
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, *_FAULTS) as error:
        raise ConfigError(
            f"--format=onnx: torch cannot export {type(model.encoder).__name__} "
            f"({_reason(error)}); choose merged"
        ) from error


def quantise(folder: Path) -> None:
    """Replaces the graph's weights by 8 bits each; activations are quantised as they come.

    By onnxruntime and not by torch, whose dynamic quantisation is deprecated and can be saved as
    pickle only.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - an extra

    whole = folder / f"whole-{FILE}"
    (folder / FILE).rename(whole)
    with _quiet():
        quantize_dynamic(
            whole,
            folder / FILE,
            op_types_to_quantize=[*QUANTISED],
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    whole.unlink()


def restore(folder: Path) -> Callable[[Inputs], Tensor]:
    """Opens what `write` wrote, in onnxruntime. Raises: VerificationError if it does not open."""
    import onnxruntime  # noqa: PLC0415 - an extra

    try:
        session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no class of their own in common
        raise VerificationError(f"{folder / FILE}: does not open ({first_line(error)})") from error
    read = [each.name for each in session.get_inputs()]

    def answers(inputs: Inputs) -> Tensor:
        (output,) = session.run([OUTPUT], {name: inputs[name].numpy() for name in read})
        return torch.from_numpy(np.asarray(output))

    return answers


def _check_installed() -> None:
    """Raises: ConfigError."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"--format=onnx: needs {', '.join(missing)}; pip install 'coterie[export]'"
        )


def _reason(error: BaseException) -> str:
    """What lies at the bottom: the exporter wraps it in advice on reports to its authors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error) if isinstance(error, Exception) else type(error).__name__


_FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
"""What tracing raises in a model's own code."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Both exporters tell a person of their own progress and of each other's deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
