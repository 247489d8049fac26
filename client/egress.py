"""What may leave a site: names on a list. Whatever else stands in a reply is dropped, and logged.

The handlers build their replies from the same names; this is the second lock, at the door itself,
for the day when somebody adds a metric to a reply, or an exception carries a record's text.
"""

import logging
from collections.abc import Mapping

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable

from client.refusals import code_of
from common import messages

log = logging.getLogger(__name__)

Allowed = Mapping[str, frozenset[str]]
Record = ArrayRecord | MetricRecord | ConfigRecord

ALLOWED: dict[str, dict[str, frozenset[str]]] = {
    MessageType.TRAIN: {
        messages.VECTOR: frozenset({messages.VECTOR}),
        messages.FACTS: messages.UPDATE_FACTS,
    },
    MessageType.EVALUATE: {messages.FACTS: messages.COUNT_FACTS},
}
"""By kind of message, the records of a reply and the names in them."""
UNMEASURED = (ArrayRecord, ConfigRecord)
"""Kinds of record that may leave as they are; measurements do not leave at all."""


def egress(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod, the outermost of its app.

    Guarantee: a reply holds listed records with listed names, or a code of `messages.REFUSALS`
    with its fixed text; the text of an exception stays in the local log.
    """
    try:
        reply = call_next(message, context)
    except Exception as error:
        code = code_of(error)
        unexpected = code == messages.LOCAL_FAILURE and not isinstance(error, OSError)
        log.error(  # noqa: TRY400 - a traceback only of what nobody expects
            "not answered (%s): %s", messages.REFUSALS[code], error, exc_info=unexpected
        )
        return _refusal(code, message)
    if reply.has_error():
        code = reply.error.code
        return _refusal(code if code in messages.REFUSALS else messages.LOCAL_FAILURE, message)
    allowed = ALLOWED.get(message.metadata.message_type.partition(".")[0], {})
    if all(_is_listed(name, record, allowed) for name, record in reply.content.items()):
        return reply
    return Message(_listed(reply.content, allowed), reply_to=message)


def _is_listed(name: str, record: Record, allowed: Allowed) -> bool:
    """Whether all of a record may leave, so that nothing need be copied and checked anew."""
    names = record.keys()
    return bool(names) and type(record) in UNMEASURED and names <= allowed.get(name, frozenset())


def _listed(content: RecordDict, allowed: Allowed) -> RecordDict:
    kept, dropped = RecordDict(), []
    for name, record in content.items():
        measured = isinstance(record, MetricRecord)
        names = frozenset[str]() if measured else allowed.get(name, frozenset())
        outside = record.keys() - names
        dropped += [f"{name}.{each}" for each in record if each in outside]
        if record and not outside:
            kept[name] = record
        elif listed := {each: value for each, value in record.items() if each in names}:
            kept[name] = type(record)(listed)  # type: ignore[arg-type] # of the same kind
    if dropped:
        log.warning("not on the list of what may leave, and dropped: %s", ", ".join(dropped))
    return kept


def _refusal(code: int, message: Message) -> Message:
    return Message(Error(code, messages.REFUSALS[code]), reply_to=message)
