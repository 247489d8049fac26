"""Data sets of the hub, and local ones in its formats: what `datasets` reads, and no code.

A local data set is private: it is read where it stands, and nothing of it is copied into a cache;
messages about it name rows and columns that the config names. A data set of the hub is public.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Audio, ClassLabel, Dataset, Image
from huggingface_hub import constants
from pyarrow import parquet

from common.config import DataConfig
from common.errors import ConfigError, first_line
from common.folders import is_local
from common.media import File, Reader
from common.records import Content
from common.tables import Column

datasets.disable_progress_bars()
datasets.utils.logging.set_verbosity_error()

SAVED, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
"""Files that `save_to_disk` leaves in the folder of one split, and of several."""


@dataclass(frozen=True)
class HubTable:
    """One split, opened."""

    rows: Dataset
    where: str
    """What messages call it."""
    local: bool

    def column(self, setting: str, name: str) -> Column:
        """The values of a column, or of a field in one as `translation.en`; classes by the names
        that the schema gives them.

        Args: setting: that gave the name. Raises: ConfigError if there is no such column.
        """
        rows = self.rows if name in self.rows.column_names else self.rows.flatten()
        if name not in rows.column_names:
            raise ConfigError(
                f"{setting}={name}: no such column among the {len(self.rows.column_names)} of "
                f"{self.where}; its schema names them"
            )
        kind = rows.features[name]
        with self._reading(name):
            values = list(rows[name])
        if not isinstance(kind, ClassLabel):
            return values
        known = dict(enumerate(kind.names))
        return [known.get(value) for value in values]

    def check_labels(self, config: DataConfig) -> None:
        """Raises: ConfigError if a label is no class of a column whose schema lists them."""
        kind = self.rows.features.get(config.label_column)
        if not isinstance(kind, ClassLabel):
            return
        for label in config.labels:
            if label not in kind.names:
                raise ConfigError(
                    f"data.labels: {self.where} has no class {label!r} among the "
                    f"{len(kind.names)} of its schema"
                )

    def media_column(self, name: str) -> str:
        """The column of images or sounds: of this name, or the only one. Raises: ConfigError."""
        media: list[str] = [
            n for n, kind in self.rows.features.items() if isinstance(kind, Image | Audio)
        ]
        if not name and len(media) == 1:
            return media[0]
        if name in media:
            return name
        raise ConfigError(
            f"data.media_column={name or repr(name)}: {len(media)} columns of {self.where} hold "
            "images or sounds by its schema; name one of them"
        )

    def contents(self, name: str, read: Reader) -> Iterator[Content]:
        """What the task reads in each row of a column of images or sounds, one at a time.

        Raises: ConfigError naming the row that holds none.
        """
        encoded = type(self.rows.features[name])(decode=False)
        rows = self.rows.cast_column(name, encoded)
        for row in range(len(rows)):
            called = f"{self.where}: row {row + 1}"
            with self._reading(name):
                value = rows[row][name]
            yield read(self._file(value, called), called)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Files are mapped, and found to be damaged when they are read. Raises: ConfigError."""
        try:
            yield
        except Exception as error:  # its text might hold what it could not read
            raise ConfigError(f"{self.where}: its column {name} cannot be read") from error

    def _file(self, value: Any, called: str) -> File:
        """What stands in the row itself, or, of a data set of the hub, in its cache."""
        if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
            raise ConfigError(f"{called} holds no image or sound")
        if value.get("bytes"):
            return bytes(value["bytes"])
        path = Path(value["path"])
        caches = [Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)]
        if self.local or not any(path.resolve().is_relative_to(c.resolve()) for c in caches):
            raise ConfigError(
                f"{called} names a file instead of holding it; save the data set with its files "
                "embedded, as parquet, or read the folder by data=image_folder or audio_folder"
            )
        return path


def open_split(config: DataConfig, path: str, split: str, name: str) -> HubTable:
    """One split of a data set: a name of the hub, or a local folder.

    Args: name: the setting that gave the path. Raises: ConfigError if there is none.
    """
    where, local = f"{name}={path}", is_local(path)
    folder = Path(path).expanduser()
    if not local:
        rows = _from_hub(config, path, split, where)
    elif (folder / SAVED).is_file() or (folder / SAVED_SPLITS).is_file():
        if split == config.test_split and not (folder / SAVED_SPLITS).is_file():
            raise ConfigError(f"data.test_split={split}: {where} holds one split; leave it out")
        rows = _saved(folder, split, where)
    else:
        rows = _of_parquet(folder, split, where)
    return HubTable(rows.with_format(None), where, local)


def _from_hub(config: DataConfig, path: str, split: str, where: str) -> Dataset:
    """Raises: ConfigError if it is not there, or, without a network, not in the cache."""
    try:
        # This version of `datasets` knows no scripts, and refuses a repository that has one.
        return datasets.load_dataset(
            path, config.subset or None, split=split, revision=config.revision or None
        )
    except Exception as error:  # of the network, the hub, pyarrow or the file system
        offline = isinstance(error, ConnectionError) or datasets.config.HF_HUB_OFFLINE
        remedy = (
            "without a network only what was downloaded before is found: unset HF_HUB_OFFLINE, or "
            "give a folder that datasets' save_to_disk wrote"
            if offline
            else "look at data.subset, data.split and data.revision"
        )
        raise ConfigError(f"{where}: cannot be loaded ({first_line(error)}); {remedy}") from error


def _saved(folder: Path, split: str, where: str) -> Dataset:
    """What `save_to_disk` wrote, mapped into memory. Raises: ConfigError."""
    several = (folder / SAVED_SPLITS).is_file()
    place = folder / split if several else folder
    if several and not (place / SAVED).is_file():
        raise ConfigError(f"{where}: has no split {split}; name one by data.split or test_split")
    try:
        return Dataset.load_from_disk(str(place))
    except Exception as error:  # a message of a library might hold what it could not read
        raise ConfigError(
            f"{where}: cannot be opened as what datasets' save_to_disk wrote; save it again"
        ) from error


def _of_parquet(folder: Path, split: str, where: str) -> Dataset:
    """Parquet files named by their split, with the schema that the first one carries.

    Raises: ConfigError.
    """
    files = [path for path in sorted(folder.rglob("*.parquet")) if _is_of(path, split, folder)]
    if not files:
        raise ConfigError(
            f"{where}: has no file of split {split}; expected {split}.parquet, {split}-*.parquet "
            f"or {split}/*.parquet, or what datasets' save_to_disk wrote"
        )
    try:
        return Dataset(pa.concat_tables([parquet.read_table(path) for path in files]))
    except Exception as error:  # as of what was saved
        raise ConfigError(
            f"{where}: its parquet files of split {split} cannot be read, or differ in their "
            "columns"
        ) from error


def _is_of(path: Path, split: str, folder: Path) -> bool:
    """By its own name, or by that of a folder inside the data set's; what that one is called says
    nothing, or all of `~/test` would be the public split `test`.
    """
    inside = path.parent != folder and path.parent.name == split
    return inside or path.stem == split or path.stem.startswith(f"{split}-")
