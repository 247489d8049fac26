"""A checkpoint is whole or absent, and says which run and round it is."""

import json
import os

import numpy as np
import pytest
from safetensors import safe_open

from common import messages
from server.checkpoint import RunState, read_last, write_checkpoint

VECTOR = np.float32([0.1, -0.0, 1e-40, 3e38, 7])


def written(folder, round_number=3, vector=VECTOR):
    return write_checkpoint(folder, RunState("run", round_number, vector), private=True)


def test_checkpoint_gives_back_every_bit(tmp_path):
    with safe_open(written(tmp_path / "checkpoints"), framework="np") as file:
        assert file.get_tensor("vector").tobytes() == VECTOR.tobytes()
        assert file.get_tensor("vector").dtype == np.float32


def test_vector_that_came_over_the_network_is_written_whole(tmp_path):
    """It is a read-only view into the message."""
    received = messages.unpack_arrays(messages.pack_vector(VECTOR))
    assert not received.flags.writeable
    with safe_open(written(tmp_path, vector=received), framework="np") as file:
        assert np.array_equal(file.get_tensor("vector"), VECTOR)


def test_checkpoint_names_its_run_and_round(tmp_path):
    with safe_open(written(tmp_path, 12), framework="np") as file:
        facts = json.loads(file.metadata()["run"])
    assert (facts["run_id"], facts["round"], facts["private"]) == ("run", 12, True)


def test_names_of_checkpoints_sort_by_round(tmp_path):
    paths = [written(tmp_path, number) for number in (10, 2, 1, 999, 100)]
    numbers = [path.name for path in sorted(paths)]
    assert numbers == [f"round-{number:04d}.safetensors" for number in (1, 2, 10, 100, 999)]


@pytest.mark.parametrize("interrupt", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupted_write_leaves_nothing(call, interrupt, tmp_path, monkeypatch):
    def stop(*_):
        raise interrupt

    monkeypatch.setattr(os, call, stop)
    with pytest.raises(interrupt):
        written(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = written(tmp_path)
    before = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, vector=np.zeros(5, dtype=np.float32))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_last_round_is_the_one_of_the_largest_number(tmp_path):
    for number in (9_999, 10_000):
        written(tmp_path, number, np.full(2, number, np.float32))
    assert read_last(tmp_path).tolist() == [10_000, 10_000]
