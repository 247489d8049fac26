"""A commitment to a site's records: one hash that changes with any of them, and tells nothing.

Leaves are HMACs under a secret of the site, so nobody without it can try out texts; sorted, so the
order of records does not matter. Merkle tree with separated domains, as in RFC 6962, 2.1.

Beside the root, a tag for each record or person: a second HMAC, in a domain of its own, that
leaves the label out. Where two ledgers of one secret have a tag in common, they have that record,
or person, in common.
"""

import hashlib
import hmac
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.canonical import canonical_json
from common.digests import SIZE, Digests, DigestSet, gathered, order_of, rows_of
from common.progress import Told, telling, untold

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
    tags: Set[bytes] = field(repr=False)
    """Of what must be under one ledger only, see `commit_to`: stay at the site."""


UNBOUND = Commitment("0" * 64, frozenset())
"""Before the first run binds a ledger to records."""


def commit_to(
    records: "Records", secret: bytes, *, unit: str = "record", told: Told = untold
) -> Commitment:
    """Commits to records, whatever their order; their contents are read once, one at a time.

    Guarantee: without `secret` neither part tells anything of a text or id that could be guessed.
    The tags of two sets under one secret meet where a text is in both, whatever its labels; where
    records name persons, a text of the same person, and where persons are the unit, a person.
    Args: told: hears how far it is.
    """
    records, leaves, tags = records.laid_out(), bytearray(), bytearray()
    tagged, persons = _tagged(records, unit), records.persons
    identities = telling(records.identities(), told, "committing to records", len(records))
    for at, (key, label) in enumerate(zip(identities, records.labels, strict=True)):
        name, person = _name(key), persons[at] if persons is not None else ""
        fields = [name, int(label), *([] if persons is None else [person])]
        leaves += hmac.digest(secret, _LEAF + _bytes(canonical_json(fields)), "sha256")
        tags += hmac.digest(secret, tagged(name, person), "sha256")
    return Commitment(_root(rows_of(leaves)), DigestSet(rows_of(tags)))


def _tagged(records: "Records", unit: str) -> Callable[[str, str], bytes]:
    """What the tag of a record is of, from its text's name and its person."""
    if records.persons is None:
        return lambda name, _: _TEXT + _bytes(name)
    if unit == "person":
        return lambda _, person: _PERSON + _bytes(person)
    return lambda name, person: _OWNED + _bytes(canonical_json([person, name]))


def secret_of(key: Ed25519PrivateKey) -> bytes:
    """The 32 secret bytes of a site that has had this key from its beginning."""
    info = b"coterie dataset commitment"
    return HKDF(hashes.SHA256(), 32, None, info).derive(key.private_bytes_raw())


def _root(leaves: Digests) -> str:
    level = leaves[order_of(leaves)].tobytes() or hashlib.sha256(b"").digest()
    while len(level) > SIZE:
        pairs = (level[at : at + 2 * SIZE] for at in range(0, len(level), 2 * SIZE))
        level = gathered(hashlib.sha256(_NODE + pair).digest() for pair in pairs).tobytes()
    return level.hex()


def _name(key: object) -> str:
    """A text is its own name; several texts have that of their list."""
    return key if isinstance(key, str) else canonical_json(key)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
