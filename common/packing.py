"""Packing: what a file is packed by, told by its first bytes and never by its name."""

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import IO, Any

from common.errors import ConfigError

DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)
"""What unpacking raises, beside OSError, of a file that is cut or damaged; the last two of zip's,
where a way of packing is one that Python does not know."""
HEAD = 8


class Packing(Enum):
    """Ways of packing a file, by the bytes that it then begins with."""

    gzip = b"\x1f\x8b"
    bz2 = b"BZh"
    xz = b"\xfd7zXZ\x00"
    zip = b"PK\x03\x04"
    zstd = b"\x28\xb5\x2f\xfd"


def packing_of(path: Path) -> Packing | None:
    """How a file is packed, None where it is not. Raises: OSError."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    return next((each for each in Packing if head.startswith(each.value)), None)


@contextmanager
def unpacked(path: Path, where: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The content of a file, unpacked as it is read; and the file itself, to see how far that is.

    Args: where: what messages call the file.
    Raises: ConfigError if it is a folder of files, as a table of Excel is; OSError, or one of
    `DAMAGE`, here or while it is read, if it is damaged.
    """
    packing = packing_of(path)
    with path.open("rb") as file:
        if packing is None:
            yield file, file
        else:
            with _OPENERS[packing](file, where) as content:
                yield content, file


def _unzipped(file: IO[bytes], where: str) -> Any:
    archive = zipfile.ZipFile(file)
    if len(archive.namelist()) != 1:
        raise ConfigError(
            f"{where}: is a zip of {len(archive.namelist())} files, as Excel's tables are; "
            "save its table as one CSV file"
        )
    if archive.infolist()[0].flag_bits & 1:
        raise ConfigError(f"{where}: is a zip with a password; unpack it")
    return archive.open(archive.namelist()[0])


def _unzstd(file: IO[bytes], _where: str) -> Any:
    import pyarrow as pa  # noqa: PLC0415 - of its kind only: Python has none before 3.14

    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")


_OPENERS: dict[Packing, Callable[[IO[bytes], str], Any]] = {
    Packing.gzip: lambda file, _: gzip.GzipFile(fileobj=file),
    Packing.bz2: lambda file, _: bz2.BZ2File(file),
    Packing.xz: lambda file, _: lzma.LZMAFile(file),  # noqa: SIM115 - who calls it closes it
    Packing.zip: _unzipped,
    Packing.zstd: _unzstd,
}
