"""Shared memory that has no name, and that nobody can change."""

import gc
import os

import numpy as np
import pytest

from simulations import segment
from simulations.segment import ALIGNED, Segment


def handles():
    return len(os.listdir("/proc/self/fd"))


def test_parts_are_found_where_they_are_said_to_be():
    parts = [b"abc", b"", bytes(range(200)), memoryview(np.arange(5.0)).cast("B")]
    made, places = Segment.of(parts)
    view = made.view()
    assert [bytes(view[start : start + size]) for start, size in places] == [
        bytes(p) for p in parts
    ]
    assert all(start % ALIGNED == 0 for start, _ in places)
    made.close()


def test_it_has_no_name():
    made, _ = Segment.of([b"abc"])
    assert os.fstat(made.handle).st_nlink == 0
    made.close()


def test_nobody_can_change_it_once_it_is_made():
    made, _ = Segment.of([b"abc"])
    for change in (lambda: os.pwrite(made.handle, b"x", 0), lambda: os.ftruncate(made.handle, 1)):
        with pytest.raises(OSError, match="not permitted"):
            change()
    assert made.view().readonly
    assert not np.frombuffer(made.view(), np.uint8).flags.writeable
    made.close()


def test_what_is_mapped_outlives_the_descriptor_and_goes_with_the_last_that_refers_to_it():
    before = handles()
    made, _ = Segment.of([np.arange(1000.0).data])
    values = np.frombuffer(made.view(), np.float64)
    made.close()
    assert values.sum() == 499500
    assert handles() == before + 1
    del values
    gc.collect()
    assert handles() == before


def test_a_copy_on_write_changes_nobody_elses():
    made, _ = Segment.of([bytes(4096)])
    mine, other = made.copied_on_write(), made.view()
    mine[0] = 7
    assert (mine[0], other[0]) == (7, 0)
    made.close()


def test_more_than_so_many_take_no_file_handles(monkeypatch):
    monkeypatch.setattr(segment, "MOST_MAPPED", len(segment._MAPPED) + 3)
    made, _ = Segment.of([b"abc"])
    before = handles()
    views = [made.view() for _ in range(50)]
    assert handles() == before + 3
    assert {bytes(view) for view in views} == {b"abc"}
    assert all(view.readonly for view in views)
    made.close()


def test_an_empty_one_is_empty():
    made, places = Segment.of([])
    assert (bytes(made.view()), places) == (b"", [])
    made.close()
