"""The site's books on disk: one SQLite file, a chain of entries per site in it.

Write-ahead: a round is charged, and on the platter, before its data are read; its update is
prepared before it may leave, and released before it leaves. A crash in between loses the round
and keeps the charge. Nothing is ever refunded.

The rules are `common.privacy.books`'; this module makes entries, and makes them durable. Beside
the chain it keeps, for itself, the bytes of an update that was prepared and not yet released
again: only these may be sent a second time.
"""

import fcntl
import hashlib
import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import ConfigError, VerificationError
from common.privacy import chain
from common.privacy.accounting import Event
from common.privacy.books import Books, filter_order
from common.privacy.chain import Entry, Head, Kind, event_body
from common.privacy.measurements import Measurements

KEY_SUFFIX, LOCK_SUFFIX = ".key", ".lock"
BUSY_S = 30.0
"""How long a writer waits for another one."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    site TEXT NOT NULL, seq INTEGER NOT NULL, line TEXT NOT NULL, PRIMARY KEY (site, seq)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prepared (
    site TEXT NOT NULL, seq INTEGER NOT NULL, content BLOB NOT NULL, PRIMARY KEY (site, seq)
);
CREATE TRIGGER IF NOT EXISTS entry_is_not_edited BEFORE UPDATE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS entry_is_not_deleted BEFORE DELETE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


@dataclass(frozen=True)
class Terms:
    """What an officer fixes when a ledger is opened for a dataset."""

    dataset: str
    """Its name, as people know it."""
    dataset_root: str
    """SHA-256 commitment to the records, keyed by the site: tells nothing without the key."""
    cap: float
    """Epsilon that no history of this ledger may exceed, at `delta`."""
    delta: float
    officer_key: str
    """Public key, in hex, that signs changes of the cap: not the site's."""


class Store:
    """A ledger file with its key, open for writing. Any number of processes may hold one."""

    def __init__(self, path: Path) -> None:
        """Opens the file. Raises: ConfigError if it is not there, or its key is not private."""
        if not path.is_file():
            raise ConfigError(f"{path}: no such ledger; make one with `coterie ledger init {path}`")
        self.path = path
        self.key = _read_key(path)
        # Whoever writes shares this lock; who gets it alone knows that nobody else is alive.
        self._lock = os.open(f"{path}{LOCK_SUFFIX}", os.O_RDWR | os.O_CREAT, 0o600)
        self._connection = _connect(path)
        self._ledgers: dict[str, Ledger] = {}
        self._inside = False
        """Whether a transaction is open."""
        self._recover()

    @classmethod
    def create(cls, path: Path) -> "Store":
        """A new, empty file beside a new key. Raises: ConfigError if there is one."""
        if path.exists():
            raise ConfigError(f"{path}: exists already; a ledger is never overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
        key = Ed25519PrivateKey.generate()
        _write_key(Path(f"{path}{KEY_SUFFIX}"), key)
        connection = _connect(path)
        connection.executescript(_SCHEMA)
        connection.close()
        return cls(path)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()
        os.close(self._lock)

    def sites(self) -> list[str]:
        """Sites with a chain here."""
        try:
            rows = self._connection.execute("SELECT DISTINCT site FROM entry ORDER BY site")
        except sqlite3.Error as error:
            raise VerificationError(f"{self.path}: is not a ledger file ({error})") from error
        return [site for (site,) in rows]

    def open(self, site: str, terms: Terms) -> "Ledger":
        """A new chain. Raises: ConfigError if the site has one."""
        if site in self.sites():
            raise ConfigError(f"{self.path}#{site}: has a ledger already")
        self._ledgers[site] = ledger = Ledger(self, site)
        ledger.append(Kind.GENESIS, _genesis(site, terms, chain.public_hex(self.key)))
        return ledger

    def ledger(self, site: str) -> "Ledger":
        """The chain of a site. Raises: ConfigError if it has none; VerificationError."""
        if site not in self._ledgers:
            if site not in self.sites():
                known = ", ".join(self.sites()) or "none"
                raise ConfigError(f"{self.path}#{site}: no such site; it holds {known}")
            self._ledgers[site] = Ledger(self, site)
        return self._ledgers[site]

    @contextmanager
    def together(self) -> Iterator[sqlite3.Connection]:
        """One transaction, one fsync, for everything appended inside; nested ones join it."""
        if self._inside:
            yield self._connection
            return
        self._connection.execute("BEGIN IMMEDIATE")
        self._inside, before = True, self._connection.total_changes
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.total_changes != before:  # else no ledger saw anything new
                for ledger in self._ledgers.values():
                    ledger.forget()
            self._connection.rollback()
            raise
        finally:
            self._inside = False

    def _recover(self) -> None:
        """Declares lost what nobody can finish any more; its charge stays."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process is alive, and may be training
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            return
        with self.together():
            for site in self.sites():
                ledger = self.ledger(site)
                for reservation in ledger.books.open_reservations("reserved"):
                    ledger.append(Kind.LOST, {"reservation": reservation, "reason": "crash"})
        fcntl.flock(self._lock, fcntl.LOCK_SH)


class Ledger:
    """The chain of one site. Every method that writes returns after the entry is on disk.

    Raises: PrivacyRefusedError where the budget says no, and then nothing was written.
    """

    def __init__(self, store: Store, site: str) -> None:
        self._store, self.site = store, site
        self._books: Books | None = None

    @property
    def books(self) -> Books:
        """What the chain means, up to its last entry. Raises: VerificationError."""
        books = self._books or Books()
        self._books = None  # whatever fails below leaves nothing half read
        for entry in self._entries(after=books.head.seq):
            books.apply(entry)
        self._books = books
        return books

    def entries(self) -> list[Entry]:
        """The whole chain."""
        return list(self._entries(after=0))

    @property
    def head(self) -> Head:
        """Its end."""
        return self.books.head

    def forget(self) -> None:
        """Reads the chain anew at the next use: a transaction was rolled back."""
        self._books = None

    def append(self, kind: Kind, body: Mapping[str, Any]) -> Entry:
        """Adds one entry, if the rules allow it; it is on disk when this returns."""
        with self._store.together() as connection:
            books = self.books
            entry = chain.write_entry(kind, body, after=books.head, key=self._store.key)
            books.apply(entry)
            connection.execute(
                "INSERT INTO entry VALUES (?, ?, ?)", (self.site, entry.seq, entry.line)
            )
        return entry

    def bind(self, root: str) -> None:
        """Records that the dataset's commitment is now `root`; its spending goes on."""
        with self._store.together():
            if self.books.genesis["dataset_root"] != root:
                self.append(Kind.DATASET, {"dataset_root": root})

    def commit(
        self, run: str, event: Event, *, rounds: int, spare_rounds: int, plan: str, model: str
    ) -> None:
        """Commits a run: from now on its rounds may be reserved. `plan`: its config's hash."""
        with self._store.together():
            self.append(
                Kind.PLAN,
                {
                    "run": run,
                    "plan": plan,
                    "model": model,
                    "event": event_body(event),
                    "rounds": rounds,
                    "spare_rounds": spare_rounds,
                    "admission": self.books.admission(),
                },
            )

    def reserve(self, run: str, round_number: int, event: Event) -> int:
        """Charges one attempt at a round, before its data are touched; returns its number."""
        with self._store.together() as connection:
            tried = self.books.reservations.values()
            attempt = 1 + sum((r.run, r.round) == (run, round_number) for r in tried)
            entry = self.append(
                Kind.RESERVE,
                {
                    "run": run,
                    "round": round_number,
                    "attempt": attempt,
                    "event": event_body(event),
                },
            )
            connection.execute("DELETE FROM prepared WHERE site = ?", (self.site,))
        return entry.seq

    def prepare(self, reservation: int, content: bytes, measured: Measurements) -> None:
        """Fixes what a round may release: these bytes and no others.

        Args: measured: of noise and coins only.
        """
        with self._store.together() as connection:
            self.append(
                Kind.PREPARE,
                {
                    "reservation": reservation,
                    "update": hashlib.sha256(content).hexdigest(),
                    "steps": measured.round_steps,
                    "noise_ratio": measured.noise_ratio,
                    "noise_deviation": measured.noise_deviation,
                    "coin_deviation": measured.coin_deviation,
                },
            )
            connection.execute(
                "INSERT INTO prepared VALUES (?, ?, ?)", (self.site, reservation, content)
            )

    def release(self, reservation: int) -> bytes:
        """The prepared bytes, to be sent after this; the same ones again where it was released.

        Raises: VerificationError if they are not what was prepared.
        """
        found = self._store._connection.execute(
            "SELECT content FROM prepared WHERE site = ? AND seq = ?", (self.site, reservation)
        ).fetchone()
        planned = self.books.reservations.get(reservation)
        if planned is None or found is None:
            raise VerificationError(f"reservation {reservation}: nothing is prepared for it")
        if hashlib.sha256(found[0]).hexdigest() != planned.update:
            raise VerificationError(
                f"reservation {reservation}: its update is not what was prepared"
            )
        if planned.state != "released":
            self.append(Kind.RELEASE, {"reservation": reservation})
        return bytes(found[0])

    def lose(self, reservation: int) -> None:
        """Gives up a round that failed; its charge stays."""
        self.append(Kind.LOST, {"reservation": reservation, "reason": "failure"})

    def export(self) -> str:
        """The chain as a file that anybody can verify."""
        books = self.books
        claims = {"epsilon_pld": books.spent_pld(), "epsilon_rdp": books.spent_rdp()}
        return chain.export(self.entries(), claims, self._store.key)

    def _entries(self, *, after: int) -> Iterator[Entry]:
        rows = self._store._connection.execute(
            "SELECT seq, line FROM entry WHERE site = ? AND seq > ? ORDER BY seq",
            (self.site, after),
        )
        for seq, line in rows.fetchall():
            yield chain.read_entry(line, seq)


def _genesis(site: str, terms: Terms, site_key: str) -> dict[str, Any]:
    return {
        "version": chain.VERSION,
        "site": site,
        "dataset": terms.dataset,
        "dataset_root": terms.dataset_root,
        "unit": "record",
        "relation": "add_or_remove_one",
        "cap": terms.cap,
        "delta": terms.delta,
        "filter_order": filter_order(terms.cap, terms.delta),
        "site_key": site_key,
        "officer_key": terms.officer_key,
    }


def _connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            path, isolation_level=None, timeout=BUSY_S, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        raise VerificationError(f"{path}: is not a ledger file ({error})") from error
    return connection


def _write_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Never over another key: with it, a chain could not be continued."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists already; a key is never overwritten") from error
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(key.private_bytes_raw().hex() + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read_key(path: Path) -> Ed25519PrivateKey:
    return read_private_key(Path(f"{path}{KEY_SUFFIX}"))


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """A key file of ours. Raises: ConfigError if others may read it, or it is none."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"{path}: others may read this key; run chmod 600 on it")
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text("ascii").strip()))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: the key is not there; a ledger is written with its key"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: holds no key") from error


def generate_key(path: Path) -> Ed25519PrivateKey:
    """A new key, in a file only its owner may read. Raises: ConfigError if there is one."""
    key = Ed25519PrivateKey.generate()
    _write_key(path, key)
    return key
