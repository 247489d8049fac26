"""A user's mistake: exit code 2, one line with the name in it, and nothing written."""

import pytest

MISTAKES = {
    "unknown key": (["privacy.epsilom=1"], "privacy.epsilom: no such setting; did you mean"),
    "forced unknown key": (["+privacy.extra=1"], "privacy.extra: no such setting"),
    "wrong type": (["privacy.epsilon=lots"], "privacy.epsilon=lots: must be a number"),
    "fraction of a site": (
        ["federation.sites=1.5"],
        "federation.sites=1.5: must be a whole number",
    ),
    "wrong choice": (["privacy.noise=loud"], "privacy.noise=loud: must be one of entropy, seeded"),
    "wrong group": (["privacy=all"], "privacy=all: must be one of none, person, record"),
    "epsilon zero": (["privacy.epsilon=0"], "privacy.epsilon=0.0: must be a finite number above 0"),
    "epsilon negative": (["privacy.epsilon=-1"], "privacy.epsilon=-1.0: must be"),
    "epsilon infinite": (["privacy.epsilon=inf"], "privacy.epsilon=inf: must be"),
    "delta too large": (["privacy.delta=0.1"], "privacy.delta=0.1: must be below 1/N"),
    "more sites than records": (
        ["federation.sites=5000"],
        "federation.sites=5000: must be at most",
    ),
    "no such file": (["data.path=nowhere.csv"], "data.path=nowhere.csv: no such file"),
    "no such column": (["data.text_column=body"], "data.text_column=body: no such column"),
    "a folder for a file": (["data.path=."], "data.path=.: is a folder; name a file in it, or"),
    "no column of labels": (["data.label_column=''"], "data.label_column='': must name a column"),
    "no column of texts": (["data.text_column=''"], "data.text_column='': must name a column with"),
    "a label of blanks": (
        ["data.labels=[sport,' ']"],
        "data.labels=['sport', ' ']: must be two or more different class names",
    ),
    "the private file as hold-out": (
        ["data.test_path=${data.path}"],
        "leaves no record to train on: 120 are public, 120 repeat others or public ones",
    ),
    "no such label column": (["data.label_column=y"], "data.label_column=y: no such column"),
    "model folder without weights": (["model.name=./empty"], "model.name=./empty: no weights"),
    "no such model folder": (["model.name=./absent"], "model.name=./absent: no folder"),
    "no such model": (["model.name=absent"], "model.name=absent: cannot be loaded"),
    "rank beyond any": (
        ["tuning.rank=1000000000"],
        "tuning.rank=1000000000: must be between 1 and",
    ),
    "step size beyond any": (
        ["tuning.head_learning_rate=1e300"],
        "tuning.head_learning_rate=1e+300: must be above 0 and at most 1e+06",
    ),
    "clip beyond any": (["privacy.clip_norm=1e300"], "privacy.clip_norm=1e+300: must be above 0"),
    "rounds beyond any": (
        ["federation.rounds=1000000000"],
        "federation.rounds=1000000000: must be",
    ),
    "steps beyond any": (
        ["federation.rounds=10000", "federation.local_steps=10000"],
        "federation.rounds=10000: must keep the steps of a site, 100,000,000",
    ),
    "rate that no ledger takes": (["privacy.sample_rate=1e-9"], "privacy.sample_rate=1e-09: must"),
    "batch beyond any": (
        ["engine.physical_batch=10000000"],
        "engine.physical_batch=10000000: must",
    ),
    "tokens beyond any": (["task.max_tokens=1000000000"], "task.max_tokens=1000000000: must be"),
    "coded and altered": (
        ["federation.coding=int8", "faults.flipped=0.5"],
        "federation.coding=int8: must be float32 with faults.flipped",
    ),
    "two at once": (["privacy.epsilon=0", "privacy.sample_rate=2"], "; privacy.sample_rate=2.0:"),
    "sigma too small": (["privacy.noise_multiplier=0.1"], "privacy.noise_multiplier=0.1: spends"),
    "missing labels": (["data.labels=???"], "no value for data.labels"),
    "no hold-out": (["data.holdout_fraction=0"], "evaluation.split=holdout: has no records"),
    "wrong declaration": (["data.declared_records=500"], "data.declared_records=500: the training"),
    "columns of a task that reads one": (
        ["data.columns=[text,label]"],
        "data.columns=[text,label]: must be left out with task=text_classification",
    ),
    "a column too few": (
        ["task=question_answering", "data.columns=[text,label]", "data.labels=[]"],
        "data.columns=[text,label]: must name 3 columns with task=question_answering: of question,",
    ),
    "no columns": (
        ["task=seq2seq", "data.text_column=text", "data.labels=[]"],
        "data.columns=[]: must name 2 columns with task=seq2seq: of source, target, in this order",
    ),
    "a column twice": (
        ["task=seq2seq", "data.columns=[text,text]", "data.labels=[]"],
        "data.columns=[text,text]: must be different columns",
    ),
    "not a word": (["privacy.epsilon=[1"], "an argument cannot be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_line_and_nothing_written(
    mistake, coterie, tiny_overrides, tmp_path, monkeypatch
):
    overrides, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    answer = coterie("simulate", *tiny_overrides, *overrides)
    assert answer.code == 2
    assert message in answer.err
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_used_run_folder_is_refused(coterie, tiny_overrides, tmp_path):
    (tmp_path / "precious").write_text("")
    answer = coterie("simulate", *tiny_overrides, f"run_dir={tmp_path}")
    assert answer.code == 2
    assert "is not an empty folder" in answer.err


def test_a_place_that_cannot_be_written_is_one_line(coterie, tiny_overrides, tmp_path):
    """The system says so, and not a rule of ours: Hydra would add a line with all settings."""
    (tmp_path / "file").write_text("kept")
    answer = coterie("simulate", *tiny_overrides, f"run_dir={tmp_path / 'file' / 'run'}")
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert str(tmp_path / "file") in answer.err
    assert (tmp_path / "file").read_text() == "kept"


def test_json_refusals_are_one_object(coterie, tiny_overrides):
    answer = coterie("simulate", *tiny_overrides, "privacy.epsilon=0", "--json")
    assert answer.code == 2
    assert answer.json["error"]["code"] == 2
    assert "privacy.epsilon" in answer.json["error"]["message"]


def test_names_that_look_like_markup_are_printed_as_they_stand(
    coterie, tiny_overrides, tiny_csv, tmp_path, monkeypatch
):
    """Folders, columns and groups are the user's to name: rich would read `[/x]` as a tag."""
    monkeypatch.chdir(tmp_path)
    header, *rows = tiny_csv.read_text().splitlines()
    groups = [f"{row},{('[/red]', '[bold]')[at % 2]}" for at, row in enumerate(rows)]
    (tmp_path / "r.csv").write_text("\n".join([f"{header},[/g]", *groups]))
    settings = ["data.path=r.csv", "data.group_column='[/g]'", "data.holdout_fraction=0.5"]
    answer = coterie("simulate", *tiny_overrides, *settings, "run_dir='runs/[/x]'")
    assert answer.code == 0, answer.err
    assert "runs/[/x]" in answer.out
    assert "by [/g]:" in answer.out
    assert {"[/red]", "[bold]"} <= {*answer.out.replace("(", " ").split()}
