import contextlib
import os
import shutil
from pathlib import Path

import pytest

from common.durable import folder_atomic, write_atomic


class CrashError(Exception):
    """Stands for whatever ends the process in the middle."""


def crash(*_args, **_kwargs):
    raise CrashError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"\x00bytes\xff", "text, é\n"])
def test_content_is_written_exactly(tmp_path, content):
    path = tmp_path / "new" / "folder" / "file"
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(path.parent) == ["file"]


def test_an_earlier_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "a much longer text than the next")
    write_atomic(path, "short")
    assert path.read_text() == "short"


@pytest.mark.parametrize("step", ["fdopen", "fsync", "chmod", "replace"])
@pytest.mark.parametrize("old", ["old", None])
def test_a_crash_leaves_the_old_file_or_none_and_nothing_temporary(
    tmp_path, monkeypatch, step, old
):
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)
    monkeypatch.setattr(os, step, crash)
    with pytest.raises(CrashError):
        write_atomic(path, "new")
    assert names(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_text() == old


def test_content_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch):
    """Renaming first would leave an empty file after a power cut."""
    calls = []

    def spy(name):
        real = getattr(os, name)

        def called(*args, **kwargs):
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, called)

    spy("fsync")
    spy("replace")
    write_atomic(tmp_path / "file", "new")
    assert calls == ["fsync", "replace", "fsync"]


def test_others_may_read_what_was_written(tmp_path):
    """Temporary files are private to their owner; the finished ones are not."""
    write_atomic(tmp_path / "file", "text")
    with folder_atomic(tmp_path / "folder"):
        pass
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def fill(folder, text):
    (folder / "inner").mkdir()
    (folder / "a").write_text(text)
    (folder / "inner" / "b").write_text(text)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


OLD = {"a": "old", "inner/b": "old"}
NEW = {"a": "new", "inner/b": "new"}


def test_a_folder_appears_whole_and_only_at_the_end(tmp_path):
    path = tmp_path / "above" / "folder"
    with folder_atomic(path) as temporary:
        fill(temporary, "new")
        assert not path.exists()
        assert temporary.parent == path.parent  # the rename must not cross file systems
    assert contents(path) == NEW
    assert names(path.parent) == ["folder"]


def test_an_earlier_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    fill(path, "old")
    (path / "only-old").write_text("old")
    with folder_atomic(path) as temporary:
        fill(temporary, "new")
    assert contents(path) == NEW
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("had_one", [True, False])
def test_a_crash_inside_the_block_leaves_the_old_folder_or_none(tmp_path, had_one):
    path = tmp_path / "folder"
    if had_one:
        path.mkdir()
        fill(path, "old")

    def half_written():
        with folder_atomic(path) as temporary:
            (temporary / "a").write_text("new")
            raise CrashError

    with pytest.raises(CrashError):
        half_written()
    assert names(tmp_path) == (["folder"] if had_one else [])
    assert not had_one or contents(path) == OLD


def replace_folder(path):
    with folder_atomic(path) as temporary:
        fill(temporary, "new")


def test_a_crash_while_flushing_leaves_the_old_folder(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    fill(path, "old")
    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(CrashError):
        replace_folder(path)
    assert contents(path) == OLD
    assert names(tmp_path) == ["folder"]


def test_a_crash_while_the_old_folder_is_removed_leaves_no_part_of_it(tmp_path, monkeypatch):
    """Removing many files is many steps; half of the old set under the name is no set at all."""
    path = tmp_path / "folder"
    path.mkdir()
    fill(path, "old")
    remove = shutil.rmtree

    def crash_halfway(folder, *args, **kwargs):
        monkeypatch.setattr(shutil, "rmtree", remove)
        (Path(folder) / "a").unlink()
        raise CrashError

    monkeypatch.setattr(shutil, "rmtree", crash_halfway)
    with contextlib.suppress(CrashError):
        replace_folder(path)
    assert not path.exists() or contents(path) in (OLD, NEW)


def test_a_link_in_the_place_of_a_folder_leaves_nothing_temporary(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OSError), folder_atomic(tmp_path / "link") as temporary:  # noqa: PT011 - which one, the system says
        (temporary / "a").write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
