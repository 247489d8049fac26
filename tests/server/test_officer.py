"""The officer's report: figures are the ledgers' own, words are plain, nothing needs explaining."""

import json
import math
import re
import runpy
import shutil
from pathlib import Path

import jsonschema
import pytest

from client.ledger import Store
from common import cli
from common.privacy import watched
from common.privacy.accounting import Event, shown
from common.privacy.stored import read_chains
from server import officer_words as words
from server.officer import officer_report
from server.officer_page import chance, odds, page
from server.spent_plot import Point, drawing
from tests.server.witnesses import Party

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "officer-report.schema.json").read_text())
MAKE = runpy.run_path(str(ROOT / "tests" / "assets" / "make_ledgers.py"))
ASSETS = ROOT / "tests" / "assets" / "ledgers"
FILES = ("officer-report.html", "officer-report.json")


@pytest.fixture(scope="module")
def lasting(tmp_path_factory, tiny_overrides):
    """A run on lasting books, whose officer has a key; rounds of another one, which the filter
    admitted, after it.
    """
    folder = tmp_path_factory.mktemp("officer")
    sites = [part for number in (1, 2) for part in ("--site", f"site-{number}")]
    common = ["--cap", "20", "--delta", "1e-3", "--dataset", "made", *sites]
    key = ["--officer-key", str(folder / "officer.key")]
    assert cli.main(["ledger", "init", str(folder / "books.db"), *common, *key]) == 0
    own = [*tiny_overrides, "privacy.epsilon=4", f"ledger={folder / 'books.db'}"]
    assert cli.main(["simulate", *own, f"run_dir={folder / 'first'}", "--json"]) == 0
    event, rounds = Event(3.0, 0.5, 2), {"rounds": 2, "spare_rounds": 0}
    with Store(folder / "books.db") as store:
        for ledger in map(store.ledger, store.sites()):
            ledger.commit("later", event, **rounds, plan="2" * 64, model="tiny", unit="record")
            for number in (1, 2):
                reservation = ledger.reserve("later", number, event)
                ledger.prepare(reservation, b"update", steps=2)
                ledger.release(reservation)
    return folder


@pytest.fixture
def exports(lasting, tmp_path):
    paths = []
    with Store(lasting / "books.db") as store:
        for site in store.sites():
            paths.append(tmp_path / f"{site}.ledger")
            paths[-1].write_text(store.ledger(site).export())
    return paths


def checked(content):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(content, SCHEMA)
    return content


def test_its_figures_are_those_of_ledger_verify(lasting, exports, tmp_path, coterie):
    answer = coterie("report", "--for", "officer", *exports, "--output", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    content = checked(answer.json)
    assert "run" not in content
    assert len(content["sites"]) == 2
    text = (tmp_path / "out" / FILES[0]).read_text()
    for site, export in zip(content["sites"], exports, strict=True):
        judged = coterie("ledger", "verify", export, "--json").json
        assert site["epsilon"] == judged["epsilon"]
        assert site["epsilon"]["proved"] > site["epsilon"]["pld"]  # by the filter
        assert (site["cap"], site["delta"]) == (judged["cap"], judged["delta"])
        assert site["verification"]["head"] == judged["head"]
        assert site["history"][-1]["epsilon"] == judged["epsilon"]["proved"]
        assert f"{math.ceil(1000 * judged['epsilon']['proved']) / 1000:.3f}" in text
    assert json.loads((tmp_path / "out" / FILES[1]).read_text()) == content


def test_a_run_is_held_against_the_ledgers_and_not_copied(lasting, tmp_path, coterie):
    run = tmp_path / "run"
    shutil.copytree(lasting / "first", run)
    answer = coterie("report", "--for", "officer", run, "--json")
    assert answer.code == 0, answer.err
    content = checked(answer.json)
    assert content["summary"]["claims_agree"]
    assert content["run"]["simulated"]
    own = [check for check in content["sites"][0]["checks"] if check["what"].startswith("epsilon")]
    assert {check["what"] for check in own} >= {"epsilon when the run ended"}
    # A run that claims less than its ledgers say is found out.
    report = json.loads((run / "report.json").read_text())
    spent = report["sites"][0]["epsilon"]
    report["sites"][0]["epsilon"] = spent - 0.1
    (run / "report.json").write_text(json.dumps(report))
    content = checked(coterie("report", "--for", "officer", run, "--json").json)
    assert not content["summary"]["claims_agree"]
    then = next(each for each in content["sites"][0]["checks"] if "when the run" in each["what"])
    assert not then["agrees"]
    assert then["measured"] == shown(spent)
    assert content["sites"][0]["epsilon"]["proved"] > spent  # the ledger has gone on since
    assert "does not agree" in (run / FILES[0]).read_text()
    report["sites"][0]["ledger_head"] = f"5:{'a' * 64}"
    (run / "report.json").write_text(json.dumps(report))
    refused = coterie("report", "--for", "officer", run)
    assert refused.code == 5
    assert "does not contain the head" in refused.err


def test_the_curve_rises_to_the_cap_and_never_falls(lasting):
    for chain in read_chains(str(lasting / "books.db")):
        (site,) = officer_report([chain])["sites"]
        spent = [point["epsilon"] for point in site["history"]]
        assert spent == sorted(spent)
        assert spent[0] == 0
        assert spent[-1] == site["epsilon"]["proved"] <= site["cap"]
        assert len(site["history"]) == 1 + site["rounds"]["charged"] == 5
        assert len({point["run"] for point in site["history"]}) == 3


def test_a_signed_report_is_checked_and_an_edited_one_found(lasting, exports, tmp_path, coterie):
    out, key = tmp_path / "out", lasting / "officer.key"
    made = coterie("report", "--for", "officer", exports[0], "--output", out, "--sign", key)
    assert made.code == 0, made.err
    signature = out / "officer-report.sig"
    public = coterie("ledger", "verify", exports[0], "--json").json["officer_key"]
    good = coterie("report", "--check", signature, "--key", public, "--json")
    assert good.json["key_pinned"]
    assert good.json["files"] == sorted(FILES)
    assert "key not pinned" in coterie("report", "--check", signature).out
    assert coterie("report", "--check", signature, "--key", "ab" * 32).code == 5
    for name in FILES:
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole.replace(b"3", b"2", 1))
        edited = coterie("report", "--check", signature)
        assert edited.code == 5
        assert f"{name}: is not the file that was signed" in edited.err
        (out / name).write_bytes(whole)
    text = signature.read_text()
    for bad in (
        "",
        "{}",
        "[1]",
        text.replace('"signed"', '"sealed"'),
        text.replace(public, "0" * 64),
    ):
        signature.write_text(bad)
        assert coterie("report", "--check", signature).code == 5
    signature.write_text(text.replace('"signed":"2', '"signed":"3'))
    assert "its signature is not" in coterie("report", "--check", signature).err
    # Another report in its place takes the old signature away.
    assert coterie("report", "--for", "officer", exports[0], "--output", out).code == 0
    assert not signature.exists()


def test_pins_and_the_witness_are_told_of(exports, lasting, tmp_path, coterie):
    party = Party(tmp_path)
    ids = []
    for export in exports:
        answer = coterie("witness", "enrol", party.folder.path, export, "--node", "n", "--json")
        ids.append(answer.json["id"])
    known = coterie("ledger", "verify", exports[0], "--json").json
    site_key = answer.json["site_key"]
    with party.serving() as address:
        words = ("--key", site_key, "--officer", known["officer_key"], "--witness", address)
        answer = coterie(
            "report", "--for", "officer", *exports, *words, "--pass", party.admit("officer"),
            "--output", tmp_path / "out", "--json",
        )  # fmt: skip
    party.book.close()
    assert answer.code == 0, answer.err
    content = checked(answer.json)
    assert content["summary"]["pinned"]
    assert [site["verification"]["witness"]["ledger"] for site in content["sites"]] == ids
    text = (tmp_path / "out" / FILES[0]).read_text()
    assert "asked the witness" in text
    assert "Still open" not in text
    assert coterie("report", "--for", "officer", exports[0], "--key", "ab" * 32).code == 5


def test_a_ledger_with_a_fault_makes_no_report(exports, tmp_path, coterie):
    text = exports[0].read_text()
    exports[0].write_text(text.replace('"round":2', '"round":3', 1))
    refused = coterie("report", "--for", "officer", exports[0], "--output", tmp_path / "out")
    assert refused.code == 5
    assert re.search(r"site-1\.ledger: entry \d+ ", refused.err)
    assert not (tmp_path / "out").exists()


def test_audits_stand_with_their_ceiling_and_verdict():
    pen = MAKE["Pen"]()
    pen.plan()
    pen.answer(1)
    pen.audit()
    pen.audit(lower_bound=3.4, verdict="FALSIFIED", design="canaries")
    content = checked(_of(pen))
    assert [audit["verdict"] for audit in content["sites"][0]["audits"]] == [
        "NOT FALSIFIED",
        "FALSIFIED",
    ]
    assert content["summary"]["falsified"] == 1
    text = page(content)
    assert "6.500" in text
    assert "proved a claim false" in text
    assert words.OTHER_AUDIT in text
    assert 'class="answer bad"' in text


def _of(pen):
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".ledger") as file:
        file.write(pen.export(MAKE["claims_of"](pen)))
        file.flush()
        return officer_report(read_chains(file.name))


@pytest.mark.parametrize("name", ["finished", "eventful", "of-persons"])
def test_any_good_ledger_has_a_report(name):
    content = checked(officer_report(read_chains(str(ASSETS / f"{name}.jsonl"))))
    text = page(json.loads(json.dumps(content)))
    assert "<script" not in text
    assert not re.search(r"(?:src|href)=", text)
    assert not re.search(r"https?://", text)
    if name == "of-persons":
        assert "one person, with all of their records" in text
        assert "two records of one person" not in text.split("Words used here")[0]


def test_every_measurement_is_told_in_plain_words():
    told = [name for _, _, names in words.WATCHED for name in names]
    assert sorted(told) == sorted(check.name for check in watched.CHECKS)


JARGON = (
    "PLD", "RDP", "Renyi", "Gaussian", "sigma", "Poisson", "DP-SGD", "differential", "hash",
    "SHA", "Ed25519", "gRPC", "TLS", "accountant", "admission", "SQLite", "canary", "canaries",
    "mechanism", "genesis", "GENESIS", "JSON schema", "mTLS", "nonce", "subsampl", "ledger head",
)  # fmt: skip
EXPLAINED = (
    "epsilon", "delta", "cap", "ledger", "update", "noise", "rate", "round", "neighbours",
    "filter", "fingerprint", "audit", "ceiling", "witness", "coordinator", "paid for",
)  # fmt: skip


def test_every_word_of_the_trade_is_explained_or_absent(lasting):
    content = officer_report(read_chains(str(lasting / "books.db")))
    figures = {"m": 9, "confidence": 0.95, "lower_bound": 1.0, "claimed_epsilon": 3.0}
    content["sites"][0]["audits"] = [
        {"time": "2026-01-02T03:04:05Z", "design": f"{kind}: canaries in gradient space", **figures}
        | {"ceiling": 2.5, "verdict": "NOT FALSIFIED"}
        for kind in words.AUDITS
    ]
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page(content), flags=re.DOTALL)
    explained = text.split("Words used here")[1]
    for word in JARGON:
        assert word not in text, word
    for word in EXPLAINED:
        if word in text:
            assert word in explained, word


def test_names_in_a_ledger_are_text_and_never_markup():
    pen = MAKE["Pen"](site="<b>x</b>", dataset="<script>1</script>")
    pen.plan("<i>run</i>")
    pen.answer(1, "<i>run</i>")
    text = page(_of(pen))
    for markup in ("<b>x", "<script", "<i>run"):
        assert markup not in text


def test_what_is_no_ledger_is_named(tmp_path, coterie, lasting):
    for given, code, said in (
        ([], 2, "RUN|LEDGER: give the folder"),
        ([tmp_path / "none"], 2, "no such ledger, exported file or run folder"),
        ([f"{lasting / 'books.db'}#nobody"], 2, "no such site; it holds site-1, site-2"),
        ([ROOT / "README.md"], 5, "README.md: "),
        ([lasting / "first", tmp_path], 2, "a report is of one run"),
        ([tmp_path], 5, "holds no finished run"),
    ):
        answer = coterie("report", "--for", "officer", *given, "--output", tmp_path / "out")
        assert (answer.code, said in answer.err) == (code, True), answer.err
    assert coterie("report", "--for", "nurse", lasting / "first").code == 2
    assert not (tmp_path / "out").exists()


def test_a_ledger_is_only_read(lasting, tmp_path, coterie):
    before = {path: path.read_bytes() for path in lasting.iterdir() if path.is_file()}
    words = ("--for", "officer", f"{lasting / 'books.db'}#site-2", "--output", tmp_path)
    assert coterie("report", *words).code == 0
    assert {path: path.read_bytes() for path in lasting.iterdir() if path.is_file()} == before


def test_a_drawing_says_what_it_shows_and_stays_inside():
    points = [Point(n, "2026-01-02T03:04:05Z", f"run{n // 9}", n / 4, 9.0) for n in range(30)]
    text = str(drawing(points, "a & b"))
    assert "<title>a &amp; b</title>" in text
    numbers = [float(x) for x in re.findall(r'(?:x1?|x2)="([-\d.]+)"', text)]
    assert all(0 <= number <= 360 for number in numbers)
    heights = [float(x) for x in re.findall(r' (?:y1?|y2)="([-\d.]+)"', text)]
    assert all(0 <= number <= 190 for number in heights)


def test_odds_and_chances_are_on_the_safe_side():
    for epsilon in (0.001, 0.5, 1.0, 2.9997, 6.0, 13.0):
        assert float(odds(epsilon).replace(",", "")) >= math.exp(epsilon)
    for delta in (1e-3, 3e-5, 1e-7, 0.3):
        assert 1 / float(chance(delta).removeprefix("1 in ").replace(",", "")) >= delta * 0.999999
