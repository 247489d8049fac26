"""Folders of images and sounds: one record a file, and one line for each kind of fault."""

import os
import shutil
import subprocess
import sys
import unicodedata
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from common.config import DataConfig, DataSource, TaskName
from common.data import check_files, load_splits
from common.errors import ConfigError
from common.folders import labelled_files
from common.media import image_of, sound_of
from common.spool import Spooled
from common.tasks import TASKS, reader_of

SECRET = "swordfish"  # in names of files and folders; must stand in no message
LABELS = ["cat", "dog"]


def picture(number):
    draw = np.random.default_rng(number)
    return draw.integers(0, 256, (6, 5, 3), dtype=np.uint8)


def sound(number):
    return np.random.default_rng(number).uniform(-0.5, 0.5, 400).astype(np.float32)


def write_picture(path, number):
    Image.fromarray(picture(number)).save(path)


def write_sound(path, number):
    soundfile.write(path, sound(number), 16_000)


IMAGES = (DataSource.image_folder, write_picture, "png", image_of)
SOUNDS = (DataSource.audio_folder, write_sound, "wav", partial(sound_of, rate=16_000))
KINDS = {"images": IMAGES, "sounds": SOUNDS}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request):
    return request.param


def fill(root, kind, count=20):
    _, write, ending, _ = kind
    for number in range(count):
        folder = root / LABELS[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{SECRET}-{number:03d}.{ending}", number)
    return root


def config_of(root, kind, **changes):
    return DataConfig(**{"source": kind[0], "path": str(root), "labels": LABELS, **changes})


def load(root, kind, **changes):
    return load_splits(config_of(root, kind, **changes), read=kind[3])


def all_of(splits):
    parts = (splits.train, splits.validation, splits.holdout)
    return {
        key: int(label)
        for part in parts
        for key, label in zip(part.identities(), part.labels, strict=True)
    }


def test_every_file_is_a_record_with_the_label_of_its_folder(tmp_path, kind):
    splits = load(fill(tmp_path / "d", kind), kind)
    assert len(splits.train) + len(splits.validation) + len(splits.holdout) == 20
    assert splits.duplicates == 0
    assert sorted(all_of(splits).values()) == [0] * 10 + [1] * 10
    assert splits.train.persons is None


def test_contents_are_what_the_task_reads(tmp_path):
    fill(tmp_path / "d", IMAGES)
    splits = load(tmp_path / "d", IMAGES, holdout_fraction=0.0, validation_fraction=0.0)
    assert len(splits.train) == 20
    first = labelled_files(config_of(tmp_path / "d", IMAGES), str(tmp_path / "d"), "data.path")[0]
    assert first.label == 0
    assert (splits.train.contents[0] == picture(0)).all()
    fill(tmp_path / "s", SOUNDS)
    sounds = load(tmp_path / "s", SOUNDS, holdout_fraction=0.0, validation_fraction=0.0)
    assert np.allclose(sounds.train.contents[0], sound(0), atol=1e-4)


def test_labels_come_from_the_config_and_in_its_order(tmp_path, kind):
    fill(tmp_path / "d", kind)
    there = all_of(load(tmp_path / "d", kind))
    back = all_of(load(tmp_path / "d", kind, labels=LABELS[::-1]))
    assert there == {key: 1 - label for key, label in back.items()}


def test_a_folder_of_its_own_is_the_public_holdout(tmp_path, kind):
    fill(tmp_path / "private", kind)
    fill(tmp_path / "public", kind, count=4)
    splits = load(tmp_path / "private", kind, test_path=str(tmp_path / "public"))
    assert len(splits.holdout) == 4
    assert splits.duplicates == 4  # the same four stand among the private ones
    assert not {*splits.holdout.identities()} & {*splits.train.identities()}


def test_the_same_picture_in_another_format_or_name_is_one_record(tmp_path):
    fill(tmp_path / "d", IMAGES)
    Image.fromarray(picture(0)).save(tmp_path / "d" / "cat" / "another name.BMP")
    assert load(tmp_path / "d", IMAGES).duplicates == 1


def test_a_record_more_moves_no_other(tmp_path, kind):
    """Neighbours differ in one record, wherever its name stands in the order."""
    before = load(fill(tmp_path / "d", kind), kind)
    kind[1](tmp_path / "d" / "cat" / f"0.{kind[2]}", 99)
    after = load(tmp_path / "d", kind)
    moved = {*after.train.identities()} ^ {*before.train.identities()}
    held = {*after.holdout.identities()} ^ {*before.holdout.identities()}
    assert len(moved) + len(held) <= 1


@pytest.mark.parametrize("empty", [True, False], ids=["empty folder", "no folder"])
def test_a_label_may_have_no_record_here(tmp_path, kind, empty):
    """Else its last record would decide whether the others are used at all."""
    fill(tmp_path / "d", kind)
    if empty:
        (tmp_path / "d" / "rare").mkdir()
    splits = load(tmp_path / "d", kind, labels=[*LABELS, "rare"])
    assert {*all_of(splits).values()} == {0, 1}


def test_names_that_begin_with_a_dot_are_passed_over(tmp_path, kind):
    fill(tmp_path / "d", kind)
    for folder in (tmp_path / "d", tmp_path / "d" / "cat"):
        (folder / ".DS_Store").write_bytes(b"junk")
        (folder / ".hidden").mkdir()
    assert len(all_of(load(tmp_path / "d", kind))) == 20


def test_accents_that_a_file_system_took_apart_are_the_labels(tmp_path, kind):
    fill(tmp_path / "d", kind)
    (tmp_path / "d" / "cat").rename(tmp_path / "d" / unicodedata.normalize("NFD", "café"))
    splits = load(tmp_path / "d", kind, labels=[unicodedata.normalize("NFC", "café"), "dog"])
    assert len(all_of(splits)) == 20


def test_a_link_inside_the_folder_is_a_file_like_others(tmp_path, kind):
    fill(tmp_path / "d", kind)
    cat = tmp_path / "d" / "cat"
    (cat / f"zz.{kind[2]}").symlink_to(next(cat.iterdir()))
    assert load(tmp_path / "d", kind).duplicates == 1


def test_files_are_read_one_at_a_time(tmp_path, kind):
    """Listing opens nothing: whoever reads later need not hold them all."""
    fill(tmp_path / "d", kind)
    for path in (tmp_path / "d").rglob(f"*.{kind[2]}"):
        path.write_bytes(b"")
    files = labelled_files(config_of(tmp_path / "d", kind), str(tmp_path / "d"), "data.path")
    assert len(files) == 20
    with pytest.raises(ConfigError, match=r"file 1 of cat: "):
        kind[3](files[0].path, files[0].where)


def put(name, content):
    def fault(root, ending):
        place = root / name.format(ending)
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)

    return fault


def link(target):
    def fault(root, ending):
        outside = root.parent / f"outside.{ending}"
        outside.write_bytes(b"secret")
        (root / "dog" / "0.png").symlink_to(outside if target is None else target)

    return fault


def outer_folder(root, ending):
    (root / "dog").rename(root.parent / "away")
    (root / "dog").symlink_to(root.parent / "away")


def nested(root, _ending):
    (root / "dog" / f"0{SECRET}").mkdir()


def strange_folders(root, _ending):
    for name in (SECRET, "Cat"):
        (root / name).mkdir()


def pipe(root, ending):
    os.mkfifo(root / "dog" / f"0.{ending}")


def nothing(root, _ending):
    for path in root.rglob("*"):
        if path.is_file():
            path.unlink()


def bomb(root, _ending):
    """A PNG of 10 GB of white in 100 bytes: its header alone says how large it is."""
    header = (b"IHDR" + (100_000).to_bytes(4) * 2 + b"\x08\x00\x00\x00\x00")  # fmt: skip
    chunk = (13).to_bytes(4) + header + zlib.crc32(header).to_bytes(4)
    data = b"IDAT" + zlib.compress(bytes(10))
    body = (len(data) - 4).to_bytes(4) + data + zlib.crc32(data).to_bytes(4)
    (root / "dog" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + body)


def large(root, _ending):
    """Between what PIL refuses, and what it only warns of."""
    Image.new("1", (10_000, 9_500)).save(root / "dog" / "0.png")


def cut(root, ending):
    whole = (root / "dog" / f"{SECRET}-001.{ending}").read_bytes()
    (root / "dog" / f"0.{ending}").write_bytes(whole[: len(whole) * 2 // 3])


def samples(values, rate=16_000):
    def fault(root, _ending):
        soundfile.write(root / "dog" / "0.wav", np.array(values, "f4"), rate, subtype="FLOAT")

    return fault


FIRST = "data.path={}: file 1 of dog"
BOTH_FAULTS = {
    "a folder that is no label": (strange_folders, "2 of its folders are not among data.labels"),
    "a file beside the labels": (put(f"{SECRET}.txt", b""), "holds a file beside the folders of"),
    "another kind of file": (put("dog/0.txt", b"a"), f"{FIRST} has none of the endings ."),
    "no ending": (put("dog/0", b"a"), f"{FIRST} has none of the endings ."),
    "a nested folder": (nested, f"{FIRST} is a folder; files must stand in that of their label"),
    "an empty file": (put("dog/0.{}", b""), f"{FIRST}: not a readable "),
    "a text in its place": (put("dog/0.{}", b"goal " * 99), f"{FIRST}: not a readable "),
    "a link that leads out": (link(None), f"{FIRST} is a link that leads out of the folder"),
    "a link to a file of the machine": (link("/etc/hostname"), f"{FIRST} is a link that leads out"),
    "a link to nothing": (link("nowhere"), f"{FIRST} is no file, or a link to nothing"),
    "a link to itself": (link("0.png"), f"{FIRST} is no file, or a link to nothing"),
    "a label that is a link out": (outer_folder, f"{FIRST} is a link that leads out of the folder"),
    "a pipe": (pipe, f"{FIRST} is no file"),
    "no file at all": (nothing, "holds no file of a record; expected LABEL/FILE with ."),
}
IMAGE_FAULTS = {
    "cut off": (cut, f"{FIRST}: not a readable image file"),
    "a decompression bomb": (bomb, f"{FIRST}: has more than 89,478,485 pixels; make it smaller"),
    "a large one": (large, f"{FIRST}: has more than 89,478,485 pixels; make it smaller"),
    "a program for a printer": (put("dog/0.png", b"%!PS-Adobe-3.0 EPSF-3.0\n"), "not a readable"),
}
SOUND_FAULTS = {
    "no samples": (samples([]), f"{FIRST}: holds no sound"),
    "not a number": (samples([0.0, np.nan]), f"{FIRST}: holds samples that are no numbers"),
    "infinite": (samples([0.0, np.inf]), f"{FIRST}: holds samples that are no numbers"),
    "an absurd rate": (samples([0.0] * 9, 900_001), f"{FIRST}: must have 1000 to 768000 samples"),
    "hours of it": (samples([0.0] * 3_700_000, 1_000), f"{FIRST}: must have 1000 to 768000"),
}
FAULTS = [
    *((IMAGES, name, *fault) for name, fault in {**BOTH_FAULTS, **IMAGE_FAULTS}.items()),
    *((SOUNDS, name, *fault) for name, fault in {**BOTH_FAULTS, **SOUND_FAULTS}.items()),
]


@pytest.mark.parametrize(
    ("kind", "name", "spoil", "message"), FAULTS, ids=[f"{k[2]}: {name}" for k, name, *_ in FAULTS]
)
def test_a_broken_folder_is_one_line_with_the_files_place(tmp_path, kind, name, spoil, message):
    root = fill(tmp_path / "d", kind)
    spoil(root, kind[2])
    with pytest.raises(ConfigError) as refused:
        load(root, kind)
    text = str(refused.value)
    assert message.format(root) in text
    assert "\n" not in text
    assert SECRET not in text


def test_a_folder_that_is_not_there_is_refused_before_anything(tmp_path, kind):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent", tmp_path / "file"):
        for changes in ({"path": str(path)}, {"test_path": str(path)}):
            with pytest.raises(ConfigError, match=r"^data\.(test_)?path=.*: no such folder$"):
                check_files(config_of(tmp_path, kind, **changes))


def test_pixels_of_sixteen_bits_keep_their_grays(tmp_path):
    """PIL's own way makes all but the darkest white: a scan would be a blank page."""
    grays = np.array([[0, 255, 256, 32_768, 65_535]], np.uint16)
    Image.fromarray(grays).save(tmp_path / "a.png")
    assert image_of(tmp_path / "a.png", "a")[..., 0].tolist() == [[0, 0, 1, 128, 255]]


def test_pixels_of_thirty_two_bits_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ConfigError, match=r"^a: has pixels of 32 bits"):
        image_of(tmp_path / "a.tif", "a")


def test_a_picture_is_the_same_record_for_every_model(tmp_path):
    """Its split, and its place in the books, hang on what it holds."""
    write_picture(tmp_path / "a.png", 3)
    read = reader_of(TaskName.image_classification, object())
    assert read is not None
    assert (read(tmp_path / "a.png", "a") == picture(3)).all()
    assert (read((tmp_path / "a.png").read_bytes(), "a") == picture(3)).all()
    assert reader_of(TaskName.text_classification, object()) is None


@pytest.mark.parametrize("task", [TaskName.image_classification, TaskName.audio_classification])
def test_a_run_on_a_folder_ends_with_a_report(task, tiny_overrides, tmp_path, coterie):
    """With the examples of the task as files, and the model that its group is about."""
    examples = TASKS[task].toy_examples(60)
    image = task is TaskName.image_classification
    names = ["a", "b"]
    for number, (content, label) in enumerate(zip(examples.contents, examples.labels, strict=True)):
        place = tmp_path / "d" / names[label]
        place.mkdir(parents=True, exist_ok=True)
        if image:
            Image.fromarray(content[..., 0]).save(place / f"{number}.png")
        else:
            soundfile.write(place / f"{number}.flac", content, 16_000)
    source, model = ("image", "vit_digits") if image else ("audio", "wav2vec2_tiny")
    own = [f"data={source}_folder", f"data.path={tmp_path / 'd'}", "data.labels=[a,b]"]
    kept = [each for each in tiny_overrides if not each.startswith(("data", "model", "task"))]
    answer = coterie(
        *("simulate", *kept, *own, f"task={task.name}", f"model={model}"),
        *(f"run_dir={tmp_path / 'run'}", "--json"),
    )
    assert answer.code == 0, answer.err
    assert answer.json["evaluation_records"] > 0
    assert "repeated files dropped" in " ".join(answer.err.split())


BEFORE_ANY_RECORD = {
    "a broken folder": ("vit_digits", [], "file 1 of dog: not a readable image file"),
    "a model of texts": ("minilm", [], "has no processor of pixel_values"),
    "a task of sounds": (
        "wav2vec2_tiny",
        ["task=audio_classification"],
        "task=audio_classification: data=image_folder holds images; choose task=image_class",
    ),
    "persons": ("vit_digits", ["data.person_column=who"], "data=image_folder names no persons"),
    "labels that are no names of folders": (
        "vit_digits",
        ["data.labels=[cat,../dog]"],
        "data.labels=['cat', '../dog']: must be names of folders",
    ),
    "no path": ("vit_digits", ["data.path=''"], "data.path='': must be the path of a folder"),
    "a table": (
        "vit_digits",
        ["data=csv"],
        "task=image_classification: data=csv holds texts; choose other data or another task",
    ),
}


@pytest.mark.parametrize("fault", BEFORE_ANY_RECORD)
def test_a_mistake_ends_the_command_with_one_line_and_nothing_written(
    fault, tiny_overrides, tmp_path, monkeypatch, coterie
):
    model, own, message = BEFORE_ANY_RECORD[fault]
    monkeypatch.chdir(tmp_path)
    put("dog/0.{}", b"no image")(fill(tmp_path / "d", IMAGES), "png")
    kept = [each for each in tiny_overrides if not each.startswith(("data", "model", "task"))]
    folder = ["data=image_folder", "data.path=d", "data.labels=[cat,dog]"]
    chosen = [*folder, "task=image_classification", f"model={model}", *own]
    groups = {each.split("=")[0]: each for each in chosen}  # a group is chosen once
    answer = coterie("simulate", *kept, *groups.values())
    assert answer.code == 2, answer.err
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_what_files_hold_is_on_the_disk_and_not_in_memory(tmp_path, kind):
    """And is not read again: a file that changes meanwhile would be another record than charged."""
    splits = load(fill(tmp_path / "d", kind), kind)
    shutil.rmtree(tmp_path / "d")
    for part in (splits.train, splits.validation, splits.holdout, splits.train.subset([0])):
        assert isinstance(part.contents, Spooled)
        assert len([*part.contents]) == len(part)


def test_no_room_for_what_files_hold_is_one_line_with_the_remedy(tmp_path, kind, monkeypatch):
    def full(*_arguments, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.spool.pa.ipc.new_file", full)
    with pytest.raises(ConfigError, match=r"^data\.path=.*no room.*No space left.*TMPDIR$"):
        load(fill(tmp_path / "d", kind), kind)


GROWTH = """
import sys
from pathlib import Path
from common.config import DataConfig, DataSource
from common.data import load_splits
from common.media import image_of
from client.commitment import commit_to

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

def read(path):
    labels = ["cat", "dog"]
    config = DataConfig(source=DataSource.image_folder, path=path, labels=labels)
    splits = load_splits(config, read=image_of)
    commit_to(splits.train, bytes(32))
    return splits

read(sys.argv[1])
before = anonymous()
splits = read(sys.argv[2])
print(anonymous() - before, len(splits.train))
"""


def test_a_folder_of_many_megabytes_costs_few(tmp_path):
    """Held as arrays it is all of them: 65 MB."""
    for name, count in (("small", 20), ("large", 1500)):
        for number in range(count):
            folder = tmp_path / name / LABELS[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.full((120, 120, 3), number % 251, dtype=np.uint8)
            pixels[0, :3, 0] = (number % 256, number // 256, 7)
            Image.fromarray(pixels).save(folder / f"{number}.bmp")
    told = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path / "small"), str(tmp_path / "large")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert int(told[1]) > 900
    assert float(told[0]) < 20
