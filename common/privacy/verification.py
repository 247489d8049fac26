"""Judges an exported ledger from the file and public keys alone; no site, no torch, no data."""

from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import PrivacyRefusedError, VerificationError
from common.privacy.accounting import epsilon_prv
from common.privacy.books import Books
from common.privacy.chain import EMPTY, Entry, Export, Head, read_export

TOLERANCE = 1e-6
"""By how much a claimed epsilon may be below ours before it is an under-count: other processors
and other versions round the same price otherwise."""


@dataclass(frozen=True)
class Verified:
    """A ledger in which nothing is wrong."""

    books: Books
    epsilon_pld: float
    epsilon_rdp: float
    epsilon_prv: float | None
    """Only if it was asked for, and Opacus's accountant can price the history."""
    key_pinned: bool
    """False: the file says itself whose it is. Anybody can write such a file."""
    officer_pinned: bool
    """False: the cap may be the site's own invention."""
    head_pinned: bool
    """False: entries after the tail's head may have been cut off."""


def verify(
    content: bytes,
    *,
    key: str | None = None,
    officer: str | None = None,
    head: Head | None = None,
    prv: bool = False,
) -> Verified:
    """Checks an export from its first byte to its last, and prices it again.

    Guarantee: every byte was signed by the site; entries follow each other; every release was
    reserved and charged at its plan's price, within the cap; what the site claims to have spent
    is not less than it did.
    Args: key: the site's first public key, in hex, as the officer enrolled it; officer: the
    officer's, without which the site could have written terms of its own; head: one that somebody
    else remembers, which the chain must contain.
    Raises: VerificationError naming the entry at fault.
    """
    export = read_export(content)
    books = replayed(export.entries)
    export.check_tail(books.site_key)
    if export.head != books.head:
        raise VerificationError("tail: does not name the last entry; entries are missing")
    verified = judged(books, key=key, officer=officer, head=head, prv=prv)
    _check_claim(export, "epsilon_pld", verified.epsilon_pld)
    _check_claim(export, "epsilon_rdp", verified.epsilon_rdp)
    return verified


def judged(
    books: Books,
    *,
    key: str | None = None,
    officer: str | None = None,
    head: Head | None = None,
    prv: bool = False,
) -> Verified:
    """Holds books whose entries were all found sound against what their reader knows, and prices
    them again.

    Args and Raises: as `verify`.
    """
    if key is not None and books.genesis["site_key"] != key:
        raise VerificationError("entry 1 (GENESIS): is of another site's key than the one given")
    if officer is not None and books.genesis["officer_key"] != officer:
        raise VerificationError("entry 1 (GENESIS): names another officer than the one given")
    if head is not None and not books.contains(head):
        raise VerificationError(
            f"entry {head.seq}: is not the one whose head was given; this is a fork, or a copy "
            "older than that head"
        )
    return Verified(
        books,
        books.spent_pld(),
        books.spent_rdp(),
        epsilon_prv(books.charges(), books.delta) if prv else None,
        key is not None,
        officer is not None,
        head is not None and head != EMPTY,
    )


def replayed(entries: Iterable[Entry]) -> Books:
    """The books after all entries. Raises: VerificationError naming the entry at fault."""
    books = Books()
    for entry in entries:
        try:
            books.apply(entry)
        except PrivacyRefusedError as error:
            raise VerificationError(f"entry {entry.seq} ({entry.kind.value}): {error}") from error
    if not books.genesis:
        raise VerificationError("entry 1: is missing; a ledger begins with GENESIS")
    return books


def _check_claim(export: Export, name: str, ours: float) -> None:
    claimed = float(export.claims[name])
    if claimed < ours - TOLERANCE:
        raise VerificationError(
            f"tail: claims {name} {claimed:.6g}, but the entries cost {ours:.6g}: an under-count"
        )
