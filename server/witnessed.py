"""What a witness remembers: the whole chain of heads of each ledger an officer enrolled.

One id, one ledger, one line of keys. Nothing is ever taken back: a head that was countersigned is
on the disk first, and stays. What a site signed and the witness could not take, a fork or an older
copy, is kept as evidence.

Every pass is written down when it is given, and believed as long as it is not taken back.
"""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.errors import ConfigError, VerificationError
from common.privacy import chain
from common.privacy.chain import EMPTY, LINK_BYTES, Entry, Head, Kind, linked
from common.privacy.witness import Advance, Refusal, is_id

BUSY_S = 30.0
MOST_EVIDENCE = 200
"""Refused heads kept of one ledger: the first ones."""
FORMAT = 2
TIME = "%Y-%m-%dT%H:%M:%SZ"
_SCHEMA = f"""
PRAGMA user_version = {FORMAT};
CREATE TABLE ledger (id TEXT PRIMARY KEY, node TEXT NOT NULL, enrolled TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE signer (
    id TEXT NOT NULL, after INTEGER NOT NULL, key TEXT NOT NULL, PRIMARY KEY (id, after)
) WITHOUT ROWID;
CREATE TABLE entry (
    id TEXT NOT NULL, seq INTEGER NOT NULL, hash TEXT NOT NULL, seen TEXT NOT NULL,
    PRIMARY KEY (id, seq)
) WITHOUT ROWID;
CREATE UNIQUE INDEX one_id_a_ledger ON entry (hash) WHERE seq = 1;
CREATE TABLE refused (
    id TEXT NOT NULL, seq INTEGER NOT NULL, hash TEXT NOT NULL, signature TEXT NOT NULL,
    reason TEXT NOT NULL, seen TEXT NOT NULL, PRIMARY KEY (id, seq, hash)
) WITHOUT ROWID;
CREATE TABLE pass (
    serial TEXT PRIMARY KEY, name TEXT NOT NULL, given TEXT NOT NULL, until TEXT NOT NULL,
    revoked TEXT NOT NULL
) WITHOUT ROWID;
CREATE TRIGGER entry_is_not_edited BEFORE UPDATE ON entry
    BEGIN SELECT RAISE(ABORT, 'what was witnessed stays'); END;
CREATE TRIGGER entry_is_not_deleted BEFORE DELETE ON entry
    BEGIN SELECT RAISE(ABORT, 'what was witnessed stays'); END;
CREATE TRIGGER signer_is_not_edited BEFORE UPDATE ON signer
    BEGIN SELECT RAISE(ABORT, 'what was witnessed stays'); END;
CREATE TRIGGER a_pass_stays_revoked BEFORE UPDATE ON pass WHEN OLD.revoked != ''
    BEGIN SELECT RAISE(ABORT, 'what was taken back stays so'); END;
"""


class RefusedError(Exception):
    """What was asked is refused; nothing changed, but for evidence."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal


@dataclass(frozen=True)
class Standing:
    """One enrolled ledger, as its officer sees it."""

    ledger: str
    node: str
    head: Head
    key: str
    """The site's, at that head."""
    seen: str
    """When the witness heard of it last."""
    refused: tuple[dict[str, str], ...]
    """Heads that the site signed and the witness refused: evidence of a fork or an older copy."""


@dataclass(frozen=True)
class Given:
    """One pass that was given."""

    name: str
    given: str
    until: str
    """When its certificate ends."""
    revoked: str
    """When it was taken back; empty while it is good."""


class WitnessBook:
    """One file. Threads may share it; they take turns. Every method that writes returns after what
    it wrote is on the disk. Raises: VerificationError if the file is not a witness's.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; `coterie witness init` makes a witness")
        self._path, self._turn = path, threading.Lock()
        try:
            self._connection = sqlite3.connect(
                path, isolation_level=None, timeout=BUSY_S, check_same_thread=False
            )
            self._connection.execute("PRAGMA synchronous = FULL")
            ((found,),) = self._connection.execute("PRAGMA user_version")
        except sqlite3.Error as error:
            raise self._not_ours(error) from error
        if found != FORMAT:
            self._connection.close()
            raise VerificationError(f"{path}: is not a witness's file, or of another version")

    @classmethod
    def create(cls, path: Path) -> "WitnessBook":
        """A new, empty file. Raises: ConfigError if there is one."""
        if path.exists():
            raise ConfigError(f"{path}: exists already; what a witness knows is never overwritten")
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        connection.close()
        return cls(path)

    def __enter__(self) -> "WitnessBook":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()

    def enrol(self, ledger: str, node: str, entries: Sequence[Entry]) -> Head:
        """From now on `ledger` names the chain of these entries, which were found sound.

        Raises: ConfigError if the id names another chain, or the chain has another id.
        """
        if not is_id(ledger):
            raise ConfigError(f"--id={ledger!r}: must be 1 to 200 printable characters")
        now = _now()
        with self._transaction() as connection:
            if connection.execute("SELECT 1 FROM ledger WHERE id = ?", (ledger,)).fetchone():
                raise ConfigError(f"{ledger}: is enrolled already; one ledger per id")
            first = entries[0]
            twin = connection.execute(
                "SELECT id FROM entry WHERE seq = 1 AND hash = ?", (first.hash,)
            ).fetchone()
            if twin:
                raise ConfigError(f"{ledger}: this ledger is enrolled already, as {twin[0]}")
            connection.execute("INSERT INTO ledger VALUES (?, ?, ?)", (ledger, node, now))
            signers = [(0, str(first.body["site_key"]))] + [
                (entry.seq, str(entry.body["site_key"]))
                for entry in entries
                if entry.kind is Kind.KEY_ROTATE
            ]
            connection.executemany(
                "INSERT INTO signer VALUES (?, ?, ?)", [(ledger, *row) for row in signers]
            )
            connection.executemany(
                "INSERT INTO entry VALUES (?, ?, ?, ?)",
                [(ledger, entry.seq, entry.hash, now) for entry in entries],
            )
        return Head(entries[-1].seq, entries[-1].hash)

    def give(self, serial: int, name: str, until: datetime) -> None:
        """Writes down a pass, by the serial number of its certificate, before it is handed over."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO pass VALUES (?, ?, ?, ?, '')",
                (str(serial), name, _now(), until.strftime(TIME)),
            )

    def take_back(self, name: str) -> int:
        """Every pass of this name that is good; from now on each is refused. Returns how many.

        Raises: ConfigError if there is none.
        """
        with self._transaction() as connection:
            found = connection.execute(
                "UPDATE pass SET revoked = ? WHERE name = ? AND revoked = ''", (_now(), name)
            )
        if not found.rowcount:
            raise ConfigError(f"{name}: has no pass that is good; `coterie witness show` lists all")
        return found.rowcount

    def check_pass(self, serial: int) -> None:
        """Raises: RefusedError unless it was given and is good."""
        with self._transaction() as connection:
            row = connection.execute(
                "SELECT revoked FROM pass WHERE serial = ?", (str(serial),)
            ).fetchone()
        if row is None or row[0]:
            raise RefusedError(Refusal.revoked)

    def passes(self) -> list[Given]:
        """All that were ever given, by name."""
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT name, given, until, revoked FROM pass ORDER BY name, given, serial"
            ).fetchall()
        return [Given(*row) for row in rows]

    def latest(self, ledger: str) -> Head:
        """The highest head. Raises: RefusedError for an id that is not enrolled."""
        with self._transaction() as connection:
            return self._latest(connection, ledger)

    def includes(self, ledger: str, head: Head) -> bool:
        """Whether the ledger went through `head`. Raises: RefusedError."""
        with self._transaction() as connection:
            self._latest(connection, ledger)
            return head == EMPTY or _hash_at(connection, ledger, head.seq) == head.hash

    def advance(self, step: Advance, node: str) -> Head:
        """Takes a ledger on to the end of `step`; the same again changes nothing.

        Args: node: whose pass it came with. Raises: RefusedError.
        """
        end = step.end
        with self._transaction() as connection:
            latest = self._latest(connection, step.ledger)
            _check_node(connection, step.ledger, node)
            # 1. The site wrote it, whoever brings it.
            key = _key_at(connection, step.ledger, end.seq)
            if not chain.hash_is_signed(key, step.signature, end.hash):
                raise RefusedError(Refusal.wrong_key)
            # 2. It goes on from what is known.
            fault = _fault(connection, step, latest)
            if fault is not None:
                self._keep_evidence(connection, step, fault)
            elif end.seq > latest.seq:
                # 3. On the disk with the end of this block, before anybody signs it.
                _append(connection, step, latest)
                if step.rotation:
                    _take_rotation(connection, step, key)
        if fault is not None:
            raise RefusedError(fault)
        return end

    def standings(self) -> list[Standing]:
        """All ledgers, by id."""
        with self._transaction() as connection:
            rows = connection.execute("SELECT id, node FROM ledger ORDER BY id").fetchall()
            return [self._standing(connection, ledger, node) for ledger, node in rows]

    def _standing(self, connection: sqlite3.Connection, ledger: str, node: str) -> Standing:
        head = self._latest(connection, ledger)
        ((seen,),) = connection.execute(
            "SELECT seen FROM entry WHERE id = ? AND seq = ?", (ledger, head.seq)
        ).fetchall()
        refused = connection.execute(
            "SELECT seq, hash, reason, seen FROM refused WHERE id = ? ORDER BY seen, seq", (ledger,)
        ).fetchall()
        evidence = tuple(
            {"head": f"{seq}:{hash_}", "reason": reason, "seen": at}
            for seq, hash_, reason, at in refused
        )
        key = _key_at(connection, ledger, head.seq + 1)
        return Standing(ledger, node, head, key, seen, evidence)

    def _latest(self, connection: sqlite3.Connection, ledger: str) -> Head:
        row = connection.execute(
            "SELECT seq, hash FROM entry WHERE id = ? ORDER BY seq DESC LIMIT 1", (ledger,)
        ).fetchone()
        if row is None:
            raise RefusedError(Refusal.unknown)
        return Head(*row)

    def _keep_evidence(self, connection: sqlite3.Connection, step: Advance, why: Refusal) -> None:
        """The site's own signature under a head that cannot be: who reads it need not trust us."""
        if why not in {Refusal.fork, Refusal.older}:
            return
        ((kept,),) = connection.execute(
            "SELECT COUNT(*) FROM refused WHERE id = ?", (step.ledger,)
        ).fetchall()
        if kept < MOST_EVIDENCE:
            connection.execute(
                "INSERT OR IGNORE INTO refused VALUES (?, ?, ?, ?, ?, ?)",
                (step.ledger, step.end.seq, step.end.hash, step.signature, why.name, _now()),
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One at a time; whole, and on the disk at its end, or not at all."""
        with self._turn:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    self._connection.rollback()
                    raise
            except sqlite3.OperationalError as error:  # a disk that is full, a lock
                raise OSError(None, f"{self._path}: {error}") from error
            except sqlite3.DatabaseError as error:
                raise self._not_ours(error) from error

    def _not_ours(self, error: Exception) -> VerificationError:
        return VerificationError(f"{self._path}: is not a witness's file ({error})")


def _check_node(connection: sqlite3.Connection, ledger: str, node: str) -> None:
    ((enrolled,),) = connection.execute(
        "SELECT node FROM ledger WHERE id = ?", (ledger,)
    ).fetchall()
    if enrolled != node:
        raise RefusedError(Refusal.stranger)


def _key_at(connection: sqlite3.Connection, ledger: str, seq: int) -> str:
    """The key that signs entry `seq`: an entry that names a new key is signed by the old one."""
    row = connection.execute(
        "SELECT key FROM signer WHERE id = ? AND after < ? ORDER BY after DESC LIMIT 1",
        (ledger, max(1, seq)),
    ).fetchone()
    return str(row[0])


def _hash_at(connection: sqlite3.Connection, ledger: str, seq: int) -> str | None:
    row = connection.execute(
        "SELECT hash FROM entry WHERE id = ? AND seq = ?", (ledger, seq)
    ).fetchone()
    return None if row is None else str(row[0])


def _fault(connection: sqlite3.Connection, step: Advance, latest: Head) -> Refusal | None:
    """What speaks against a step from what is known; None: nothing."""
    if step.after.seq > latest.seq:
        return Refusal.gap
    if step.after != EMPTY and _hash_at(connection, step.ledger, step.after.seq) != step.after.hash:
        return Refusal.fork
    for head in _heads(step):
        if head.seq > latest.seq:
            return None
        if _hash_at(connection, step.ledger, head.seq) != head.hash:
            return Refusal.fork
    return Refusal.older if step.end.seq < latest.seq else None


def _heads(step: Advance) -> Iterator[Head]:
    head = step.after
    for at in range(0, len(step.links), LINK_BYTES):
        digest = step.links[at : at + LINK_BYTES].hex()
        head = Head(head.seq + 1, linked(head.hash, digest))
        yield head


def _append(connection: sqlite3.Connection, step: Advance, latest: Head) -> None:
    now = _now()
    connection.executemany(
        "INSERT INTO entry VALUES (?, ?, ?, ?)",
        [(step.ledger, head.seq, head.hash, now) for head in _heads(step) if head.seq > latest.seq],
    )


def _take_rotation(connection: sqlite3.Connection, step: Advance, old: str) -> None:
    """The entry itself is shown, is the one whose digest was given, and both keys signed it.

    Raises: RefusedError.
    """
    end = step.end
    try:
        entry = chain.read_entry(step.rotation, end.seq)
    except VerificationError as error:
        raise RefusedError(Refusal.malformed) from error
    before = Head(entry.seq - 1, entry.prev)
    body = entry.body
    shown = entry.kind is Kind.KEY_ROTATE and Head(entry.seq, entry.hash) == end
    if not shown or not chain.rotation_is_proved(
        body["site_key"], body["proof"], old, after=before
    ):
        raise RefusedError(Refusal.malformed)
    row = (step.ledger, entry.seq, str(body["site_key"]))
    connection.execute("INSERT INTO signer VALUES (?, ?, ?)", row)


def _now() -> str:
    return datetime.now(UTC).strftime(TIME)
