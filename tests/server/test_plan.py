"""The plan says what a run costs, and costs nothing itself."""

import contextlib
import dataclasses
import io
import json

import pytest

from common import cli
from common.config import NoiseSource, PrivacyMode
from common.privacy.accounting import Event, epsilon_pld
from common.privacy.mechanism import is_private

GOLDEN = [
    "privacy.noise_multiplier=1",
    "privacy.sample_rate=0.02",
    "federation.local_steps=20",
    "federation.rounds=5",
    "privacy.delta=1e-5",
    "privacy.epsilon=3",
]


def called(*arguments):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert cli.main([*arguments, "--json"]) == 0
    return json.loads(output.getvalue())


@pytest.fixture(scope="module")
def default():
    """The plan of the main job as it comes: BBC News, MiniLM."""
    return called("plan")


@pytest.fixture(scope="module")
def declared(tiny_overrides):
    return [*tiny_overrides, "data.declared_records=84"]


def test_plan_has_every_field_of_the_contract(default):
    assert set(default) == {
        "privacy",
        "noise_multiplier",
        "strategy",
        "tolerated_sites",
        "sample_rate",
        "clip_norm",
        "sites",
        "rounds",
        "steps_per_round",
        "steps",
        "charge_per_site",
        "spare_rounds",
        "trainable",
        "parameters",
        "bytes_per_message",
        "bytes_per_update",
        "bytes",
        "config_hash",
        "estimated_s",
    }
    assert set(default["privacy"]) == {
        "mode",
        "unit",
        "relation",
        "delta",
        "epsilon",
        "epsilon_by_round",
        "private",
    }
    assert default["privacy"]["mode"] == "record"
    assert default["privacy"]["unit"] == "record"
    assert default["privacy"]["relation"] == "add_or_remove_one"
    assert default["privacy"]["private"] is True
    assert default["estimated_s"] > 0


def test_counts_and_bytes_of_a_plan_belong_together(default):
    """MiniLM-L6, rank 8 on query and value of one block: 2 * 2 * 8 * 384, and a head 5 * 385."""
    assert default["trainable"] == 2 * 2 * 8 * 384 + 5 * 385
    assert default["bytes_per_message"] == 4 * default["trainable"]
    assert default["bytes_per_update"] == default["bytes_per_message"]
    assert default["bytes"] == 2 * 10 * 5 * default["bytes_per_message"]
    assert default["steps"] == default["rounds"] * default["steps_per_round"] == 20
    assert default["charge_per_site"] == {
        "noise_multiplier": default["noise_multiplier"],
        "sample_rate": 0.5,
        "steps": 20,
    }


def test_solved_noise_spends_the_budget_and_no_more(default):
    spent = default["privacy"]["epsilon_by_round"]
    assert len(spent) == 10
    assert spent == sorted(spent)
    assert len(set(spent)) == 10
    assert 0.98 * 3 <= spent[-1] <= 3
    assert spent[-1] == default["privacy"]["epsilon"]


def test_epsilon_of_a_plan_is_that_of_its_charge(default):
    """Priced again from the three numbers the plan shows, on the finer grid."""
    again = epsilon_pld([Event(**default["charge_per_site"])], default["privacy"]["delta"])
    assert again == pytest.approx(default["privacy"]["epsilon"], abs=2e-3)
    assert again <= 3


def test_golden_price_of_a_hundred_steps(coterie):
    """sigma 1, q 0.02, 100 steps, delta 1e-5: 1.427 by Google's PLD accountant, interval 1e-4."""
    answer = coterie("plan", *GOLDEN, "--json")
    assert answer.code == 0
    spent = answer.json["privacy"]["epsilon_by_round"]
    assert len(spent) == 5
    assert spent[-1] == pytest.approx(1.427, abs=0.002)
    assert spent[0] == pytest.approx(0.897, abs=0.002)


def test_json_is_one_object_on_one_line(coterie, declared):
    answer = coterie("plan", *declared, "--json")
    assert answer.code == 0
    assert len(answer.out.splitlines()) == 1
    assert isinstance(answer.json, dict)
    assert answer.err == ""


def test_table_for_a_person_shows_the_price(coterie, declared):
    answer = coterie("plan", *declared)
    assert answer.code == 0
    assert "epsilon" in answer.out
    assert "after round 2" in answer.out
    assert "NOT PRIVATE" not in answer.out


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["privacy.noise_multiplier=0.3"], "privacy.noise_multiplier=0.3: spends epsilon"),
        (["privacy.delta=0.03"], "privacy.delta=0.03: must be below 1/N"),
        (["federation.sites=85"], "federation.sites=85: must be at most 84"),
        (["tuning.last_layers=3"], "tuning.last_layers=3: must be at most 2"),
        (["model.name=./nowhere"], "model.name=./nowhere"),
    ],
)
def test_plan_that_cannot_be_kept_is_refused(overrides, named, coterie, declared):
    answer = coterie("plan", *declared, *overrides, "--json")
    assert answer.code == 2
    assert answer.json["error"]["kind"] == "ConfigError"
    assert named in answer.json["error"]["message"]
    assert len(answer.err.splitlines()) == 1


def test_delta_is_judged_by_the_records_of_one_site(coterie, declared):
    """84 records at 2 sites: the bound is 1/42 and not 1/84."""
    by_hand = [*declared, "privacy.noise_multiplier=5"]
    assert coterie("plan", *by_hand, "privacy.delta=0.023", "--json").code == 0
    assert coterie("plan", *by_hand, "privacy.delta=0.024", "--json").code == 2


def test_noise_by_hand_is_taken_as_it_is(coterie, declared):
    answer = coterie("plan", *declared, "privacy.noise_multiplier=5", "--json")
    assert answer.json["noise_multiplier"] == 5
    assert 0 < answer.json["privacy"]["epsilon"] < 4


def test_plan_without_privacy_says_so(coterie, declared):
    machine = coterie("plan", *declared, "privacy=none", "--json").json
    assert machine["privacy"]["private"] is False
    assert machine["privacy"]["epsilon"] == "inf"
    assert machine["privacy"]["epsilon_by_round"] == ["inf", "inf"]
    assert "NOT PRIVATE" in coterie("plan", *declared, "privacy=none").out


def test_seeded_noise_is_never_called_private(coterie, declared):
    machine = coterie("plan", *declared, "privacy.noise=seeded", "--json").json
    assert machine["privacy"]["private"] is False
    assert "NOT PRIVATE" in coterie("plan", *declared, "privacy.noise=seeded").out


def test_plan_opens_no_data(coterie, declared, tmp_path):
    """A file that no run could read is no hindrance to a plan."""
    path = tmp_path / "garbage.csv"
    path.write_bytes(b"\xff\xfe\x00\x01" * 100)
    overrides = [*declared, f"data.path={path}"]
    assert coterie("plan", *overrides, "--json").code == 0
    assert coterie("simulate", *overrides, f"run_dir={tmp_path / 'run'}", "--json").code == 2


def test_plan_writes_nothing(coterie, declared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert coterie("plan", *declared, "--json").code == 0
    assert list(tmp_path.rglob("*")) == []


def test_time_is_estimated_only_where_the_records_are_declared(coterie, tiny_overrides):
    assert "estimated_s" not in coterie("plan", *tiny_overrides, "--json").json


def test_a_plan_by_person_names_the_unit_and_costs_the_same_sigma(
    coterie, person_overrides, tiny_overrides
):
    """k is in the noise and not in its price."""
    known = "data.declared_records=84"
    by_person = coterie("plan", *person_overrides, known, "--json").json
    by_record = coterie("plan", *tiny_overrides, known, "--json").json
    assert by_person["privacy"]["unit"] == by_person["privacy"]["mode"] == "person"
    assert by_person["privacy"]["max_records_per_person"] == 3
    assert "max_records_per_person" not in by_record["privacy"]
    assert by_person["noise_multiplier"] == by_record["noise_multiplier"]
    assert by_person["charge_per_site"] == by_record["charge_per_site"]
    shown = " ".join(coterie("plan", *person_overrides, known).out.replace("│", " ").split())
    assert "Poisson rate 0.5 by person, with at most 3 records of each, clip 1" in shown
    assert "one person added or removed" in shown


def test_whether_a_run_is_private_follows_from_unit_and_noise(tiny_config, person_config):
    for config in (tiny_config, person_config):
        assert is_private(config)
        for change in ({"noise": NoiseSource.seeded}, {"mode": PrivacyMode.none}):
            privacy = dataclasses.replace(config.privacy, **change)
            assert not is_private(dataclasses.replace(config, privacy=privacy))


@pytest.mark.slow
def test_an_adapter_is_a_two_hundredth_of_the_full_model_on_the_wire(coterie):
    """What travels each way per round and site, of the pretrained MiniLM of the main job; with
    adapters in its top block, as by default, and in all of them.
    """

    def bytes_of(*overrides):
        answer = coterie("plan", "privacy=none", *overrides, "--json")
        assert answer.code == 0, answer.err
        return answer.json["bytes_per_message"]

    full = bytes_of("tuning=full")
    assert full > 90_000_000
    assert bytes_of("tuning=lora") <= full / 200
    assert bytes_of("tuning=lora", "tuning.last_layers=0") <= full / 200
    assert bytes_of("tuning=lora", "tuning.freeze_a=true") < bytes_of("tuning=lora")
