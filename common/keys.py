"""Private keys in files that only their owner may read."""

import os
import stat
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import ConfigError


def generate_key(path: Path) -> Ed25519PrivateKey:
    """A new Ed25519 key, on disk with mode 0600 when this returns; never over another one.

    Raises: ConfigError if there is a file.
    """
    key = Ed25519PrivateKey.generate()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists already; a key is never overwritten") from error
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(key.private_bytes_raw().hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise
    return key


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """A key file of ours. Raises: ConfigError if others may read it, or it is none."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"{path}: others may read this key; run chmod 600 on it")
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text("ascii").strip()))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: the key is not there; a ledger is written with its key"
        ) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: holds no key") from error
