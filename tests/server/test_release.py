"""The released folder opens without Coterie, and nothing else opens as one."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common import classes, cli, parameters
from common.errors import VerificationError
from common.tasks import build_model, text_classification
from server import release
from server.release import answers_of, load_released, write_model

TEXTS = [
    "some text",
    "the a of in goal match team",
    "was on today said coach cup score",
    "the a of in bank shares profit",
    "was on today said market loan trade",
]

RUN_CARD = """
import json, sys
block, texts = json.load(open(sys.argv[1]))
labels = []
for text in texts:
    names = {}
    exec(block.replace('"some text"', repr(text)), names)
    labels.append(names["label"])
print(json.dumps([labels, sorted({"common", "server", "peft"} & set(sys.modules))]))
"""


def simulated(tmp_path_factory, overrides):
    run_dir = tmp_path_factory.mktemp("release") / "run"
    assert cli.main(["simulate", *overrides, f"run_dir={run_dir}", "--json"]) == 0
    return run_dir


@pytest.fixture(scope="module")
def private(tmp_path_factory, tiny_overrides):
    return simulated(tmp_path_factory, tiny_overrides)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_overrides):
    """Trained without privacy and for longer, so that it tells the classes apart."""
    longer = ["privacy=none", "federation.rounds=10", "federation.local_steps=10"]
    longer.append("tuning.head_learning_rate=1")
    return simulated(tmp_path_factory, [*tiny_overrides, *longer])


@pytest.fixture
def report(private):
    return json.loads((private / "report.json").read_text())


@pytest.fixture
def tiny_report(tiny_config, report):
    return tiny_config, report


@pytest.fixture
def folder(private, tmp_path):
    """A copy of a released model, to be damaged."""
    return shutil.copytree(private / "model", tmp_path / "model")


def block_of(card):
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return block


def test_card_of_a_private_run_states_the_guarantee(private, report):
    card = (private / "model" / "README.md").read_text()
    stated = float(re.search(r"\*\*epsilon ([\d.]+),", card)[1])
    assert 0 <= stated - report["privacy"]["epsilon"]["pld"] < 0.001  # rounded up, never down
    assert "delta 0.001**" in card
    assert "adding or removing one" in card
    assert "Not counted: " in card
    assert "NOT PRIVATE" not in card
    assert f"accuracy {report['evaluation']['accuracy']:.4f}" in card


def test_card_of_a_run_without_privacy_claims_none(plain):
    card = (plain / "model" / "README.md").read_text()
    assert "**NOT PRIVATE.**" in card
    assert "epsilon" not in card
    assert "protected" not in card


def test_code_of_the_card_runs_as_it_stands_and_agrees_with_predict(plain, coterie, tmp_path):
    """A reader copies it; only the text it asks about is replaced here."""
    block = block_of((plain / "model" / "README.md").read_text())
    assert block.count('"some text"') == 1
    compile(block, "card", "exec")
    (tmp_path / "block.json").write_text(json.dumps([block, TEXTS]))
    script = [sys.executable, "-I", "-c", RUN_CARD, str(tmp_path / "block.json")]
    ran = subprocess.run(
        script, cwd=plain / "model", capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    labels, ours = json.loads(ran.stdout)
    assert ours == []
    answer = coterie("predict", plain, *TEXTS, "--json")
    assert labels == [prediction["label"] for prediction in answer.json["predictions"]]
    assert set(labels) == {"sport", "money"}


def test_code_of_the_card_of_a_native_head_is_a_pipeline(
    compose_config, tiny_overrides, report, tmp_path, coterie
):
    config = compose_config(*tiny_overrides, "model.head=native")
    model = build_model(config)
    vector = parameters.flatten(model)
    vector += 0.3 * np.random.default_rng(3).normal(size=vector.shape).astype(np.float32)
    write_model(tmp_path / "model", model, vector, config, report)
    block = block_of((tmp_path / "model" / "README.md").read_text())
    assert 'pipeline("text-classification"' in block
    (tmp_path / "block.json").write_text(json.dumps([block, TEXTS]))
    script = [sys.executable, "-I", "-c", RUN_CARD, str(tmp_path / "block.json")]
    ran = subprocess.run(
        script, cwd=tmp_path / "model", capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    labels, ours = json.loads(ran.stdout)
    assert [name for name in ours if name != "peft"] == []  # transformers looks for peft itself
    answer = coterie("predict", tmp_path, *TEXTS, "--json")
    assert labels == [prediction["label"] for prediction in answer.json["predictions"]]


def test_released_weights_hold_no_adapter_and_no_pickle(private):
    names = {path.name for path in (private / "model").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    assert not [
        name for name in load_file(private / "model" / "model.safetensors") if "lora" in name
    ]


def test_released_model_is_that_of_the_final_checkpoint(private, tiny_config, tmp_path):
    vector = load_file(private / "checkpoints" / "round-0002.safetensors")["vector"]
    model = build_model(tiny_config)
    parameters.load(model, vector.numpy())
    released, _ = load_released(private / "model")
    inputs = {
        "input_ids": torch.arange(5, 17).reshape(2, 6),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
    }
    with torch.no_grad():
        assert torch.allclose(released(**inputs), model.eval()(**inputs), atol=1e-5)


def test_labels_keep_their_order(private):
    released, task = load_released(private / "model")
    assert released.labels == ["sport", "money"]
    assert task.max_tokens == 12


def edit_settings(**changes):
    def fault(folder):
        settings = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            if value is None:
                del settings[name]
            else:
                settings[name] = value
        (folder / "config.json").write_text(json.dumps(settings))

    return fault


def edit_weights(change):
    def fault(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return fault


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_encoder(weights):
    for name in [name for name in weights if not name.startswith("mean_pooled_head.")]:
        del weights[name]


HEAD = {"pooling": "mean", "feature_scale": 4.0, "max_tokens": 12, "task": "text_classification"}
FAULTS = {
    "no folder": shutil.rmtree,
    "no settings": lambda folder: (folder / "config.json").unlink(),
    "settings cut off": lambda folder: (folder / "config.json").write_text('{"coterie": '),
    "settings are a list": lambda folder: (folder / "config.json").write_text("[]"),
    "no coterie entry": edit_settings(coterie=None),
    "coterie entry is text": edit_settings(coterie="mean"),
    "no feature scale": edit_settings(coterie={k: HEAD[k] for k in HEAD if k != "feature_scale"}),
    "unknown task": edit_settings(coterie={**HEAD, "task": "translation"}),
    "no labels": edit_settings(id2label=None),
    "labels with a gap": edit_settings(id2label={"0": "sport", "2": "money"}),
    "one label more than the head": edit_settings(id2label={"0": "a", "1": "b", "2": "c"}),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut off": cut_weights,
    "weights are no safetensors": lambda folder: (folder / "model.safetensors").write_text("x"),
    "no head": edit_weights(lambda weights: weights.pop("mean_pooled_head.weight")),
    "head of another width": edit_weights(
        lambda weights: weights.update({"mean_pooled_head.weight": torch.zeros(2, 31)})
    ),
    "head of another class count": edit_weights(
        lambda weights: weights.update({"mean_pooled_head.weight": torch.zeros(3, 32)})
    ),
    "bias of another size": edit_weights(
        lambda weights: weights.update({"mean_pooled_head.bias": torch.zeros(3)})
    ),
    "no encoder weights": edit_weights(drop_encoder),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_folder_that_is_no_released_model_is_refused(fault, folder):
    FAULTS[fault](folder)
    with pytest.raises(VerificationError, match=re.escape(str(folder))):
        load_released(folder)


def test_undamaged_copy_is_opened(folder):
    """Or the refusals above would mean nothing."""
    labels = [answer["label"] for answer in answers_of(folder, ["goal match team"])]
    assert labels[0] in ("sport", "money")


def test_predict_of_a_folder_without_a_run_is_one_line(coterie, tmp_path):
    answer = coterie("predict", tmp_path, "some text", "--json")
    assert answer.code == 5
    assert len(answer.err.splitlines()) == 1
    assert answer.json["error"]["kind"] == "VerificationError"


def test_label_with_odd_characters_comes_back_whole(
    compose_config, tiny_overrides, report, tmp_path
):
    odd = '"quoted" & <b>, ü'
    config = compose_config(*tiny_overrides, "tuning=head")
    config.data.labels[:] = ["sport", odd]
    model = build_model(config)
    vector = parameters.flatten(model)
    vector[-1] = 100.0
    write_model(tmp_path / "model", model, vector, config, report)
    assert answers_of(tmp_path / "model", ["goal"])[0]["label"] == odd


STEPS = {"save_file": classes, "load_tokenizer": text_classification, "render": release}


@pytest.mark.parametrize("interrupt", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [*STEPS])
def test_interrupted_write_leaves_no_half_model(
    step, interrupt, tiny_report, tmp_path, monkeypatch
):
    tiny_config, report = tiny_report

    def stop(*_, **__):
        raise interrupt

    model = build_model(tiny_config)
    monkeypatch.setattr(STEPS[step], step, stop)
    with pytest.raises(interrupt):
        write_model(tmp_path / "model", model, parameters.flatten(model), tiny_config, report)
    assert list(tmp_path.iterdir()) == []
