"""Chains of entries where they lie: an exported file, or a ledger's own file, read only.

Nothing is written and no key is needed, so that whoever judges a ledger cannot change it.
"""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from common.errors import ConfigError, VerificationError
from common.privacy import chain
from common.privacy.books import Books
from common.privacy.chain import Entry, Head
from common.privacy.verification import Verified, judged, replayed, verify

MAX_BYTES = 1 << 30
"""Of an exported file: far above a million entries."""
SQLITE = b"SQLite format 3\0"


@dataclass(frozen=True)
class Chain:
    """One site's ledger, found sound."""

    source: str
    """Where it was read, as it was named."""
    entries: tuple[Entry, ...]
    verified: Verified
    claims: Mapping[str, float] | None
    """What the signed end of an export claims was spent; None of a ledger's own file."""

    @property
    def books(self) -> Books:
        """The state after all entries."""
        return self.verified.books

    @property
    def site(self) -> str:
        """Whose it is, by its first entry."""
        return str(self.books.genesis["site"])


@dataclass(frozen=True)
class Pins:
    """What a reader knows of ledgers, and holds against them."""

    key: str | None = None
    officer: str | None = None
    head: Head | None = None


def read_chains(name: str, pins: Pins = Pins()) -> list[Chain]:
    """The ledgers of `name`: an exported file, a ledger's file, or one site of it as FILE#SITE.

    Guarantee: each was judged from its first entry to its last.
    Raises: ConfigError if there is none, VerificationError naming the file and the entry at fault.
    """
    path, site = _split(name)
    try:
        if _is_database(path):
            return [_stored(name, path, each, pins) for each in _sites(path, site)]
        content = _content(path)
        read = chain.read_export(content)
        verified = verify(content, key=pins.key, officer=pins.officer, head=pins.head)
    except VerificationError as error:
        raise VerificationError(f"{name}: {error}") from error
    claims = {each: float(read.claims[each]) for each in chain.CLAIMS}
    found = Chain(name, read.entries, verified, claims)
    if site and site != found.site:
        raise ConfigError(f"{name}: no such site; it is the ledger of {found.site}")
    return [found]


def _split(name: str) -> tuple[Path, str]:
    if Path(name).exists():
        return Path(name), ""
    path, _, site = name.rpartition("#") if "#" in name else (name, "", "")
    if not Path(path).is_file():
        raise ConfigError(f"{name}: no such ledger, exported file or run folder")
    return Path(path), site


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(SQLITE)) == SQLITE


def _content(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise VerificationError("longer than any ledger")
    return path.read_bytes()


def _rows(path: Path, query: str, *values: object) -> list[tuple[object, ...]]:
    address = f"file:{quote(str(path.resolve()))}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True)) as connection:
            return connection.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise VerificationError(f"cannot be read as a ledger ({error}); export it first") from error


def _sites(path: Path, site: str) -> list[str]:
    known = [str(each) for (each,) in _rows(path, "SELECT DISTINCT site FROM entry ORDER BY site")]
    if site and site not in known:
        raise ConfigError(f"{path}#{site}: no such site; it holds {', '.join(known) or 'none'}")
    return [site] if site else known


def _stored(name: str, path: Path, site: str, pins: Pins) -> Chain:
    rows = _rows(path, "SELECT seq, line FROM entry WHERE site = ? ORDER BY seq", site)
    entries = tuple(chain.read_entry(str(line), number) for number, (_, line) in enumerate(rows, 1))
    books = replayed(entries)
    if books.genesis["site"] != site:
        raise VerificationError(f"#{site}: its first entry names another site")
    verified = judged(books, key=pins.key, officer=pins.officer, head=pins.head)
    source = name if "#" in name else f"{name}#{site}"
    return Chain(source, entries, verified, None)
