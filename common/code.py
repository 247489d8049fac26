"""Which code this is: a digest that a site's officer can review once, and then hold it to."""

import functools
import hashlib
from pathlib import Path

from common.errors import ConfigError

PACKAGES = ("client", "common")
"""What runs beside the data."""


@functools.cache
def code_digest() -> str:
    """SHA-256, in hex, of every Python file of the client's packages, by path and content.

    Guarantee: another digest if any of them is edited, added, renamed or removed. What the
    libraries below are is not in it; their versions stand in each report.
    """
    root = Path(__file__).parent.parent
    whole = hashlib.sha256()
    for file in sorted(path for name in PACKAGES for path in (root / name).rglob("*.py")):
        whole.update(hashlib.sha256(str(file.relative_to(root)).encode()).digest())
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()


FLOWERS = ((1, 41), (1, 42))
"""Minor versions of flwr whose protocols are known here; see the contract tests of
`client.fleet`."""


def check_flower(version: str) -> None:
    """Raises: ConfigError if this flwr is none whose protocol is known here.

    >>> check_flower("1.41.0")
    >>> check_flower("1.43.0")
    Traceback (most recent call last):
    common.errors.ConfigError: flwr 1.43.0: needs 1.41 or 1.42; pip install 'flwr<1.43'
    """
    first, second, *_ = (*version.split("."), "", "")
    if not (first.isdigit() and second.isdigit() and (int(first), int(second)) in FLOWERS):
        raise ConfigError(f"flwr {version}: needs 1.41 or 1.42; pip install 'flwr<1.43'")
