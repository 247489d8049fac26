"""The released folder of every task, opened by transformers where Coterie cannot be imported."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from common import parameters
from common.config import HeadName, TaskName
from common.model import read_of
from common.tasks import TASKS, build_model
from server.release import answers_of, load_released, write_model
from tests.common.toy import toy_config

PIPELINES = {
    TaskName.text_classification: "text-classification",
    TaskName.image_classification: "image-classification",
    TaskName.audio_classification: "audio-classification",
    TaskName.causal_lm: "text-generation",
}
AUTO = {
    TaskName.question_answering: "AutoModelForQuestionAnswering",
    TaskName.seq2seq: "AutoModelForSeq2SeqLM",
}
"""Tasks whose pipelines transformers 5 has taken away: their model and tokenizer open."""
SOUND_S = 0.3

PLAIN = """
import importlib.abc, json, sys

class Refuses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"common", "client", "server", "simulations"}:
            raise ModuleNotFoundError(f"No module named {name}")

sys.meta_path.insert(0, Refuses())
try:
    import common
    raise SystemExit("coterie can be imported here")
except ModuleNotFoundError:
    pass

import numpy, torch, transformers
from transformers import AutoTokenizer, pipeline

asked = json.load(open(sys.argv[1]))
found = {}
for name, (how, folder, contents) in asked.items():
    if how.startswith("Auto"):
        model = getattr(transformers, how).from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if name == "seq2seq":
            inputs = tokenizer(contents, return_tensors="pt")
            written = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=1)
            found[name] = tokenizer.batch_decode(written, skip_special_tokens=True)
        else:
            with torch.inference_mode():
                output = model(**tokenizer(*contents, return_tensors="pt"))
            found[name] = [output.start_logits[0].tolist(), output.end_logits[0].tolist()]
        continue
    answer = pipeline(how, model=folder)
    if how == "text-generation":
        said = answer(contents, max_new_tokens=6, do_sample=False)
        found[name] = said[0]["generated_text"]
        continue
    given = numpy.array(contents) if how != "text-classification" else contents
    if how == "image-classification":
        given = given.astype("uint8")
    if how == "audio-classification":
        given = {"raw": given.astype("float32"), "sampling_rate": 16000}
    answers = answer(given, top_k=None if how == "text-classification" else 2)
    found[name] = {each["label"]: each["score"] for each in answers}
print(json.dumps(found))
"""


def asked_of(name):
    content = TASKS[name].toy_examples(1).contents[0]
    if name is TaskName.question_answering:
        return list(content[:2])
    if name is TaskName.seq2seq:
        return [content[0]]
    if name is TaskName.audio_classification:  # as in training: padded to what is kept
        return np.pad(content, (0, 16_000))[: round(16_000 * SOUND_S)].tolist()
    return content.tolist() if isinstance(content, np.ndarray) else content


@pytest.fixture(scope="module")
def folders(tiny_config, tiny_overrides, tmp_path_factory):
    """A released folder of every task; no parameter is as it was drawn."""
    from common import cli

    run = tmp_path_factory.mktemp("run") / "run"
    assert cli.main(["simulate", *tiny_overrides, f"run_dir={run}", "--json"]) == 0
    report = json.loads((run / "report.json").read_text())
    made = {}
    for name in TASKS:
        config = toy_config(name, tiny_config, tmp_path_factory.mktemp(name.name))
        if name.has_classes:
            config = replace(config, model=replace(config.model, head=HeadName.native))
        model = build_model(config)
        vector = parameters.flatten(model)
        vector += 0.3 * np.random.default_rng(3).normal(size=vector.shape).astype(np.float32)
        made[name] = tmp_path_factory.mktemp("released") / "model"
        write_model(made[name], model, vector, config, report)
    return made


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory):
    """What plain transformers answers, in a process of its own."""
    path = tmp_path_factory.mktemp("asked") / "asked.json"
    ways = PIPELINES | AUTO
    path.write_text(
        json.dumps({n.name: [ways[n], str(f), asked_of(n)] for n, f in folders.items()})
    )
    script = [sys.executable, "-I", "-c", PLAIN, str(path)]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_every_task_is_here():
    assert {*TASKS} == {*PIPELINES} | {*AUTO}
    assert not {*PIPELINES} & {*AUTO}


def test_tasks_without_a_pipeline_have_none_in_transformers():
    """The day one comes back, this says so."""
    from transformers.pipelines import PIPELINE_REGISTRY

    known = {*PIPELINE_REGISTRY.get_supported_tasks()}
    assert {*PIPELINES.values()} <= known
    assert not known & {"question-answering", "text2text-generation", "summarization"}


@pytest.mark.parametrize("name", [n for n in TASKS if n.has_classes], ids=lambda n: n.name)
def test_a_pipeline_gives_the_classes_the_probabilities_that_we_give(name, folders, found):
    task = TASKS[name]
    model, settings = load_released(folders[name])
    from common.config import ModelConfig

    processor = task.load_processor(ModelConfig(str(folders[name])))
    inputs = read_of(task.encode(processor, task.toy_examples(1), settings))
    with torch.inference_mode():
        ours = model(**inputs).softmax(1)[0].tolist()
    assert found[name.name] == pytest.approx(dict(zip(model.labels, ours, strict=True)), abs=1e-5)
    assert abs(ours[0] - 0.5) > 1e-3  # or a head of zeros would do


def test_a_mean_pooled_head_is_not_taken_for_another(tiny_config, folders, tmp_path):
    """Over another pooling it would answer, and wrongly."""
    from transformers import AutoModelForSequenceClassification

    config = toy_config(TaskName.text_classification, tiny_config, tmp_path)
    model = build_model(config)
    released = folders[TaskName.text_classification].parent / "mean"
    released.mkdir()
    TASKS[config.task.name].save(model, released, {"feature_scale": config.model.feature_scale})
    _, info = AutoModelForSequenceClassification.from_pretrained(released, output_loading_info=True)
    assert {"classifier.weight", "classifier.bias"} <= {*info["missing_keys"]}
    assert {"mean_pooled_head.weight", "mean_pooled_head.bias"} <= {*info["unexpected_keys"]}


def test_a_pipeline_continues_a_text_as_we_do(folders, found):
    prompt = asked_of(TaskName.causal_lm)
    (ours,) = answers_of(folders[TaskName.causal_lm], [prompt])
    assert found["causal_lm"].startswith(prompt)
    theirs = found["causal_lm"].removeprefix(prompt).strip()
    assert ours["continuation"].startswith(theirs) or theirs.startswith(ours["continuation"])
    assert theirs or not ours["continuation"]


def test_transformers_finds_the_ends_that_we_find(folders, found):
    name = TaskName.question_answering
    task = TASKS[name]
    model, settings = load_released(folders[name])
    from common.config import ModelConfig

    processor = task.load_processor(ModelConfig(str(folders[name])))
    inputs = read_of(task.encode(processor, task.toy_examples(1), settings))
    with torch.inference_mode():
        ours = model(**inputs)[0]
    tokens = len(found[name.name][0])
    assert tokens == int(inputs["attention_mask"].sum())
    for end in (0, 1):
        assert ours[:tokens, end].tolist() == pytest.approx(found[name.name][end], abs=1e-4)


def test_transformers_writes_what_we_write(folders, found):
    name = TaskName.seq2seq
    (ours,) = answers_of(folders[name], asked_of(name))
    assert [text.strip() for text in found[name.name]] == [ours["written"]]
