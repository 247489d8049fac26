"""A digest of the code beside the data changes with any of it, and with nothing else."""

import shutil
from pathlib import Path

import pytest

from common import code


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The packages elsewhere, and how to digest them there."""
    root = Path(code.__file__).parent.parent
    for name in code.PACKAGES:
        shutil.copytree(root / name, tmp_path / name)
    monkeypatch.setattr(code, "__file__", str(tmp_path / "common" / "code.py"))
    return tmp_path, code.code_digest.__wrapped__


CHANGES = {
    "edited": lambda root: (root / "client" / "app.py").write_text("pass\n"),
    "added": lambda root: (root / "client" / "clipping" / "more.py").write_text(""),
    "removed": lambda root: (root / "common" / "errors.py").unlink(),
    "renamed": lambda root: (root / "client" / "app.py").rename(root / "client" / "apps.py"),
    "swapped": lambda root: (
        (root / "client" / "app.py").rename(root / "x"),
        (root / "client" / "site.py").rename(root / "client" / "app.py"),
        (root / "x").rename(root / "client" / "site.py"),
    ),
}


def test_the_same_code_elsewhere_has_the_same_digest(copy):
    _, digest = copy
    assert digest() == code.code_digest()


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_shows(change, copy):
    root, digest = copy
    before = digest()
    CHANGES[change](root)
    assert digest() != before


def test_what_is_no_code_does_not_matter(copy):
    root, digest = copy
    before = digest()
    (root / "client" / "notes.txt").write_text("x")
    (root / "client" / "__pycache__").mkdir(exist_ok=True)
    (root / "client" / "__pycache__" / "app.cpython-311.pyc").write_bytes(b"x")
    assert digest() == before
