"""`coterie node`: the long-lived process beside a site's records."""

import logging
import sys
from importlib import metadata

from client.settings import NODE, NodeSettings
from common.cli import Invocation, emit_json
from common.composition import run_with
from common.errors import ConfigError

FLOWERS = ((1, 41), (1, 42))
"""Minor versions of flwr whose fleet protocol `client.fleet` speaks; see its contract tests."""


def node(invocation: Invocation) -> None:
    """Answer a coordinator's instructions beside a site's own records, by its own policy."""

    def job(settings: NodeSettings) -> None:
        check_flower(metadata.version("flwr"))
        _begin_log()  # before libraries that would begin one of their own
        # torch and the model come with it: whoever mistyped a setting does not wait for them.
        from client.service import run_node  # noqa: PLC0415

        answer = run_node(settings)
        if invocation.json:
            emit_json(answer)

    run_with(NODE, job, invocation)


def _begin_log() -> None:
    """Of what this node does, in plain words; of what was measured on records, nothing."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("flwr").setLevel(logging.WARNING)


class OneLine(logging.Formatter):
    """A message is one line, whatever a stranger's words in it hold."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """As the format says, without control characters."""
        line = super().formatMessage(record)
        return "".join(each if each.isprintable() else " " for each in line)


def check_flower(version: str) -> None:
    """Raises: ConfigError if this flwr is none whose protocol is known here.

    >>> check_flower("1.41.0")
    >>> check_flower("1.43.0")
    Traceback (most recent call last):
    common.errors.ConfigError: flwr 1.43.0: a node needs 1.41 or 1.42; pip install 'flwr<1.43'
    """
    first, second, *_ = (*version.split("."), "", "")
    if not (first.isdigit() and second.isdigit() and (int(first), int(second)) in FLOWERS):
        raise ConfigError(f"flwr {version}: a node needs 1.41 or 1.42; pip install 'flwr<1.43'")
