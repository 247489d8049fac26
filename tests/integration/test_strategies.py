"""Every strategy over real apps, a real (tiny) Transformer, books and files."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.strategies import StrategyName


@pytest.mark.slow  # a run each
@pytest.mark.parametrize("name", [each.name for each in StrategyName])
def test_a_federation_trains_under_every_strategy(name, coterie, tiny_overrides, tmp_path):
    settings = [*tiny_overrides, f"strategy={name}", "federation.sites=5", "tuning=head"]
    answer = coterie("simulate", *settings, f"run_dir={tmp_path / 'run'}", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["strategy"] == name
    assert answer.json["privacy"]["private"] is True
    assert 0.98 * 8 <= answer.json["privacy"]["epsilon"]["pld"] <= 8
    states = [
        load_file(tmp_path / "run" / "checkpoints" / f"round-{number:04d}.safetensors")
        for number in (0, 1, 2)
    ]
    assert all(np.isfinite(each).all() for state in states for each in state.values())
    assert not np.array_equal(states[1]["vector"], states[0]["vector"])
    assert not np.array_equal(states[2]["vector"], states[1]["vector"])
    assert f"rounds of {name};" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"strategy {name}." in (tmp_path / "run" / "report.html").read_text()
    assert (f"│ strategy         │ {name}" in answer.err) == (name != "fedavg")


@pytest.mark.parametrize("name", ["fedavg", "fedmedian"])
def test_a_plan_says_what_is_tolerated(name, coterie, tiny_overrides):
    settings = [*tiny_overrides, f"strategy={name}", "federation.sites=5", "tuning=head"]
    answer = coterie("plan", *settings, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["strategy"] == name
    assert answer.json["tolerated_sites"] == {"fedavg": 0, "fedmedian": 2}[name]
