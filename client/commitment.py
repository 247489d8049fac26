"""A commitment to a site's records: one hash that changes with any of them, and tells nothing.

Leaves are HMACs under a secret of the site, so nobody without it can try out texts; sorted, so the
order of records does not matter. Merkle tree with separated domains, as in RFC 6962, 2.1.

Beside the root, a tag for each record or person: a second HMAC, in a domain of its own, that
leaves the label out. Where two ledgers of one secret have a tag in common, they have that record,
or person, in common.
"""

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.canonical import canonical_json

if TYPE_CHECKING:  # the books open without pandas
    from common.records import Records

_LEAF, _NODE, _TEXT, _OWNED, _PERSON = b"\x00", b"\x01", b"\x02", b"\x03", b"\x04"
"""What a hash is of: none of one kind can stand for one of another."""


@dataclass(frozen=True)
class Commitment:
    """What a ledger is bound to."""

    root: str
    """SHA-256 Merkle root, in hex, over records with their labels, and persons if they name any:
    goes into the chain.
    """
    tags: frozenset[bytes] = field(repr=False)
    """Of what must be under one ledger only, see `commit_to`: stay at the site."""


UNBOUND = Commitment("0" * 64, frozenset())
"""Before the first run binds a ledger to records."""


def commit_to(records: "Records", secret: bytes, *, unit: str = "record") -> Commitment:
    """Commits to records, whatever their order.

    Guarantee: without `secret` neither part tells anything of a text or id that could be guessed.
    The tags of two sets under one secret meet where a text is in both, whatever its labels; where
    records name persons, a text of the same person, and where persons are the unit, a person.
    """
    tags = frozenset(hmac.digest(secret, tagged, "sha256") for tagged in _tagged(records, unit))
    return Commitment(_root(_leaves(records, secret)), tags)


def _tagged(records: "Records", unit: str) -> Iterator[bytes]:
    persons = records.persons
    if persons is None:
        return (_TEXT + _bytes(_name(key)) for key in records.identities())
    if unit == "person":
        return (_PERSON + _bytes(person) for person in persons)
    pairs = zip(persons, map(_name, records.identities()), strict=True)
    return (_OWNED + _bytes(canonical_json([*pair])) for pair in pairs)


def secret_of(key: Ed25519PrivateKey) -> bytes:
    """The 32 secret bytes of a site that has had this key from its beginning."""
    info = b"coterie dataset commitment"
    return HKDF(hashes.SHA256(), 32, None, info).derive(key.private_bytes_raw())


def _root(leaves: Iterator[bytes]) -> str:
    level = sorted(leaves) or [hashlib.sha256(b"").digest()]
    while len(level) > 1:
        pairs = (level[at : at + 2] for at in range(0, len(level), 2))
        level = [hashlib.sha256(_NODE + b"".join(pair)).digest() for pair in pairs]
    return level[0].hex()


def _leaves(records: "Records", secret: bytes) -> Iterator[bytes]:
    columns = [[*map(_name, records.identities())], records.labels.tolist()]
    if records.persons is not None:
        columns.append(records.persons)
    for fields in zip(*columns, strict=True):
        yield hmac.digest(secret, _LEAF + _bytes(canonical_json([*fields])), "sha256")


def _name(key: object) -> str:
    """A text is its own name; several texts have that of their list."""
    return key if isinstance(key, str) else canonical_json(key)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
