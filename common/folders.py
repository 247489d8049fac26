"""Folders of images or sounds: DIR/LABEL/FILE, one record a file.

The site owns the folder, and names in it may be private: of folders whose name is no label only the
number is told, and a file is called by its place among those of its label, in the order of names.

The rule is that of tables: the first file that cannot be a record stops the run. Names that begin
with a dot are no records, and passed over; what else stands in the folder must be one. A label
without a folder, or with an empty one, has no record here: to refuse that would make one record
decide about the others.
"""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.config import DataConfig, DataSource
from common.errors import ConfigError

ENDINGS = {
    DataSource.image_folder: (".png", ".jpg", ".jpeg", ".bmp", ".webp"),
    DataSource.audio_folder: (".wav", ".flac", ".ogg"),
}
"""Of the names of files, in capitals or not, by what the folder holds."""


@dataclass(frozen=True)
class LabelledFile:
    """A file of one record, not opened yet."""

    path: Path
    label: int
    where: str
    """What messages call it."""


def labelled_files(config: DataConfig, path: str, name: str) -> list[LabelledFile]:
    """The files of a folder, label by label, in the order of their names.

    Guarantee: each is a plain file inside the folder. Nothing is opened.
    Args: name: the setting that gave the path.
    Raises: ConfigError if something in the folder can be no record, or nothing is.
    """
    root, where = Path(path).expanduser(), f"{name}={path}"
    try:
        folders = _folders(root, config, where)
        files = [
            file
            for index, label in enumerate(config.labels)
            if label in folders
            for file in _files(root, folders[label], config, index, where)
        ]
    except OSError as error:
        raise ConfigError(f"{where}: cannot be listed ({error.strerror})") from error
    if not files:
        raise ConfigError(
            f"{where}: holds no file of a record; expected LABEL/FILE with "
            f"{', '.join(ENDINGS[config.source])}"
        )
    return files


def is_local(path: str) -> bool:
    """Whether a path is meant, and not a name of the hub."""
    return path.startswith((".", "/", "~")) or Path(path).is_dir()


def _folders(root: Path, config: DataConfig, where: str) -> dict[str, Path]:
    """The folder of each label that has one. Raises: ConfigError."""
    found: dict[str, Path] = {}
    strange = 0
    composed = {_composed(label): label for label in config.labels}
    for entry in _entries(root):
        if not entry.is_dir():
            raise ConfigError(
                f"{where}: holds a file beside the folders of labels; put it into that of its label"
            )
        label = composed.get(_composed(entry.name))
        if label is None or label in found:
            strange += 1
        else:
            found[label] = entry
    if strange:
        raise ConfigError(
            f"{where}: {strange} of its folders are not among data.labels; name them there, "
            "or move them away"
        )
    return found


def _files(
    root: Path, folder: Path, config: DataConfig, index: int, where: str
) -> Iterator[LabelledFile]:
    """The files of one label. Raises: ConfigError if one is no record."""
    inside = root.resolve()
    for number, path in enumerate(_entries(folder), start=1):
        called = f"{where}: file {number} of {config.labels[index]}"
        if not Path(os.path.realpath(path)).is_relative_to(inside):  # resolve() fails on loops
            raise ConfigError(f"{called} is a link that leads out of the folder; copy it there")
        if path.is_dir():
            raise ConfigError(f"{called} is a folder; files must stand in that of their label")
        if not path.is_file():
            raise ConfigError(f"{called} is no file, or a link to nothing; move it away")
        if path.suffix.lower() not in ENDINGS[config.source]:
            raise ConfigError(
                f"{called} has none of the endings {', '.join(ENDINGS[config.source])}; "
                "move it away"
            )
        yield LabelledFile(path, index, called)


def _entries(folder: Path) -> list[Path]:
    """What is in a folder but names that begin with a dot, in the order of the bytes of names."""
    names = (name for name in os.listdir(folder) if not name.startswith("."))
    return [folder / name for name in sorted(names, key=os.fsencode)]


def _composed(name: str) -> str:
    """As most systems write it: some take accents apart in the names of files."""
    return unicodedata.normalize("NFC", name)
