"""Files of images and sounds, as arrays: what their tasks read."""

import importlib
import logging
import warnings
from collections.abc import Callable
from io import BytesIO
from math import gcd
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.config import MAX_SECONDS
from common.errors import ConfigError
from common.spool import Array

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it finds wrong, our errors say

COLOURS = {1: "L", 3: "RGB"}
"""PIL's name of an image with so many channels."""
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")
"""What is opened: of the others that PIL knows, some start programs of the machine."""
RATES = (1_000, 768_000)
"""Samples a second that a sound file may have, from and to."""
_GRAY, _GRAY_OF_16_BITS, _TOO_FINE = ("1", "L", "LA"), "I;16", ("I", "F")
"""PIL's names of how pixels are kept."""

File = Path | bytes
"""A file on the disk, or what stands in one."""
Reader = Callable[[File, str], Array]
"""What a task reads in a file; the text is what messages call the file. Raises: ConfigError."""


def read_image(path: str, *, channels: int) -> NDArray[np.uint8]:
    """(H, W, C) one image file, turned to gray or colours as `channels` says, 1 or 3.

    Raises: ConfigError if it is no image that PIL opens.
    """
    return with_channels(image_of(_file(path), path), channels)


def image_of(file: File, where: str) -> NDArray[np.uint8]:
    """(H, W, C) an image as it stands in the file: C is 1 for gray, else 3, transparency dropped.

    Guarantee: the same whatever model will read it, so that a record is the same for all.
    Args: where: what messages call the file. Raises: ConfigError.
    """
    try:
        with warnings.catch_warnings():
            # PIL only warns of an image that is larger than its limit, up to twice as large.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(_source(file), formats=FORMATS) as image:
                pixels = None if image.mode in _TOO_FINE else _pixels(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ConfigError(
            f"{where}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"
        ) from error
    except Exception as error:  # whatever a parser trips over in a file that anybody may have made
        raise ConfigError(f"{where}: not a readable image file") from error
    if pixels is None:
        raise ConfigError(f"{where}: has pixels of 32 bits; save it with 8 or 16")
    return pixels


def with_channels(image: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """(H, W, C) an image of 1 or 3 channels with `channels` of them, as PIL turns colours gray."""
    if image.shape[2] == channels:
        return image
    turned = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return _rows(turned.convert(COLOURS[channels]), channels)


def read_sound(path: str, *, rate: int) -> NDArray[np.float32]:
    """(samples,) one sound file, its channels averaged, resampled to `rate` samples a second.

    Raises: ConfigError if it is no sound that libsndfile opens, or an empty one.
    """
    return sound_of(_file(path), path, rate=rate)


def sound_of(file: File, where: str, *, rate: int) -> NDArray[np.float32]:
    """As `read_sound`, of a file or what stands in one.

    Args: where: what messages call the file. Raises: ConfigError, of a sound that is longer than
    any task keeps, too.
    """
    library: Any = _soundfile()
    try:
        with library.SoundFile(_source(file)) as opened:
            own_rate, frames = int(opened.samplerate), int(opened.frames)
            fits = RATES[0] <= own_rate <= RATES[1] and frames <= own_rate * MAX_SECONDS
            samples = opened.read(dtype="float32", always_2d=True) if fits else None
    except Exception as error:  # as of images
        raise ConfigError(f"{where}: not a readable sound file, as WAV or FLAC") from error
    if samples is None:
        raise ConfigError(
            f"{where}: must have {RATES[0]} to {RATES[1]} samples a second, for at most "
            f"{MAX_SECONDS} seconds; cut it, or resample it"
        )
    if not len(samples):
        raise ConfigError(f"{where}: holds no sound")
    if not np.isfinite(samples).all():
        raise ConfigError(f"{where}: holds samples that are no numbers")
    from scipy.signal import resample_poly  # noqa: PLC0415 - for sounds only

    common = gcd(rate, own_rate)
    mono = resample_poly(samples.mean(1), rate // common, own_rate // common)
    return np.asarray(mono, dtype=np.float32)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith(_GRAY_OF_16_BITS):  # PIL would make all but the darkest white
        fine = np.asarray(image, dtype=np.uint16)
        return (fine >> 8).astype(np.uint8)[..., None]
    channels = 1 if image.mode in _GRAY else 3
    return _rows(image.convert(COLOURS[channels]), channels)


def _rows(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels)


def _source(file: File) -> Path | BytesIO:
    return BytesIO(file) if isinstance(file, bytes) else file


def _file(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{path}: no such file")
    return file


def _soundfile() -> ModuleType:
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError) as error:  # OSError: the wheel's libsndfile does not load
        raise ConfigError(
            "sound files need the package soundfile; pip install 'coterie[audio]'"
        ) from error
