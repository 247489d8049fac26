"""Every form of a model answers as the original, carries its card, and is whole or not there."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from common import cli
from common.config import ModelConfig, TaskName, from_yaml
from common.errors import ConfigError, VerificationError
from common.model import read_of
from common.pretrained import load_encoder
from common.tasks import TASKS
from server import adapter, exports, graph
from server.exports import BOUNDS, USE, Format, export_run
from server.release import load_released
from tests.common.toy import TINY

CASES = [
    (task, head)
    for task in TASKS
    for head in (("mean", "native") if task.has_classes else ("mean",))
]
QUICK = [(TaskName.image_classification, "native")]
IDS = [f"{task.name}-{head}" for task, head in CASES]


def overrides_of(task, head, tiny_overrides, folder):
    tiny = TINY[task]
    mine = [o for o in tiny_overrides if not o.startswith("data")]
    mine += ["data=toy", f"task={task.name}", "task.max_tokens=12", "task.max_target_tokens=4"]
    mine += ["task.max_seconds=0.3", f"model.head={head}"]
    if tiny.labels:
        mine.append(f"data.labels=[{','.join(tiny.labels)}]")
    if tiny.save is not None:
        tiny.save(folder)
        mine = [o for o in mine if not o.startswith("model.name=")] + [f"model.name={folder}"]
        mine.append(f"tuning.targets=[{','.join(tiny.tuning.get('targets', []))}]")
        mine.append("tuning.last_layers=0")
    return mine


@pytest.fixture(scope="module")
def runs(tiny_overrides, tmp_path_factory):
    """A finished LoRA run of a task and head, made when it is first asked for."""
    made = {}

    def run(task, head, *more):
        key = (task, head, more)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{task.name}-{head}")
            mine = overrides_of(task, head, tiny_overrides, folder / "pretrained")
            made[key] = folder / "run"
            arguments = [*mine, *more, f"run_dir={made[key]}", "--json"]
            assert cli.main(["simulate", *arguments]) == 0
        return made[key]

    return run


@pytest.fixture
def run(runs):
    return runs(TaskName.text_classification, "mean")


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """One run in every form: its folder, and what was said of it."""
    run, folder = runs(TaskName.text_classification, "mean"), tmp_path_factory.mktemp("exported")
    return {
        form: (folder / form.value, export_run(run, folder / form.value, form)) for form in Format
    }


@pytest.fixture
def damaged(run, tmp_path):
    """A copy of a run, to be damaged."""
    return shutil.copytree(run, tmp_path / "run")


def test_every_format_has_a_bound_and_a_writer():
    assert {*BOUNDS} == {*Format} == {*exports._WRITERS}
    assert {task for task, _ in CASES} == {*TASKS}


@pytest.mark.parametrize("form", [Format.merged, Format.adapter], ids=lambda f: f.value)
@pytest.mark.parametrize(("task", "head"), CASES, ids=IDS)
def test_weights_of_every_task_are_the_runs_to_rounding(task, head, form, runs, tmp_path):
    record = export_run(runs(task, head), tmp_path / "x", form)
    assert record["max_abs_error"] <= 1e-5 * max(1, record["largest_output"])
    assert record["agreement"] == 1
    assert record["largest_output"] > 0.1  # of a model that answers nothing, all exports agree
    assert [*(tmp_path / "x").rglob("*.safetensors")]
    assert not [p for p in (tmp_path / "x").rglob("*") if p.suffix in {".bin", ".pt", ".pkl"}]


def assert_graphs(run, folder, form):
    record = export_run(run, folder, form)
    assert record["max_abs_error"] <= BOUNDS[form] * max(1, record["largest_output"])
    if form is Format.onnx:
        assert record["agreement"] == 1
    assert not [*folder.rglob("*.safetensors")]
    return record


@pytest.mark.parametrize(("task", "head"), QUICK)
def test_a_graph_answers_as_the_model(task, head, runs, tmp_path):
    assert_graphs(runs(task, head), tmp_path / "onnx", Format.onnx)


@pytest.mark.slow
@pytest.mark.parametrize("form", [Format.onnx, Format.int8], ids=lambda form: form.value)
@pytest.mark.parametrize(("task", "head"), CASES, ids=IDS)
def test_a_graph_of_every_task_answers_as_the_model(task, head, form, runs, tmp_path):
    assert_graphs(runs(task, head), tmp_path / form.value, form)


def test_eight_bits_are_smaller_and_say_their_error(exported):
    whole, small = exported[Format.onnx][1], exported[Format.int8][1]
    assert small["bytes"] < whole["bytes"]
    assert small["max_abs_error"] > whole["max_abs_error"]  # else nothing was quantised


def test_a_graph_takes_any_number_of_records(run, exported):
    answers = graph.restore(exported[Format.onnx][0])
    config = from_yaml((run / "config.yaml").read_text())
    task = TASKS[config.task.name]
    made = read_of(task.made(task.load_processor(config.model), 5, config))
    model = load_released(run / "model")[0]
    for records in (1, 5):
        some = {name: tensor[:records] for name, tensor in made.items()}
        with torch.no_grad():
            assert torch.allclose(answers(some), model(**some), atol=1e-5)


@pytest.mark.parametrize("form", [*Format], ids=lambda form: form.value)
def test_the_card_and_the_record_state_privacy_and_error(form, run, exported):
    folder, record = exported[form]
    original = (run / "model" / "README.md").read_text()
    card = (folder / "README.md").read_text()
    assert card.startswith(original.partition(USE)[0].rstrip())
    assert "**epsilon " in card
    assert f"{record['max_abs_error']:.1e}" in card
    assert json.loads((folder / "export.json").read_text()) == record
    assert record["private"] is True
    assert (folder / "tokenizer.json").is_file()


def test_an_export_of_a_run_without_privacy_says_so(runs, tmp_path):
    run = runs(TaskName.text_classification, "mean", "privacy=none", "tuning=head")
    assert export_run(run, tmp_path / "x", Format.merged)["private"] is False
    assert "**NOT PRIVATE.**" in (tmp_path / "x" / "README.md").read_text()


@pytest.mark.parametrize(("task", "head"), CASES, ids=IDS)
def test_peft_opens_an_adapter_on_the_pretrained_model(task, head, runs, tmp_path):
    """As the card says, and the head comes along wherever transformers has one."""
    import transformers

    run = runs(task, head)
    export_run(run, tmp_path / "x", Format.adapter)
    config = from_yaml((run / "config.yaml").read_text())
    family = adapter.host_family(config)
    assert f"{family}.from_pretrained(" in (tmp_path / "x" / "README.md").read_text()
    labels = {"num_labels": 2} if family.endswith("Classification") else {}
    base = getattr(transformers, family).from_pretrained(config.model.name, **labels)
    opened = adapter.opened_by_peft(base, tmp_path / "x").eval()
    assert isinstance(opened, PeftModel)
    made = TASKS[task].made(TASKS[task].load_processor(config.model), 3, config)
    read = read_of(made)
    released = load_released(run / "model")[0]
    with torch.no_grad():
        ours = released(**dict(read))
        if head == "mean" and task.has_classes:
            assert (tmp_path / "x" / "head.safetensors").is_file()
            return
        if task is TaskName.seq2seq:
            written = read.pop("writes_ids")
            start = torch.full((3, 1), released.start)
            read["decoder_input_ids"] = torch.cat((start, written[:, :-1]), 1)
        found = opened(**read)
    if task is TaskName.question_answering:
        theirs = torch.stack((found.start_logits, found.end_logits), 2)
        seen = read["attention_mask"] > 0
        assert torch.allclose(theirs[seen], ours[seen], atol=1e-4)
    else:
        assert torch.allclose(found.logits, ours, atol=1e-4)


GRAPH_ALONE = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
inputs = {each.name: numpy.ones([3, *each.shape[1:]], "int64") for each in session.get_inputs()}
print(session.run(None, inputs)[0].shape)
assert not {"torch", "transformers", "common"} & {*sys.modules}
"""


def test_a_graph_runs_without_torch(exported):
    script = [sys.executable, "-I", "-c", GRAPH_ALONE]
    ran = subprocess.run(
        script,
        cwd=exported[Format.int8][0],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "(3, 2)"


def one_line(answer, code):
    assert answer.code == code
    assert len(answer.err.splitlines()) == 1
    return answer.json["error"]["message"]


def test_an_export_that_answers_otherwise_is_refused_and_leaves_nothing(coterie, run, tmp_path):
    answer = coterie("export", run, "--to", tmp_path / "x", "--max-error", "1e-12", "--json")
    assert "nothing was written" in one_line(answer, 5)
    assert [*tmp_path.iterdir()] == []


def test_a_released_model_that_is_not_the_checkpoints_is_refused(damaged, tmp_path):
    path = damaged / "model" / "model.safetensors"
    weights = load_file(path)
    weights["mean_pooled_head.bias"][0] += 0.1
    save_file(weights, path, metadata={"format": "pt"})
    for form in (Format.merged, Format.adapter):
        with pytest.raises(VerificationError, match="an output is off by"):
            export_run(damaged, tmp_path / "x", form)
    assert not (tmp_path / "x").exists()


def test_a_model_of_numbers_that_are_none_is_refused(damaged, tmp_path):
    path = damaged / "model" / "model.safetensors"
    weights = load_file(path)
    weights["mean_pooled_head.bias"] = weights["mean_pooled_head.bias"] * torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="an output is off by"):
        export_run(damaged, tmp_path / "x", Format.merged)


DAMAGES = {
    "no config": lambda run: (run / "config.yaml").unlink(),
    "config is no YAML": lambda run: (run / "config.yaml").write_text("{:"),
    "config of another kind": lambda run: (run / "config.yaml").write_text("a: 1"),
    "config is a list": lambda run: (run / "config.yaml").write_text("[1]"),
    "no card": lambda run: (run / "model" / "README.md").unlink(),
    "card of somebody": lambda run: (run / "model" / "README.md").write_text("hello"),
    "no model": lambda run: shutil.rmtree(run / "model"),
    "no checkpoint": lambda run: shutil.rmtree(run / "checkpoints"),
    "checkpoint cut off": lambda run: cut(run / "checkpoints" / "round-0002.safetensors"),
    "checkpoint of another model": lambda run: save_file(
        {"vector": torch.zeros(3)}, run / "checkpoints" / "round-0002.safetensors"
    ),
    "nothing": shutil.rmtree,
}


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_of_no_finished_run_is_one_line(damage, coterie, damaged, tmp_path):
    DAMAGES[damage](damaged)
    answer = coterie("export", damaged, "--to", tmp_path / "x", "--json")
    one_line(answer, 5)
    assert not (tmp_path / "x").exists()


def test_an_export_has_a_place_of_its_own_in_the_run(coterie, damaged):
    answer = coterie("export", damaged, "--json")
    assert answer.code == 0, answer.err
    assert (damaged / "exports" / "merged" / "export.json").is_file()


def test_mistakes_are_one_line(coterie, run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    taken = coterie("export", run, "--to", tmp_path / "full", "--json")
    assert "is not an empty folder; choose another" in one_line(taken, 2)
    assert (tmp_path / "full" / "file").read_text() == "kept"
    unknown = coterie("export", run, "--to", tmp_path / "x", "--format", "pickle", "--json")
    assert "'pickle' is not one of" in one_line(unknown, 2)
    for bound in ("0", "1", "-1", "nan"):
        wrong = coterie("export", run, "--to", tmp_path / "x", "--max-error", bound, "--json")
        assert "--max-error" in one_line(wrong, 2)
    assert not (tmp_path / "x").exists()


def test_a_place_that_the_export_would_spoil_is_refused(coterie, run, tmp_path, monkeypatch):
    """A copy inside the released model would be in the next export; a replaced folder is no cwd."""
    inside = run / "model" / "copy"
    answer = coterie("export", run, "--to", inside, "--json")
    assert "is inside the model that is exported" in one_line(answer, 2)
    assert not inside.exists()
    monkeypatch.chdir(tmp_path)
    assert "is the folder you are in" in one_line(
        coterie("export", run, "--to", tmp_path, "--json"), 2
    )
    assert not any(tmp_path.iterdir())


def test_an_adapter_of_a_run_without_one_is_refused(coterie, runs, tmp_path):
    run = runs(TaskName.text_classification, "mean", "privacy=none", "tuning=head")
    answer = coterie("export", run, "--to", tmp_path / "x", "--format", "adapter", "--json")
    assert "--format=adapter: the run has tuning=head" in one_line(answer, 2)
    assert not (tmp_path / "x").exists()


def test_a_pretrained_model_that_is_gone_is_one_line(coterie, runs, tmp_path):
    original = runs(TaskName.image_classification, "mean")
    run = shutil.copytree(original, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    gone = config.replace(str(original.parent / "pretrained"), str(tmp_path / "gone"))
    assert gone != config
    (run / "config.yaml").write_text(gone)
    answer = coterie("export", run, "--to", tmp_path / "x", "--format", "adapter", "--json")
    assert "no folder with a config.json" in one_line(answer, 2)


def test_without_the_extra_the_remedy_is_named(coterie, run, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "NEEDED", ("onnx", "a_package_nobody_has"))
    answer = coterie("export", run, "--to", tmp_path / "x", "--format", "onnx", "--json")
    assert "needs a_package_nobody_has; pip install 'coterie[export]'" in one_line(answer, 2)


class Forks(nn.Module):
    """What it does depends on its input: no graph says that."""

    def __init__(self):
        super().__init__()
        self.encoder = self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


def test_a_model_that_is_no_graph_is_one_line(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^--format=onnx: torch cannot export[^\n]*merged$"
    ) as no:
        graph.write(Forks(), {"x": torch.ones(3, 2)}, tmp_path)
    assert "\x1b" not in str(no.value)  # the exporter writes in colours
    assert "step" not in str(no.value)


def test_a_graph_that_does_not_open_is_one_line(exported, tmp_path):
    shutil.copy(exported[Format.onnx][0] / "model.onnx", tmp_path)
    cut(tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match=r"does not open [^\n]*$"):
        graph.restore(tmp_path)


@pytest.mark.parametrize("interrupt", [OSError, KeyboardInterrupt])
def test_an_interrupted_export_leaves_nothing(interrupt, run, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise interrupt

    monkeypatch.setattr(exports, "render", stop)
    with pytest.raises(interrupt):
        export_run(run, tmp_path / "x", Format.merged)
    assert [*tmp_path.iterdir()] == []


def test_the_merged_folder_is_a_released_one(coterie, run, tmp_path):
    export_run(run, tmp_path / "x" / "model", Format.merged)
    ours = coterie("predict", run, "goal match team", "--json").json
    assert coterie("predict", tmp_path / "x", "goal match team", "--json").json == ours


def test_a_merged_classifier_is_an_encoder_like_any_other(exported):
    encoder = load_encoder(ModelConfig(str(exported[Format.merged][0])))
    assert encoder.config.hidden_size == 32
