"""Every command in README and docs runs as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(page):
    text = page.read_text()
    return [line for block in FENCE.findall(text) for line in block.splitlines() if line.strip()]


def test_the_pages_hold_commands():
    assert len(commands(ROOT / "README.md")) >= 8


@pytest.fixture
def place(tmp_path, tiny_csv, tiny_persons_csv, monkeypatch):
    """The folder to be in, with the records that pages speak of."""
    (tmp_path / "records.csv").write_text(tiny_csv.read_text().replace("text,label", "body,topic"))
    letters = tiny_persons_csv.read_text().replace("text,label,person", "text,label,patient")
    (tmp_path / "letters.csv").write_text(letters)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow  # a process per command of the README
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_page_runs(page, place, tiny_overrides, coterie):
    """In the page's order, in one folder; jobs get the tiny model and data, appended, so that
    what is tried is the command and not the hour it would take. `make` targets are looked up.

    Those that need a shell are processes, and of the README the first of each of `coterie`'s
    commands; the rest run in this one, which has imported everything.
    """
    known = set()
    for command in commands(page):
        kind = tuple(command.split()[:2])
        new = page.name == "README.md" and kind not in known
        known.add(kind)
        code, said = run(command, place, tiny_overrides, None if new else coterie)
        assert code == 0, f"{command}\n{said}"


def run(command, folder, tiny_overrides, here):
    """Exit code and output. Args: here: runs `coterie` in this process, if it may."""
    if command.startswith("make "):
        target = shlex.split(command)[1]
        return ended(["make", "--dry-run", target], cwd=ROOT)
    if command.startswith("python "):
        words = shlex.split(command)
        script = words[1:3] if words[1] == "-m" else words[1:2]
        arguments = [sys.executable, *script, "--help"]
        return ended(arguments, cwd=ROOT)
    assert "coterie " in command, f"not a command this test knows: {command}"
    own_settings = "resume=auto" in command  # those of the run that it goes on with
    if (
        re.search(r"coterie (simulate|plan|preflight|audit (mechanism|run))\b", command)
        and not own_settings
    ):
        own = ["data=csv", *(o for o in tiny_overrides if not o.startswith(("data", "task")))]
        chosen = own[1:] if "data.path=" in command else tiny_overrides
        epsilon = re.findall(r"privacy\.epsilon=\S+", command) if "ledger=" in command else []
        settings = [*chosen, "task.max_tokens=12", "privacy.epsilon=8", *epsilon]
        command = f"{command} {shlex.join(settings)}"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if here and re.fullmatch(r"coterie [^|&;<>$`*?~!]+", command):
        answer = here(*shlex.split(command)[1:])
        return answer.code, answer.out + answer.err
    return ended(command, shell=True, cwd=folder, env=environment)


def ended(command, **more):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    return done.returncode, done.stdout + done.stderr
