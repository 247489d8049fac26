"""Tables read in batches: the same splits as when they were read whole, and the right row named."""

import csv
import gzip
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.commitment import commit_to
from client.persons import capped
from common import tables
from common.config import DataConfig, DataSource, EmptyTexts
from common.data import load_splits
from common.errors import ConfigError
from common.spool import Spooled

SECRET = "swordfish"
FORMS = ("csv", "csv.gz", "jsonl", "jsonl.gz", "parquet")
NAMES = ("text", "label", "who")


def write(path, rows):
    """The same rows in the format that the name of the file says."""
    records = [dict(zip(NAMES, row, strict=True)) for row in rows]
    if path.suffix == ".gz":
        plain = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes(), 1))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([NAMES, *rows])
    elif path.suffix == ".jsonl":
        lines = (json.dumps(record) + "\n" for record in records)
        path.write_text("".join(lines), encoding="utf-8")
    else:
        pd.DataFrame(records, columns=NAMES).to_parquet(path, row_group_size=50_000)
    return path


def config_of(path, **changes):
    source = DataSource[path.name.removesuffix(".gz").rpartition(".")[2]]
    return DataConfig(source=source, path=str(path), labels=["no", "yes"], **changes)


def parts(splits):
    return splits.train, splits.validation, splits.holdout


def fingerprint(splits):
    told = [
        [[*map(str, part.identities())], part.labels.tolist(), list(part.persons or ())]
        for part in parts(splits)
    ]
    return hashlib.sha256(json.dumps([told, splits.duplicates]).encode()).hexdigest()[:16]


def committed(records, unit="record"):
    commitment = commit_to(records, bytes(range(32)), unit=unit)
    tags = sorted(tag.hex() for tag in commitment.tags)
    return hashlib.sha256((commitment.root + "".join(tags)).encode()).hexdigest()[:16]


KNOWN = {
    "texts": ({}, "7fd1f0b5e25602f6", "a2ecd47cf5dc8561"),
    "pairs": ({"columns": ["text", "who"]}, "b278d529f3b5ce23", "4db3d0e4c51b0a41"),
    "persons": ({"person_column": "who"}, "54894df5c89d58a5", "60f6eddc2777c452"),
}
"""Computed by the program of before tables were read in batches (commit a0037a6)."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KNOWN)
def test_splits_and_commitments_are_those_of_before(kind, form, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_ROWS", 17)
    changes, known_splits, known_commitment = KNOWN[kind]
    rows = [
        (f"text  {n % 170} é中 of {n % 7}", "yes" if n % 3 else "no", f"p{n * 7 % 41}")
        for n in range(400)
    ]
    splits = load_splits(config_of(write(tmp_path / f"r.{form}", rows), **changes))
    assert fingerprint(splits) == known_splits
    assert committed(splits.train) == known_commitment
    assert all(isinstance(part.contents, Spooled) for part in parts(splits))
    if kind == "persons":
        kept = capped(splits.train, 2)
        assert (len(kept), committed(kept, "person")) == (62, "4e84a2a57c61d7ef")


def whole_reference(rows, seed=0):
    """The splits of a table in memory, as plainly as they can be said: texts by split."""
    labels = {}
    for text, label, who in rows:
        labels.setdefault((who, " ".join(text.split())), set()).add(label)
    first = {key: label for key, (label, *others) in labels.items() if not others}
    place = {
        who: int.from_bytes(hashlib.sha256(f"{seed}:{who}".encode()).digest()[:8], "big") / 2**64
        for who, _ in first
    }
    held = {key for key in first if place[key[0]] < 0.2}
    near = {key for key in first if 0.2 <= place[key[0]] < 0.1 + 0.2}
    near = {key for key in near if key[1] not in {text for _, text in held}}
    public = {text for _, text in held | near}
    train = {key for key in first if place[key[0]] >= 0.1 + 0.2 and key[1] not in public}
    return [[(*key, first[key]) for key in first if key in some] for some in (train, near, held)]


TABLES = st.lists(
    st.tuples(
        st.sampled_from([f"text {n}" for n in range(9)] + ["text  1 ", "é", "中, 'and' \"more\""]),
        st.sampled_from(["no", "yes"]),
        st.sampled_from([f"p{n}" for n in range(12)]),
    ),
    max_size=30,
)


@settings(max_examples=60)
@given(rows=TABLES, form=st.sampled_from(FORMS), size=st.integers(1, 8))
def test_whatever_the_batches_the_records_are_the_same(rows, form, size):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BATCH_ROWS", size)
        if not rows and "jsonl" in form:
            return  # a file without a line names no columns
        path = write(Path(folder) / f"r.{form}", rows)
        splits = load_splits(config_of(path, person_column="who"))
    found = [
        [
            (who, text, ("no", "yes")[label])
            for who, text, label in zip(part.persons, part.contents, part.labels, strict=True)
        ]
        for part in parts(splits)
    ]
    assert found == whole_reference(rows)
    assert splits.duplicates == len(rows) - sum(map(len, found))


FAULTS = {
    "empty text": ((" ", "no", "p"), "row 70001 has an empty text"),
    "unknown label": ((SECRET, SECRET, "p"), "row 70001 has a label that is not one"),
    "empty person": ((SECRET, "no", " "), "row 70001 has an empty who"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_far_down_is_named_by_its_row(fault, form, tmp_path):
    row, message = FAULTS[fault]
    empty = EmptyTexts.refuse if fault == "empty text" else EmptyTexts.skip
    left_out = ("", "no", "") if empty is EmptyTexts.skip else ("t0", "no", "p")
    rows = [left_out, *((f"t{n}", "no", "p") for n in range(1, 70_000))]
    path = write(tmp_path / f"r.{form}", [*rows, row, *rows[1:9]])
    with pytest.raises(ConfigError) as refused:
        load_splits(config_of(path, person_column="who", empty=empty))
    assert message in str(refused.value)
    assert SECRET not in str(refused.value)


LATE = {
    "csv: too many fields": (
        "csv",
        "a,no,p,x\n",
        "row 70001 has 4 fields, and the first line names 3",
    ),
    "csv: an open quote": ("csv", f'"{SECRET},no,p\n', "EOF inside string starting at row 70001"),
    "jsonl: no object": ("jsonl", "[]\n", "line 70001 is not a JSON object"),
    "jsonl: other names": ("jsonl", '{"text": "a"}\n', "line 70001 has other names than the"),
    "jsonl: half a character": (
        "jsonl",
        '{"text": "a \\ud800", "label": "no", "who": "p"}\n',
        "row 70001 has half a character in text",
    ),
}


@pytest.mark.parametrize("fault", LATE)
def test_a_broken_line_far_down_is_named(fault, tmp_path):
    form, line, message = LATE[fault]
    path = write(tmp_path / f"r.{form}", [(f"t{n}", "no", "p") for n in range(70_000)])
    with path.open("a") as file:
        file.write(line)
    with pytest.raises(ConfigError) as refused:
        load_splits(config_of(path))
    assert message in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_a_surplus_field_is_seen_in_any_row_of_any_batch(size, tmp_path, monkeypatch):
    """Wherever a batch begins, and by its number as all other messages count."""
    monkeypatch.setattr(tables, "BATCH_ROWS", size)
    path = tmp_path / "r.csv"
    for bad in range(20):
        rows = [f"t{n},no" for n in range(20)]
        rows[bad] += ",x"
        path.write_text("\n".join(["text,label", *rows]))
        with pytest.raises(ConfigError, match=f": row {bad + 1} has 3 fields, and the first line"):
            load_splits(config_of(path))


def test_only_the_columns_asked_for_are_looked_at(tmp_path):
    rows = [{"text": f"t{n}", "label": "no", "other": SECRET * 99, "list": [n]} for n in range(9)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame(rows).to_parquet(tmp_path / "r.parquet")
    for name in ("r.jsonl", "r.parquet"):
        path = tmp_path / name
        columns = {"data.text_column": "text"}
        source = config_of(path).source
        (batch,) = tables.read_batches(source, str(path), "data.path", columns)
        assert [*map(list, batch)] == [[row["text"] for row in rows]]


def test_progress_is_told_from_nothing_to_all(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_ROWS", 1000)
    rows = [(f"{n} {'x' * 200}", "no", "p") for n in range(5000)]
    for form in FORMS:
        heard = []
        path = write(tmp_path / f"r.{form}", rows)
        load_splits(config_of(path), told=lambda *said, heard=heard: heard.append(said))
        assert {what for what, _ in heard} == {"reading data.path", "splitting records"}
        shares = [share for what, share in heard if what == "reading data.path"]
        assert shares == sorted(shares)
        assert (len({*shares}) > 2 or form == "csv.gz", shares[-1]) == (True, 1.0)


def test_no_room_for_the_texts_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    path = write(tmp_path / "r.csv", [(SECRET, "no", "p")])

    def full(*_arguments, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.spool.pa.ipc.new_file", full)
    with pytest.raises(ConfigError, match=r"^data\.path=.*no room.*No space left.*TMPDIR$"):
        load_splits(config_of(path))


def test_ids_that_repeat_are_one_object(tmp_path):
    path = write(tmp_path / "r.csv", [(f"t{n}", "no", f"person {n % 3}") for n in range(3000)])
    splits = load_splits(config_of(path, person_column="who", holdout_fraction=0.0))
    assert len({id(person) for part in parts(splits) for person in part.persons}) == 3
    assert splits.train.labels.dtype == np.int64
