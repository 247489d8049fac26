"""Freed memory stays, or goes back, as asked; elsewhere than on glibc nothing happens."""

import ctypes
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
