"""Freed memory stays, or goes back, as asked; elsewhere than on glibc nothing happens."""

import ctypes
import mmap
import platform
import subprocess
import sys

import pytest

from common import allocation

PEAK_AND_REST = """
import sys, torch
from pathlib import Path
from common import allocation
getattr(allocation, sys.argv[1])()
blocks = [torch.ones(1 << 21) for _ in range(32)]  # 256 MB, eight each
del blocks
status = Path("/proc/self/status").read_text()
peak, rest = (int(status.split(name)[1].split()[0]) for name in ("VmHWM:", "VmRSS:"))
print(peak - rest)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
@pytest.mark.parametrize(
    ("policy", "stays"), [("keep_freed_memory", True), ("return_freed_memory", False)]
)
def test_freed_memory_stays_or_goes_back(policy, stays):
    answer = subprocess.run(
        [sys.executable, "-c", PEAK_AND_REST, policy], capture_output=True, text=True, check=True
    )
    returned_kb = int(answer.stdout)
    assert returned_kb < 30_000 if stays else returned_kb > 220_000


def test_a_c_library_without_the_setting_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not allocation.keep_freed_memory()


def test_memory_is_given_back_where_it_grew_and_not_each_round(monkeypatch):
    trimmed = []
    monkeypatch.setattr(allocation, "trim_freed_memory", lambda: trimmed.append(True))
    pages = iter([100, 90, 107, 90, 109, 80, 96, 97])
    trimming = allocation.Trimming(lambda: next(pages))
    rounds = [trimming.after_round() for _ in range(8)]
    # The first, which prepares; the one above 1.2 times what was there a round later.
    assert rounds == [True, False, False, False, True, False, False, True]
    assert len(trimmed) == 3


def test_of_who_waits_what_is_free_goes_back_once_a_second_whatever_there_is(monkeypatch):
    monkeypatch.setattr(allocation, "trim_freed_memory", lambda: True)
    now = [0.0]
    trimming = allocation.Trimming(lambda: 1000, lambda: now[0], lambda: 0.4 * now[0])
    given_at = []
    for step in range(20):
        now[0] = 0.25 * step
        if trimming.after_round():
            given_at.append(now[0])
    assert given_at == [0.0, 1.0, 2.0, 3.0, 4.0]
    now[0] = 10.0
    assert trimming.after_round()
    now[0] = 12.0
    assert trimming.after_round()  # a round of two seconds: after each


def test_of_who_works_it_goes_back_after_five_seconds(monkeypatch):
    monkeypatch.setattr(allocation, "trim_freed_memory", lambda: True)
    now, worked = [0.0], [0.0]
    trimming = allocation.Trimming(lambda: 1000, lambda: now[0], lambda: worked[0])
    given_at = []
    for step in range(60):
        now[0], worked[0] = 0.25 * step, 0.25 * min(step, 40)  # after ten seconds it waits
        if trimming.after_round():
            given_at.append(now[0])
    assert given_at == [0.0, 5.0, 10.0, 11.0, 12.0, 13.0, 14.0]


def test_where_nobody_says_how_much_is_there_memory_is_given_back(monkeypatch, tmp_path):
    trimmed = []
    monkeypatch.setattr(allocation, "trim_freed_memory", lambda: trimmed.append(True))
    monkeypatch.setattr(allocation, "STATM", tmp_path / "statm")
    trimming = allocation.Trimming()
    for _ in range(6):
        trimming.after_round()
    assert len(trimmed) == 3


@pytest.mark.skipif(not allocation.STATM.exists(), reason="asks /proc")
def test_the_kernel_is_asked():
    before = allocation.resident_pages()
    with mmap.mmap(-1, 64 << 20) as held:  # new pages, whatever this process has freed
        held.write(b"x" * len(held))
        assert allocation.resident_pages() - before > 8000
