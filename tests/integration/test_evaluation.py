"""What a run says of its model beside the metrics, and when it measures."""

import csv
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.ledger import Store

SEEDED = ["privacy.noise=seeded", "federation.rounds=3"]


def final_vector(run_dir):
    return load_file(sorted((run_dir / "checkpoints").iterdir())[-1])["vector"]


def metrics_of(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["metrics"] for line in lines]


@pytest.fixture(scope="module")
def every(tmp_path_factory, tiny_overrides):
    """Runs that differ in nothing but how often they measure."""
    from common import cli

    folder = tmp_path_factory.mktemp("every")
    for often in (0, 1, 2):
        settings = [*SEEDED, f"evaluation.every={often}", f"run_dir={folder / str(often)}"]
        assert cli.main(["simulate", *tiny_overrides, *settings]) == 0
    return folder


@pytest.mark.parametrize(("often", "measured"), [(0, [3]), (1, [1, 2, 3]), (2, [2, 3])])
def test_every_so_many_rounds_and_the_last_are_measured(every, often, measured):
    found = metrics_of(every / str(often))
    assert [number for number, metrics in enumerate(found, start=1) if metrics] == measured


def test_the_model_of_the_last_round_is_released_whatever_was_measured_before(every):
    vectors = [final_vector(every / str(often)) for often in (0, 1, 2)]
    assert all(np.array_equal(vectors[0], each) for each in vectors)
    weights = {(every / str(n) / "model" / "model.safetensors").read_bytes() for n in (0, 1, 2)}
    assert len(weights) == 1


def test_thinner_measurement_reports_the_same_final_numbers(every):
    reports = [json.loads((every / str(n) / "report.json").read_text()) for n in (0, 1, 2)]
    assert all(each["evaluation"] == reports[0]["evaluation"] for each in reports)
    assert all(each["evaluation_detail"] == reports[0]["evaluation_detail"] for each in reports)


def test_page_and_command_draw_a_run_that_was_measured_once(every, coterie):
    answer = coterie("report", every / "0")
    assert answer.code == 0, answer.err
    page = (every / "0" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 1  # seeded: no epsilon to plot
    assert page.count("<td></td>") == 2 * 2  # two metrics of two rounds


def split_by_home(path, target, *, changed=""):
    """Three homes; `changed` marks the texts of the third. The others stay as they are."""
    with path.open(newline="") as source, target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*next(reader := csv.reader(source)), "home"])
        for number, (text, label) in enumerate(reader):
            home = "abc"[number % 3]
            writer.writerow([f"{text} {changed}" if home == "c" else text, label, home])
    return target


LEAVE = ["federation.sites=3", "federation.partition=natural", "data.site_column=home"]
DECLARED = ["data.declared_records=84", "data.holdout_fraction=0", "data.validation_fraction=0"]


@pytest.fixture(scope="module")
def left_out(tmp_path_factory, tiny_overrides, tiny_csv):
    """A private run without site-3, and the public records apart in a file."""
    from common import cli

    folder = tmp_path_factory.mktemp("left-out")
    rows = tiny_csv.read_text().splitlines()
    (folder / "test.csv").write_text("\n".join([f"{rows[0]},home", *(f"{r},x" for r in rows[85:])]))
    (folder / "private.csv").write_text("\n".join(rows[:85]))
    split_by_home(folder / "private.csv", folder / "plain.csv")
    split_by_home(folder / "private.csv", folder / "changed.csv", changed="loan")

    def go(name, *overrides):
        own = [o for o in tiny_overrides if not o.startswith(("data.path", "federation.sites"))]
        files = [f"data.path={folder / name}.csv", f"data.test_path={folder / 'test.csv'}"]
        where = folder / "-".join([name, *overrides]).replace("=", "-")
        everything = [*own, *LEAVE, *DECLARED, *files, *overrides, f"run_dir={where}"]
        assert cli.main(["simulate", *everything]) == 0
        return where

    return go


def test_a_left_out_site_is_measured_and_stamped(left_out):
    run_dir = left_out("plain", "federation.leave_out=site-3")
    report = json.loads((run_dir / "report.json").read_text())
    found = report["evaluation_left_out"]
    assert (found["site"], found["records"], found["private"]) == ("site-3", 28, False)
    assert {*found["metrics"]} == {"accuracy", "macro_f1"}
    assert "nothing was charged" in found["reason"]
    assert found["reason"] in (run_dir / "report.html").read_text()
    assert all(isinstance(value, float) for value in report["evaluation"].values())
    assert report["evaluation_records"] == 36  # the public ones, and none of the site's


def test_a_left_out_site_is_not_charged_and_has_no_ledger(left_out):
    run_dir = left_out("plain", "federation.leave_out=site-2", "federation.quorum=0.9")
    report = json.loads((run_dir / "report.json").read_text())
    assert [site["name"] for site in report["sites"]] == ["site-1", "site-3"]
    with Store(run_dir / "ledgers" / "sites.db") as store:
        assert sorted(store.sites()) == ["site-1", "site-3"]


def test_what_a_left_out_site_holds_reaches_the_model_in_no_bit(left_out):
    """The promise that lets nothing be charged for it: its records train nothing."""
    settings = ["privacy.noise=seeded", "federation.leave_out=site-3"]
    plain, changed = left_out("plain", *settings), left_out("changed", *settings)
    assert np.array_equal(final_vector(plain), final_vector(changed))
    with_all = [left_out(name, "privacy.noise=seeded") for name in ("plain", "changed")]
    assert not np.array_equal(*map(final_vector, with_all))


def test_a_sweep_over_sites_ends_with_a_summary(coterie, tiny_overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sites = "federation.leave_out=site-1,site-2"
    answer = coterie("simulate", *tiny_overrides, "-m", sites, "run_dir=sweep", "--json")
    assert answer.code == 0, answer.err
    *reports, together = map(json.loads, answer.out.splitlines())
    assert [each["evaluation_left_out"]["site"] for each in reports] == ["site-1", "site-2"]
    told = together["leave_one_site_out"]
    assert told == json.loads((tmp_path / "sweep" / "leave_one_site_out.json").read_text())
    values = [each["evaluation_left_out"]["metrics"]["accuracy"] for each in reports]
    assert told["runs"][0]["mean"] == pytest.approx(sum(values) / 2, abs=1e-4)
    assert told["private"] is False


def test_a_coordinator_without_the_records_refuses_to_leave_one_out(tiny_config, tmp_path):
    """Only a simulation holds them; a deployment must not ask a site for them."""
    from dataclasses import replace

    from common.config import to_canonical
    from common.errors import ConfigError
    from server.app import CONFIG_KEY, Watch, server_app
    from simulations.run import _server_context
    from tests.server.fake_grid import FakeGrid

    config = replace(
        tiny_config,
        federation=replace(tiny_config.federation, leave_out="site-2"),
        run_dir=str(tmp_path / "run"),
    )
    assert "site-2" in to_canonical(config)
    context = _server_context(config)
    assert CONFIG_KEY in context.run_config
    app = server_app(lambda _: None, Watch(lambda *_: None, lambda _: None, lambda _: None))
    with pytest.raises(ConfigError, match="simulations only"):
        app(FakeGrid({2: "site-1"}, lambda *_: None), context)
    assert not (tmp_path / "run").exists()


def test_groups_of_public_records_are_reported(coterie, tiny_overrides, tiny_csv, tmp_path):
    path = split_by_home(tiny_csv, tmp_path / "homes.csv")
    own = [o for o in tiny_overrides if not o.startswith("data.path")]
    settings = [f"data.path={path}", "data.group_column=home", "data.holdout_fraction=0.6"]
    answer = coterie("simulate", *own, *settings, f"run_dir={tmp_path / 'run'}", "--json")
    assert answer.code == 0, answer.err
    groups = answer.json["evaluation_detail"]["groups"]
    assert [each["group"] for each in groups["groups"]] == ["a", "b", "c"]
    assert sum(each["records"] for each in groups["groups"]) == answer.json["evaluation_records"]
    found = {each["group"]: each["value"] for each in groups["groups"] if each["compared"]}
    assert found[groups["worst"]] == min(found.values())
    assert groups["gap"] == pytest.approx(max(found.values()) - min(found.values()), abs=1e-4)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>By home</h2>" in page
    again = coterie("report", tmp_path / "run")
    assert "by home: accuracy worst for" in again.out
