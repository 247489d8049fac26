"""The benchmark that sets simulators side by side: it runs, and no arm can skip work unseen."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import processes
from benchmarks.simulation import check_agreement, installed

ROOT = Path(__file__).resolve().parents[2]
NAMED = {
    *("engine", "sites", "payload_bytes", "workers", "round_s", "cpu_s_per_site"),
    *("first_reply_s", "peak_rss_mb"),
}


def arm(name, *values):
    return SimpleNamespace(name=name, vector=np.float32(values))


def test_an_arm_with_other_parameters_than_the_loop_ends_the_benchmark():
    loop = np.float32([1, 2])
    check_agreement([arm("local", 1, 2.00001)], loop)
    with pytest.raises(AssertionError, match=r"local is 0\.5 from what it must be"):
        check_agreement([arm("pfl", 1, 2), arm("local", 1, 2.5)], loop)
    with pytest.raises(AssertionError):
        check_agreement([arm("local", float("nan"), 2)], loop)


def test_what_children_take_is_counted():
    """A process that sleeps, while its child's child works: as daemons do."""
    work = "x = bytearray(60_000_000)\nwhile True: x[0] = 1 - x[0]"
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    process = subprocess.Popen([sys.executable, "-c", inner])
    try:
        spent_s = 0.0
        while spent_s < 0.5:
            spent_s = processes.cpu_s(process.pid)
        members = processes.family(process.pid)
        assert len(members) == 2
        assert 57 < processes.resident_mb(process.pid) <= processes.peak_mb(process.pid) + 1
    finally:
        for pid in reversed(processes.family(process.pid)):
            os.kill(pid, 9)
        process.wait()


def test_peers_that_are_not_there_are_left_out():
    assert installed(sys.executable) == [
        name
        for name, module in (("ray", "ray"), ("pfl", "pfl"), ("flare", "nvflare"))
        if __import__("importlib.util").util.find_spec(module)
    ]


@pytest.mark.slow  # three processes that import torch
def test_a_small_case_runs_and_says_what_it_must(tmp_path):
    told = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.simulation", "--json", str(told)]
    more = ["--case", "quick-mlp", "--arms", "loop", "local"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *more], cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(row["engine"], row["workers"]) for row in rows] == [
        ("loop", 1),
        ("local", 1),
        ("local", 2),
    ]
    for row in rows:
        assert set(row) >= NAMED
        assert row["payload_bytes"] == 4 * 2410
        assert all(row[name] > 0 for name in ("round_s", "first_reply_s", "peak_rss_mb"))
