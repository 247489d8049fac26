"""`engine=ray`: Flower's own simulation answers as this process would, and leaves nothing."""

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from client.ledger import Store
from common import cli
from common.config import NodeConfig
from common.records import Records
from common.spool import Kind, spooled
from simulations import cluster
from simulations.sites import Sites

HAS_RAY = importlib.util.find_spec("ray") is not None
NEEDS_RAY = pytest.mark.skipif(not HAS_RAY, reason="the extra `ray` is not installed")
COTERIE = [sys.executable, "-c", "import sys; from common.cli import main; sys.exit(main())"]
SEEDED = ["privacy.noise=seeded", "engine.threads=1"]


@pytest.fixture
def no_ray(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "ray" else found(name, *more),
    )


def test_without_ray_it_is_one_line_and_nothing_is_written(
    no_ray, tiny_overrides, tmp_path, capsys
):
    code = cli.main(["simulate", *tiny_overrides, "engine=ray", f"run_dir={tmp_path / 'run'}"])
    said = capsys.readouterr().err.strip()
    assert code == 2
    assert len(said.splitlines()) == 1
    assert "engine=ray" in said
    assert "pip install 'flwr[simulation]" in said
    assert not (tmp_path / "run").exists()


def test_a_plan_needs_no_ray(no_ray, tiny_overrides):
    assert cli.main(["plan", *tiny_overrides, "engine=ray"]) == 0


def test_records_of_a_table_travel_with_their_texts():
    """To a worker a spool goes as an open file; a process of Ray's may be on another machine."""
    texts = spooled([[["one", "two"]], [["three"]]], 1, kind=Kind.text)
    records = Records(texts, labels=None)
    sites = Sites({"site-1": records.contents}, ("a",), NodeConfig(), None)
    back = pickle.loads(cluster.packed(sites))
    assert [*back.records["site-1"]] == ["one", "two", "three"]


def run(engine, overrides, run_dir):
    """In a process of its own: Ray leaves warnings in the one it was started from."""
    settings = [*overrides, *SEEDED, f"engine={engine}", f"run_dir={run_dir}"]
    done = subprocess.run([*COTERIE, "simulate", *settings], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return run_dir


def final_vector(run_dir):
    return load_file(sorted((run_dir / "checkpoints").iterdir())[-1])["vector"]


def entries(run_dir):
    with Store(run_dir / "ledgers" / "sites.db") as store:
        return {
            name: [entry.kind for entry in store.ledger(name).entries()] for name in store.sites()
        }


@NEEDS_RAY
@pytest.mark.slow  # Ray takes ten seconds to start
def test_the_results_are_those_of_local_to_the_bit(tiny_overrides, tmp_path):
    local = run("local", tiny_overrides, tmp_path / "local")
    ray = run("ray", [*tiny_overrides, "engine.workers=2"], tmp_path / "ray")
    assert final_vector(ray).tobytes() == final_vector(local).tobytes()
    ours, theirs = (json.loads((d / "report.json").read_text()) for d in (ray, local))
    assert ours["evaluation"] == theirs["evaluation"]
    assert ours["engine"] == "ray"
    for site in (*ours["sites"], *theirs["sites"]):
        site.pop("ledger_head")  # of keys and nonces that are each run's own
    assert ours["sites"] == theirs["sites"]
    assert entries(ray) == entries(local)


@NEEDS_RAY
@pytest.mark.slow  # the same
@pytest.mark.parametrize("after", ["ray", "round"])
def test_a_ctrl_c_ends_it_and_all_of_ray(after, tiny_overrides, tmp_path):
    """While Ray starts, and in the middle of the rounds."""
    command = [*COTERIE, "simulate", *tiny_overrides, "engine=ray"]
    more = ["engine.workers=2", "federation.rounds=60", f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen([*command, *more], stderr=subprocess.DEVNULL)

    def waited():
        return ray_of(process.pid) if after == "ray" else lines.exists()

    lines = tmp_path / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not waited() and time.monotonic() < deadline:
            time.sleep(0.1)
        members = ray_of(process.pid)
        assert members
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        deadline = time.monotonic() + 10
        while (left := [p for p in members if is_alive(p)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left
    finally:
        process.kill()
        process.wait()


def ray_of(pid):
    """Ray's own processes among the descendants of one."""
    from benchmarks.processes import family

    names = {each: Path(f"/proc/{each}/cmdline") for each in family(pid) if each != pid}
    return [each for each, path in names.items() if path.exists() and "ray" in path.read_text()]


def is_alive(pid):
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
