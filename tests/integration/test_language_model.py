"""A task without classes goes the whole way: run, report, card and answers."""

import json

from tests.common.toy import save_gpt2


def test_a_language_model_is_trained_reported_and_released(coterie, tiny_overrides, tmp_path):
    save_gpt2(tmp_path / "gpt2")
    run = tmp_path / "run"
    answer = coterie(
        "simulate",
        *(o for o in tiny_overrides if not o.startswith("model.name=")),
        "task=causal_lm",
        f"model.name={tmp_path / 'gpt2'}",
        "task.max_tokens=12",
        "tuning.targets=[]",
        "tuning.last_layers=0",
        "privacy.count_noise=5",
        f"run_dir={run}",
    )
    assert answer.code == 0, answer.err
    assert "perplexity" in answer.out
    report = json.loads((run / "report.json").read_text())
    assert [*report["evaluation"]] == ["perplexity", "token_accuracy"]
    assert "perplexity on public records" in (run / "report.html").read_text()
    card = (run / "model" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "AutoModel" not in card
    said = coterie("predict", run, "goal match")
    assert said.code == 0, said.err
    assert said.out.startswith("goal match ")
