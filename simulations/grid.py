"""LocalGrid: Flower's Grid over the sites of one machine; nothing is polled."""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence, Set
from time import monotonic
from typing import Protocol

from flwr.app import Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from simulations.answer import (
    COORDINATOR_NODE_ID,
    RUN_ID,
    Answer,
    Together,
    alone,
    answered,
    are_alike,
    context_of,
    identify,
    is_late,
    node_of,
    one_by_one,
    partition_of,
)

__all__ = ["COORDINATOR_NODE_ID", "RUN_ID", "Crew", "LocalGrid", "ThisProcess"]

PATIENCE_S = 0.5
"""How long a pull waits for the first reply at most, so that a deadline can pass in between."""


class Crew(Protocol):
    """Who answers: this process, or several."""

    def push(self, outgoing: Iterable[Message]) -> None:
        """Takes messages that have their ids."""

    def pull(self, wanted: Collection[str], timeout_s: float) -> list[Message]:
        """Some replies to these messages, each once; none after so long without any."""

    def close(self) -> None:
        """Lets go of everything; what was not answered will not be."""


class ThisProcess:
    """Answers when a reply is pulled: one job per pull, in the order pushed."""

    def __init__(self, answer: Answer, sites: int, together: Together = alone) -> None:
        self._answer, self._together = answer, together
        self._contexts = [context_of(site, sites, RecordDict()) for site in range(sites)]
        self._waiting: OrderedDict[str, Message] = OrderedDict()

    def push(self, outgoing: Iterable[Message]) -> None:
        """See `Crew`."""
        for identity in [each for each, message in self._waiting.items() if is_late(message)]:
            del self._waiting[identity]
        self._waiting |= {message.metadata.message_id: message for message in outgoing}

    def pull(self, wanted: Collection[str], timeout_s: float) -> list[Message]:
        """See `Crew`."""
        job: list[Message] = []
        most = 1
        for identity, message in self._waiting.items():
            if identity in wanted and (not job or are_alike(message, job[0])):
                most = most if job else self._together(message)
                job.append(message)
            if len(job) >= most:
                break
        for message in job:
            del self._waiting[message.metadata.message_id]
        contexts = [self._contexts[partition_of(message)] for message in job]
        return answered(self._answer, job, contexts) if job else []

    def close(self) -> None:
        """See `Crew`."""
        self._waiting.clear()


class LocalGrid(Grid):
    """Carries messages to the ClientApp of each site and back.

    Guarantee: every pushed message is answered once, unless its time passes first. In this process
    a message is handled when its reply is pulled, one job per pull, in the order pushed, so that a
    deadline can pass between sites; workers begin when it is pushed, and answer in any order.
    """

    def __init__(self, crew: Crew | ClientApp, site_names: Sequence[str]) -> None:
        """Args: crew: who answers; a ClientApp answers in this process, one site at a time."""
        if isinstance(crew, ClientApp):
            crew = ThisProcess(one_by_one(crew), len(site_names))
        self._crew = crew
        self._names = {node_of(index): name for index, name in enumerate(site_names)}
        self._pushed = 0
        identify()

    def __enter__(self) -> "LocalGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends whatever processes answer."""
        self._crew.close()

    def set_run(self, run: Run) -> None:
        """Does nothing: a LocalGrid lives for one run."""

    @property
    def run(self) -> Run:
        """A LocalGrid has no record of its run."""
        raise NotImplementedError("a LocalGrid keeps no Run")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Deprecated by Flower in favour of `Message(...)`; the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Node id of every site."""
        return list(self._names)

    def get_nodes(self) -> list[NodeInfo]:
        """Node id and name of every site."""
        return [NodeInfo(node_id=node, name=name) for node, name in self._names.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queues messages; returns their ids."""
        named = []
        for message in messages:
            assert message.metadata.dst_node_id in self._names
            self._pushed += 1
            named.append(_with_id(message, f"local-{self._pushed}"))
        self._crew.push(named)
        return [message.metadata.message_id for message in named]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Some replies to these messages, each once; none after `PATIENCE_S` without any."""
        wanted = message_ids if isinstance(message_ids, Set) else {*message_ids}
        return self._crew.pull(wanted, PATIENCE_S) if wanted else []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Pushes, then pulls until all have answered or `timeout` seconds have passed."""
        waiting, replies = {*self.push_messages(messages)}, []
        deadline = None if timeout is None else monotonic() + timeout
        while waiting and (deadline is None or monotonic() < deadline):
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies


def _with_id(message: Message, identity: str) -> Message:
    """The same message under the id that a SuperLink would have given it."""
    known = message.metadata
    metadata = Metadata(
        run_id=known.run_id,
        message_id=identity,
        src_node_id=known.src_node_id,
        dst_node_id=known.dst_node_id,
        reply_to_message_id=known.reply_to_message_id,
        group_id=known.group_id,
        created_at=known.created_at,
        ttl=known.ttl,
        message_type=known.message_type,
    )
    renamed: Message = Message(content=message.content, metadata=metadata)  # type: ignore[call-overload] # Flower types the public forms only
    return renamed
