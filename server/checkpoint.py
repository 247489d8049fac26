"""The state of a run after a round, on disk, whole or absent."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from common.durable import write_atomic
from common.errors import VerificationError
from common.parameters import Vector


def write_checkpoint(
    folder: Path, *, run_id: str, round_number: int, private: bool, vector: Vector
) -> Path:
    """Writes `round-NNNN.safetensors`: the global vector, and whose it is in the header."""
    path = folder / f"round-{round_number:04d}.safetensors"
    header = {"run": json.dumps({"run_id": run_id, "round": round_number, "private": private})}
    write_atomic(path, save({"vector": np.asarray(vector)}, metadata=header))
    return path


def read_last(folder: Path) -> Vector:
    """The vector of the last round in `folder`, as it stands there: hold it against a layout.

    Raises: VerificationError if there is none.
    """
    names = sorted(folder.glob("round-*.safetensors"), key=lambda path: (len(path.name), path.name))
    if not names:
        raise VerificationError(f"{folder}: holds no checkpoint")
    try:
        vector: Vector = load_file(names[-1])["vector"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise VerificationError(f"{names[-1]}: not a checkpoint of a round") from error
    return vector
