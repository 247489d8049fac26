"""What may leave a site: names on a list. Whatever else stands in a reply is dropped, and logged.

The handlers build their replies from the same names; this is the second lock, at the door itself,
for the day when somebody adds a metric to a reply, or an exception carries a record's text.
"""

import logging

from flwr.app import Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from client.refusals import code_of
from common import messages

log = logging.getLogger(__name__)

ALLOWED: dict[str, dict[str, frozenset[str]]] = {
    MessageType.TRAIN: {
        messages.VECTOR: frozenset({messages.VECTOR}),
        messages.FACTS: messages.UPDATE_FACTS,
    },
    MessageType.EVALUATE: {messages.FACTS: messages.COUNT_FACTS},
}
"""By kind of message, the records of a reply and the names in them."""


def egress(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod, the outermost of its app.

    Guarantee: a reply holds listed records with listed names, or a code of `messages.REFUSALS`
    with its fixed text; the text of an exception stays in the local log.
    """
    try:
        reply = call_next(message, context)
    except Exception as error:
        code = code_of(error)
        unexpected = code == messages.LOCAL_FAILURE
        log.error(  # noqa: TRY400 - a traceback only of what nobody expects
            "not answered (%s): %s", messages.REFUSALS[code], error, exc_info=unexpected
        )
        return _refusal(code, message)
    if reply.has_error():
        code = reply.error.code
        return _refusal(code if code in messages.REFUSALS else messages.LOCAL_FAILURE, message)
    kind = message.metadata.message_type.partition(".")[0]
    return Message(_listed(reply.content, ALLOWED.get(kind, {})), reply_to=message)


def _listed(content: RecordDict, allowed: dict[str, frozenset[str]]) -> RecordDict:
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
