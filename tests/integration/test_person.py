"""A run by person from the command line to its report, and the mistakes one can make of it."""

import json
from collections import Counter

import pytest

from client.ledger import Store
from common import cli
from common.data import load_splits
from common.privacy.verification import verify

ASSUMED = "nobody has records at two sites, or under two ids; such a person's bounds add up"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, person_overrides):
    """One run by person, shared by the tests that only read it."""
    run_dir = tmp_path_factory.mktemp("person") / "run"
    assert cli.main(["simulate", *person_overrides, f"run_dir={run_dir}", "--json"]) == 0
    return run_dir


def test_the_report_names_unit_bound_and_assumption(finished):
    report = json.loads((finished / "report.json").read_text())
    privacy = report["privacy"]
    assert privacy["mode"] == privacy["unit"] == "person"
    assert privacy["max_records_per_person"] == 3
    assert privacy["private"] is True
    assert privacy["private_reason"].startswith("Person-level DP-SGD inside each site")
    assert "at most 3 records, all or none of them in a step" in privacy["private_reason"]
    assert ASSUMED in privacy["private_reason"]
    assert 0.98 * 8 <= privacy["epsilon"]["pld"] <= 8
    assert {"pld", "rdp", "prv"} == set(privacy["epsilon"])


def test_page_and_card_say_it_in_plain_words(finished):
    page = " ".join((finished / "report.html").read_text().split())
    assert "Unit: one person with all of their records, added or removed." in page
    assert "can tell whether a person's records were in its data" in page
    assert "Of each person at most 3 records were used." in page
    assert ASSUMED.replace("'", "&#39;") in page
    assert "clip 1.0 a record, at most 3 records a person" in page
    card = " ".join((finished / "model" / "README.md").read_text().split())
    assert "Each person of a site is protected at **epsilon" in card
    assert "one person with all of their records, of which a site uses at most 3" in card
    assert ASSUMED in card
    assert "one record" not in page + card


def test_the_books_are_by_person_and_charge_the_events_of_a_run_by_record(finished):
    with Store(finished / "ledgers" / "sites.db") as store:
        for name in ("site-1", "site-2"):
            ledger = store.ledger(name)
            verified = verify(ledger.export().encode())
            assert verified.books.unit == "person"
            units = [e.body["unit"] for e in ledger.entries() if e.kind.value == "PLAN"]
            assert units == ["person"]
            assert [r.event.steps for r in verified.books.reservations.values()] == [2, 2]


def test_the_number_of_records_is_that_of_those_used(finished, compose_config, person_overrides):
    """The divisor is what a step expects of what may be used."""
    train = load_splits(compose_config(*person_overrides).data).train
    used = sum(min(count, 3) for count in Counter(train.persons).values())
    assert used < len(train)
    assert f"declared_records: {used}\n" in (finished / "config.yaml").read_text()


def test_no_id_of_a_person_is_in_any_file_of_a_run(finished):
    for path in finished.rglob("*"):
        if path.is_file():
            assert b"p07" not in path.read_bytes(), path


def test_a_baseline_is_compared_on_the_same_public_persons(
    coterie, person_overrides, tmp_path, finished
):
    """Splits go by person wherever persons are named, whatever is protected."""
    without = [
        "privacy=none",
        "privacy.max_records_per_person=null",
        f"run_dir={tmp_path / 'none'}",
    ]
    answer = coterie("simulate", *person_overrides, *without, "--json")
    assert answer.code == 0, answer.err
    assert coterie("report", finished, "--baseline", tmp_path / "none").code == 0


MISTAKES = {
    "no column": (["data.person_column="], "data.person_column='': must name the column"),
    "no such column": (["data.person_column=who"], "data.person_column=who: no such column"),
    "no bound": (
        ["privacy.max_records_per_person=0"],
        "privacy.max_records_per_person=0: must be at least 1",
    ),
    "a bound in words": (["privacy.max_records_per_person=few"], "max_records_per_person=few"),
    "a bound without persons": (["privacy=record"], "must be left out with privacy=record"),
    "more sites than persons": (["federation.sites=35"], "the number of training persons"),
    "wrong declaration": (["data.declared_records=120"], "the training split has "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_line_and_nothing_written(
    mistake, coterie, person_overrides, tmp_path, monkeypatch
):
    overrides, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    answer = coterie("simulate", *person_overrides, *overrides)
    assert answer.code == 2, answer.err
    assert message in answer.err
    assert answer.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_data_that_name_no_persons_are_refused(coterie, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = coterie("simulate", "privacy=person")
    assert answer.code == 2
    assert answer.err == (
        "coterie simulate: privacy=person: data=bbc_news names no persons; "
        "give data=csv with data.person_column\n"
    )


def made(coterie, folder, unit):
    answer = coterie(
        "ledger", "init", folder / "books.db", "--cap", "20", "--delta", "1e-3", "--dataset", "x",
        "--site", "site-1", "--site", "site-2", "--officer-key", folder / "officer.key",
        "--unit", unit,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return folder / "books.db"


def test_books_of_persons_take_runs_by_person_and_say_so(coterie, person_overrides, tmp_path):
    ledger = made(coterie, tmp_path, "person")
    run = ["simulate", *person_overrides, f"ledger={ledger}", f"run_dir={tmp_path / 'run'}"]
    assert coterie(*run).code == 0
    sites = coterie("ledger", "show", ledger, "--json").json["sites"]
    assert [(site["unit"], site["rounds"]) for site in sites] == [("person", 2)] * 2
    assert " person " in coterie("ledger", "show", ledger).out
    coterie("ledger", "export", f"{ledger}#site-1", "--output", tmp_path / "one")
    assert coterie("ledger", "verify", tmp_path / "one", "--json").json["unit"] == "person"
    assert "unit person; epsilon" in coterie("ledger", "verify", tmp_path / "one").out


@pytest.mark.parametrize("unit", ["record", "person"])
def test_lasting_books_of_another_unit_are_told_early(
    unit, coterie, person_overrides, tiny_overrides, tmp_path
):
    """Before the model is loaded or a plan shown: one line, with the remedy."""
    ledger = made(coterie, tmp_path, unit)
    overrides, mode = (
        (person_overrides, "person") if unit == "record" else (tiny_overrides, "record")
    )
    answer = coterie("simulate", *overrides, f"ledger={ledger}", f"run_dir={tmp_path / 'run'}")
    assert answer.code == 2
    assert answer.err == (
        f"coterie simulate: privacy.mode={mode}: must be {unit}, the unit of {ledger}#site-1; "
        f"give privacy={unit}, or other books\n"
    )
    assert answer.out == ""
    assert not (tmp_path / "run").exists()


def test_a_unit_that_is_none_is_refused_and_makes_no_file(coterie, tmp_path):
    answer = coterie(
        "ledger", "init", tmp_path / "books.db", "--cap", "20", "--delta", "1e-3", "--dataset", "x",
        "--site", "s", "--officer-key", tmp_path / "officer.key", "--unit", "household",
    )  # fmt: skip
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "unit=household: must be record or person" in answer.err
    assert list(tmp_path.iterdir()) == []
