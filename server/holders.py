"""Who holds which keys and certificates: the book of whoever provisions a federation.

It knows public halves, certificates and digests of key files, and no private key but the
authority's and the one that seals: a key leaves its kit for nowhere. With the digests a kit can be
sealed again, with new certificates, by somebody who no longer has its keys.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
)

from common.certificates import Authority, make_authority, public_line
from common.durable import sync_folder
from common.errors import ConfigError, VerificationError
from common.keys import generate_key, read_private_key, write_private
from common.privacy.chain import public_hex
from common.seal import digest_of

BOOK, SEALING_KEY, LOCK = "holders.json", "sealing.key", "lock"
NODE_KEY, CLIENT_KEY, LEDGER_KEY, LOCAL_KEY = "node.key", "client.key", "ledger.key", "local.key"
DOOR_KEY, SUPERLINK_KEY = "door.key", "superlink.key"


@dataclass(frozen=True)
class Key:
    """One key of a holder, without its private half."""

    public: str
    """As whoever needs it reads it: a line of OpenSSH, PEM, or 64 hex digits."""
    digest: str
    """SHA-256 of the file that holds the private half."""


@dataclass(frozen=True)
class Holder:
    """A site, or the coordinator."""

    keys: Mapping[str, Key] = field(default_factory=dict)
    """By the name of the file."""
    certificates: Mapping[str, str] = field(default_factory=dict)
    """The valid ones, in PEM, by the name of the file."""
    issued: tuple[int, ...] = ()
    """Serial numbers of client certificates that are not revoked, the last one last."""
    earlier_ledger_keys: tuple[str, ...] = ()
    """Public: books that began with one of these are verified with it for ever."""
    sealed: str = ""
    """Digest of what its last kit holds: one that is as before is not made anew."""
    seal: str = ""
    """Digest of the seal of that kit."""
    is_out: bool = False
    """Whether the holder was revoked."""

    @property
    def emptied(self) -> "Holder":
        """Without keys and certificates, and let in again once it has others."""
        begun = [self.keys[LEDGER_KEY].public] if LEDGER_KEY in self.keys else []
        earlier = (*self.earlier_ledger_keys, *begun)
        return Holder(issued=self.issued, earlier_ledger_keys=earlier)


@dataclass(frozen=True)
class Book:
    """All holders, and every certificate that was revoked."""

    holders: Mapping[str, Holder] = field(default_factory=dict)
    revoked: Mapping[int, datetime] = field(default_factory=dict)
    revocations: str = ""
    """The list of these that the authority signed last, in PEM."""

    def with_holder(self, name: str, holder: Holder) -> "Book":
        """The book with a new state of one holder."""
        return replace(self, holders={**self.holders, name: holder})

    def revoking(self, name: str, *, now: datetime) -> "Book":
        """The book in which all client certificates of a holder are revoked."""
        holder = self.holders[name]
        revoked = {**self.revoked, **dict.fromkeys(holder.issued, now)}
        return replace(self.with_holder(name, replace(holder, issued=())), revoked=revoked)


@dataclass(frozen=True)
class Office:
    """The folder of whoever provisions: authority, sealing key, book, and kits to be handed out."""

    folder: Path

    @property
    def _own(self) -> Path:
        return self.folder / "authority"

    @property
    def kits(self) -> Path:
        """Where kits lie until they are handed out."""
        return self.folder / "kits"

    @property
    def officer_key(self) -> Path:
        """Of the privacy officer, where the federation names none."""
        return self.folder / "officer" / "officer.key"

    @property
    def authority(self) -> Authority:
        """What signs the federation's certificates."""
        return Authority(self._own / "ca.crt", self._own / "ca.key")

    def sealing_key(self) -> ed25519.Ed25519PrivateKey:
        """What seals kits. Raises: ConfigError if others may read it."""
        return read_private_key(self._own / SEALING_KEY)

    def prepare(self, *, days: int, now: datetime) -> None:
        """Makes what is not there: nothing that is, is touched."""
        for each in (self.folder, self._own, self.kits):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.authority.key.exists():
            make_authority(self._own, days=days, now=now)
        if not (self._own / SEALING_KEY).exists():
            generate_key(self._own / SEALING_KEY)

    def officer(self) -> str:
        """The public key of the officer whose private one is made here, if it is not there."""
        path = self.officer_key
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return public_hex(read_private_key(path) if path.exists() else generate_key(path))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone in here. Raises: ConfigError if this is no office, or another process is in it."""
        try:
            handle = os.open(self._own / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: no federation was provisioned there; give the folder that "
                "`coterie provision FILE --to FOLDER` made"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ConfigError(f"{self.folder}: another process provisions there") from error
        try:
            yield
        finally:
            os.close(handle)

    def read_book(self) -> Book:
        """The book; an empty one if there is none. Raises: VerificationError if malformed."""
        path = self._own / BOOK
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return Book(
                {name: _holder(each) for name, each in values["holders"].items()},
                {int(serial): _moment(since) for serial, since in values["revoked"].items()},
                str(values["revocations"]),
            )
        except FileNotFoundError:
            return Book()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VerificationError(f"{path}: malformed; restore it from a backup") from error

    def write_book(self, book: Book) -> None:
        """Replaces the book, whole."""
        values = {
            "holders": {name: asdict(each) for name, each in book.holders.items()},
            "revoked": {
                str(serial): since.isoformat(timespec="seconds")
                for serial, since in book.revoked.items()
            },
            "revocations": book.revocations,
        }
        new = self._own / f"{BOOK}.new"
        new.unlink(missing_ok=True)
        write_private(new, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())
        new.replace(self._own / BOOK)
        sync_folder(self._own)


def _holder(values: Mapping[str, object]) -> Holder:
    keys, certificates = values["keys"], values["certificates"]
    issued, earlier = values["issued"], values["earlier_ledger_keys"]
    if not (isinstance(keys, dict) and isinstance(certificates, dict)):
        raise TypeError
    if not (isinstance(issued, list) and isinstance(earlier, list)):
        raise TypeError
    return Holder(
        {name: Key(str(each["public"]), str(each["digest"])) for name, each in keys.items()},
        {str(name): str(each) for name, each in certificates.items()},
        tuple(int(serial) for serial in issued),
        tuple(str(each) for each in earlier),
        str(values["sealed"]),
        str(values["seal"]),
        bool(values["is_out"]),
    )


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def make_key(name: str) -> bytes:
    """The content of a new file of a private key, of the kind that goes by this name."""
    if name == LEDGER_KEY:
        return f"{ed25519.Ed25519PrivateKey.generate().private_bytes_raw().hex()}\n".encode("ascii")
    key = ec.generate_private_key(ec.SECP384R1())
    form = PrivateFormat.OpenSSH if name == NODE_KEY else PrivateFormat.PKCS8
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def read_key(name: str, content: bytes) -> Key:
    """What the book keeps of a file that `make_key` made. Raises: VerificationError."""
    try:
        return Key(_PUBLIC.get(name, _pem)(content), digest_of(content))
    except (ValueError, TypeError) as error:
        raise VerificationError(f"{name}: holds no key") from error


def public_of(key: Key) -> ec.EllipticCurvePublicKey:
    """Of a key that a certificate is for."""
    public = load_pem_public_key(key.public.encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return public


def certificate_of(text: str) -> x509.Certificate:
    """A certificate of the book."""
    return x509.load_pem_x509_certificate(text.encode())


def _ssh(content: bytes) -> str:
    key = load_ssh_private_key(content, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return public_line(key.public_key()).decode("ascii").strip()


def _hex(content: bytes) -> str:
    secret = bytes.fromhex(content.decode("ascii").strip())
    return public_hex(ed25519.Ed25519PrivateKey.from_private_bytes(secret))


def _pem(content: bytes) -> str:
    public = load_pem_private_key(content, None).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")


_PUBLIC: dict[str, Callable[[bytes], str]] = {NODE_KEY: _ssh, LEDGER_KEY: _hex}
