import csv
import dataclasses
import gzip
import importlib.util
import itertools
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.config import DataConfig, DataSource
from common.data import check_files, load_public, load_splits
from common.errors import ConfigError
from common.records import Records

SECRET = "swordfish"  # stands in private texts; must stand in no message


@pytest.fixture(scope="module")
def bbc(compose_config):
    return load_splits(compose_config().data)


def config_of(path, **changes):
    values = {"source": DataSource.csv, "path": str(path), "labels": ["no", "yes"]}
    return DataConfig(**{**values, **changes})


def write(path, rows, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def records(count, start=0):
    return [(f"text number {i}", "yes" if i % 2 else "no") for i in range(start, start + count)]


def place_of(splits):
    return {
        text: name
        for name in ("train", "validation", "holdout")
        for text in getattr(splits, name).contents
    }


def label_of(splits):
    return {
        text: int(label)
        for part in (splits.train, splits.validation, splits.holdout)
        for text, label in zip(part.contents, part.labels, strict=True)
    }


@pytest.fixture(scope="module")
def digits(compose_config):
    return compose_config("data=digits", "task=image_classification").data


def test_digits_have_the_declared_numbers(digits):
    """All 1,797 scans, no two alike, of which a share is public, whatever their order."""
    splits = load_splits(digits)
    parts = (splits.train, splits.validation, splits.holdout)
    assert [len(part) for part in parts] == [1259, 171, 367]
    assert splits.duplicates == 0
    assert digits.declared_records == len(splits.train)
    assert len({key for part in parts for key in part.identities()}) == 1797
    for part in parts:
        assert {*part.labels.tolist()} == {*range(10)}
        assert {(image.shape, image.dtype.name) for image in part.contents} == {
            ((8, 8, 1), "uint8")
        }
    assert max(int(image.max()) for image in splits.train.contents) == 255


def test_some_of_the_digits_keep_their_order_of_labels(digits):
    whole, some = load_splits(digits).train, load_splits(replace(digits, labels=["7", "1"])).train
    kept = [n for n, label in enumerate(whole.labels) if label in (7, 1)]
    assert some.identities() == [whole.identities()[n] for n in kept]
    assert some.labels.tolist() == [int(whole.labels[n] == 1) for n in kept]


def test_a_label_that_is_no_digit_is_named(digits):
    with pytest.raises(ConfigError, match=r"^data\.labels: the digits have no class 'ten'$"):
        load_splits(replace(digits, labels=["1", "ten"]))


def test_digits_without_their_package_are_one_line(digits, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"^data=digits: .*pip install 'coterie\[demo\]'$"):
        load_splits(digits)


def test_bbc_news_has_the_declared_numbers(bbc, compose_config):
    assert (len(bbc.train), len(bbc.validation), len(bbc.holdout)) == (1495, 215, 415)
    assert bbc.duplicates == 100
    assert compose_config().data.declared_records == len(bbc.train)


def test_bbc_news_splits_share_no_text_and_lose_none(bbc):
    parts = [set(part.contents) for part in (bbc.train, bbc.validation, bbc.holdout)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 2225 - 100
    assert set(bbc.train.labels.tolist()) == set(range(5))


def test_an_unknown_topic_is_refused(compose_config):
    data = dataclasses.replace(compose_config().data, labels=["sports", "cooking"])
    with pytest.raises(ConfigError, match=r"data\.labels.*'cooking'"):
        load_splits(data)


def test_adding_a_record_moves_no_other(tmp_path):
    """Otherwise one person's record would decide which others are trained on."""
    before = load_splits(config_of(write(tmp_path / "a.csv", records(200))))
    rows = [("one more", "no"), *records(200)]
    after = load_splits(config_of(write(tmp_path / "b.csv", rows)))
    moved = place_of(after)
    assert moved.pop("one more") in ("train", "validation", "holdout")
    assert moved == place_of(before)


def test_order_of_the_file_moves_nobody(tmp_path):
    forward = load_splits(config_of(write(tmp_path / "a.csv", records(50))))
    backward = load_splits(config_of(write(tmp_path / "b.csv", records(50)[::-1])))
    assert place_of(forward) == place_of(backward)
    assert label_of(forward) == label_of(backward) == {t: int(y == "yes") for t, y in records(50)}


def test_shares_are_about_what_was_asked_and_follow_the_split_seed(tmp_path):
    path = write(tmp_path / "a.csv", records(2000))
    splits = load_splits(config_of(path, holdout_fraction=0.3, validation_fraction=0.2))
    assert len(splits.holdout) == pytest.approx(600, abs=100)
    assert len(splits.validation) == pytest.approx(400, abs=100)
    again = load_splits(
        config_of(path, holdout_fraction=0.3, validation_fraction=0.2, split_seed=1)
    )
    assert place_of(again) != place_of(splits)


def test_a_repeated_text_is_kept_once(tmp_path):
    rows = [("same  text", "yes"), ("other", "no"), (" same text ", "yes")]
    splits = load_splits(config_of(write(tmp_path / "a.csv", rows)))
    assert splits.duplicates == 1
    assert label_of(splits) == {"same text": 1, "other": 0}


def test_a_row_changes_one_record_at_most_whatever_labels_its_text_has(tmp_path):
    """Neighbours differ by one record: to keep the first label would replace one by another."""
    labels = ("yes", "no")
    for length in range(5):
        for held_by in itertools.product(labels, repeat=length):
            rows = [("other", "no"), *(("same", label) for label in held_by)]
            held = [label_of(load_splits(config_of(write(tmp_path / "a.csv", rows))))]
            for place, label in itertools.product(range(len(rows) + 1), labels):
                more = [*rows[:place], ("same", label), *rows[place:]]
                held.append(label_of(load_splits(config_of(write(tmp_path / "b.csv", more)))))
            before = {*held[0].items()}
            assert all(len(before ^ {*after.items()}) <= 1 for after in held[1:])


def test_subset_keeps_the_order_asked(tmp_path):
    splits = load_splits(
        config_of(
            write(tmp_path / "a.csv", records(6)), holdout_fraction=0.0, validation_fraction=0.0
        )
    )
    subset = splits.train.subset([4, 1])
    assert subset.contents == ("text number 4", "text number 1")
    assert subset.labels.tolist() == [0, 1]
    assert len(splits.train.subset(np.array([], dtype=np.int64))) == 0


def test_a_test_file_is_the_whole_hold_out_and_is_never_trained_on(tmp_path):
    private = write(tmp_path / "private.csv", records(100))
    public = write(tmp_path / "public.csv", [*records(20, start=90), ("text number 95", "no")])
    splits = load_splits(config_of(private, test_path=str(public)))
    assert set(splits.holdout.contents) == {text for text, _ in records(20, start=90)}
    assert not set(splits.holdout.contents) & {*splits.train.contents, *splits.validation.contents}
    assert len(splits.train) + len(splits.validation) == 90
    assert 0 < len(splits.validation) < 30
    assert splits.duplicates == 10 + 1


def test_the_public_records_alone_are_those_of_the_splits(tmp_path):
    """A coordinator has no others; what it measures on is what a simulation does."""
    private = write(tmp_path / "private.csv", records(100))
    public = write(tmp_path / "public.csv", [*records(20, start=90), ("text number 95", "no")])
    whole = load_splits(config_of(private, test_path=str(public)))
    alone = load_public(replace(config_of(private, test_path=str(public)), path=""))
    assert alone.holdout.contents == whole.holdout.contents
    assert alone.holdout.labels.tolist() == whole.holdout.labels.tolist()
    assert len(alone.train) == len(alone.validation) == 0


def test_of_what_is_built_in_the_public_records_are_a_share(compose_config, bbc):
    alone = load_public(compose_config().data)
    assert alone.holdout.contents == bbc.holdout.contents
    assert alone.validation.contents == bbc.validation.contents


def test_a_gzipped_file_reads_as_the_plain_one(tmp_path):
    plain = write(tmp_path / "a.csv", records(30))
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert label_of(load_splits(config_of(packed))) == label_of(load_splits(config_of(plain)))


def test_quotes_commas_line_breaks_and_words_that_look_missing_survive(tmp_path):
    rows = [('a "quoted", b', "no"), ("two\nlines", "yes"), ("NA", "no"), ("null", "yes")]
    splits = load_splits(config_of(write(tmp_path / "a.csv", rows)))
    assert label_of(splits) == {'a "quoted", b': 0, "two lines": 1, "NA": 0, "null": 1}


def test_other_columns_are_ignored_and_columns_have_the_names_given(tmp_path):
    path = write(tmp_path / "a.csv", [("1", "yes", "hello")], header=("id", "y", "words"))
    splits = load_splits(config_of(path, text_column="words", label_column="y"))
    assert label_of(splits) == {"hello": 1}


FAULTS = {
    "missing text column": (f"words,label\n{SECRET},yes\n", r"data\.text_column=text: no such"),
    "missing label column": (f"text,class\n{SECRET},yes\n", r"data\.label_column=label: no such"),
    "unknown label": (f"text,label\n{SECRET},yes\nb,no\n{SECRET},maybe\n", r"row 3 has a label"),
    "label missing": (f"text,label\n{SECRET} a,yes\n{SECRET}\n", r"row 2 has no label"),
    "label of blanks": (f"text,label\n{SECRET},yes\nb,  \n", r"row 2 has no label"),
    "empty file": ("", r"not a readable CSV"),
    "too many fields": (f"text,label\n{SECRET},no\na,{SECRET},c,yes\n", r"row 2 has 4 fields"),
    "broken quotes": (f'text,label\n"{SECRET},no\n', r"not a readable CSV"),
    "unquoted comma in every row": (
        f"text,label\nwell, {SECRET},yes\nso, {SECRET},no\n",
        r"^data\.path=",
    ),
    "no header": (f"{SECRET},yes\nb,no\n", r"data\.text_column=text: no such column"),
}


@pytest.mark.parametrize(("content", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_broken_file_is_refused_without_showing_its_text(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=message) as refused:
        load_splits(config_of(path))
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_a_broken_gzip_is_refused(tmp_path, keep):
    content = gzip.compress(write(tmp_path / "a.csv", records(500)).read_bytes())
    path = tmp_path / "a.csv.gz"
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ConfigError, match="not a readable CSV"):
        load_splits(config_of(path))


@pytest.mark.parametrize("setting", ["path", "test_path"])
def test_a_missing_file_is_refused_by_the_setting_that_names_it(tmp_path, setting):
    there = write(tmp_path / "a.csv", records(5))
    config = dataclasses.replace(config_of(there), **{setting: str(tmp_path / "none.csv")})
    for refusing in (check_files, load_splits):
        with pytest.raises(ConfigError, match=rf"^data\.{setting}=.*none\.csv: no such file"):
            refusing(config)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        load_splits(config_of(tmp_path))


def test_a_fault_in_the_test_file_names_that_setting(tmp_path):
    there = write(tmp_path / "a.csv", records(5))
    public = write(tmp_path / "b.csv", [("a", "maybe")])
    with pytest.raises(ConfigError, match=r"^data\.test_path=.*row 1"):
        load_splits(config_of(there, test_path=str(public)))


def test_no_rows_is_no_records(tmp_path):
    splits = load_splits(config_of(write(tmp_path / "a.csv", [])))
    assert (len(splits.train), len(splits.validation), len(splits.holdout)) == (0, 0, 0)


# Persons.

HEADER = ("text", "label", "person")
PERSONS = {"person_column": "person"}


def persons_of(records):
    return set(records.persons)


rows_of_persons = st.lists(
    st.tuples(
        st.sampled_from([f"text {n}" for n in range(12)]),
        st.sampled_from(["no", "yes"]),
        st.sampled_from([f"person {n}" for n in range(15)]),
    ),
    max_size=40,
)


def splits_of(rows, **changes):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.csv", rows, HEADER)
        return load_splits(config_of(path, **PERSONS, **changes))


def held(records):
    return Counter(zip(records.persons, records.contents, records.labels.tolist(), strict=True))


@given(rows=rows_of_persons)
def test_splits_of_persons_share_no_person_and_no_text(rows):
    splits = splits_of(rows, holdout_fraction=0.3, validation_fraction=0.2)
    parts = (splits.train, splits.validation, splits.holdout)
    for one, other in itertools.combinations(parts, 2):
        assert not persons_of(one) & persons_of(other)
        assert not set(one.contents) & set(other.contents)
    assert sum(map(len, parts)) + splits.duplicates == len(rows)


@given(rows=rows_of_persons, gone=st.integers(0, 14))
def test_a_person_of_no_public_part_can_leave_and_nothing_else_moves(rows, gone):
    """What makes them neighbours: repeats are dropped, and places given, person by person."""
    person = f"person {gone}"
    before = splits_of(rows, holdout_fraction=0.3, validation_fraction=0.2)
    assume(person not in persons_of(before.holdout) | persons_of(before.validation))
    rest = [row for row in rows if row[2] != person]
    after = splits_of(rest, holdout_fraction=0.3, validation_fraction=0.2)
    left = Counter({key: n for key, n in held(before.train).items() if key[0] != person})
    assert held(after.train) == left
    assert held(after.validation) == held(before.validation)
    assert held(after.holdout) == held(before.holdout)


def test_a_text_is_repeated_within_a_person_and_not_between_two():
    rows = [("same", "yes", "a"), ("same", "no", "b"), (" same ", "yes", "a")]
    splits = splits_of(rows, holdout_fraction=0.0, validation_fraction=0.0)
    assert splits.duplicates == 1
    assert held(splits.train) == Counter({("a", "same", 1): 1, ("b", "same", 0): 1})


def test_a_person_of_the_test_file_is_public_with_every_record(tmp_path):
    rows = [(f"text {n}", "no", f"person {n % 10}") for n in range(60)]
    private = write(tmp_path / "private.csv", rows, HEADER)
    public = write(
        tmp_path / "public.csv", [("new", "no", "person 3"), ("text 7", "no", "somebody")], HEADER
    )
    splits = load_splits(config_of(private, test_path=str(public), **PERSONS))
    inside = persons_of(splits.train) | persons_of(splits.validation)
    assert inside == {f"person {n}" for n in range(10)} - {"person 3"}
    assert "text 7" not in {*splits.train.contents, *splits.validation.contents}
    assert splits.duplicates == 6 + 1
    assert set(splits.holdout.contents) == {"new", "text 7"}


def test_ids_are_those_of_the_file_without_blanks_around_them():
    rows = [("a", "no", " anna "), ("b", "no", "anna"), ("c", "no", "Anna")]
    splits = splits_of(rows, holdout_fraction=0.0, validation_fraction=0.0)
    assert splits.train.persons == ("anna", "anna", "Anna")
    assert splits.train.owners().tolist() == [1, 1, 0]
    assert splits.train.subset([2, 0]).persons == ("Anna", "anna")


PERSON_FAULTS = {
    "no such column": (
        f"text,label\n{SECRET},yes\n",
        r"data\.person_column=person: no such column",
    ),
    "empty id": (
        f"text,label,person\n{SECRET},yes,{SECRET}\nb,no, \n",
        r"row 2 has an empty person$",
    ),
    "id missing": (f"text,label,person\n{SECRET},yes\n", r"row 1 has an empty person$"),
    "label wrong": (f"text,label,person\na,maybe,{SECRET}\n", r"row 1 has a label"),
}


@pytest.mark.parametrize("fault", PERSON_FAULTS)
def test_a_broken_file_of_persons_is_refused_without_showing_an_id(tmp_path, fault):
    content, message = PERSON_FAULTS[fault]
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        load_splits(config_of(tmp_path / "a.csv", **PERSONS))
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_id_is_in_no_text_of_the_records_object():
    """A traceback or log that names the object must not name a person."""
    splits = splits_of([("a", "no", SECRET)], holdout_fraction=0.0, validation_fraction=0.0)
    assert splits.train.persons == (SECRET,)
    assert SECRET not in repr(splits)


def test_records_without_persons_have_no_owners():
    with pytest.raises(ValueError, match="name no persons"):
        Records(("a",), np.zeros(1, dtype=np.int64)).owners()


DESKS = ("text", "label", "desk")


def desk_rows(count, start=0, desk="north"):
    return [(*row, f"{desk}{at % 3}") for at, row in enumerate(records(count, start))]


def test_public_records_name_their_groups_and_private_ones_none(tmp_path):
    path = write(tmp_path / "a.csv", desk_rows(100), DESKS)
    splits = load_splits(config_of(path, group_column="desk"))
    desks = {text: desk for text, _, desk in desk_rows(100)}
    assert splits.train.groups is None
    for part in (splits.holdout, splits.validation):
        assert part.groups == tuple(desks[text] for text in part.contents)
    assert len(splits.holdout) > 10
    assert load_splits(config_of(path)).holdout.groups is None


def test_what_stands_in_a_private_rows_group_changes_nothing_and_is_never_refused(tmp_path):
    rows = desk_rows(100)
    config = config_of(write(tmp_path / "a.csv", rows, DESKS), group_column="desk")
    before = load_splits(config)
    private = {*before.train.contents}
    odd = [(text, label, "" if text in private else desk) for text, label, desk in rows]
    write(tmp_path / "a.csv", odd, DESKS)
    after = load_splits(config)
    for part in ("train", "validation", "holdout"):
        assert getattr(after, part).contents == getattr(before, part).contents
        assert getattr(after, part).groups == getattr(before, part).groups


def test_groups_of_a_test_file_are_read_of_that_file_alone(tmp_path):
    """The file of private records need not even have the column."""
    private = write(tmp_path / "a.csv", records(60))
    public = write(tmp_path / "b.csv", desk_rows(20, start=60), DESKS)
    splits = load_splits(config_of(private, test_path=str(public), group_column="desk"))
    assert splits.holdout.groups == tuple(desk for *_, desk in desk_rows(20, start=60))
    assert (splits.train.groups, splits.validation.groups) == (None, None)
    with pytest.raises(ConfigError, match=r"data\.group_column=desk: no such column"):
        load_splits(config_of(private, test_path=str(private), group_column="desk"))


def test_a_record_that_names_no_group_is_in_one_without_a_name(tmp_path):
    rows = [(*row, "  ") for row in records(60)]
    splits = load_splits(config_of(write(tmp_path / "a.csv", rows, DESKS), group_column="desk"))
    assert {*splits.holdout.groups} == {""}
