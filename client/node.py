"""`coterie node`: the long-lived process beside a site's records."""

import logging
import sys
from importlib import metadata

from client.settings import NODE, NodeSettings
from common.cli import Invocation, emit_json
from common.code import check_flower
from common.composition import run_with


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
