"""Answers: what becomes of the messages to sites of a simulation, in whatever process."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

log = logging.getLogger(__name__)

COORDINATOR_NODE_ID = 1
"""Flower's own id of the SuperLink; sites count from 2."""
RUN_ID = 1

Answer = Callable[[Sequence[Message], Sequence[Context]], list[Message]]
"""Replies to some messages, in their order; each with the context of the site it is for."""


@runtime_checkable
class Resting(Protocol):
    """An `Answer` that has something to do for its next one while it has nothing to answer."""

    def rest(self) -> bool:
        """A little of it. Returns: whether there is more."""


Together = Callable[[Message], int]
"""How many sites may be answered at once, by one call of an `Answer`, where the first of their
messages is this one; all are of one instruction. At least 1."""


def alone(_: Message) -> int:
    """Every site by itself."""
    return 1


def one_by_one(app: ClientApp) -> Answer:
    """A ClientApp, asked for one site after the other."""

    def answer(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        return [app(*pair) for pair in zip(messages, contexts, strict=True)]

    return answer


def answered(
    answer: Answer, messages: Sequence[Message], contexts: Sequence[Context]
) -> list[Message]:
    """What a SuperNode does: an app that raises is answered for, without its text."""
    try:
        return answer(messages, contexts)
    except Exception:
        log.exception("the ClientApp raised")
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the ClientApp raised")
        return [Message(error, reply_to=message) for message in messages]


def identify() -> None:
    """`Message()` reads the sender from here; a process of Flower's sets it when it starts."""
    TaskIdentity.run_id, TaskIdentity.node_id = RUN_ID, COORDINATOR_NODE_ID
    TaskIdentity.task_id = 1


def node_of(partition: int) -> int:
    """Node id of a site, by its place among them."""
    return COORDINATOR_NODE_ID + 1 + partition


def partition_of(message: Message) -> int:
    """The place among the sites of the one that a message is for."""
    return int(message.metadata.dst_node_id) - COORDINATOR_NODE_ID - 1


def context_of(partition: int, partitions: int, state: RecordDict) -> Context:
    """What a site's node knows of it; `state` is what its app left there."""
    return Context(
        run_id=RUN_ID,
        node_id=node_of(partition),
        node_config={"partition-id": partition, "num-partitions": partitions},
        state=state,
        run_config={},
    )


def are_alike(one: Message, other: Message) -> bool:
    """Whether two messages are of one instruction, to several sites."""
    mine, theirs = one.metadata, other.metadata
    return (mine.message_type, mine.group_id) == (theirs.message_type, theirs.group_id)


def is_late(message: Message) -> bool:
    """Whether whoever sent it no longer waits."""
    known = message.metadata
    return bool(known.created_at + known.ttl < time.time())
