"""Data sets in the formats of `datasets`: read where they stand, without code and without a hub."""

import io
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture
from pyarrow import parquet

from common import hub
from common.config import DataConfig, DataSource, EmptyTexts, TaskName
from common.data import check_files, load_splits
from common.errors import ConfigError
from common.hub import HubTable
from common.spool import Spooled
from common.tasks import reader_of

SECRET = "swordfish"  # stands in private texts; must stand in no message
SCHEMA = Features(
    {
        "text": Value("string"),
        "label": ClassLabel(names=["no", "yes"]),
        "who": Value("string"),
        "pair": {"en": Value("string"), "fr": Value("string")},
    }
)
ROWS = [
    {
        "text": f"{SECRET} text  number {n} é中",
        "label": n % 2,
        "who": f"p{n // 3}",
        "pair": {"en": f"good day {n}", "fr": f"bonjour {n}"},
    }
    for n in range(30)
]
BYTES = Features({"bytes": Value("binary"), "path": Value("string")})


def table(rows=ROWS, schema=SCHEMA):
    return Dataset.from_list(rows, features=schema)


def as_one(folder, rows):
    rows.save_to_disk(folder)


def as_splits(folder, rows):
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(folder)


def as_parquet(folder, rows):
    folder.mkdir()
    half = len(rows) // 2
    rows.select(range(half)).to_parquet(folder / "train-00000-of-00002.parquet")
    rows.select(range(half, len(rows))).to_parquet(folder / "train-00001-of-00002.parquet")
    rows.select([0]).to_parquet(folder / "test-00000-of-00001.parquet")


def as_parquet_folders(folder, rows):
    (folder / "train").mkdir(parents=True)
    rows.to_parquet(folder / "train" / "a.parquet")
    (folder / "test").mkdir()
    rows.select([0]).to_parquet(folder / "test" / "b.parquet")


FORMS = {
    "saved": as_one,
    "saved in splits": as_splits,
    "parquet": as_parquet,
    "parquet in folders": as_parquet_folders,
}


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request):
    return request.param


def config_of(path, **changes):
    values = {"source": DataSource.hub, "path": str(path), "labels": ["yes", "no"]}
    return DataConfig(**{**values, **changes})


def everything(path, read=None, **changes):
    whole = {"holdout_fraction": 0.0, "validation_fraction": 0.0, **changes}
    return load_splits(config_of(path, **whole), read=read).train


def test_every_form_gives_the_same_records(tmp_path, form):
    form(tmp_path / "d", table())
    records = everything(tmp_path / "d", person_column="who")
    assert records.contents == tuple(f"{SECRET} text number {n} é中" for n in range(30))
    assert records.labels.tolist() == [1 - n % 2 for n in range(30)]  # by the names of the schema
    assert records.persons == tuple(f"p{n // 3}" for n in range(30))


def test_a_split_is_the_public_holdout(tmp_path, form):
    form(tmp_path / "d", table())
    if form is as_one:
        with pytest.raises(ConfigError, match="holds one split"):
            load_splits(config_of(tmp_path / "d", test_split="test"))
        return
    splits = load_splits(config_of(tmp_path / "d", test_split="test"))
    assert splits.holdout.contents == (f"{SECRET} text number 0 é中",)
    assert splits.duplicates == 1
    elsewhere = load_splits(config_of(tmp_path / "d", test_path=str(tmp_path / "d")))
    assert len(elsewhere.holdout) == 30


def test_labels_may_be_texts_and_whole_numbers(tmp_path):
    for kind, values, labels in (("string", "ab", ["a", "b"]), ("int64", (7, 8), ["7", "8"])):
        schema = Features({"text": Value("string"), "label": Value(kind)})
        rows = [{"text": f"t{n}", "label": values[n % 2]} for n in range(4)]
        as_one(tmp_path / kind, table(rows, schema))
        assert everything(tmp_path / kind, labels=labels).labels.tolist() == [0, 1, 0, 1]


def test_fields_of_a_column_are_columns(tmp_path):
    as_one(tmp_path / "d", table())
    records = everything(tmp_path / "d", labels=[], columns=["pair.en", "pair.fr"])
    assert records.contents[3] == ("good day 3", "bonjour 3")


def encoded(number, kind):
    file = io.BytesIO()
    draw = np.random.default_rng(number)
    if kind is Image:
        Picture.fromarray(draw.integers(0, 256, (4, 4), dtype=np.uint8)).save(file, "PNG")
    else:
        soundfile.write(file, draw.uniform(-0.5, 0.5, 80), 16_000, format="WAV")
    return file.getvalue()


def media(kind, changes=None, count=6):
    rows = [
        {"media": {"bytes": encoded(n, kind), "path": f"{n}.x"}, "label": n % 2}
        for n in range(count)
    ]
    for at, value in (changes or {}).items():
        rows[at]["media"] = value
    schema = Features({"media": BYTES, "label": ClassLabel(names=["no", "yes"])})
    return Dataset.from_list(rows, features=schema).cast_column("media", kind())


class Ears:
    sampling_rate = 16_000


READERS = {
    Image: reader_of(TaskName.image_classification, object()),
    Audio: reader_of(TaskName.audio_classification, Ears()),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("save", [as_one, as_parquet], ids=["saved", "parquet"])
def test_images_and_sounds_are_arrays_by_our_own_readers(tmp_path, kind, save):
    """`datasets` would need torchcodec, and ffmpeg, to decode a sound."""
    save(tmp_path / "d", media(kind))
    records = everything(tmp_path / "d", READERS[kind])
    assert len(records) == 6
    assert records.labels.tolist() == [1, 0] * 3
    for number, content in enumerate(records.contents):
        expected = READERS[kind](encoded(number, kind), "a")
        assert np.array_equal(content, expected)
    named = everything(tmp_path / "d", READERS[kind], media_column="media")
    assert named.identities() == records.identities()


def private_copies():
    cache = datasets.config.HF_DATASETS_CACHE
    return sorted(str(path) for path in cache.rglob("*")) if cache.exists() else []


def test_nothing_of_a_local_data_set_is_copied_into_a_cache(tmp_path, form):
    form(tmp_path / "d", table())
    before, files = private_copies(), sorted((tmp_path / "d").rglob("*"))
    everything(tmp_path / "d")
    everything(tmp_path / "d", labels=[], columns=["pair.en", "pair.fr"])
    assert private_copies() == before
    assert sorted((tmp_path / "d").rglob("*")) == files


def test_what_the_folder_itself_is_called_names_no_split(tmp_path):
    """In one called `test` every private file would be of the public split."""
    for split in ("train", "test"):
        as_parquet(tmp_path / split, table())
        settings = {"holdout_fraction": 0.0, "validation_fraction": 0.0, "test_split": "test"}
        read = load_splits(config_of(tmp_path / split, **settings))
        assert (len(read.train), len(read.holdout)) == (len(ROWS) - 1, 1)


def test_a_script_in_a_folder_is_not_run(tmp_path):
    script = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
    for name in ("d.py", "train.py"):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_text(script)
    (tmp_path / "d" / "train.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ConfigError, match=r"has no file of split train; expected train\.parquet"):
        everything(tmp_path / "d")
    assert not (tmp_path / "ran").exists()


def changed(at, **fields):
    return [{**row, **fields} if n == at else row for n, row in enumerate(ROWS)]


def saved(rows, schema=SCHEMA):
    return lambda folder: as_one(folder, table(rows, schema))


def spoilt(save, pattern, spoil):
    def make(folder):
        save(folder, table())
        for path in folder.rglob(pattern):
            spoil(path)

    return make


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    """Keeps the sizes: what is mapped is found to be damaged when it is read."""
    path.write_bytes(path.read_bytes().replace(SECRET.encode(), b"\xff" * len(SECRET)))


def two_schemas(folder):
    as_parquet(folder, table())
    other = Dataset.from_list([{"body": "a"}])
    other.to_parquet(folder / "train-00002-of-00002.parquet")


NO_TEXT = Features({**SCHEMA, "text": Value("int64")})
FAULTS = {
    "an empty folder": (lambda folder: folder.mkdir(), {}, "has no file of split train; expected"),
    "no such split": (
        lambda folder: as_splits(folder, table()),
        {"split": "dev"},
        "has no split dev; name one by data.split",
    ),
    "no such split of parquet": (
        lambda folder: as_parquet(folder, table()),
        {"split": "dev"},
        "has no file of split dev; expected dev.parquet",
    ),
    "the arrow file is cut": (spoilt(as_one, "*.arrow", halve), {}, "d: "),
    "the arrow file is garbled": (
        spoilt(as_one, "*.arrow", garble),
        {},
        "its column text cannot be read",
    ),
    "the arrow file is away": (
        spoilt(as_one, "*.arrow", os.unlink),
        {},
        "cannot be opened as what datasets' save_to_disk wrote; save it again",
    ),
    "no JSON in its state": (spoilt(as_one, "state.json", halve), {}, "cannot be opened as what"),
    "no JSON in its info": (
        spoilt(as_one, "dataset_info.json", halve),
        {},
        "cannot be opened as what",
    ),
    "a parquet file is cut": (spoilt(as_parquet, "*.parquet", halve), {}, "cannot be read, or"),
    "parquet files of two kinds": (two_schemas, {}, "cannot be read, or differ in their columns"),
    "no such column": (
        saved(ROWS),
        {"text_column": "body"},
        "data.text_column=body: no such column among the 4 of data.path=",
    ),
    "no such field": (
        saved(ROWS),
        {"columns": ["pair.en", "pair.de"]},
        "data.columns[1]=pair.de: no such column",
    ),
    "a class that the schema does not know": (
        saved(ROWS),
        {"labels": ["yes", "perhaps"]},
        "has no class 'perhaps' among the 2 of its schema",
    ),
    "a label that is not asked for": (
        saved(ROWS, Features({**SCHEMA, "label": ClassLabel(names=["no", "yes", "maybe"])})),
        {"labels": ["yes", "maybe"]},
        "row 1 has a label that is not one of data.labels",
    ),
    "no label": (saved(changed(4, label=None)), {}, "row 5 has no label"),
    "a text is null": (
        saved(changed(4, text=None)),
        {"empty": EmptyTexts.refuse},
        "row 5 has an empty text",
    ),
    "a text is a number": (
        saved([{**row, "text": n} for n, row in enumerate(ROWS)], NO_TEXT),
        {},
        "row 1 has no text in text; it must be a string",
    ),
    "a person is null": (saved(changed(4, who=None)), {"person_column": "who"}, "row 5 has an"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_data_set_is_one_line_with_the_row(tmp_path, fault):
    make, changes, message = FAULTS[fault]
    make(tmp_path / "d")
    with pytest.raises(ConfigError) as refused:
        everything(tmp_path / "d", **changes)
    text = str(refused.value)
    assert message in text
    assert "\n" not in text
    assert SECRET not in text


OUTSIDE = {"bytes": None, "path": "/etc/hostname"}
MEDIA_FAULTS = {
    "no file": ({3: None}, "row 4 holds no image or sound"),
    "an empty file": ({3: {"bytes": b"", "path": None}}, "row 4 holds no image or sound"),
    "no such kind of file": ({3: {"bytes": b"goal", "path": None}}, "row 4: not a readable "),
    "the name of a file of the machine": ({3: OUTSIDE}, "row 4 names a file instead of holding"),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("fault", MEDIA_FAULTS)
def test_a_row_without_its_image_or_sound_is_one_line(tmp_path, kind, fault):
    """Written as it stands: `datasets` would embed the file of the machine by itself."""
    changes, message = MEDIA_FAULTS[fault]
    rows = media(kind, changes)
    plain = rows.data.table.replace_schema_metadata(rows.features.arrow_schema.metadata)
    (tmp_path / "d").mkdir()
    parquet.write_table(plain, tmp_path / "d" / "train.parquet")
    with pytest.raises(ConfigError) as refused:
        everything(tmp_path / "d", READERS[kind])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_rows_name_are_opened_in_the_cache_of_the_hub_only(tmp_path, monkeypatch):
    """Else a data set of somebody else's would say which files of this machine are read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    inside, outside = tmp_path / "cache" / "a.png", tmp_path / "b.png"
    through = tmp_path / "cache" / "link.png"
    through.symlink_to(outside)
    for path in (inside, outside):
        path.write_bytes(encoded(1, Image))
    for path, local, is_read in (
        (inside, False, True),
        (inside, True, False),
        (outside, False, False),
        (through, False, False),
    ):
        rows = media(Image, {0: {"bytes": None, "path": str(path)}}, count=1)
        whole = HubTable(rows.features, lambda: iter(()), "data.path=a", local)
        contents = whole.contents(rows, "media", READERS[Image], first=1)
        if is_read:
            assert next(contents).shape == (4, 4, 1)
        else:
            with pytest.raises(ConfigError, match="row 1 names a file instead of holding it"):
                next(contents)


def test_a_column_of_images_is_found_by_its_schema_only(tmp_path):
    as_one(tmp_path / "texts", table())
    with pytest.raises(ConfigError, match=r"^data\.media_column='': 0 columns of .* name one"):
        everything(tmp_path / "texts", READERS[Image])
    others = media(Image).rename_column("media", "other").remove_columns("label")
    as_one(tmp_path / "two", datasets.concatenate_datasets([media(Image), others], axis=1))
    with pytest.raises(ConfigError, match=r"^data\.media_column='': 2 columns of "):
        everything(tmp_path / "two", READERS[Image])
    with pytest.raises(ConfigError, match=r"^data\.media_column=label: 2 columns of "):
        everything(tmp_path / "two", READERS[Image], media_column="label")
    assert len(everything(tmp_path / "two", READERS[Image], media_column="other")) == 6


@pytest.mark.parametrize("path", ["./absent", "/absent", "~/absent"])
def test_a_path_that_leads_nowhere_is_no_name_of_the_hub(path):
    with pytest.raises(ConfigError, match=r"^data\.path=.*: no such folder$"):
        check_files(config_of(path))


def test_without_a_network_the_remedy_is_named():
    with pytest.raises(ConfigError) as refused:
        load_splits(config_of("nobody/nothing"))
    text = str(refused.value)
    assert text.startswith("data.path=nobody/nothing: cannot be loaded (")
    assert "unset HF_HUB_OFFLINE, or give a folder that datasets' save_to_disk wrote" in text
    assert "\n" not in text


RULES = {
    "data.split=''": ["data.split=''"],
    "data.test_split=train: must differ from data.split": ["data.test_split=train"],
    "data.test_split=test: must be left out where data.test_path": [
        "data.test_split=test",
        "data.test_path=other",
    ],
}


@pytest.mark.parametrize("message", RULES)
def test_splits_that_cannot_be_meant_are_refused(compose_config, message):
    hub = ["data=hub", "data.path=someone/letters", "data.labels=[a,b]"]
    with pytest.raises(ConfigError) as refused:
        compose_config(*hub, *RULES[message])
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("name", ["subset", "test_split", "revision", "media_column"])
def test_settings_of_the_hub_are_refused_for_other_data(compose_config, name):
    with pytest.raises(ConfigError, match=rf"^data\.{name}=a: must be left out with data=bbc_news"):
        compose_config(f"data.{name}=a")


def test_a_run_on_a_saved_data_set_ends_with_a_report(tiny_overrides, tmp_path, coterie):
    rows = [
        {"text": f"goal match {n}" if n % 2 else f"bank loan {n}", "label": n % 2}
        for n in range(60)
    ]
    schema = Features({"text": Value("string"), "label": ClassLabel(names=["money", "sport"])})
    as_one(tmp_path / "d", table(rows, schema))
    kept = [each for each in tiny_overrides if not each.startswith("data")]
    own = ["data=hub", f"data.path={tmp_path / 'd'}", "data.labels=[sport,money]"]
    answer = coterie("simulate", *kept, *own, f"run_dir={tmp_path / 'run'}", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["evaluation_records"] > 0


@pytest.mark.network
def test_a_data_set_of_the_hub_is_read_at_its_revision(tmp_path):
    """In a process of its own: this one was told that there is no network."""
    program = (
        "import json, sys\n"
        "from common.config import DataConfig, DataSource\n"
        "from common.data import load_splits\n"
        "config = DataConfig(DataSource.hub, 'cornell-movie-review-data/rotten_tomatoes',\n"
        "    labels=['neg', 'pos'], test_split='test', revision='main')\n"
        "splits = load_splits(config)\n"
        "json.dump([len(splits.holdout), sorted({*splits.train.labels.tolist()})], sys.stdout)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    holdout, labels = json.loads(ran.stdout)
    assert holdout > 1000
    assert labels == [0, 1]


def test_rows_are_in_memory_some_at_a_time_only(tmp_path, form, monkeypatch):
    """Texts and images go to the spool; the numbers of rows count on over the pieces."""
    monkeypatch.setattr(hub, "PIECE_ROWS", 4)
    form(tmp_path / "d", table())
    texts = everything(tmp_path / "d").contents
    assert isinstance(texts, Spooled)
    assert [*texts] == [f"{SECRET} text number {n} é中" for n in range(30)]
    form(tmp_path / "m", media(Image, count=10))
    images = everything(tmp_path / "m", READERS[Image])
    assert isinstance(images.contents, Spooled)
    assert len(images) == 10
    form(tmp_path / "b", media(Image, {9: {"bytes": b"junk", "path": None}}, count=10))
    with pytest.raises(ConfigError, match="row 10: not a readable image"):
        everything(tmp_path / "b", READERS[Image])
