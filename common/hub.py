"""Data sets of the hub, and local ones in its formats: what `datasets` reads, and no code.

A local data set is private: it is read where it stands, and nothing of it is copied into a cache;
messages about it name rows and columns that the config names. A data set of the hub is public.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Audio, ClassLabel, Dataset, Features, Image
from huggingface_hub import constants
from pyarrow import parquet

from common.config import DataConfig
from common.errors import ConfigError, first_line
from common.folders import is_local
from common.media import File, Reader
from common.spool import Array
from common.tables import Column

datasets.disable_progress_bars()
datasets.utils.logging.set_verbosity_error()

SAVED, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
"""Files that `save_to_disk` leaves in the folder of one split, and of several."""


BUFFER_BYTES = 1 << 20
"""Of a column of a parquet file that are read at once; 0 would be all of a row group."""
PIECE_ROWS = 256
"""Rows of a data set that are in memory at a time."""


@dataclass(frozen=True)
class HubTable:
    """One split, opened."""

    features: Features
    pieces: Callable[[], Iterator[Dataset]]
    """All rows in their order, some at a time; one piece at least."""
    where: str
    """What messages call it."""
    local: bool

    def columns(self, asked: dict[str, str]) -> Iterator[list[Column]]:
        """The columns asked for, in that order, some rows at a time.

        Args: asked: names by the settings that gave them. Raises: ConfigError, as `column`.
        """
        for piece in self.pieces():
            yield [self.column(piece, setting, name) for setting, name in asked.items()]

    def column(self, rows: Dataset, setting: str, name: str) -> Column:
        """The values of a column, or of a field in one as `translation.en`; classes by the names
        that the schema gives them.

        Args: setting: that gave the name. Raises: ConfigError if there is no such column.
        """
        held = rows if name in rows.column_names else rows.flatten()
        if name not in held.column_names:
            raise ConfigError(
                f"{setting}={name}: no such column among the {len(rows.column_names)} of "
                f"{self.where}; its schema names them"
            )
        kind = held.features[name]
        with self._reading(name):
            values = list(held[name])
        if not isinstance(kind, ClassLabel):
            return values
        known = dict(enumerate(kind.names))
        return [known.get(value) for value in values]

    def check_labels(self, config: DataConfig) -> None:
        """Raises: ConfigError if a label is no class of a column whose schema lists them."""
        kind = self.features.get(config.label_column)
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
            n for n, kind in self.features.items() if isinstance(kind, Image | Audio)
        ]
        if not name and len(media) == 1:
            return media[0]
        if name in media:
            return name
        raise ConfigError(
            f"data.media_column={name or repr(name)}: {len(media)} columns of {self.where} hold "
            "images or sounds by its schema; name one of them"
        )

    def contents(self, rows: Dataset, name: str, read: Reader, *, first: int) -> Iterator[Array]:
        """What the task reads in some rows of a column of images or sounds, one at a time.

        Args: first: the number of the first of them. Raises: ConfigError naming the row that holds
        none.
        """
        with self._reading(name):
            encoded = rows.cast_column(name, type(self.features[name])(decode=False))
        for row in range(len(encoded)):
            called = f"{self.where}: row {first + row}"
            with self._reading(name):
                value = encoded[row][name]
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
    if local and not any((folder / file).is_file() for file in (SAVED, SAVED_SPLITS)):
        features, pieces = _of_parquet(folder, split, where)
        return HubTable(features, pieces, where, local)
    if local and split == config.test_split and not (folder / SAVED_SPLITS).is_file():
        raise ConfigError(f"data.test_split={split}: {where} holds one split; leave it out")
    rows = _saved(folder, split, where) if local else _from_hub(config, path, split, where)
    rows = rows.with_format(None)
    return HubTable(rows.features, lambda: _pieces_of(rows), where, local)


def _pieces_of(rows: Dataset) -> Iterator[Dataset]:
    """Of a data set that is mapped into memory: without copies."""
    for start in range(0, max(len(rows), 1), PIECE_ROWS):
        yield rows.select(range(start, min(start + PIECE_ROWS, len(rows))))


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


def _of_parquet(
    folder: Path, split: str, where: str
) -> tuple[Features, Callable[[], Iterator[Dataset]]]:
    """Parquet files named by their split, with the schema that the first one carries: what it is,
    and its rows.

    Raises: ConfigError.
    """
    files = [path for path in sorted(folder.rglob("*.parquet")) if _is_of(path, split, folder)]
    if not files:
        raise ConfigError(
            f"{where}: has no file of split {split}; expected {split}.parquet, {split}-*.parquet "
            f"or {split}/*.parquet, or what datasets' save_to_disk wrote"
        )
    called = f"{where}: its parquet files of split {split}"
    with _opening(called):
        schema = parquet.read_schema(files[0])
        if any(parquet.read_schema(each) != schema for each in files):
            raise ValueError("other columns")
        features = Dataset(schema.empty_table(), fingerprint=called).features
    return features, lambda: _pieces_in(files, schema, called)


def _pieces_in(files: list[Path], schema: Any, called: str) -> Iterator[Dataset]:
    """Raises: ConfigError."""
    yield Dataset(schema.empty_table(), fingerprint=called)
    for path in files:
        with _opening(called), parquet.ParquetFile(path, buffer_size=BUFFER_BYTES) as file:
            for batch in file.iter_batches(PIECE_ROWS):
                table = pa.Table.from_batches([batch]).replace_schema_metadata(schema.metadata)
                yield Dataset(table, fingerprint=called)


@contextmanager
def _opening(called: str) -> Iterator[None]:
    """Raises: ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a message of a library might hold what it could not read
        raise ConfigError(f"{called} cannot be read, or differ in their columns") from error


def _is_of(path: Path, split: str, folder: Path) -> bool:
    """By its own name, or by that of a folder inside the data set's; what that one is called says
    nothing, or all of `~/test` would be the public split `test`.
    """
    inside = path.parent != folder and path.parent.name == split
    return inside or path.stem == split or path.stem.startswith(f"{split}-")
