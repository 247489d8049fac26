"""Files of one's own: the same records in every format, and one line for each kind of fault."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from dataclasses import replace

import pandas as pd
import pyarrow as pa
import pytest

from common.config import DataConfig, DataSource, EmptyTexts
from common.data import load_splits
from common.errors import ConfigError

SECRET = "swordfish"  # stands in private texts; must stand in no message
ROWS = [
    {
        "text": f"{SECRET} text  number {n} é中",
        "label": "yes" if n % 2 else "no",
        "who": f"p{n // 3}",
    }
    for n in range(30)
]


def as_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def as_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def as_parquet(path, rows):
    pd.DataFrame(rows).to_parquet(path)


def packed(write):
    def whole(path, rows):
        plain = path.with_suffix("")
        write(plain, rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))

    return whole


FORMATS = {
    "csv": (as_csv, "r.csv"),
    "csv, packed": (packed(as_csv), "r.csv.gz"),
    "jsonl": (as_jsonl, "r.jsonl"),
    "jsonl, packed": (packed(as_jsonl), "r.jsonl.gz"),
    "parquet": (as_parquet, "r.parquet"),
}


def config_of(path, **changes):
    source = DataSource[path.name.removeprefix("r.").removesuffix(".gz")]
    values = {"source": source, "path": str(path), "labels": ["no", "yes"]}
    return DataConfig(**{**values, **changes})


def write(folder, form, rows):
    write_rows, name = FORMATS[form]
    write_rows(folder / name, rows)
    return folder / name


@pytest.mark.parametrize("form", FORMATS)
def test_a_table_is_the_same_records_in_every_format(form, tmp_path):
    path = write(tmp_path, form, ROWS)
    reference = load_splits(config_of(write(tmp_path, "csv", ROWS), person_column="who"))
    splits = load_splits(config_of(path, person_column="who"))
    for part in ("train", "validation", "holdout"):
        ours, theirs = getattr(splits, part), getattr(reference, part)
        assert ours.contents == theirs.contents
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.persons == theirs.persons
    assert f"{SECRET} text number 1 é中" in {
        text for part in (splits.train, splits.validation, splits.holdout) for text in part.contents
    }


@pytest.mark.parametrize("form", FORMATS)
def test_several_columns_make_one_content_and_no_labels_are_needed(form, tmp_path):
    path = write(tmp_path, form, ROWS)
    splits = load_splits(config_of(path, columns=["text", "who"], labels=[], holdout_fraction=0.0))
    contents = {*splits.train.contents, *splits.validation.contents}
    assert (f"{SECRET} text number 7 é中", "p2") in contents
    assert not splits.train.labels.any()


def test_whole_numbers_are_labels_too(tmp_path):
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(20)]
    for form in ("jsonl", "parquet"):
        config = config_of(write(tmp_path, form, rows), labels=["0", "1"])
        assert {*load_splits(config).train.labels.tolist()} == {0, 1}


def replaced(row, **fields):
    return [{**each, **fields} if at == row else each for at, each in enumerate(ROWS)]


def broken(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def table(form, rows):
    return lambda folder: write(folder, form, rows)


DAMAGED = gzip.compress(b"text,label\n" * 99)[:20] + b"\xff" * 20


def zipped(files, flags=0):
    """A zip of so many files; flags: bits of its directory, 1 where there is a password."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for number in range(files):
            archive.writestr(f"{number}.csv", "text,label,who\na,no,p\n")
            archive.infolist()[-1].flag_bits |= flags
    return whole.getvalue()


LINES = [json.dumps(row) for row in ROWS]
FAULTS = {
    "jsonl: not JSON": (broken("r.jsonl", b'{"text": \n'), "line 1 is not a JSON object"),
    "jsonl: a list": (broken("r.jsonl", b'["a"]\n'), "line 1 is not a JSON object"),
    "jsonl: a bare string": (broken("r.jsonl", b'"a"\n'), "line 1 is not a JSON object"),
    "jsonl: cut off": (
        broken("r.jsonl", "\n".join([*LINES[:3], LINES[3][:9]]).encode()),
        "line 4 is not a JSON object",
    ),
    "jsonl: nested too deep": (broken("r.jsonl", b"[" * 200000), "line 1 is not a JSON object"),
    "jsonl: other names": (
        broken("r.jsonl", f'{LINES[0]}\n{{"text": "a"}}'.encode()),
        "line 2 has other names than the first",
    ),
    "jsonl: not UTF-8": (broken("r.jsonl", b'{"text": "\xff"}'), "not a readable file of JSON"),
    "jsonl: packed and damaged": (
        broken("r.jsonl.gz", DAMAGED),
        "not a readable file of JSON lines",
    ),
    "jsonl: packed and cut": (
        broken("r.jsonl.gz", gzip.compress("\n".join(LINES).encode())[:-20]),
        "not a readable file of JSON lines",
    ),
    "jsonl: empty": (broken("r.jsonl", b""), "data.text_column=text: no such column among the 0"),
    "jsonl: text is a number": (table("jsonl", replaced(4, text=3)), "row 5 has no text in text"),
    "jsonl: text is a list": (table("jsonl", replaced(4, text=["a"])), "row 5 has no text"),
    "jsonl: label is null": (table("jsonl", replaced(4, label=None)), "row 5 has no label"),
    "jsonl: label is true": (table("jsonl", replaced(4, label=True)), "row 5 has a label that is"),
    "jsonl: unknown label": (table("jsonl", replaced(4, label=SECRET)), "row 5 has a label that"),
    "jsonl: person is null": (table("jsonl", replaced(4, who=None)), "row 5 has an empty who"),
    "jsonl: person is a half": (table("jsonl", replaced(4, who=0.5)), "row 5 has an empty who"),
    "parquet: text": (broken("r.parquet", b"text,label\na,b\n"), "not a readable Parquet file"),
    "parquet: empty": (broken("r.parquet", b""), "not a readable Parquet file"),
    "parquet: cut off": (broken("r.parquet", b"PAR1" + b"\0" * 90), "not a readable Parquet file"),
    "parquet: other columns": (
        table("parquet", [{"body": "a", "label": "no", "who": "p"}]),
        "data.text_column=text: no such column among the 3",
    ),
    "csv: packed and damaged": (broken("r.csv", DAMAGED), "not a readable CSV file"),
    "csv: packed and cut": (broken("r.csv", b"\x1f\x8b"), "not a readable CSV file"),
    "csv: the head of another packing": (broken("r.csv", b"BZh9"), "not a readable CSV file"),
    "csv: a table of Excel": (broken("r.csv", zipped(2)), "is a zip of 2 files, as Excel's tables"),
    "csv: a zip with a password": (broken("r.csv", zipped(1, 1)), "is a zip with a password"),
    "csv: UTF-16 without its mark": (
        broken("r.csv", "text,label,who\na,no,p\n".encode("utf-16-le")),
        "begins with bytes of 0, as no text in UTF-8 does; of a table in UTF-16 give data.encodi",
    ),
    "csv: an image": (broken("r.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "begins with bytes of 0"),
    "csv: a column twice": (
        broken("r.csv", b"text,text,label,who\na,b,no,p\n"),
        "its first line names text 2 times; rename those that are not meant",
    ),
    "parquet: packed": (broken("r.parquet", gzip.compress(b"PAR1")), "it is packed by gzip: unpa"),
    "csv: other columns": (
        table("csv", [{"body": "a", "label": "no", "who": "p"}]),
        "data.text_column=text: no such column among the 3",
    ),
    "csv: empty": (broken("r.csv", b""), "not a readable CSV file"),
    "parquet: label is null": (table("parquet", replaced(4, label=None)), "row 5 has no label"),
    "csv: unknown label": (table("csv", replaced(4, label=SECRET)), "row 5 has a label that is"),
    "csv: too many fields": (
        broken("r.csv", b"text,label,who\na,no,p\na,b,no,p,x\n"),
        "row 2 has 5 fields, and the first line names 3; quote the texts that hold a comma",
    ),
    "csv: too many fields at once": (
        broken("r.csv", b"text,label,who\n\n \na,b,no,p\na,no,p\n"),
        "row 1 has 4 fields, and the first line names 3; quote",
    ),
    "csv: too many fields in all": (
        broken("r.csv", b"text,label,who\na,no,p,\na,no,p,\n"),
        "row 1 has 4 fields, and the first line names 3; quote",
    ),
    "csv: many too many": (
        broken("r.csv", b"text,label,who\na,no,p,x,y,z\n"),
        "row 1 has 6 fields, and the first line names 3; quote",
    ),
    "csv: too many behind lines within quotes": (
        broken("r.csv", b'text,label,who\n"a\n\nb",no,p\n\na,b,no,p\n'),
        "row 2 has 4 fields, and the first line names 3; quote",
    ),
    "csv: too few fields at once": (
        broken("r.csv", b"text,label,who\na\nb,no,p\n"),
        "row 1 has no label",
    ),
}


def zipfile_of(content):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", content)
    return whole.getvalue()


PACKED = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zip": zipfile_of,
    "zstd": lambda content: pa.compress(content, "zstd", asbytes=True),
    "nothing": lambda content: content,
}


@pytest.mark.parametrize("name", ["r.csv", "r.csv.gz", "r.jsonl", "r.jsonl.gz"])
@pytest.mark.parametrize("packing", PACKED)
def test_a_file_is_what_its_first_bytes_say_whatever_it_is_called(packing, name, tmp_path):
    """People rename files, and browsers unpack what they fetch without renaming it."""
    form = name.removeprefix("r.").removesuffix(".gz")
    plain = write(tmp_path, form, ROWS)
    whole = load_splits(config_of(plain))
    (tmp_path / name).write_bytes(PACKED[packing](plain.read_bytes()))
    assert load_splits(config_of(tmp_path / name)).train.contents == whole.train.contents


def test_there_are_enough_kinds_of_broken_files():
    assert len(FAULTS) >= 25


EMPTY = {
    "csv: nothing": ("csv", ""),
    "csv: blanks": ("csv", " \t \n"),
    "jsonl: nothing": ("jsonl", ""),
    "jsonl: null": ("jsonl", None),
    "parquet: blanks": ("parquet", "  "),
    "parquet: null": ("parquet", None),
}


@pytest.mark.parametrize("gap", EMPTY)
def test_a_row_without_a_text_is_left_out_and_counted_whatever_else_it_holds(gap, tmp_path):
    """Also where its label and person are missing; rows after it keep their numbers."""
    form, nothing = EMPTY[gap]
    rows = replaced(4, text=nothing, label="" if form == "csv" else None, who="")
    splits = load_splits(config_of(write(tmp_path, form, rows), person_column="who"))
    assert splits.tally.empty == 1
    assert len(splits.train) + len(splits.validation) + len(splits.holdout) == len(ROWS) - 1
    whole = load_splits(config_of(write(tmp_path, form, ROWS), person_column="who"))
    for part in ("train", "validation", "holdout"):  # and nothing else is moved
        had, has = getattr(whole, part).contents, getattr(splits, part).contents
        assert [text for text in had if text != ROWS[4]["text"].replace("  ", " ")] == [*has]
    rows[20] = {**rows[20], "label": SECRET}
    with pytest.raises(ConfigError, match=r"row 21 has a label that is not one of data.labels$"):
        load_splits(config_of(write(tmp_path, form, rows)))


@pytest.mark.parametrize("gap", EMPTY)
def test_a_row_without_a_text_is_refused_by_its_number_where_that_is_asked(gap, tmp_path):
    form, nothing = EMPTY[gap]
    path = write(tmp_path, form, replaced(4, text=nothing))
    with pytest.raises(
        ConfigError, match=r"row 5 has an empty text; data.empty=skip leaves it out"
    ):
        load_splits(config_of(path, empty=EmptyTexts.refuse))


def test_a_record_of_several_texts_is_left_out_if_one_is_empty(tmp_path):
    path = write(tmp_path, "csv", replaced(4, who=" "))
    config = config_of(path, columns=["text", "who"], labels=[], holdout_fraction=0.0)
    splits = load_splits(config)
    assert splits.tally.empty == 1
    assert ROWS[4]["text"] not in {text for text, _ in splits.train.contents}
    with pytest.raises(ConfigError, match="row 5 has an empty who"):
        load_splits(replace(config, empty=EmptyTexts.refuse))


def test_empty_rows_of_the_hold_out_file_are_counted_too(tmp_path):
    path, public = tmp_path / "r.csv", tmp_path / "public.csv"
    as_csv(path, replaced(4, text=""))
    as_csv(public, [{**row, "text": "" if n < 2 else f"public {n}"} for n, row in enumerate(ROWS)])
    splits = load_splits(config_of(path, test_path=str(public)))
    assert splits.tally.empty == 3
    assert len(splits.holdout) == len(ROWS) - 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_one_line_with_the_row_and_nothing_private(fault, tmp_path):
    make, message = FAULTS[fault]
    path = make(tmp_path)
    with pytest.raises(ConfigError) as refused:
        load_splits(config_of(path, person_column="who"))
    text = str(refused.value)
    assert message in text
    assert "\n" not in text
    assert SECRET not in text


def test_a_run_on_json_lines_ends_like_one_on_csv(tmp_path, tiny_overrides, coterie):
    rows = [{"text": f"goal match {n}" if n % 2 else f"bank loan {n}", "label": n % 2}
            for n in range(60)]  # fmt: skip
    as_jsonl(tmp_path / "r.jsonl", rows)
    own = ["data=jsonl", f"data.path={tmp_path / 'r.jsonl'}", "data.labels=['0','1']"]
    kept = [each for each in tiny_overrides if not each.startswith("data")]
    answer = coterie("simulate", *kept, *own, f"run_dir={tmp_path / 'run'}", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["evaluation_records"] > 0


def test_toy_examples_run_without_any_data(tmp_path, tiny_overrides, coterie):
    kept = [each for each in tiny_overrides if not each.startswith("data")]
    answer = coterie("simulate", *kept, "data=toy", f"run_dir={tmp_path / 'run'}", "--json")
    assert answer.code == 0, answer.err
    assert "of nobody" in answer.json["privacy"]["selection_reason"]
