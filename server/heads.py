"""The heads a coordinator has countersigned: what finds a ledger that went back in time.

A hash chain shows edits and not a cut tail. Whoever remembers one head of it can tell a copy that
is older, or a fork. The coordinator signs the head of each update it accepts, keeps it here from
run to run, and sends it to the site with the next instruction; it accepts no update whose ledger
does not go on from there. A coordinator and a site that both forget prove nothing: an officer
keeps heads of reports for that.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from common.errors import VerificationError
from common.keys import KEY_SUFFIX, generate_key, read_private_key
from common.messages import SiteBooks
from common.privacy.chain import Head, Receipt, continued, public_hex

BUSY_S = 30.0
"""How long a writer waits for another one."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS head (
    site TEXT PRIMARY KEY, seq INTEGER NOT NULL, hash TEXT NOT NULL, signature TEXT NOT NULL
) WITHOUT ROWID
"""


class HeadBook:
    """One file of a coordinator, and its key beside it. Several runs may share it."""

    def __init__(self, path: Path) -> None:
        """Opens the file; makes it, and a new key, if neither is there.

        Raises: ConfigError if its key is gone or not private; VerificationError if it is not one.
        """
        self._path, key = path, Path(f"{path}{KEY_SUFFIX}")
        path.parent.mkdir(parents=True, exist_ok=True)
        made = not path.exists() and not key.exists()
        self._key = generate_key(key) if made else read_private_key(key)
        with self._transaction() as connection:
            connection.execute(_SCHEMA)

    @property
    def key(self) -> str:
        """The coordinator's public key, in hex."""
        return public_hex(self._key)

    def receipts(self) -> dict[str, Receipt]:
        """The last receipt of each site."""
        with self._transaction() as connection:
            rows = connection.execute("SELECT site, seq, hash, signature FROM head").fetchall()
        return {
            site: Receipt(Head(seq, hash_), self.key, signature)
            for site, seq, hash_, signature in rows
        }

    def countersign(self, heads: Mapping[str, Head]) -> None:
        """Keeps these heads, signed, on disk when this returns; never an older one for a later."""
        rows = [
            (site, head.seq, head.hash, Receipt.sign(head, self._key).signature)
            for site, head in heads.items()
        ]
        with self._transaction() as connection:
            connection.executemany(
                "INSERT INTO head VALUES (?, ?, ?, ?) ON CONFLICT (site) DO UPDATE SET "
                "seq = excluded.seq, hash = excluded.hash, signature = excluded.signature "
                "WHERE excluded.seq > head.seq",
                rows,
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=BUSY_S)) as connection, connection:
                connection.execute("PRAGMA synchronous = FULL")
                yield connection
        except sqlite3.DatabaseError as error:
            raise VerificationError(f"{self._path}: is not a book of heads ({error})") from error


def receipts_of(nodes: Mapping[int, str], heads: HeadBook | None) -> dict[int, Receipt]:
    """What to send to each node: the receipt of the site of that name."""
    receipts = {} if heads is None else heads.receipts()
    return {node: receipts[name] for node, name in nodes.items() if name in receipts}


def check_continuation(receipt: Receipt | None, books: SiteBooks) -> None:
    """Raises: VerificationError unless the site's ledger goes on from the receipt it was sent."""
    if receipt is None:
        goes_on = not books.links
    else:
        goes_on = continued(receipt.head, books.links) == books.head
    if not goes_on:
        raise VerificationError(
            "update: its site's ledger does not go on from the head this coordinator signed; it is "
            "an older copy, or a fork"
        )
