"""Files of images and sounds become arrays, or one line that says why not."""

import numpy as np
import pytest
import soundfile
from PIL import Image

from common import media
from common.errors import ConfigError
from common.media import read_image, read_sound


@pytest.fixture
def colours(tmp_path):
    pixels = np.zeros((5, 7, 3), np.uint8)
    pixels[..., 0] = 200
    path = tmp_path / "red.png"
    Image.fromarray(pixels).save(path)
    return path, pixels


def write_sound(path, samples, rate=16_000):
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return str(path)


def test_an_image_has_the_channels_asked_for(colours):
    path, pixels = colours
    assert (read_image(str(path), channels=3) == pixels).all()
    gray = read_image(str(path), channels=1)
    assert gray.shape == (5, 7, 1)
    assert gray.dtype == np.uint8
    assert {*gray.ravel().tolist()} == {60}  # 0.299 of 200


def test_a_sound_comes_back_as_it_was_written(tmp_path):
    samples = np.linspace(-0.5, 0.5, 80, dtype=np.float32)
    read = read_sound(write_sound(tmp_path / "a.wav", samples), rate=16_000)
    assert read.dtype == np.float32
    assert np.array_equal(read, samples)


def test_channels_are_averaged_and_another_rate_resampled(tmp_path):
    time = np.arange(8_000) / 8_000
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    path = write_sound(tmp_path / "b.wav", np.stack([tone, 0 * tone], 1), rate=8_000)
    read = read_sound(path, rate=16_000)
    assert read.shape == (16_000,)
    assert read.dtype == np.float32
    strongest = np.abs(np.fft.rfft(read)).argmax()
    assert strongest == 440
    assert np.abs(read[1000:-1000]).max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("content", [b"", b"no media", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WAVE"])
@pytest.mark.parametrize("kind", ["image", "sound"])
def test_a_file_that_is_none_is_one_line_with_its_name(tmp_path, kind, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{path}: not a readable {kind} file") as refused:
        read_image(str(path), channels=3) if kind == "image" else read_sound(str(path), rate=8000)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["absent", "."])
def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path, name):
    for read in (lambda p: read_image(p, channels=3), lambda p: read_sound(p, rate=8000)):
        with pytest.raises(ConfigError, match=r": no such file$"):
            read(str(tmp_path / name))


def test_a_sound_file_without_samples_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r": holds no sound$"):
        read_sound(write_sound(tmp_path / "c.wav", np.zeros(0, np.float32)), rate=16_000)


def test_a_missing_library_is_named_with_its_remedy(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(media.importlib, "import_module", absent)
    path = write_sound(tmp_path / "d.wav", np.zeros(9, np.float32))
    with pytest.raises(ConfigError, match=r"pip install 'coterie\[audio\]'"):
        read_sound(path, rate=16_000)
