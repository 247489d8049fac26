"""Model folders with one fault each: exit code 2, one line with the model, nothing written."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizerFast

from common.config import TaskName
from tests.common.toy import save_gpt2, save_vit

SECRET = "swordfish"


class Trap:
    """Unpickling it makes a folder where the test looks."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def away(*patterns):
    def spoil(folder):
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return spoil


def setting(name="config.json", **changes):
    def spoil(folder):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **changes}))

    return spoil


def weights(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def one(tensors, end):
    return next(name for name in tensors if name.endswith(end))


def not_a_number(tensors):
    tensors[one(tensors, "layer.1.output.dense.weight")][3, 5] = torch.nan


def infinite(tensors):
    tensors[one(tensors, "layer.0.output.dense.bias")][0] = -torch.inf


def other_shape(tensors):
    name = one(tensors, "layer.1.output.dense.weight")
    tensors[name] = tensors[name][:, :-1].contiguous()


def one_less(tensors):
    del tensors[one(tensors, "layer.1.output.dense.weight")]


def pickled(folder):
    away("*.safetensors")(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def shards(name):
    """Weights in a part, and an index that says where each is."""

    def spoil(folder):
        path = folder / "model.safetensors"
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(path), name)}
        path.rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def broken_index(folder):
    shards("part.safetensors")(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def code(name):
    """What would make a folder, if it ran."""

    def spoil(folder):
        own = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoTokenizer": ["own.T", None]}
        setting(name, auto_map=own)(folder)
        (folder / "own.py").write_text("import os\nos.mkdir('opened')\n")

    return spoil


def own_kind(folder):
    code("config.json")(folder)
    setting(model_type="own")(folder)


def larger_vocabulary(folder):
    words = (folder / "vocab.txt") if (folder / "vocab.txt").is_file() else None
    known = [*BertTokenizerFast.from_pretrained(folder).get_vocab()]
    away("vocab.txt", "tokenizer*.json")(folder)
    path = words or folder / "vocab.txt"
    path.write_text("\n".join([*known, *(f"more{n}" for n in range(9))]))
    BertTokenizerFast(vocab=str(path)).save_pretrained(folder)


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("a model")


def nothing(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def adapter(folder):
    """peft would fetch what it names, and not what the folder holds."""
    given = {"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(given))


def no_padding(folder):
    nothing(folder)
    save_gpt2(folder)
    setting("tokenizer_config.json", pad_token=None)(folder)


def vit(spoil):
    def made(folder):
        nothing(folder)
        save_vit(folder)
        spoil(folder)

    return made


IMAGES = TaskName.image_classification
QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FAULTS = {
    "an empty folder": (nothing, "no folder with a config.json"),
    "a file": (a_file, "no folder with a config.json"),
    "no config": (away("config.json"), "no folder with a config.json"),
    "a config that is not JSON": (text("config.json", "{"), "cannot be loaded ("),
    "a config that is a list": (text("config.json", "[]"), "cannot be loaded ("),
    "a config of nothing": (text("config.json", "{}"), "cannot be loaded ("),
    "a kind that nobody knows": (setting(model_type="unheard-of"), "cannot be loaded ("),
    "no layers": (setting(num_hidden_layers="two"), "expected int, got str"),
    "heads that do not divide": (setting(num_attention_heads=5), "cannot be loaded ("),
    "no weights": (away("*.safetensors"), "no weights in the folder"),
    "pickled weights": (pickled, "pickled weights are never opened"),
    "empty weights": (text("model.safetensors", ""), "cannot be loaded ("),
    "weights that are text": (text("model.safetensors", SECRET * 99), "cannot be loaded ("),
    "weights cut off": (cut, "cannot be loaded ("),
    "weights of another shape": (weights(other_shape), "cannot be loaded ("),
    "a weight away": (weights(one_less), "1 weights are not in its files, among them"),
    "a weight that is no number": (weights(not_a_number), "layer.1.output.dense.weight holds"),
    "an infinite weight": (weights(infinite), "layer.0.output.dense.bias holds"),
    "a part away": (shards("absent.safetensors"), "cannot be loaded ("),
    "an index that is not JSON": (broken_index, "cannot be loaded ("),
    "weights of four bits": (setting(quantization_config=QUANTIZED), "cannot be loaded ("),
    "an adapter's folder": (adapter, "holds an adapter"),
    "code beside it": (code("config.json"), "names code of its own (auto_map"),
    "code for a kind of its own": (own_kind, "names code of its own (auto_map"),
    "code of the tokenizer": (code("tokenizer_config.json"), "names code of its own (auto_map"),
    "no tokenizer": (away("tokenizer*", "vocab*", "special*"), "tokenizer"),
    "a tokenizer that is not JSON": (text("tokenizer.json", "{"), "tokenizer"),
    "a tokenizer of more words": (larger_vocabulary, "its tokenizer has 34 tokens, and the model"),
    "no padding": (no_padding, "its tokenizer has no padding token"),
    "no image processor": (vit(away("preprocessor_config.json")), "expected preprocessor_config"),
    "an image processor of nothing": (
        vit(text("preprocessor_config.json", "{}")),  # transformers guesses one
        "cannot read what task=image_classification gives it, pixel_values (3, 224, 224)",
    ),
    "code of the image processor": (
        vit(code("preprocessor_config.json")),
        "names code of its own (auto_map",
    ),
}
IN_A_PROCESS = ("weights cut off", "code for a kind of its own")


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    """A folder to work in that holds a model."""
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(fault, tiny_overrides):
    kept = [each for each in tiny_overrides if not each.startswith("model")]
    if "image" in fault:
        kept = [each for each in kept if not each.startswith(("data", "task"))]
        kept += ["data=toy", f"task={IMAGES.name}"]
    return ["simulate", *kept, "model.name=./model"]


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def assert_refused(code, err, message):
    assert code == 2, err
    assert err.startswith("coterie simulate: model.name=./model: ")
    assert message in err
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert "trust_remote_code" not in err  # no remedy of ours
    assert SECRET not in err


def test_there_are_enough_kinds_of_broken_models():
    assert len(FAULTS) >= 30


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_model_is_one_line_and_nothing_written(fault, place, tiny_overrides, coterie):
    spoil, message = FAULTS[fault]
    spoil(place / "model")
    before = contents(place)
    answer = coterie(*arguments(fault, tiny_overrides))
    assert_refused(answer.code, answer.err, message)
    assert contents(place) == before


@pytest.mark.parametrize("fault", IN_A_PROCESS)
def test_a_process_ends_with_the_code_and_the_line(fault, place, tiny_overrides):
    spoil, message = FAULTS[fault]
    spoil(place / "model")
    before = contents(place)
    program = "import sys; from common.cli import main; sys.exit(main())"
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments(fault, tiny_overrides)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert_refused(ran.returncode, ran.stderr, message)
    assert ran.stdout == ""
    assert contents(place) == before
