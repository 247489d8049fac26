"""A commitment to a site's records: one hash that changes with any of them, and tells nothing.

Leaves are HMACs under a secret of the site, so nobody without it can try out texts; sorted, so the
order of records does not matter. Merkle tree with separated domains, as in RFC 6962, 2.1.
"""

import hashlib
import hmac
from collections.abc import Iterator

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.canonical import canonical_json
from common.data import Records


def dataset_root(records: Records, key: Ed25519PrivateKey) -> str:
    """SHA-256 root, in hex, over the records, their labels and their persons, if they name any;
    keyed by the site's key.
    """
    secret = HKDF(hashes.SHA256(), 32, None, b"coterie dataset commitment").derive(
        key.private_bytes_raw()
    )
    level = sorted(_leaves(records, secret)) or [hashlib.sha256(b"").digest()]
    while len(level) > 1:
        pairs = (level[at : at + 2] for at in range(0, len(level), 2))
        level = [hashlib.sha256(b"\x01" + b"".join(pair)).digest() for pair in pairs]
    return level[0].hex()


def _leaves(records: Records, secret: bytes) -> Iterator[bytes]:
    columns = [records.texts, records.labels.tolist()]
    if records.persons is not None:
        columns.append(records.persons)
    for fields in zip(*columns, strict=True):
        content = canonical_json([*fields]).encode(errors="surrogatepass")
        yield hmac.digest(secret, b"\x00" + content, "sha256")
