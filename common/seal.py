"""The seal of a kit: every file of it by digest, signed by whoever provisioned the federation.

A *kit* is a flat folder that one holder gets: a site, or the coordinator. Its seal tells a kit that
somebody altered on its way from one that is as it was made. That holds against somebody who can
make a seal of his own only where the provisioner's public key is known by another way.
"""

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.canonical import canonical_json
from common.errors import ConfigError, VerificationError

SEAL = "seal.json"
MAX_FILE_BYTES = 1 << 20
"""Of one file of a kit."""
_PURPOSE = b"coterie kit seal 1\n"


@dataclass(frozen=True)
class Seal:
    """What a seal says, once it was checked."""

    federation: str
    holder: str
    """The site that the kit is for, or "coordinator"."""
    made: datetime
    expires: Mapping[str, datetime]
    """When each certificate of the kit ends, by its file."""
    files: Mapping[str, str]
    """SHA-256 of each file but the seal itself."""
    key: str
    """Public key of the provisioner, 64 hex digits."""
    pinned: bool
    """Whether that key was known beforehand; if not, the kit could be all of a stranger's."""

    @property
    def ends(self) -> datetime | None:
        """When the first of its certificates ends."""
        return min(self.expires.values(), default=None)


def digest_of(content: bytes) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(content).hexdigest()


def sealed(
    key: Ed25519PrivateKey,
    *,
    federation: str,
    holder: str,
    files: Mapping[str, str],
    expires: Mapping[str, datetime],
    now: datetime,
) -> str:
    """The text of a seal. Args: files: digest of each file; expires: of each certificate."""
    body = {
        "federation": federation,
        "holder": holder,
        "made": now.isoformat(timespec="seconds"),
        "expires": {name: end.isoformat(timespec="seconds") for name, end in expires.items()},
        "files": dict(files),
        "key": key.public_key().public_bytes_raw().hex(),
    }
    signature = key.sign(_PURPOSE + canonical_json(body).encode()).hex()
    return json.dumps({**body, "signature": signature}, indent=1, sort_keys=True) + "\n"


def check_seal(folder: Path, *, key: str = "") -> Seal:
    """What the seal of a kit says, if the kit is as it was made.

    Names that begin with two dots are not looked at: Kubernetes keeps its own there.
    Args: key: the provisioner's public key, if it is known by another way than the kit.
    Raises: VerificationError naming the file that is altered, missing or one too many, or if the
    seal is another's; ConfigError if there is no kit, or others may read it.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no kit, as it is no folder")
    seal = _read(folder, key)
    found = {path.name: path for path in folder.iterdir() if not path.name.startswith("..")}
    found.pop(SEAL)
    for name in sorted({*found} | {*seal.files}):
        if name not in seal.files:
            raise VerificationError(
                f"{folder / name}: is no file of this kit; keep what is your own elsewhere"
            )
        if name not in found:
            raise VerificationError(f"{folder / name}: is missing from this kit; get the kit anew")
        if digest_of(_content(found[name])) != seal.files[name]:
            raise VerificationError(f"{folder / name}: was altered; get the kit anew")
    _check_modes(folder, found)
    return seal


def _read(folder: Path, key: str) -> Seal:
    path = folder / SEAL
    try:
        values = json.loads(_content(path))
        signature, body = bytes.fromhex(values["signature"]), {**values}
        del body["signature"]
        seal = _parsed(body, pinned=bool(key))
        signed = Ed25519PublicKey.from_public_bytes(bytes.fromhex(seal.key))
        signed.verify(signature, _PURPOSE + canonical_json(body).encode())
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: is no kit, as it has no {SEAL}") from error
    except InvalidSignature as error:
        raise VerificationError(f"{path}: its signature does not hold; get the kit anew") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{path}: is malformed; get the kit anew") from error
    if key and key != seal.key:
        raise VerificationError(
            f"{path}: was sealed by {seal.key}, and not by {key}; somebody else made this kit, or "
            "the key is not this federation's"
        )
    return seal


def _parsed(body: dict[str, Any], *, pinned: bool) -> Seal:
    return Seal(
        str(body["federation"]),
        str(body["holder"]),
        _moment(body["made"]),
        {str(name): _moment(end) for name, end in body["expires"].items()},
        {str(name): str(each) for name, each in body["files"].items()},
        str(body["key"]),
        pinned,
    )


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _content(path: Path) -> bytes:
    if not path.is_file():
        if path.exists():
            raise VerificationError(
                f"{path}: is no file of this kit; keep what is your own elsewhere"
            )
        raise FileNotFoundError(path)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise VerificationError(f"{path}: was altered; get the kit anew")
    return path.read_bytes()


def _check_modes(folder: Path, found: Mapping[str, Path]) -> None:
    for path in (folder, *found.values()):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(
                f"{path}: others may read it; run chmod -R go= {folder}, as a kit holds keys"
            )
