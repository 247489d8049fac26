"""A bar says how far long reading is, to a person at a terminal, and to nobody else."""

import io

import pytest
from rich.console import Console

from simulations import run


def shown(*, terminal, patience):
    written = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "PATIENCE_S", patience)
        with run._telling(Console(file=written, force_terminal=terminal, width=80)) as told:
            for share in (0.0, 0.25, 1.0):
                told("reading data.path", share)
    return written.getvalue()


def test_a_bar_says_what_is_done_and_how_far():
    text = shown(terminal=True, patience=-1.0)
    assert "reading data.path" in text
    assert "100%" in text


def test_what_is_quick_or_read_by_a_machine_shows_none():
    assert shown(terminal=True, patience=60.0) == ""
    assert shown(terminal=False, patience=-1.0) == ""
