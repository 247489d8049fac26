"""Secrets in files that only their owner may read: private keys, and what a ledger has of them."""

import os
import stat
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.durable import sync_folder
from common.errors import ConfigError

KEY_SUFFIX, SECRET_SUFFIX, NEXT_SUFFIX = ".key", ".secret", ".new"


def generate_key(path: Path) -> Ed25519PrivateKey:
    """A new Ed25519 key, on disk with mode 0600 when this returns; never over another one.

    Raises: ConfigError if there is a file.
    """
    key = Ed25519PrivateKey.generate()
    _write(path, key.private_bytes_raw())
    return key


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """A key file of ours. Raises: ConfigError if others may read it, or it is none."""
    return Ed25519PrivateKey.from_private_bytes(_read(path))


class SiteKeys:
    """The secret files of a ledger: its key, the key that is to follow, and what outlives both.

    Links are followed: a key stays in the folder it is kept in. No method is safe against another
    one elsewhere; a ledger's lock and transactions are.
    """

    def __init__(self, ledger: Path) -> None:
        self.path = Path(f"{ledger}{KEY_SUFFIX}").resolve()
        self._next = Path(f"{self.path}{NEXT_SUFFIX}")
        self.secret_path = Path(f"{ledger}{SECRET_SUFFIX}").resolve()
        self._next_secret = Path(f"{self.secret_path}{NEXT_SUFFIX}")

    def current(self) -> Ed25519PrivateKey:
        """The key in use. Raises: ConfigError if others may read it, or it is none."""
        return read_private_key(self.path)

    def is_changing(self) -> bool:
        """Whether a change of keys began, and did not end."""
        return self._next.exists()

    def propose(self) -> Ed25519PrivateKey:
        """A new key beside the one in use, on disk with its name. Raises: ConfigError."""
        return generate_key(self._next)

    def proposed(self) -> Ed25519PrivateKey:
        """The key that is to follow. Raises: ConfigError if others may read it, or it is none."""
        return read_private_key(self._next)

    def adopt(self) -> None:
        """Puts the proposed key in the place of the one in use, for good when this returns."""
        _install(self._next, self.path)

    def withdraw(self) -> None:
        """Forgets the proposed key."""
        self._next.unlink()

    def kept_secret(self) -> bytes | None:
        """What `keep` wrote, if it ever did. Raises: ConfigError if others may read it."""
        return _read(self.secret_path) if self.secret_path.exists() else None

    def keep(self, secret: bytes) -> None:
        """Writes a secret that is to outlive the key; whole or not at all."""
        self.tidy()
        _write(self._next_secret, secret)
        _install(self._next_secret, self.secret_path)

    def tidy(self) -> None:
        """Removes a secret that `keep` did not get to write whole."""
        self._next_secret.unlink(missing_ok=True)


def _write(path: Path, secret: bytes) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists already; a key is never overwritten") from error
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secret.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except BaseException:
        path.unlink()
        raise


def _read(path: Path) -> bytes:
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"{path}: others may read this key; run chmod 600 on it")
        secret = bytes.fromhex(path.read_text("ascii").strip())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: the key is not there; a ledger is written with its key"
        ) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: holds no key") from error
    if len(secret) != 32:  # noqa: PLR2004 - bytes, of an Ed25519 key and of HKDF's output
        raise ConfigError(f"{path}: holds no key")
    return secret


def _install(new: Path, path: Path) -> None:
    new.replace(path)
    sync_folder(path.parent)
