"""The state of a run after a round, on disk, whole or absent: what it goes on from.

Nothing random is in it: noise and coins of the next round are drawn afresh, here as after a pause.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.canonical import canonical_json
from common.durable import write_atomic
from common.errors import VerificationError
from common.parameters import Vector
from server.run_folder import PATTERN
from server.strategy import Memory

HEADER, VECTOR, MEMORY = "run", "vector", "strategy."
"""Name of the header's one entry, of the parameters, and what stands before a strategy's vectors.
"""


@dataclass(frozen=True)
class RunState:
    """A run between two rounds: old in, new out."""

    run_id: str
    round: int
    """The last one that is over; 0 before the first."""
    vector: Vector
    """The global parameters."""
    memory: Memory = field(default_factory=dict)
    """What the strategy carries on."""
    spares: Mapping[str, int] = field(default_factory=dict)
    """Spare rounds that are left to each site, by name; empty before the first round."""
    resumed_after: tuple[int, ...] = ()
    """The rounds after which the run was interrupted and taken up again."""


def write_checkpoint(folder: Path, state: RunState, *, private: bool) -> Path:
    """Writes `round-NNNN.safetensors`: parameters, strategy, and in the header whose."""
    path = folder / _name(state.round)
    tensors = {VECTOR: np.asarray(state.vector)}
    tensors |= {f"{MEMORY}{name}": np.asarray(each) for name, each in state.memory.items()}
    facts = {
        "run_id": state.run_id,
        "round": state.round,
        "private": private,
        "spares": dict(state.spares),
        "resumed_after": list(state.resumed_after),
    }
    facts |= {"digest": _digest(facts, tensors)}
    write_atomic(path, save(tensors, metadata={HEADER: json.dumps(facts)}))
    return path


def read_checkpoint(folder: Path, number: int) -> RunState:
    """The state after round `number`, as it was written: hold its vector against a layout.

    Raises: VerificationError if it is not there, or a bit of it is not what was written.
    """
    path = folder / _name(number)
    tensors, facts = _read(path)
    memory = {n.removeprefix(MEMORY): each for n, each in tensors.items() if n != VECTOR}
    try:
        state = RunState(
            run_id=str(facts["run_id"]),
            round=int(facts["round"]),
            vector=tensors[VECTOR],
            memory=memory,
            spares={str(site): int(left) for site, left in facts["spares"].items()},
            resumed_after=tuple(map(int, facts["resumed_after"])),
        )
        told = facts.pop("digest")
        whole = told == _digest(facts, tensors) and state.round == number
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VerificationError(_damaged(path)) from error
    if not whole:
        raise VerificationError(_damaged(path))
    return state


def read_last(folder: Path) -> Vector:
    """The vector of the last round in `folder`, as it stands there: hold it against a layout.

    Raises: VerificationError if there is none.
    """
    names = sorted(folder.glob(PATTERN), key=lambda path: (len(path.name), path.name))
    if not names:
        raise VerificationError(f"{folder}: holds no checkpoint")
    tensors, _ = _read(names[-1])
    return tensors[VECTOR]


def _name(number: int) -> str:
    return f"round-{number:04d}.safetensors"


def _read(path: Path) -> tuple[dict[str, Vector], dict[str, Any]]:
    """The float32 vectors of a checkpoint, and its facts. Raises: VerificationError."""
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads((file.metadata() or {})[HEADER])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise VerificationError(_damaged(path)) from error
    kinds = {(each.dtype, each.ndim, each.size) for each in tensors.values()}
    of_one = len(kinds) == 1 and all(kind[:2] == (np.float32, 1) for kind in kinds)
    if VECTOR not in tensors or not of_one or not isinstance(facts, dict):
        raise VerificationError(_damaged(path))
    return tensors, facts


def _damaged(path: Path) -> str:
    return f"{path}: not a checkpoint of a round, or damaged"


def _digest(facts: Mapping[str, Any], tensors: Mapping[str, Vector]) -> str:
    """SHA-256 of all that a checkpoint says: its format knows no checksum."""
    sha = hashlib.sha256(canonical_json(facts).encode())
    for name, vector in sorted(tensors.items()):
        sha.update(f"{name} {vector.size}\n".encode())
        sha.update(np.ascontiguousarray(vector).data)
    return sha.hexdigest()
