"""The site's books on disk: one SQLite file, a chain of entries per site in it.

Write-ahead: a round is charged, and on the platter, before its data are read; its update is
prepared before it may leave, and released before it leaves. A crash in between loses the round
and keeps the charge. Nothing is ever refunded.

The rules are `common.privacy.books`'; this module makes entries, and makes them durable. Beside
the chain it keeps, for itself, the bytes of an update that was prepared and not yet released
again: only these may be sent a second time; and a tag of every text that was ever under a chain,
so that no record comes under two.
"""

import errno
import fcntl
import hashlib
import math
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.commitment import UNBOUND, Commitment, secret_of
from client.site_keys import SiteKeys
from common.errors import ConfigError, CoterieError, VerificationError
from common.keys import KEY_SUFFIX, generate_key, read_secret, write_secret
from common.privacy import chain
from common.privacy.accounting import Event
from common.privacy.books import Books, filter_order
from common.privacy.chain import Entry, Head, Kind, Receipt, event_body

LOCK_SUFFIX = ".lock"
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
CREATE TRIGGER IF NOT EXISTS entry_is_not_replaced BEFORE INSERT ON entry
    WHEN EXISTS (SELECT 1 FROM entry WHERE site = NEW.site AND seq >= NEW.seq)
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS entry_is_not_deleted BEFORE DELETE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""
_SEEN = (
    "CREATE TABLE IF NOT EXISTS seen (tag BLOB PRIMARY KEY, site TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TRIGGER IF NOT EXISTS seen_is_not_edited BEFORE UPDATE ON seen"
    " BEGIN SELECT RAISE(ABORT, 'a record that was seen stays so'); END",
    "CREATE TRIGGER IF NOT EXISTS seen_is_not_deleted BEFORE DELETE ON seen"
    " BEGIN SELECT RAISE(ABORT, 'a record that was seen stays so'); END",
)
"""Whose a text is. One of `_SCHEMA` that older files are given when they are opened."""


@dataclass(frozen=True)
class Terms:
    """What an officer fixes when a ledger is opened for a dataset."""

    dataset: str
    """Its name, as people know it."""
    cap: float
    """Epsilon that no history of this ledger may exceed, at `delta`."""
    delta: float
    officer_key: str
    """Public key, in hex, that signs changes of the cap: not the site's."""
    unit: str = "record"
    """What the cap protects, `record` or `person`; runs of another unit are refused."""


class Store:
    """A ledger file with its key, open for writing.

    Any number of processes may hold one, each its own: a store does not survive a fork. Threads
    may share one, and take turns, a transaction at a time.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file. Raises: ConfigError if it is not there, or its key is not private."""
        if not path.is_file():
            raise ConfigError(f"{path}: no such ledger; make one with `coterie ledger init {path}`")
        self.path = path.resolve()  # one lock and one key, by whatever link it was reached
        self._files = SiteKeys(self.path)
        self.key = self._files.current()
        self._ledgers: dict[str, Ledger] = {}
        self._inside = False
        """Whether a transaction is open."""
        self._process, self._turn, self._closed = os.getpid(), threading.RLock(), False
        self._connection = _connect(self.path)
        # Whoever writes shares this lock; who gets it alone knows that nobody else is alive.
        self._lock = os.open(f"{self.path}{LOCK_SUFFIX}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            alone = self._share_lock()
            self._settle_key()
            self._add_missing_table()
            if alone:
                self._recover()
                fcntl.flock(self._lock, fcntl.LOCK_SH)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, given: Path | None = None) -> "Store":
        """A new, empty file beside a new key, or beside a copy of the one given.

        Raises: ConfigError if there is one, or what is given is no key that its owner alone reads.
        """
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path}: exists already; a ledger is never overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
        if given is None:
            generate_key(Path(f"{path}{KEY_SUFFIX}"))
        else:
            write_secret(Path(f"{path}{KEY_SUFFIX}"), read_secret(given))
        try:
            connection = _connect(path)
            connection.executescript(f"BEGIN; {_SCHEMA} {'; '.join(_SEEN)}; COMMIT;")
            connection.close()
            return cls(path)
        except BaseException:
            for suffix in ("", "-wal", "-shm", LOCK_SUFFIX, KEY_SUFFIX):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            raise

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        if not self._closed:
            self._closed = True
            self._connection.close()
            os.close(self._lock)

    def sites(self) -> list[str]:
        """Sites with a chain here."""
        return [site for (site,) in self.read("SELECT DISTINCT site FROM entry ORDER BY site")]

    def read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of the file. Raises: VerificationError if it is not a ledger's."""
        try:
            with self.turn():
                return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise VerificationError(f"{self.path}: is not a ledger file ({error})") from error

    def open(self, site: str, terms: Terms, commitment: Commitment = UNBOUND) -> "Ledger":
        """A new chain, for these records.

        Raises: ConfigError if the site has one, the terms are none, or a record is, or once was,
        under another chain; nothing was written then.
        """
        if self._holds(site):
            raise ConfigError(f"{self.path}#{site}: has a ledger already")
        ledger = Ledger(self, site)
        with self.claiming(site, commitment):
            for (other,) in self.read("SELECT site FROM entry LIMIT 1"):
                self.ledger(other).signable()
            body = _genesis(site, terms, commitment.root, chain.public_hex(self.key))
            ledger.append(Kind.GENESIS, body)
        self._ledgers[site] = ledger
        return ledger

    def ledger(self, site: str) -> "Ledger":
        """The chain of a site. Raises: ConfigError if it has none; VerificationError."""
        if not self._holds(site):
            known = ", ".join(self.sites()) or "none"
            raise ConfigError(f"{self.path}#{site}: no such site; it holds {known}")
        return self._ledgers.setdefault(site, Ledger(self, site))

    @contextmanager
    def claiming(self, site: str, commitment: Commitment) -> Iterator[None]:
        """Records become those of `site` with what is written inside, or not at all.

        Raises: ConfigError, before anything is written, if one is another site's.
        """
        with self.together() as connection:
            owners = {
                owner
                for tag in commitment.tags
                for (owner,) in connection.execute("SELECT site FROM seen WHERE tag = ?", (tag,))
            }
            if others := sorted(owners - {site}):
                raise ConfigError(_overlap(self.path, site, others[0]))
            yield
            rows = ((tag, site) for tag in commitment.tags)
            connection.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", rows)

    def _holds(self, site: str) -> bool:
        return bool(self.read("SELECT 1 FROM entry WHERE site = ? LIMIT 1", site))

    def _check_process(self) -> None:
        """After a fork, SQLite and the lock are the parent's: a child could write to nowhere."""
        if os.getpid() != self._process:
            raise VerificationError(f"{self.path}: was opened by another process; open it anew")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for the transaction of another thread to end: it may yet be rolled back."""
        self._check_process()
        with self._turn:
            yield

    @contextmanager
    def together(self) -> Iterator[sqlite3.Connection]:
        """One transaction, one fsync, for everything appended inside; nested ones join it.

        Raises: OSError where the disk does not take it; it is as if nothing had been appended.
        """
        with self.turn():
            if self._inside:
                yield self._connection
                return
            _begin(self._connection, self.path)
            self._inside, before = True, self._connection.total_changes
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                # A refusal before anything was written left no ledger ahead of the disk.
                if not isinstance(error, CoterieError) or before != self._connection.total_changes:
                    for ledger in self._ledgers.values():
                        ledger.forget()
                self._connection.rollback()
                if isinstance(error, sqlite3.OperationalError):
                    raise _of_disk(error, self.path) from error
                raise
            finally:
                self._inside = False

    @contextmanager
    def apart(self, ledger: "Ledger") -> Iterator[None]:
        """Inside `together`: what is written to one chain is undone if it ends in an error, which
        is raised; what was written to others stays.
        """
        assert self._inside, "there is nothing to stay in"
        self._connection.execute("SAVEPOINT apart")
        try:
            yield
        except BaseException:
            ledger.forget()
            self._connection.execute("ROLLBACK TO apart")
            raise
        finally:
            self._connection.execute("RELEASE apart")

    @property
    def secret(self) -> bytes:
        """Keys the commitments to records; a new site key leaves it as it was.

        Raises: ConfigError if its file is gone since, or others may read it.
        """
        kept = self._files.kept_secret()
        if kept is not None:
            return kept
        states = (self.ledger(site).books for site in self.sites())
        if any(books.genesis["site_key"] != books.site_key for books in states):
            raise ConfigError(
                f"{self._files.secret_path}: is not there; it has been needed since the ledger got "
                "a new key: put it back from a copy"
            )
        return secret_of(self.key)

    def rotate(self) -> None:
        """Gives all chains a new site key, which is `key` afterwards.

        Guarantee: whenever the process or the machine stops, the next opening finds one key, and
        it is that of all chains. The secret stays.
        Raises: ConfigError if another process has the file open, or there is no chain;
        VerificationError if the key is not that of all chains. Nothing has changed then.
        """
        self._check_process()
        with self._turn, self._alone():
            assert not self._inside, "the key file follows a transaction that must be over"
            self._settle_key()
            ledgers = [self.ledger(site) for site in self.sites()]
            if not ledgers:
                raise ConfigError(f"{self.path}: holds no site's ledger, whose key could change")
            for ledger in ledgers:
                ledger.signable()
            # Each on the disk before the next: 1. what must outlive the key, 2. the new key beside
            # the old one, 3. the chains, 4. the new key in the place of the old one.
            self._files.keep(self.secret)
            key = self._files.propose()
            try:
                with self.together():
                    for ledger in ledgers:
                        ledger.hand_over(key)
            finally:
                self._settle_key()

    def _settle_key(self) -> None:
        """Ends a change of keys as the chains say: done if they name the new one, else undone.

        Nobody else can be in the middle of one: that takes the lock alone, and here it is held.
        """
        self._files.tidy()
        if self._files.is_changing():
            # The old key goes after what is seen here is on the disk: a commit may be seen sooner.
            self._flush()
            with self.together():
                if self._files.is_changing():  # and no other opening was quicker
                    self._choose_key()
        self.key = self._files.current()

    def _flush(self) -> None:
        """Returns once every commit that can be read is on the disk."""
        ((busy, *_),) = self.read("PRAGMA wal_checkpoint(FULL)")
        if busy:
            raise ConfigError(f"{self.path}: another process holds it; try again")

    def _choose_key(self) -> None:
        named = {self.ledger(site).books.site_key for site in self.sites()}
        if named <= {chain.public_hex(self._files.current())}:
            self._files.withdraw()
        elif named == {chain.public_hex(self._files.proposed())}:
            self._files.adopt()
        else:
            raise VerificationError(
                f"{self._files.path}: neither this key nor the one beside it is that of all chains"
            )

    def _share_lock(self) -> bool:
        """Takes the lock. Returns: whether alone; else it is shared, and others may be training."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            return False
        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Has the lock alone. Raises: ConfigError if another process has the file open."""
        try:
            if not self._share_lock():
                raise ConfigError(
                    f"{self.path}: another process has it open, with the old key; stop it first"
                )
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _add_missing_table(self) -> None:
        """Files of before overlaps were looked for get the table, once they are known as ours."""
        self.read("SELECT 1 FROM entry LIMIT 1")
        if not self.read("SELECT 1 FROM sqlite_master WHERE name = 'seen_is_not_deleted'"):
            with self.together() as connection:
                for statement in _SEEN:
                    connection.execute(statement)

    def _recover(self) -> None:
        """Declares lost what nobody, as this has the lock alone, can finish; its charge stays."""
        with self.together():
            for site in self.sites():
                self.ledger(site).lose_unfinished()


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
        with self._store.turn():
            books = self._books or Books()
            self._books = None  # whatever fails below leaves nothing half read
            for entry in self._entries(after=books.head.seq):
                books.apply(entry)
            self._books = books
            return books

    def entries(self) -> list[Entry]:
        """The whole chain."""
        return list(self._entries(after=0))

    def entries_after(self, head: Head) -> list[Entry]:
        """Those that follow `head`, which must be one of this chain's."""
        return list(self._entries(after=head.seq))

    @property
    def head(self) -> Head:
        """Its end."""
        return self.books.head

    def forget(self) -> None:
        """Reads the chain anew at the next use: a transaction was rolled back."""
        self._books = None

    @property
    def store(self) -> Store:
        """The file it is in."""
        return self._store

    def at_once(self) -> AbstractContextManager[object]:
        """Several entries or none, with one fsync."""
        return self._store.together()

    def append(self, kind: Kind, body: Mapping[str, Any]) -> Entry:
        """Adds one entry, if the rules allow it; it is on disk when this returns."""
        with self._store.together() as connection:
            books = self.signable()
            entry = chain.write_entry(kind, body, after=books.head, key=self._store.key)
            books.apply(entry)
            connection.execute(
                "INSERT INTO entry VALUES (?, ?, ?)", (self.site, entry.seq, entry.line)
            )
        return entry

    def signable(self) -> Books:
        """The books, if the store's key is theirs. Raises: VerificationError if it is no longer."""
        books = self.books
        if books.genesis and chain.public_hex(self._store.key) != books.site_key:
            raise VerificationError(
                f"{self._store.path}#{self.site}: would be signed by another key than its own; "
                "if it got a new key meanwhile, open it anew"
            )
        return books

    def hand_over(self, key: Ed25519PrivateKey) -> None:
        """Names the key that signs from the next entry on."""
        books = self.books
        proof = chain.prove_rotation(key, books.site_key, after=books.head)
        self.append(Kind.KEY_ROTATE, {"site_key": chain.public_hex(key), "proof": proof})

    def bind(self, commitment: Commitment) -> None:
        """Records what the dataset is from now on; its spending goes on.

        Raises: ConfigError if a record, or person, is, or once was, under another chain of this
        store; nothing was written then.
        """
        with self._store.claiming(self.site, commitment):
            if self.books.genesis["dataset_root"] != commitment.root:
                self.append(Kind.DATASET, {"dataset_root": commitment.root})

    def acknowledge(self, receipt: Receipt) -> None:
        """Keeps a coordinator's receipt, once. Raises: VerificationError for a head never had."""
        with self._store.together():
            if self.books.receipts.get(receipt.key) != receipt.head:
                self.append(
                    Kind.RECEIPT,
                    {
                        "seq": receipt.head.seq,
                        "hash": receipt.head.hash,
                        "coordinator_key": receipt.key,
                        "signature": receipt.signature,
                    },
                )

    def links(self, after: Head, to: Head) -> bytes:
        """What proves to whoever remembers `after` that this chain went on from there `to`.

        Raises: VerificationError if it did not.
        """
        if not self.books.contains(after):
            raise VerificationError(f"{self.site}: its ledger never had the head {after}")
        between = islice(self._entries(after=after.seq), to.seq - after.seq)
        return b"".join(bytes.fromhex(entry.content_digest) for entry in between)

    def commit(
        self,
        run: str,
        event: Event,
        *,
        rounds: int,
        spare_rounds: int,
        plan: str,
        model: str,
        unit: str,
    ) -> None:
        """Commits a run: from now on its rounds may be reserved.

        Args: plan: its config's hash; unit: whose presence `event` is the price of.
        Raises: VerificationError if that is not the ledger's unit.
        """
        with self._store.together():
            self.append(
                Kind.PLAN,
                {
                    "run": run,
                    "plan": plan,
                    "model": model,
                    "unit": unit,
                    "event": event_body(event),
                    "rounds": rounds,
                    "spare_rounds": spare_rounds,
                    "admission": self.books.admission(),
                },
            )

    def reserve(self, run: str, round_number: int, event: Event) -> int:
        """Charges one attempt at a round, before its data are touched; returns its number."""
        with self._store.together() as connection:
            attempt = 1 + len(self.books.attempts.get((run, round_number), []))
            entry = self.append(
                Kind.RESERVE,
                {
                    "run": run,
                    "round": round_number,
                    "attempt": attempt,
                    "event": event_body(event),
                },
            )
            done = self.books.open_reservations("released", "lost")
            connection.executemany(
                "DELETE FROM prepared WHERE site = ? AND seq = ?", [(self.site, at) for at in done]
            )
        return entry.seq

    def prepare(self, reservation: int, content: bytes, *, steps: int) -> None:
        """Fixes what a round may release: these bytes and no others.

        Args: steps: as counted. What else the meters measured is judged where they are, and not
        kept: whoever knows all records but one could tell from an exact energy of the noise
        whether that one was there.
        """
        with self._store.together() as connection:
            self.append(
                Kind.PREPARE,
                {
                    "reservation": reservation,
                    "update": hashlib.sha256(content).hexdigest(),
                    "steps": steps,
                },
            )
            connection.execute(
                "INSERT INTO prepared VALUES (?, ?, ?)", (self.site, reservation, content)
            )

    def release(self, reservation: int) -> bytes:
        """The prepared bytes, to be sent after this; the same ones again where it was released.

        Raises: VerificationError if they are not what was prepared.
        """
        rows = self._store.read(
            "SELECT content FROM prepared WHERE site = ? AND seq = ?", self.site, reservation
        )
        planned = self.books.reservations.get(reservation)
        if planned is None or not rows:
            raise VerificationError(f"reservation {reservation}: nothing is prepared for it")
        content = rows[0][0]
        if not isinstance(content, bytes) or hashlib.sha256(content).hexdigest() != planned.update:
            raise VerificationError(
                f"reservation {reservation}: its update is not what was prepared"
            )
        if planned.state != "released":
            self.append(Kind.RELEASE, {"reservation": reservation})
        return content

    def answered(self, run: str, round_number: int) -> int | None:
        """The reservation of a round that was prepared already: its bytes may be sent again.

        Raises: VerificationError if the round is being answered at this moment.
        """
        books = self.books
        for reservation in books.attempts.get((run, round_number), []):
            state = books.reservations[reservation].state
            if state == "reserved":
                raise VerificationError(f"round {round_number} of run {run} is under way")
            if state != "lost":
                return reservation
        return None

    def lose(self, reservation: int, reason: str = "failure") -> None:
        """Gives up a round that failed; its charge stays. Args: reason: one of `chain.LOSSES`."""
        self.append(Kind.LOST, {"reservation": reservation, "reason": reason})

    def lose_unfinished(self, *runs: str) -> bool:
        """Declares lost what was reserved by a process that is dead; its charge stays.

        Args: runs: whose reservations; none: of all, for who knows that no other process is alive.
        Returns: whether there was any. What was prepared may still be sent, and is not lost.
        """
        with self._store.together():
            books = self.books
            unfinished = [
                seq
                for seq in books.open_reservations("reserved")
                if not runs or books.reservations[seq].run in runs
            ]
            for reservation in unfinished:
                self.append(Kind.LOST, {"reservation": reservation, "reason": "crash"})
        return bool(unfinished)

    def export(self) -> str:
        """The chain as a file that anybody can verify. Raises: VerificationError."""
        books = self.signable()
        claims = {"epsilon_pld": books.spent_pld(), "epsilon_rdp": books.spent_rdp()}
        # Others may append meanwhile: what is claimed is of these entries.
        return chain.export(self.entries()[: books.head.seq], claims, self._store.key)

    def _entries(self, *, after: int) -> Iterator[Entry]:
        rows = self._store.read(
            "SELECT seq, line FROM entry WHERE site = ? AND seq > ? ORDER BY seq", self.site, after
        )
        for seq, line in rows:
            yield chain.read_entry(str(line), seq)


def read_chain(path: Path, site: str) -> list[Entry]:
    """The entries of a site, unjudged; nothing is written or settled.

    Raises: ConfigError if the site has none there; VerificationError if it is no ledger file.
    """
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as file:
            rows = file.execute("SELECT site, seq, line FROM entry ORDER BY site, seq").fetchall()
    except sqlite3.Error as error:
        raise VerificationError(f"{path}: is not a ledger file ({error})") from error
    entries = [chain.read_entry(str(line), seq) for name, seq, line in rows if name == site]
    if not entries:
        known = ", ".join(sorted({str(name) for name, *_ in rows})) or "none"
        raise ConfigError(
            f"{path}#{site}: no such site, it holds {known}; correct name, or give ledger=FILE#SITE"
        )
    return entries


def _overlap(path: Path, site: str, other: str) -> str:
    return (
        f"{path}#{site}: a record of its data or a person is, or once was, under #{other}; each of "
        "two ledgers would charge it for its own releases only. A simulation on lasting books must "
        "keep seed, data.* and the partition as they were; elsewhere give it to one site"
    )


def _genesis(site: str, terms: Terms, root: str, site_key: str) -> dict[str, Any]:
    check_terms(terms.cap, terms.delta, terms.unit)
    return {
        "version": chain.VERSION,
        "site": site,
        "dataset": terms.dataset,
        "dataset_root": root,
        "unit": terms.unit,
        "relation": "add_or_remove_one",
        "cap": terms.cap,
        "delta": terms.delta,
        "filter_order": filter_order(terms.cap, terms.delta),
        "site_key": site_key,
        "officer_key": terms.officer_key,
    }


def check_terms(cap: float, delta: float, unit: str = "record") -> None:
    """Raises: ConfigError for a cap or delta that bounds nothing, or a unit that is none."""
    if unit not in chain.UNITS:
        raise ConfigError(f"unit={unit}: must be {' or '.join(chain.UNITS)}")
    if not 0 < cap < math.inf:
        raise ConfigError(f"cap={cap}: must be a finite number above 0")
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta}: must be between 0 and 1, both excluded")


def _begin(connection: sqlite3.Connection, path: Path) -> None:
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        raise ConfigError(f"{path}: another process holds it ({error}); try again") from error


def _of_disk(error: sqlite3.OperationalError, path: Path) -> Exception:
    """The fault of a disk under SQLite's, if that is what it was: a file system's, as any other."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    if code == sqlite3.SQLITE_IOERR:
        return OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    return error


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
