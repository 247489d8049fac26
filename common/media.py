"""Files of images and sounds, as arrays: what their tasks read."""

import importlib
from math import gcd
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy.signal import resample_poly

from common.errors import ConfigError

COLOURS = {1: "L", 3: "RGB"}
"""PIL's name of an image with so many channels."""


def read_image(path: str, *, channels: int) -> NDArray[np.uint8]:
    """(H, W, C) one image file, turned to gray or colours as `channels` says, 1 or 3.

    Raises: ConfigError if it is no image that PIL opens.
    """
    try:
        with Image.open(_file(path)) as image:
            pixels = np.asarray(image.convert(COLOURS[channels]), dtype=np.uint8)
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: not a readable image file") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def read_sound(path: str, *, rate: int) -> NDArray[np.float32]:
    """(samples,) one sound file, its channels averaged, resampled to `rate` samples a second.

    Raises: ConfigError if it is no sound that libsndfile opens, or an empty one.
    """
    library: Any = _soundfile()
    try:
        samples, own_rate = library.read(_file(path), dtype="float32", always_2d=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable sound file, as WAV or FLAC") from error
    mono = samples.mean(1)
    if not len(mono):
        raise ConfigError(f"{path}: holds no sound")
    common = gcd(rate, own_rate)
    return np.asarray(resample_poly(mono, rate // common, own_rate // common), dtype=np.float32)


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
