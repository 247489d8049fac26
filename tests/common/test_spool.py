"""A table in a file without a name: the same rows as a tuple of them, and nothing left behind."""

import os
import pickle
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import spool
from common.records import Records
from common.spool import Kind, Spooled, spooled, spooled_arrays

SECRET = "swordfish"  # stands in private texts; must stand nowhere else
ROOT = Path(__file__).resolve().parents[2]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
BATCHES = st.lists(st.lists(TEXT, max_size=5), max_size=6)


def written(batches):
    return spooled(([batch] for batch in batches), 1, kind=Kind.text)


def in_pairs(batches):
    return spooled(([batch, batch[::-1]] for batch in batches), 2, kind=Kind.texts)


@given(BATCHES, st.data())
def test_rows_read_from_the_file_are_those_that_were_written(batches, data):
    texts = [text for batch in batches for text in batch]
    read = written(batches)
    assert (len(read), list(read), read) == (len(texts), texts, tuple(texts))
    if texts:
        at = data.draw(st.lists(st.integers(0, len(texts) - 1)))
        assert list(read.chosen(np.array(at, dtype=np.int64))) == [texts[i] for i in at]
        assert [read[i] for i in at] == [texts[i] for i in at]
        assert read[-1] == texts[-1]
    assert read[1:4] == texts[1:4]
    assert read != [*texts, "one more"]


@given(BATCHES)
def test_several_columns_are_a_tuple_a_row(batches):
    pairs = [pair for batch in batches for pair in zip(batch, batch[::-1], strict=True)]
    assert list(in_pairs(batches)) == pairs


def test_many_blocks_are_read_in_any_order_and_their_pages_given_back(monkeypatch):
    monkeypatch.setattr(spool, "BLOCK", 3)
    monkeypatch.setattr(spool, "GIVEN_BACK", 2)
    batches = [[f"text {n} {m}" for m in range(7)] for n in range(9)]
    texts = [text for batch in batches for text in batch]
    order = np.random.default_rng(0).permutation(len(texts))
    read = written(batches).chosen(order)
    assert [*read] == [*read] == [texts[n] for n in order]


def test_a_row_that_is_not_there_is_an_index_error():
    with pytest.raises(IndexError):
        written([["a"]])[1]


def test_what_is_compared_or_shown_is_no_text():
    read = written([[SECRET]])
    assert SECRET not in repr(Records(read, np.zeros(1, np.int64)))
    assert read != SECRET
    with pytest.raises(TypeError):
        hash(read)


def test_the_file_has_no_name_while_it_is_written_and_read_and_is_the_owners_alone(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def batches():
        for text in "abc":
            yield [[text]]
            seen.append(os.listdir(tmp_path))

    read = spooled(batches(), 1, kind=Kind.text)
    state = os.fstat(read._spool.handle)
    assert state.st_dev == tmp_path.stat().st_dev
    assert (stat.S_IMODE(state.st_mode), state.st_nlink) == (0o600, 0)
    assert [*seen, os.listdir(tmp_path)] == [[]] * 4


def test_the_file_is_closed_with_the_last_that_reads_it():
    read = written([["a", "b"]])
    handle, part = read._spool.handle, read[1:]
    del read
    assert [*part] == ["b"]
    del part
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


HOLDING = """
import os, sys
from common.config import DataConfig, DataSource
from common.data import load_splits
splits = load_splits(DataConfig(source=DataSource.csv, path=sys.argv[1], labels=["no", "yes"]))
print(os.readlink(f"/proc/self/fd/{splits.train.contents._spool.handle}"), flush=True)
if sys.argv[2] == "stay":
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_nothing_is_left_when_a_process_is_killed_or_ends(end, tmp_path):
    """In the folder for temporary files, or anywhere else that `find` by content could look."""
    table, folder = tmp_path / "r.csv", tmp_path / "temporary"
    table.write_text("text,label\n" + "".join(f"{SECRET} {n},no\n" for n in range(2000)))
    folder.mkdir()
    command = [sys.executable, "-c", HOLDING, str(table), "stay" if end == "kill" else "go"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
    ) as process:
        where = process.stdout.readline().decode()
        assert where.startswith(str(folder))
        assert where.endswith("(deleted)\n")
        if end == "kill":
            assert os.listdir(folder) == []
            process.kill()
        assert process.wait(30) == (-signal.SIGKILL if end == "kill" else 0)
    assert os.listdir(folder) == []
    assert {path.name for path in tmp_path.iterdir()} == {"r.csv", "temporary"}


def test_another_process_is_given_the_file_and_not_the_texts():
    read = written([[f"{SECRET} {'long ' * 200}{n}" for n in range(300)]])[100:]
    packed = bytes(ForkingPickler.dumps(read))
    assert SECRET.encode() not in packed
    assert len(packed) < 8 * len(read) + 1000
    assert pickle.loads(packed) == read
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(list, read).result(60) == [*read]
        assert pool.submit(len, read).result(60) == 200


GROWTH = """
import sys
from pathlib import Path
from common.config import DataConfig, DataSource
from common.data import load_splits
from client.commitment import commit_to

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

def read(path):
    config = DataConfig(source=DataSource.csv, path=path, labels=["no", "yes"])
    splits = load_splits(config)
    commit_to(splits.train, bytes(32))
    return splits

read(sys.argv[1])
before = anonymous()
splits = read(sys.argv[2])
print(anonymous() - before, len(splits.train.contents))
"""


def test_a_table_of_many_megabytes_costs_few(tmp_path):
    """Held as Python texts it is all of them, and more."""
    for name, rows in (("small", 3000), ("large", 30_000)):
        lines = (f"{n} {'some words ' * 190},no\n" for n in range(rows))
        (tmp_path / name).write_text("text,label\n" + "".join(lines))
    assert (tmp_path / "large").stat().st_size > 60e6
    told = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path / "small"), str(tmp_path / "large")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert int(told[1]) > 15_000
    assert float(told[0]) < 16


def test_a_thread_beside_reads_the_same_while_pages_are_given_back(monkeypatch):
    monkeypatch.setattr(spool, "GIVEN_BACK", 1)
    from concurrent.futures import ThreadPoolExecutor

    texts = [f"text {n} {'x' * 300}" for n in range(6000)]
    read = written([texts[at : at + 1000] for at in range(0, 6000, 1000)])
    until = time.monotonic() + 1
    with ThreadPoolExecutor(4) as pool:
        while time.monotonic() < until:
            assert all(pool.map(lambda _: [*read] == texts, range(4)))


def test_spooled_is_what_a_table_gives():
    assert isinstance(written([]), Spooled)
    assert len(written([])) == 0
    assert [*written([])] == []


ARRAYS = st.lists(
    st.builds(
        lambda shape, seed, kind: np.random.default_rng(seed).integers(0, 99, shape).astype(kind),
        st.lists(st.integers(0, 4), min_size=1, max_size=3),
        st.integers(0, 9),
        st.sampled_from(["uint8", "float32"]),
    ),
    max_size=9,
)


@given(ARRAYS, st.integers(1, 60))
def test_arrays_of_any_size_are_read_as_they_were_written(arrays, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "WRITTEN_BYTES", at_once)
        patch.setattr(spool, "ARRAYS", 2)
        read = spooled_arrays(arrays)
    assert read == tuple(arrays)
    assert [(each.dtype, each.shape) for each in read] == [(a.dtype, a.shape) for a in arrays]
    assert all(each.flags.writeable for each in read)  # libraries warn of others
    if arrays:
        assert read != [*arrays[:-1], arrays[-1] + 1 if arrays[-1].size else np.ones(1)]
        assert pickle.loads(bytes(ForkingPickler.dumps(read[-1:]))) == arrays[-1:]


def test_arrays_hash_as_they_did_in_memory():
    """Ledgers are bound to these digests: a record must not become another by where it lies."""
    arrays = [np.arange(6, dtype=np.uint8).reshape(1, 2, 3), np.zeros(5, dtype=np.float32)]
    labels = np.zeros(2, dtype=np.int64)
    spooled_ones, plain = Records(spooled_arrays(arrays), labels), Records(tuple(arrays), labels)
    assert (spooled_ones.digests() == plain.digests()).all()
    assert spooled_ones.identities() == plain.identities()
