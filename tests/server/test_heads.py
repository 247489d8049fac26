"""The coordinator's memory of heads: it lasts, only goes forward, and finds a rollback."""

import hashlib
import os
import threading

import pytest

from common.errors import ConfigError, VerificationError
from common.messages import SiteBooks
from common.privacy.chain import EMPTY, Head, Receipt, continued
from server.heads import HeadBook, check_continuation, receipts_of


def head(seq, letter="a"):
    return Head(seq, letter * 64)


def books(at, links=b""):
    return SiteBooks(at, 8.0, 2.5, (), links)


def test_receipts_last_and_are_signed_by_the_one_key(tmp_path):
    first = HeadBook(tmp_path / "heads.db")
    assert first.receipts() == {}
    first.countersign({"north": head(3), "south": head(7, "b")})
    again = HeadBook(tmp_path / "heads.db")
    assert again.key == first.key
    receipts = again.receipts()
    assert {site: each.head for site, each in receipts.items()} == {
        "north": head(3),
        "south": head(7, "b"),
    }
    for receipt in receipts.values():
        assert receipt.key == first.key
        receipt.check()
    assert os.stat(tmp_path / "heads.db.key").st_mode & 0o777 == 0o600


def test_an_older_head_never_takes_the_place_of_a_later_one(tmp_path):
    book = HeadBook(tmp_path / "heads.db")
    book.countersign({"north": head(5)})
    book.countersign({"north": head(4, "b")})
    book.countersign({"north": head(5, "c")})
    assert book.receipts()["north"].head == head(5)
    book.countersign({"north": head(6, "d")})
    assert book.receipts()["north"].head == head(6, "d")


def test_two_runs_may_share_a_book(tmp_path):
    path = tmp_path / "heads.db"
    shared = [HeadBook(path), HeadBook(path)]

    def sign(book, name):
        for seq in range(1, 30):
            book.countersign({name: head(seq)})

    threads = [
        threading.Thread(target=sign, args=(book, name))
        for book, name in zip(shared, ("north", "south"), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.head.seq for each in HeadBook(path).receipts().values()} == {29}


def test_only_names_that_are_there_get_a_receipt(tmp_path):
    book = HeadBook(tmp_path / "heads.db")
    book.countersign({"north": head(3)})
    assert {*receipts_of({11: "north", 12: "south"}, book)} == {11}
    assert receipts_of({11: "north"}, None) == {}


def test_a_book_without_its_key_is_not_made_anew(tmp_path):
    HeadBook(tmp_path / "heads.db").countersign({"north": head(3)})
    (tmp_path / "heads.db.key").unlink()
    with pytest.raises(ConfigError, match="key is not there"):
        HeadBook(tmp_path / "heads.db")


def test_a_key_that_others_may_read_is_refused(tmp_path):
    HeadBook(tmp_path / "heads.db")
    (tmp_path / "heads.db.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        HeadBook(tmp_path / "heads.db")


def test_a_file_of_another_kind_is_refused(tmp_path):
    HeadBook(tmp_path / "heads.db")
    (tmp_path / "heads.db").write_text("these are not heads" * 100)
    with pytest.raises(VerificationError, match="is not a book of heads"):
        HeadBook(tmp_path / "heads.db")


DIGESTS = [hashlib.sha256(bytes([n])).digest() for n in range(4)]
START = head(5)
WAY = b"".join(DIGESTS)


@pytest.fixture(scope="module")
def receipt(tmp_path_factory):
    book = HeadBook(tmp_path_factory.mktemp("heads") / "heads.db")
    book.countersign({"north": START})
    return book.receipts()["north"]


def test_a_ledger_that_goes_on_is_accepted(receipt):
    check_continuation(receipt, books(continued(START, WAY), WAY))
    check_continuation(receipt, books(START))
    check_continuation(None, books(head(9)))


END = continued(START, WAY)
BROKEN = {
    "an older copy": books(head(4, "b")),
    "another end of the same length": books(Head(END.seq, "f" * 64), WAY),
    "a cut way": books(END, WAY[:-32]),
    "a longer way": books(END, WAY + DIGESTS[0]),
    "no way": books(END),
    "an edited entry": books(END, DIGESTS[1] + WAY[32:]),
    "entries in another order": books(END, b"".join(reversed(DIGESTS))),
    "another number of the same end": books(Head(END.seq + 1, END.hash), WAY),
    "from the beginning": books(continued(EMPTY, WAY), WAY),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_ledger_that_does_not_is_refused(fault, receipt):
    with pytest.raises(VerificationError, match="an older copy, or a fork"):
        check_continuation(receipt, BROKEN[fault])


def test_a_way_without_a_receipt_is_refused():
    with pytest.raises(VerificationError):
        check_continuation(None, books(END, WAY))


def test_a_receipt_is_of_the_key_it_names(receipt):
    for forged in (
        Receipt(receipt.head, "ab" * 32, receipt.signature),
        Receipt(head(6), receipt.key, receipt.signature),
        Receipt(receipt.head, receipt.key, "0" * 128),
        Receipt(receipt.head, "01" + "00" * 31, "0" * 128),
    ):
        with pytest.raises(VerificationError, match="receipt"):
            forged.check()
