"""The command for a file nobody has seen, on a file as odd as such files are."""

import csv
import io
import random

import pytest

from benchmarks.mail_corpora import CORPORA, TOPICS, Source, messages

ODD = "Ihr Konto läuft ab: “gratis” für £9"


def odd_file(rows, encoding):
    """As a spreadsheet saves it: an index, labels as typed, spare columns, an old encoding."""
    file = io.StringIO(newline="")
    lines = [(n, label, text, "", "") for n, (text, label) in enumerate(rows)]
    csv.writer(file).writerows([("", "Category", "Message", "", ""), *lines])
    return file.getvalue().encode(encoding)


@pytest.fixture
def mails(tmp_path):
    """150 messages to train on, with eight repeated and three empty ones, and 40 public ones."""
    draw = random.Random(0)

    def mail(n):
        words = draw.choices(["goal", "match", "team"] if n % 2 else ["bank", "loan", "today"], k=6)
        return f"Subject: {n}\r\n\r\n{' '.join(words)}\n> {ODD}", "Spam " if n % 2 else "HAM"

    rows = [mail(n) for n in range(150)]
    rows = [*rows, *rows[:8], ("", "ham"), (" \n", "spam"), ("", "")]
    (tmp_path / "train.csv").write_bytes(odd_file(rows, "cp1252"))
    public = [mail(n) for n in range(200, 240)]
    (tmp_path / "holdout.csv").write_bytes(odd_file(public, "utf-8-sig"))
    return tmp_path


def test_the_command_runs_on_it_and_only_the_screen_tells_how_many_were_empty(
    mails, tiny_overrides, coterie
):
    kept = [each for each in tiny_overrides if not each.startswith("data")]
    answer = coterie(
        "simulate",
        *kept,
        "data=csv",
        f"data.path={mails / 'train.csv'}",
        f"data.test_path={mails / 'holdout.csv'}",
        "data.text_column=Message",
        "data.label_column=Category",
        "data.labels=[spam,ham]",
        f"run_dir={mails / 'run'}",
        "--json",
    )
    assert answer.code == 0, answer.err
    assert answer.json["evaluation_records"] == 40
    told = " ".join(answer.err.split())
    assert "40 hold-out; 8 repeated texts dropped, 3 without a text left out" in told
    for path in (mails / "run").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"without a text" not in content
            assert b"Konto" not in content, path


@pytest.mark.parametrize("name", CORPORA)
def test_the_made_corpora_are_the_same_each_time(name):
    articles = {topic: [[f"{topic}{n}" for n in range(300)]] for topic in TOPICS}
    first, second = (messages(name, Source(random.Random(1), articles), 600) for _ in range(2))
    assert first == second
    assert messages(name, Source(random.Random(2), articles), 600) != first
    share = sum(label == "spam" for _, label in first) / 600
    assert abs(share - CORPORA[name][1]) < 0.06
    assert 0 < 600 - len({text for text, _ in first}) < 60
