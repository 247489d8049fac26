"""CSV files as other programs write them: Excel, pandas, a shell; and what cannot be read."""

import csv
import gzip
import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import DataConfig, DataSource
from common.data import load_splits
from common.dialect import ERRORS, Separator, is_encoding
from common.errors import ConfigError

SECRET = "swordfish"
ROWS = [
    (f'{SECRET} {n}: café £5, “quoted” "twice"\nnew line', "spam" if n % 2 else "ham")
    for n in range(30)
]
TEXTS = {" ".join(text.split()) for text, _ in ROWS}


def table(rows=ROWS, header=("text", "label"), **how):
    file = io.StringIO(newline="")
    csv.writer(file, **how).writerows([header, *rows])
    return file.getvalue()


def load(folder, content, name="mails.csv", **changes):
    (folder / name).write_bytes(content)
    values = {"source": DataSource.csv, "path": str(folder / name), "labels": ["ham", "spam"]}
    return load_splits(DataConfig(**{**values, **changes}))


def texts_of(splits):
    parts = (splits.train, splits.validation, splits.holdout)
    return {text for part in parts for text in part.contents}


WRITTEN = {
    "lines end as in Unix": table(lineterminator="\n").encode(),
    "lines end as in Windows": table(lineterminator="\r\n").encode(),
    "everything is quoted": table(quoting=csv.QUOTE_ALL).encode(),
    "byte order mark": b"\xef\xbb\xbf" + table().encode(),
    "byte order mark and quotes": b"\xef\xbb\xbf" + table(quoting=csv.QUOTE_ALL).encode(),
    "Windows-1252": table().encode("cp1252"),
    "UTF-16": table().encode("utf-16"),
    "UTF-16, the other way round": b"\xfe\xff" + table().encode("utf-16-be"),
    "an index without a name": table(
        [(n, *row) for n, row in enumerate(ROWS)], ("", "text", "label")
    ).encode(),
    "columns without names at the end": table(
        [(*row, "", "") for row in ROWS], ("text", "label", "", "")
    ).encode(),
    "every row twice": table([*ROWS, *ROWS]).encode(),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_a_file_is_read_as_it_was_written(written, tmp_path):
    splits = load(tmp_path, WRITTEN[written])
    assert texts_of(splits) == TEXTS
    assert splits.duplicates == (len(ROWS) if written == "every row twice" else 0)
    assert texts_of(load(tmp_path, gzip.compress(WRITTEN["lines end as in Unix"]), "m.gz")) == TEXTS


def test_an_encoding_can_be_named(tmp_path):
    rows = [(f"żółć {n}", "ham") for n in range(20)]
    splits = load(tmp_path, table(rows).encode("iso8859-2"), encoding="iso8859-2")
    assert texts_of(splits) == {text for text, _ in rows}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "utf-16"])
def test_characters_in_another_encoding_than_the_named_one_are_one_line(encoding, tmp_path):
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, table().encode("cp1252"), encoding=encoding)
    message = str(refused.value)
    assert f"are not spelled as {encoding}; give the file's own data.encoding" in message
    assert "byte" not in message
    assert "0x" not in message


def test_an_encoding_that_is_none_is_refused():
    assert is_encoding("")
    assert is_encoding("cp1252")
    for name in ("base64", "klingon", "a\0b", "rot13"):
        assert not is_encoding(name)


@given(st.lists(st.binary(max_size=12), max_size=5), st.binary(max_size=12))
def test_how_one_record_is_decoded_does_not_depend_on_another(others, one):
    """Neighbours differ by one record: another one with odd bytes must leave it as it was."""

    def line(content):
        return content.replace(b"\n", b"").replace(b"\r", b"") + b",ham\n"

    whole = b"".join(line(each) for each in [*others, one])
    alone = line(one).decode("utf-8", ERRORS)
    assert whole.decode("utf-8", ERRORS).endswith(alone)
    assert whole.decode("utf-8", ERRORS) == "".join(
        line(each).decode("utf-8", ERRORS) for each in [*others, one]
    )


def test_bytes_that_are_not_utf_8_are_windows_1252(tmp_path):
    rows = b"text,label\n" + "café\n".encode().strip() + b" caf\xe9 \x93x\x94 \x81,ham\n"
    assert texts_of(load(tmp_path, rows)) == {"café café “x” \x81"}


@pytest.mark.parametrize("separator", [each for each in Separator if each is not Separator.comma])
def test_another_separator_is_named_in_the_message_and_then_read(separator, tmp_path):
    content = table(delimiter=separator.value).encode()
    with pytest.raises(ConfigError, match=rf"; give data\.separator={separator.name}$"):
        load(tmp_path, content)
    assert texts_of(load(tmp_path, content, separator=separator)) == TEXTS


def test_odd_texts_are_records_like_any(tmp_path):
    odd = [
        "a\0b",
        "x" * 1_000_000,
        "many words " * 100_000,
        "\x1b[31m",
        "\u202eabc",
        "=2+2",
        "\x7f",
    ]
    splits = load(tmp_path, table([(text, "ham") for text in odd]).encode())
    assert texts_of(splits) == {" ".join(text.split()) for text in odd}


def test_quotes_that_never_end_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"not a readable CSV file \(.*EOF inside string") as told:
        load(tmp_path, (table() + f'"{SECRET} and no more,ham\r\n').encode())
    assert SECRET not in str(told.value)
    assert "\n" not in str(told.value)


def test_settings_of_csv_files_are_refused_elsewhere(compose_config):
    for setting in ("data.encoding=cp1252", "data.separator=tab"):
        with pytest.raises(ConfigError, match=r"must be left out with data=jsonl"):
            compose_config("data=jsonl", "data.path=a", "data.labels=[a,b]", setting)
    with pytest.raises(ConfigError, match=r"^data\.encoding=klingon: must be an encoding"):
        compose_config("data=csv", "data.path=a", "data.labels=[a,b]", "data.encoding=klingon")


def test_numbers_are_labels_on_the_command_line(compose_config, tmp_path):
    """Hydra reads 0 and 1 as whole numbers."""
    (tmp_path / "a.csv").write_text("text,label\none,1\nnone,0\n")
    data = compose_config("data=csv", f"data.path={tmp_path / 'a.csv'}", "data.labels=[0,1]").data
    assert load_splits(replace(data, holdout_fraction=0.0)).train.labels.tolist() == [1, 0]
