"""The secret files of a ledger, and how a new key takes the place of the one in use."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.durable import sync_folder
from common.keys import KEY_SUFFIX, generate_key, read_private_key, read_secret, write_secret

SECRET_SUFFIX, NEXT_SUFFIX = ".secret", ".new"


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
        return read_secret(self.secret_path) if self.secret_path.exists() else None

    def keep(self, secret: bytes) -> None:
        """Writes a secret that is to outlive the key; whole or not at all."""
        self.tidy()
        write_secret(self._next_secret, secret)
        _install(self._next_secret, self.secret_path)

    def tidy(self) -> None:
        """Removes a secret that `keep` did not get to write whole."""
        self._next_secret.unlink(missing_ok=True)


def _install(new: Path, path: Path) -> None:
    new.replace(path)
    sync_folder(path.parent)
