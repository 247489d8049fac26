"""A node's ledger and its witness: told after each round, missed loudly, never put back."""

import logging
import shutil
from pathlib import Path

import pytest

from client import anchor as module
from client.anchor import Anchor
from client.ledger import Store, Terms
from client.settings import NODE
from common.cli import Invocation
from common.composition import run_with
from common.errors import ConfigError, VerificationError
from common.privacy.accounting import Event
from common.privacy.chain import Kind
from common.privacy.verification import verify
from common.privacy.witness import Pass, WitnessAheadError, WitnessLine
from tests.server.witnesses import Party

ID = "notes/ward-1"
ROUND = Event(4.0, 0.5, 2)


@pytest.fixture
def party(tmp_path):
    made = Party(tmp_path)
    yield made
    made.book.close()


@pytest.fixture
def books(tmp_path):
    """A path of books with one ledger, which a run has begun on."""
    path = tmp_path / "books.db"
    with Store.create(path) as store:
        ledger = store.open("ward-1", Terms("notes", 100.0, 1e-3, "1" * 64))
        committed = {
            "rounds": 9,
            "spare_rounds": 0,
            "plan": "2" * 64,
            "model": "tiny",
            "unit": "record",
        }
        ledger.commit("run", ROUND, **committed)
    return path


@pytest.fixture
def enrolled(party, books):
    with Store(books) as store:
        party.book.enrol(ID, "ward-1", store.ledger("ward-1").entries())
    return party


def answer(ledger, number):
    """A whole round."""
    reservation = ledger.reserve("run", number, ROUND)
    ledger.prepare(reservation, b"update", steps=ROUND.steps)
    ledger.release(reservation)


def line_of(party):
    return WitnessLine(party.address, Pass(party.admit("ward-1")))


def test_each_round_is_witnessed_and_the_signature_kept_in_the_ledger(enrolled, books):
    with enrolled.serving(), enrolled.line() as line, Store(books) as store:
        ledger = store.ledger("ward-1")
        anchor = Anchor(line, ledger)
        anchor.begin()
        for number in (1, 2):
            answer(ledger, number)
            head = ledger.head
            anchor.keep_up()
            assert enrolled.book.latest(ID) == head
            (receipt,) = [each for each in ledger.entries_after(head) if each.kind is Kind.RECEIPT]
            assert receipt.body["coordinator_key"] == enrolled.key
            assert receipt.body["hash"] == head.hash
            before = ledger.head
            anchor.keep_up()  # nothing new: nothing is told, and nothing written
            assert ledger.head == before
        books_now = verify(ledger.export().encode()).books
        assert books_now.receipts[enrolled.key] == head
        # Another process of the same node adds no receipt for a receipt.
        Anchor(line, ledger).begin()
        assert ledger.head == before


def test_an_absent_witness_is_told_of_and_caught_up_with(enrolled, books, caplog, monkeypatch):
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.0)
    with enrolled.serving() as address:
        pass
    with Store(books) as store, enrolled.line() as line:
        ledger = store.ledger("ward-1")
        anchor = Anchor(line, ledger)
        anchor._delay = 0.0
        anchor.begin()
        for number in (1, 2, 3):
            answer(ledger, number)
            anchor._not_before = 0.0
            anchor.keep_up()
        assert len(caplog.records) == 1  # said once, and not for every round
        assert "NOT WITNESSED" in caplog.text
        assert "going on without" in caplog.text
        head = ledger.head
    with enrolled.serving(address), enrolled.line() as line, Store(books) as store:
        anchor = Anchor(line, store.ledger("ward-1"))
        anchor._away = True
        with caplog.at_level(logging.INFO):
            anchor.keep_up()
        assert "answers again" in caplog.text
        assert enrolled.book.latest(ID) == head


def test_an_absent_witness_is_asked_ever_more_rarely(enrolled, books):
    with enrolled.serving():
        pass
    with Store(books) as store, enrolled.line() as line:
        anchor = Anchor(line, store.ledger("ward-1"))
        delays = []
        for _ in range(9):
            anchor._not_before = 0.0
            anchor.keep_up()
            delays.append(anchor._delay)
        assert delays == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0]


def test_a_ledger_put_back_to_an_older_copy_is_stopped(enrolled, books, tmp_path):
    copies = [f"{books}{suffix}" for suffix in ("", "-wal", ".key", ".lock")]
    with enrolled.serving(), enrolled.line() as line:
        with Store(books) as store:
            ledger = store.ledger("ward-1")
            answer(ledger, 1)
        aside = tmp_path / "aside"
        aside.mkdir()
        for copy in filter(lambda each: Path(each).exists(), copies):
            shutil.copy2(copy, aside)
        with Store(books) as store:
            answer(store.ledger("ward-1"), 2)
            Anchor(line, store.ledger("ward-1")).begin()
        for old in aside.iterdir():
            shutil.copy2(old, books.parent / old.name)
        with Store(books) as store:
            ledger = store.ledger("ward-1")
            with pytest.raises(WitnessAheadError, match="older copy"):
                Anchor(line, ledger).begin()
            answer(ledger, 2)
            answer(ledger, 3)
            answer(ledger, 4)  # longer than what the witness knows, and a fork of it
            with pytest.raises(VerificationError, match="fork"):
                Anchor(line, ledger).keep_up()


def test_a_new_site_key_is_witnessed_too(enrolled, books):
    with enrolled.serving(), enrolled.line() as line:
        with Store(books) as store:
            answer(store.ledger("ward-1"), 1)
            store.rotate()
            answer(store.ledger("ward-1"), 2)
        with Store(books) as store:
            ledger = store.ledger("ward-1")
            Anchor(line, ledger).begin()
            answer(ledger, 3)
            head = ledger.head
            Anchor(line, ledger).keep_up()
            assert enrolled.book.latest(ID) == head


def test_a_witness_that_does_not_know_the_ledger_is_named_at_the_start(party, books, caplog):
    with party.serving(), party.line() as line, Store(books) as store:
        ledger = store.ledger("ward-1")
        with pytest.raises(VerificationError, match="no ledger is enrolled"):
            Anchor(line, ledger).begin()
        Anchor(line, ledger).keep_up()  # forgotten while the node was at work: it goes on
        assert "NOT WITNESSED" in caplog.text


def test_verify_asks_the_witness(enrolled, books, tmp_path, coterie):
    export = tmp_path / "ward-1.ledger"
    asking = ("--witness", None, "--pass", enrolled.admit("officer"))
    with enrolled.serving() as address, enrolled.line() as line:
        asking = ("--witness", address, *asking[2:])
        with Store(books) as store:
            ledger = store.ledger("ward-1")
            export.write_text(ledger.export())
            assert coterie("ledger", "verify", export, *asking, "--json").json["head_pinned"]
            answer(ledger, 1)
            Anchor(line, ledger).begin()
            stale = coterie("ledger", "verify", export, *asking)
            assert stale.code == 5
            assert "older copy" in stale.err
            export.write_text(ledger.export())
        found = coterie("ledger", "verify", export, *asking, "--json").json
        assert found["witness"]["ledger"] == ID
        assert found["witness"]["key"] == enrolled.key
        assert found["witness"]["entries_after"] == 1  # the receipt itself
        assert "which is in this ledger" in coterie("ledger", "verify", export, *asking).out
        unknown = coterie("ledger", "verify", export, *asking, "--witness-id", "x")
        assert (unknown.code, "no ledger is enrolled" in unknown.err) == (5, True)
    away = coterie("ledger", "verify", export, *asking)
    assert away.code == 4
    assert "does not answer" in away.err
    assert coterie("ledger", "verify", export, "--witness", address).code == 2
    assert coterie("ledger", "verify", export, "--witness", "no port", *asking[2:]).code == 2
    missing = coterie("ledger", "verify", export, *asking[:2], "--pass", tmp_path / "none")
    assert (missing.code, "makes a pass" in missing.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["witness=127.0.0.1:9"], "must be given both, or neither"),
        (["witness=nowhere", "witness_pass=p"], "witness=nowhere: must be HOST:PORT"),
        (
            ["witness=127.0.0.1:9", "witness_pass=p", "ledger=", "allow_unprotected=true"],
            "needs a ledger",
        ),
    ],
)
def test_settings_of_a_witness_belong_together(words, said, tiny_csv):
    own = (
        *("name=site-1", "superlink=127.0.0.1:1", "authority=ca.crt", "key=node.key"),
        *("ledger=books.db", f"data.path={tiny_csv}", "data.labels=[sport,money]"),
    )
    with pytest.raises(ConfigError, match=said):
        run_with(NODE, print, Invocation("node", (*own, *words), json=False))
