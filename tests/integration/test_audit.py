"""`coterie audit` as people use it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from client.audit import CanaryTrainer
from client.ledger import Store
from client.train import Trainer
from common import cli
from common.canonical import digest
from common.privacy.noise import Randomness
from common.privacy.verification import verify
from simulations import mia
from tests.client.test_audit import fix_draws

KEYS = {"lower_bound", "claimed_epsilon", "confidence", "m", "design", "ceiling", "verdict"}
NEVER = ("verified", "safe ", "secure", "proven")


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A ledger that an officer opened."""
    folder = tmp_path_factory.mktemp("books")
    made = cli.main(
        [
            *("ledger", "init", str(folder / "books.db"), "--cap", "8", "--delta", "1e-3"),
            *("--dataset", "made", "--site", "ward-1", "--site", "ward-2"),
            *("--officer-key", str(folder / "officer.key")),
        ]
    )
    assert made == 0
    return folder / "books.db"


def check_result(result):
    assert set(result) >= KEYS
    assert (result["confidence"], result["verdict"]) == (0.95, "NOT FALSIFIED")
    assert 0 <= result["lower_bound"] <= result["ceiling"]


def test_the_mechanism_is_audited_printed_and_signed(coterie, tiny_overrides, books, monkeypatch):
    fix_draws(monkeypatch)
    asked = ["mechanism", *tiny_overrides, "tuning=head", "canaries=1000"]
    answer = coterie("audit", *asked, f"ledger={books}", "--json")
    assert answer.code == 0, answer.err
    check_result(answer.json)
    assert answer.json["m"] == 1000
    assert "subsampling" in answer.json["not_tested"]
    with Store(books) as store:
        for site in ("ward-1", "ward-2"):
            ledger = store.ledger(site)
            (entry,) = ledger.books.audits
            assert entry["report"] == digest(answer.json)
            assert {name: entry[name] for name in KEYS} == {n: answer.json[n] for n in KEYS}
            assert ledger.books.charges() == []
            assert verify(ledger.export().encode()).books.audits == [entry]
    shown = coterie("ledger", "show", books)
    assert "ward-1: audits: 1, of which 0 FALSIFIED" in " ".join(shown.out.split())
    person = coterie("audit", *asked)
    assert person.code == 0, person.err
    words = " ".join(person.out.split())
    for said in ("claimed", "lower bound", "95% confidence", "ceiling", "NOT FALSIFIED"):
        assert said in words
    assert "Not tested: subsampling" in words
    assert not any(word in words.lower() for word in NEVER)


def test_a_falsified_claim_is_printed_signed_and_exits_with_5(
    coterie, tiny_overrides, books, monkeypatch
):
    draw = Randomness.normal
    monkeypatch.setattr(
        Randomness, "normal", lambda stream, count, std=1.0: 0.3 * draw(stream, count, std)
    )
    asked = ["mechanism", *tiny_overrides, "tuning=head", "canaries=1000"]
    answer = coterie("audit", *asked, f"ledger={books}#ward-2", "--json")
    assert answer.code == 5
    assert answer.json["verdict"] == "FALSIFIED"
    assert answer.json["error"]["code"] == 5
    assert answer.json["lower_bound"] > answer.json["claimed_epsilon"]
    assert answer.json["alarms"] == ["noise-scale"]
    with Store(books) as store:
        assert store.ledger("ward-2").books.audits[-1]["verdict"] == "FALSIFIED"
        assert [a["verdict"] for a in store.ledger("ward-1").books.audits] == ["NOT FALSIFIED"]
    person = coterie("audit", *asked)
    assert person.code == 5
    assert "FALSIFIED: epsilon is at least" in person.err
    assert "lower bound" in person.out


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES = {
    "nothing": "nothing: no such audit; give one of mechanism, run, mia",
    "mechanism canaries=many": "canaries=many: must be a whole number",
    "mechanism canaries=10": "canaries=10: must be at least 1000",
    "mechanism ledger=nowhere.db": "nowhere.db: no such ledger",
    "mechanism privacy=none": "privacy=none: claims nothing",
    "mechanism privacy.noise=seeded": "privacy.noise=seeded: protects nothing",
    "mechanism privacy.epsilom=1": "did you mean privacy.epsilon?",
    "run privacy=none": "privacy=none: claims nothing",
    "run faults=rough": "faults: must be none with audit run",
    "run engine=ray": "engine=ray: must be local",
    "run canaries=5": "canaries=5: must be at least 100",
    "mia nowhere": "nowhere: ",
}
QUICK = ("nothing", "mechanism canaries=many", "mechanism ledger=nowhere.db")


def check_mistake(words, coterie, tiny_overrides, here):
    action, *rest = words.split()
    settings = [] if action in ("mia", "nothing") else tiny_overrides
    answer = coterie("audit", action, *settings, *rest)
    assert answer.code in (2, 5)
    assert MISTAKES[words] in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert "Traceback" not in answer.err
    assert [*here.iterdir()] == []


@pytest.mark.parametrize("words", QUICK)
def test_a_mistake_is_one_line(words, coterie, tiny_overrides, here):
    check_mistake(words, coterie, tiny_overrides, here)


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in MISTAKES if words not in QUICK])
def test_so_is_every_other(words, coterie, tiny_overrides, here):
    check_mistake(words, coterie, tiny_overrides, here)


def test_help_shows_an_example_of_each(coterie):
    for asked in ([], ["--help"], ["mechanism", "--help"]):
        answer = coterie("audit", *asked)
        assert answer.code == 0
        for action in ("mechanism", "run", "mia"):
            assert f"Example: coterie audit {action}" in answer.out


@pytest.fixture(scope="module")
def audited(tmp_path_factory, tiny_overrides):
    """A run with canaries."""
    run_dir = tmp_path_factory.mktemp("audited") / "run"
    asked = [*tiny_overrides, "tuning=head", "canaries=200", f"run_dir={run_dir}"]
    assert cli.main(["audit", "run", *asked, "--json"]) == 0
    return run_dir


@pytest.mark.slow
def test_a_run_is_audited_site_by_site_charged_and_signed(audited):
    content = json.loads((audited / "audit.json").read_text())
    report = json.loads((audited / "report.json").read_text())
    results = {result["site"]: result for result in content["audits"]}
    assert sorted(results) == [site["name"] for site in report["sites"]] == ["site-1", "site-2"]
    with Store(audited / "ledgers" / "sites.db") as store:
        for site in report["sites"]:
            result = results[site["name"]]
            check_result(result)
            assert result["m"] == 200
            books = store.ledger(site["name"]).books
            assert [r.state for r in books.reservations.values()] == ["released", "released"]
            assert books.spent_pld() == pytest.approx(site["epsilon"], abs=1e-6)
            assert result["claimed_epsilon"] == pytest.approx(site["epsilon"], abs=1e-3)
            (entry,) = books.audits
            assert entry["report"] == digest(result)
            assert verify(store.ledger(site["name"]).export().encode()).books.audits == [entry]


@pytest.mark.slow
def test_a_run_whose_canaries_are_not_protected_is_falsified(
    tmp_path, tiny_overrides, coterie, monkeypatch
):
    """What leaves holds the gradients once more, after the noise and past all meters."""

    def leaking(self, site, vector, *, round_number):
        found, measured = Trainer.train(self, site, vector, round_number=round_number)
        watched, leak = self._training, np.zeros_like(vector)
        for number, layer in enumerate(self.layers):
            own = watched.present[watched.canaries.layer == number]
            left, right = watched.canaries.left[number][own], watched.canaries.right[number][own]
            part = slice(layer.offset, layer.offset + layer.size)
            leak[part] = (left.T @ right).flatten().numpy()
        return found - np.float32(20.0) * leak * self._rates.astype(np.float32), measured

    monkeypatch.setattr(CanaryTrainer, "train", leaking, raising=False)
    asked = [*tiny_overrides, "canaries=400", f"run_dir={tmp_path / 'run'}"]
    answer = coterie("audit", "run", *asked, "privacy.epsilon=1", "--json")
    assert answer.code == 5
    assert {result["verdict"] for result in answer.json["audits"]} == {"FALSIFIED"}
    with Store(tmp_path / "run" / "ledgers" / "sites.db") as store:
        assert store.ledger("site-1").books.audits[0]["verdict"] == "FALSIFIED"


@pytest.mark.slow
def test_attacks_on_the_released_model(audited, coterie, monkeypatch):
    monkeypatch.setattr(mia, "FEWEST", 5)
    answer = coterie("audit", "mia", audited, "--json")
    assert answer.code == 0, answer.err
    assert "never says that the model is safe" in answer.json["note"]
    for result in answer.json["audits"]:
        check_result(result)
        assert result["design"].startswith("mia: ")
        assert 0 <= result["auc"] <= 1
        assert 0 <= result["tpr_at_1_percent_fpr"] <= 1
    person = coterie("audit", "mia", audited)
    assert person.code == 0
    assert "NOT FALSIFIED" in person.out


def test_an_attack_finds_who_fits_far_better(monkeypatch):
    draw = np.random.default_rng(0)
    inside, outside = draw.normal(5, 1, 600), draw.normal(0, 1, 600)
    scores, present = mia.fair_game(inside, outside, draw)
    assert abs(present.mean() - 0.5) < 0.1
    assert scores[present].mean() > 4 > scores[~present].mean()


def test_a_fair_game_takes_nobody_twice_and_no_more_than_there_are():
    draw = np.random.default_rng(0)
    inside, outside = np.arange(100.0), 1000 + np.arange(60.0)
    for _ in range(50):
        scores, present = mia.fair_game(inside, outside, draw)
        assert len(set(scores.tolist())) == len(scores)
        assert set(scores[present]) <= set(inside)
        assert set(scores[~present]) <= set(outside)


def test_what_a_run_claims_can_be_infinite():
    from common.privacy.lower_bounds import Audit, Bounds

    nothing = Audit("mia", Bounds(10, {"a": 1.0}, {"a": 2.0}), float("inf"), 1e-3)
    assert nothing.content()["claimed_epsilon"] == "inf"
    assert replace(nothing, claimed_epsilon=0.5).verdict == "FALSIFIED"
