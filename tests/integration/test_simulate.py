"""The whole path, over real apps, a real (tiny) Transformer and real files."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.ledger import Store
from common import parameters
from common.coding import coded_bytes
from common.config import Coding
from common.privacy.accounting import Event, epsilon_pld
from common.tasks import build_model
from server.resume import stored_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_overrides):
    """One private run, shared by the tests that only read it."""
    from common import cli

    run_dir = tmp_path_factory.mktemp("run") / "private"
    assert cli.main(["simulate", *tiny_overrides, f"run_dir={run_dir}", "--json"]) == 0
    return run_dir


def final_vector(run_dir: Path) -> np.ndarray:
    return load_file(sorted((run_dir / "checkpoints").iterdir())[-1])["vector"]


def test_a_run_leaves_everything_the_contract_names(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml",
        "report.json",
        "report.html",
        "metrics.jsonl",
        "checkpoints",
        "ledgers",
        "model",
    }
    assert len(list((finished / "checkpoints").iterdir())) == 3
    assert not [path for path in finished.rglob("*") if path.name.startswith(".")]


def test_report_has_every_field_of_the_contract(finished):
    report = json.loads((finished / "report.json").read_text())
    assert {
        "task",
        "model",
        "tuning",
        "rounds",
        "engine",
        "privacy",
        "sites",
        "evaluation",
        "timing",
        "communication",
        "versions",
        "config_hash",
        "seed",
    } <= set(report)
    privacy = report["privacy"]
    assert privacy["mode"] == "record"
    assert privacy["unit"] == "record"
    assert privacy["private"] is True
    assert "Each site's own ledger charged every round" in privacy["private_reason"]
    assert privacy["scope"] == "this_run"
    assert privacy["selection_charged"] is False
    assert {"pld", "rdp", "prv"} == set(privacy["epsilon"])
    assert 0.98 * 8 <= privacy["epsilon"]["pld"] <= 8
    assert {"total_s", "train_s", "overhead_s"} == set(report["timing"])
    assert {"bytes_up", "bytes_down"} == set(report["communication"])
    for site in report["sites"]:
        told = {"name", "epsilon", "cap", "rounds", "repeated", "steps", "ledger_head"}
        assert told | {"not_answered", "noise_multiplier"} == set(site)
        assert site["not_answered"] == {}
        assert site["cap"] == 8.0
        assert (
            int(site["ledger_head"].split(":")[0]) == 9
        )  # genesis, plan, two rounds of three, a receipt
        assert site["steps"] == 4
        assert site["epsilon"] <= 8
    assert all(isinstance(value, float) for value in report["evaluation"].values())


def test_report_page_is_self_contained(finished):
    page = (finished / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "<script" not in page
    assert "http" not in page


def test_bytes_are_those_of_the_vectors(finished):
    report = json.loads((finished / "report.json").read_text())
    expected = (4 * final_vector(finished).size + 128) * 2 * 2
    assert report["communication"] == {"bytes_up": expected, "bytes_down": expected}


def run(coterie, tiny_overrides, run_dir, *overrides) -> np.ndarray:
    answer = coterie("simulate", *tiny_overrides, *overrides, f"run_dir={run_dir}", "--json")
    assert answer.code == 0, answer.err
    return final_vector(run_dir)


def test_a_coded_run_sends_a_quarter_back_and_learns_the_same(coterie, tiny_overrides, tmp_path):
    """Within what rounding adds: far less than the noise that is there anyway."""
    settings = ("privacy.noise=seeded", "federation.coding=")
    plain = run(coterie, tiny_overrides, tmp_path / "plain", settings[0])
    coded = run(coterie, tiny_overrides, tmp_path / "coded", settings[0], f"{settings[1]}int8")
    again = run(coterie, tiny_overrides, tmp_path / "again", settings[0], f"{settings[1]}int8")
    assert np.array_equal(coded, again)
    assert not np.array_equal(coded, plain)
    way = plain - parameters.flatten(build_model(stored_config(tmp_path / "plain")))
    assert np.linalg.norm(coded - plain) < 0.05 * np.linalg.norm(way)
    told = json.loads((tmp_path / "coded" / "report.json").read_text())["communication"]
    assert told["bytes_down"] == (4 * plain.size + 128) * 2 * 2
    assert told["bytes_up"] == (coded_bytes(plain.size, Coding.int8) + 128) * 2 * 2


def test_seeded_runs_are_bit_identical_and_stamped(coterie, tiny_overrides, tmp_path):
    first = run(coterie, tiny_overrides, tmp_path / "a", "privacy.noise=seeded")
    second = run(coterie, tiny_overrides, tmp_path / "b", "privacy.noise=seeded")
    other = run(coterie, tiny_overrides, tmp_path / "c", "privacy.noise=seeded", "seed=1")
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    weights = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("a", "b")
    ]
    assert weights[0] == weights[1]
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["privacy"]["private"] is False
    for name in ("report.html", "model/README.md", "report.json"):
        assert "NOT PRIVATE" in (tmp_path / "a" / name).read_text()


def test_private_runs_of_one_seed_differ(coterie, tiny_overrides, tmp_path):
    """Noise and coins come from the operating system; a seed must not reach them."""
    first = run(coterie, tiny_overrides, tmp_path / "a")
    second = run(coterie, tiny_overrides, tmp_path / "b")
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    assert not np.array_equal(first, second)
    assert cosine < 0.9999


def test_without_privacy_the_report_says_so(coterie, tiny_overrides, tmp_path):
    run(coterie, tiny_overrides, tmp_path / "a", "privacy=none")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["privacy"]["epsilon"] == {"pld": "inf", "rdp": "inf", "prv": "inf"}
    assert report["privacy"]["private"] is False
    assert report["sites"][0]["epsilon"] == "inf"


def test_training_learns(coterie, tiny_overrides, tmp_path):
    longer = [
        "privacy=none",
        "privacy.sample_rate=0.5",
        "federation.rounds=10",
        "federation.local_steps=30",
        "tuning.head_learning_rate=1",
        "tuning.adapter_learning_rate=0.05",
    ]
    run(coterie, tiny_overrides, tmp_path / "a", *longer)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["evaluation"]["accuracy"] > 0.8


def test_head_tuning_and_dirichlet_run_too(coterie, tiny_overrides, tmp_path):
    vector = run(
        coterie, tiny_overrides, tmp_path / "a", "tuning=head", "federation.partition=dirichlet"
    )
    assert vector.size == 2 * 32 + 2


def test_quorum_and_epsilon_count_every_round_asked(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert lines[0]["epsilon"] < lines[1]["epsilon"] <= 8
    assert lines[0]["asked"] == ["site-1", "site-2"]


def test_sites_count_their_own_records_within_the_same_epsilon(coterie, tiny_overrides, tmp_path):
    run_dir, sigma = tmp_path / "run", 3.0
    settings = [f"privacy.count_noise={sigma}", "privacy.spare_rounds=1", f"run_dir={run_dir}"]
    answer = coterie("simulate", *tiny_overrides, *settings, "--json")
    assert answer.code == 0, answer.err
    counted, privacy = answer.json["evaluation_private"], answer.json["privacy"]
    assert counted["sites"] == 2
    assert 0 <= counted["accuracy"] <= 1
    assert counted["standard_error"] == pytest.approx(sigma * 2**0.5 / counted["records"], rel=0.01)
    with Store(run_dir / "ledgers" / "sites.db") as store:
        for site in answer.json["sites"]:
            books = store.ledger(site["name"]).books
            assert Event(sigma, 1.0, 1) in books.charges()
            assert site["epsilon"] == pytest.approx(books.spent_pld(), abs=1e-6)
            assert site["ledger_head"] == str(books.head)
            planned = sum(plan.whole.steps for plan in books.plans.values())
            assert planned == 3 * 2 + 1  # two rounds and a spare of two steps, and the count
    rounds = {**privacy["mechanism"], "steps": 4}
    assert privacy["epsilon"]["pld"] > epsilon_pld([Event(**rounds)], 1e-3) + 0.01
    assert privacy["epsilon"]["pld"] < 8  # the spare round was not needed
    page = (run_dir / "report.html").read_text()
    assert "accuracy at the sites" in page
    assert "shows nobody a single update" in page
    assert len(privacy["guarantees"]) == 4
    again = coterie("report", run_dir)
    assert "as 2 sites counted" in again.out
    assert "Against whom" in again.out


def test_report_shows_the_baseline_beside(coterie, tiny_overrides, tmp_path, finished):
    run(coterie, tiny_overrides, tmp_path / "none", "privacy=none")
    answer = coterie("report", finished, "--baseline", tmp_path / "none", "--json")
    assert answer.code == 0
    assert "accuracy" in answer.json["baseline"]["evaluation"]
    assert "without privacy" in (finished / "report.html").read_text()


def test_predict_answers_with_the_released_model(coterie, finished):
    answer = coterie("predict", finished, "goal match team", "bank shares", "--json")
    assert answer.code == 0
    labels = [prediction["label"] for prediction in answer.json["predictions"]]
    assert set(labels) <= {"sport", "money"}
    assert len(labels) == 2


def test_predict_refuses_bytes_that_are_no_text(coterie, finished):
    answer = coterie("predict", finished, "goal", b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "coterie predict: text 2: is no UTF-8; write it in a UTF-8 terminal\n"


def test_sweep_gives_each_job_its_own_folder(coterie, tiny_overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    answer = coterie("simulate", *tiny_overrides, "-m", "seed=0,1", "run_dir=sweep")
    took_s = time.perf_counter() - started
    assert answer.code == 0, answer.err
    reports = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/report.json")]
    assert 0 < sum(report["timing"]["total_s"] for report in reports) < took_s
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["job-0", "job-1"]
    assert "coterie sweep-report sweep" in answer.out
    together = coterie("sweep-report", "sweep", "--json").json
    assert (together["runs"], together["rows"][0]["seeds"]) == (2, [0, 1])
    assert together["epsilon_together"] > max(row["epsilon"] for row in together["rows"])


@pytest.mark.slow
def test_jobs_of_a_sweep_run_at_a_time_under_hydras_launcher(tiny_overrides, tmp_path):
    """Real processes; the one that is refused says why, and the other one finishes."""
    sweep = ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "engine.threads=1")
    command = "import sys; from common.cli import main; sys.exit(main())"
    answer = subprocess.run(
        [
            *(sys.executable, "-c", command, "simulate", *tiny_overrides, *sweep),
            *("privacy.delta=1e-4,2", f"run_dir={tmp_path / 'sweep'}"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert answer.returncode == 2, answer.stderr
    assert "Traceback" not in answer.stderr
    assert "privacy.delta=2" in answer.stderr
    assert (tmp_path / "sweep" / "job-0" / "report.json").exists()
    assert not (tmp_path / "sweep" / "job-1").exists()
