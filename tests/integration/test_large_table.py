"""The benchmark of large tables runs, at a size that takes seconds."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_table_costs_little_memory_beside_its_size(tmp_path, tiny_model):
    answer = tmp_path / "answer.json"
    # On a disk: of files in memory, as the suite's may be, every mapped page is memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        command = [
            *(sys.executable, "-m", "benchmarks.large_table", "--gigabytes", "0.2"),
            *("--json", str(answer), "--folder", folder),
            *(f"model.name={tiny_model}", "task.max_tokens=12", "engine.threads=1"),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        assert [*Path(folder).iterdir()] == []
    told = json.loads(answer.read_text())
    assert told["runs"]["large"]["rows"] > 50 * told["runs"]["small"]["rows"]
    assert told["runs"]["large"]["phases"]["reading"]["wall_s"] > 0
    assert told["extra_mb"]["anonymous"] < 100
