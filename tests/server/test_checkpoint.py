"""A checkpoint is whole or absent, and says which run and round it is."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from common import messages
from common.errors import VerificationError
from server.checkpoint import RunState, read_checkpoint, read_last, write_checkpoint

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


STATE = RunState(
    "run",
    7,
    VECTOR,
    memory={"mean": VECTOR * 0, "square": VECTOR[::-1].copy()},
    spares={"site-1": 2, "München": 0},
    resumed_after=(2, 5, 5),
)


def test_a_state_comes_back_whole(tmp_path):
    write_checkpoint(tmp_path, STATE, private=False)
    state = read_checkpoint(tmp_path, 7)
    assert replace(state, vector=0, memory=0) == replace(STATE, vector=0, memory=0)
    assert state.vector.tobytes() == STATE.vector.tobytes()
    assert {n: v.tobytes() for n, v in state.memory.items()} == {
        n: v.tobytes() for n, v in STATE.memory.items()
    }


def test_no_byte_of_a_state_can_change_unseen(tmp_path):
    path = write_checkpoint(tmp_path, STATE, private=False)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(VerificationError, match="or damaged"):
            read_checkpoint(tmp_path, 7)


def test_a_checkpoint_cut_anywhere_is_damaged(tmp_path):
    path = write_checkpoint(tmp_path, STATE, private=False)
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(VerificationError, match=r"round-0007\.safetensors: not a checkpoint"):
            read_checkpoint(tmp_path, 7)


def test_a_checkpoint_of_another_round_under_this_name_is_damaged(tmp_path):
    path = write_checkpoint(tmp_path, STATE, private=False)
    path.rename(tmp_path / "round-0008.safetensors")
    with pytest.raises(VerificationError, match="or damaged"):
        read_checkpoint(tmp_path, 8)


def test_a_checkpoint_of_before_is_no_state_to_go_on_from(tmp_path):
    """It has no digest; its vector can still be exported."""
    header = {"run": json.dumps({"run_id": "run", "round": 1, "private": True})}
    (tmp_path / "round-0001.safetensors").write_bytes(save({"vector": VECTOR}, metadata=header))
    with pytest.raises(VerificationError, match="or damaged"):
        read_checkpoint(tmp_path, 1)
    assert read_last(tmp_path).tobytes() == VECTOR.tobytes()
