"""The state of a run after a round, on disk, whole or absent."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from common.durable import write_atomic
from common.parameters import Vector


def write_checkpoint(
    folder: Path, *, run_id: str, round_number: int, private: bool, vector: Vector
) -> Path:
    """Writes `round-NNNN.safetensors`: the global vector, and whose it is in the header."""
    path = folder / f"round-{round_number:04d}.safetensors"
    header = {"run": json.dumps({"run_id": run_id, "round": round_number, "private": private})}
    write_atomic(path, save({"vector": np.asarray(vector)}, metadata=header))
    return path
