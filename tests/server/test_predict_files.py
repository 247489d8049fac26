"""Images and sounds from training to answers: the released folder, its card, and `predict`."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from PIL import Image

from common import parameters
from common.config import HeadName, TaskName
from common.tasks import TASKS, build_model
from server.release import load_released, write_model
from tests.common.toy import TINY, toy_config

BOTH = [TaskName.image_classification, TaskName.audio_classification]
NAMES = {BOTH[0]: "image.png", BOTH[1]: "sound.wav"}


@pytest.fixture(scope="module")
def report(tmp_path_factory, tiny_overrides):
    from common import cli

    run = tmp_path_factory.mktemp("run") / "run"
    assert cli.main(["simulate", *tiny_overrides, f"run_dir={run}", "--json"]) == 0
    return json.loads((run / "report.json").read_text())


@pytest.fixture(
    scope="module",
    params=[(name, head) for name in BOTH for head in HeadName],
    ids=lambda cell: f"{cell[0].name}-{cell[1].name}",
)
def config(request, tiny_config, tmp_path_factory):
    name, head = request.param
    config = toy_config(name, tiny_config, tmp_path_factory.mktemp("toy"))
    return replace(config, model=replace(config.model, head=head))


@pytest.fixture(scope="module")
def run(config, report, tmp_path_factory):
    """A run folder with a model that is no zero, and a file to ask it about."""
    run = tmp_path_factory.mktemp("released")
    model = build_model(config)
    vector = parameters.flatten(model)
    vector += 0.3 * np.random.default_rng(3).normal(size=vector.shape).astype(np.float32)
    write_model(run / "model", model, vector, config, report)
    content = TASKS[config.task.name].toy_examples(1).contents[0]
    if config.task.name is BOTH[0]:
        Image.fromarray(content[..., 0]).save(run / "model" / NAMES[config.task.name])
    else:
        soundfile.write(run / "model" / NAMES[config.task.name], content, 16_000, subtype="FLOAT")
    return run


def test_predict_answers_about_a_file(run, config, coterie):
    file = run / "model" / NAMES[config.task.name]
    answer = coterie("predict", run, file, file, "--json")
    assert answer.code == 0, answer.err
    first, again = answer.json["predictions"]
    assert first == again
    assert first["file"] == str(file)
    assert first["label"] in TINY[config.task.name].labels
    assert 0 < first["probability"] <= 1
    assert str(file) in coterie("predict", run, file).out


@pytest.mark.parametrize("content", [b"", b"plain text", None])
def test_predict_of_a_file_that_is_none_is_one_line(run, coterie, tmp_path, content):
    path = tmp_path / "odd"
    if content is not None:
        path.write_bytes(content)
    answer = coterie("predict", run, path, "--json")
    assert answer.code == 2
    assert answer.err.startswith(f"coterie predict: {path}: ")
    assert len(answer.err.splitlines()) == 1


def test_code_of_the_card_runs_as_it_stands_and_agrees_with_predict(run, config, coterie):
    card = (run / "model" / "README.md").read_text()
    tag = f"pipeline_tag: {config.task.name.name.replace('_', '-')}"
    assert (tag in card) == (config.model.head is HeadName.native)
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert ("pipeline(" in block) == (config.model.head is HeadName.native)
    script = [sys.executable, "-I", "-c", f"{block}\nprint(label)"]
    ran = subprocess.run(
        script,
        cwd=run / "model",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ},
    )
    assert ran.returncode == 0, ran.stderr
    answer = coterie("predict", run, run / "model" / NAMES[config.task.name], "--json")
    assert ran.stdout.strip() == answer.json["predictions"][0]["label"]


def test_what_the_task_reads_comes_back_with_the_model(run, config):
    assert load_released(run / "model")[1] == config.task
