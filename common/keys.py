"""Secrets in files that only their owner may read."""

import os
import stat
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.durable import sync_folder
from common.errors import ConfigError

KEY_SUFFIX = ".key"
"""Of the key beside a file that it signs for."""
SECRET_BYTES = 32
"""Of an Ed25519 key, and of HKDF's output."""


def generate_key(path: Path) -> Ed25519PrivateKey:
    """A new Ed25519 key, on disk with mode 0600 when this returns; never over another one.

    Raises: ConfigError if there is a file.
    """
    key = Ed25519PrivateKey.generate()
    write_secret(path, key.private_bytes_raw())
    return key


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """A key file of ours. Raises: ConfigError if others may read it, or it is none."""
    return Ed25519PrivateKey.from_private_bytes(read_secret(path))


def write_secret(path: Path, secret: bytes) -> None:
    """A new file, on disk with its name when this returns. Raises: ConfigError if there is one."""
    write_private(path, f"{secret.hex()}\n".encode("ascii"))


def write_private(path: Path, content: bytes) -> None:
    """A new file that its owner alone may read, on disk with its name when this returns.

    Raises: ConfigError if there is one.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists already; a key is never overwritten") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except BaseException:
        path.unlink()
        raise


def check_secret(path: Path) -> None:
    """Raises: ConfigError if others than its owner may read a file; OSError if it is not there."""
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(f"{path}: others may read this key; run chmod 600 on it")


def read_secret(path: Path) -> bytes:
    """What `write_secret` wrote. Raises: ConfigError if others may read it, or it is none."""
    try:
        check_secret(path)
        secret = bytes.fromhex(path.read_text("ascii").strip())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: the key is not there; a ledger is written with its key"
        ) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: holds no key") from error
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"{path}: holds no key")
    return secret
