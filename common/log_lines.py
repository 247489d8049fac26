"""A log as one line an event: words for people, or JSON for machines.

Neither repeats a traceback: a library's words about private bytes may hold some of them.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from enum import Enum
from typing import Any


class LogForm(Enum):
    """What a line of a log is."""

    text = "text"
    json = "json"


class OneLine(logging.Formatter):
    """A message is one line, whatever a stranger's words in it hold."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """As the format says, without control characters."""
        return _printable(super().formatMessage(record))


class JsonLine(logging.Formatter):
    """A JSON object a line: time, level, logger, message, and the event's own facts.

    Facts are what the call gives as `extra={"facts": {...}}`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        facts: dict[str, Any] = getattr(record, "facts", {})
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _printable(record.getMessage()),
            **facts,
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
        return json.dumps(line, ensure_ascii=False)


def begin_log(form: LogForm = LogForm.text) -> None:
    """Sends this process's log to stderr; of other libraries, what is wrong only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLine() if form is LogForm.json else OneLine("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("flwr").setLevel(logging.WARNING)


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)
