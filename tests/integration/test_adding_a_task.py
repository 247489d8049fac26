"""docs/adding-a-task.md adds a task to a copy of this checkout, and it works there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding-a-task.md").read_text(encoding="utf-8")
COPIED = ("common", "client", "server", "simulations", "conf", "tests", "benchmarks")
FILES = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
LINES = re.findall(r"^```python\n( {4}.*)\n```$", PAGE, re.MULTILINE)
COMMANDS = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy with the page's two files and its one line, and the line of the suite."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if (known := ROOT / ".mypy_cache").is_dir():  # by content: only what the page adds is read anew
        shutil.copytree(known, folder / ".mypy_cache")
    for name, text in FILES.items():
        assert not (folder / name).exists()
        (folder / name).write_text(text, encoding="utf-8")
    member, suite = LINES
    put(folder / "common" / "config.py", after='    seq2seq = "Seq2Seq", NO_CLASSES\n', line=member)
    put(folder / "tests" / "common" / "toy.py", after="] = {\n", line=suite)
    return folder


def put(path, *, after, line):
    text = path.read_text(encoding="utf-8")
    assert text.count(after) == 1
    path.write_text(text.replace(after, f"{after}{line}\n"), encoding="utf-8")


def python(checkout, *arguments):
    """Of the copy: its folder stands before everything that is installed."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def coterie(checkout, command, *more):
    words = shlex.split(command)
    assert words.pop(0) == "coterie"
    program = "import sys; from common.cli import main; sys.exit(main(sys.argv[1:]))"
    return python(checkout, "-c", program, *words, *more, "--json")


def test_the_page_holds_one_file_one_yaml_and_one_line():
    assert [*FILES] == ["common/tasks/text_regression.py", "conf/task/text_regression.yaml"]
    assert len(LINES) == 2  # of the program, and of its tests
    assert len(COMMANDS) == 1


@pytest.mark.slow  # two processes that import everything
def test_the_new_task_learns_privately_and_answers(checkout, tiny_model):
    simulate, predict = COMMANDS[0].splitlines()
    small = [f"model.name={tiny_model}", "task.max_tokens=12", "engine.threads=1"]
    more = ["federation.local_steps=10", "federation.rounds=6", "engine.physical_batch=256"]
    ran = coterie(checkout, simulate, *small, *more)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["task"] == "text_regression"
    assert report["privacy"]["private"] is True
    assert report["privacy"]["epsilon"]["pld"] <= 8
    assert [*report["evaluation"]] == ["mean_absolute_error", "rmse"]
    # The best constant is 1.0 off in the mean; four runs were 0.665 to 0.671.
    assert report["evaluation"]["mean_absolute_error"] < 0.85
    answered = coterie(checkout, predict)
    assert answered.returncode == 0, answered.stderr
    (prediction,) = json.loads(answered.stdout)["predictions"]
    assert isinstance(prediction["number"], float)
    card = (checkout / "runs" / "ratings" / "model" / "README.md").read_text()
    assert "```python" not in card  # code for classes would say nonsense of a number
    assert "coterie predict" in card


@pytest.mark.slow  # a suite in another process
def test_the_new_task_passes_the_contract_of_all_tasks(checkout):
    suite = [
        "-m",
        "pytest",
        "-q",
        "tests/common/test_tasks.py",
        "-k",
        "text_regression or each_name",
    ]
    ran = python(checkout, *suite)
    assert ran.returncode == 0, ran.stdout
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_the_file_of_the_page_is_in_order(checkout, tool):
    what = [] if tool == ["mypy"] else ["common/tasks/text_regression.py"]
    ran = python(checkout, "-m", *tool, *what)
    assert ran.returncode == 0, ran.stdout
