"""LocalGrid: Flower's Grid over ClientApps in this process; nothing is serialised or polled."""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from time import monotonic

from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.cohort import Cohort

log = logging.getLogger(__name__)

COORDINATOR_NODE_ID = 1
"""Flower's own id of the SuperLink; sites count from 2."""
RUN_ID = 1


class LocalGrid(Grid):
    """Carries messages to the ClientApp of each site and back.

    Guarantee: every pushed message is answered once; a message is handled when its reply is
    pulled, one site per pull, in the order pushed, so that a deadline can pass between sites. A
    cohort handles several of one kind per pull, as many as it says.
    """

    def __init__(
        self, client_app: ClientApp, site_names: list[str], cohort: Cohort | None = None
    ) -> None:
        self._client_app, self._cohort = client_app, cohort
        self._contexts = {
            COORDINATOR_NODE_ID + 1 + index: _context(index, len(site_names))
            for index in range(len(site_names))
        }
        self._names = dict(zip(self._contexts, site_names, strict=True))
        self._waiting: OrderedDict[str, Message] = OrderedDict()
        self._pushed = 0
        # Message() reads the sender from here; a Flower process sets it at start.
        TaskIdentity.run_id, TaskIdentity.node_id = RUN_ID, COORDINATOR_NODE_ID
        TaskIdentity.task_id = 1

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
        return list(self._contexts)

    def get_nodes(self) -> list[NodeInfo]:
        """Node id and name of every site."""
        return [NodeInfo(node_id=node, name=name) for node, name in self._names.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queues messages; returns their ids."""
        ids = []
        for message in messages:
            assert message.metadata.dst_node_id in self._contexts
            self._pushed += 1
            identity = f"local-{self._pushed}"
            self._waiting[identity] = _with_id(message, identity)
            ids.append(identity)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Handles the oldest of these messages still waiting, with those that go with it."""
        wanted, job = set(message_ids), list[Message]()
        most = 1
        for identity, message in self._waiting.items():
            if identity in wanted and (not job or _go_together(message, job[0])):
                job.append(message)
                most = self._cohort.size(message) if self._cohort and len(job) == 1 else most
            if len(job) >= most:
                break
        for message in job:
            del self._waiting[message.metadata.message_id]
        return self._handle(job) if job else []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Pushes, then pulls until all have answered or `timeout` seconds have passed."""
        waiting, replies = set(self.push_messages(messages)), []
        deadline = None if timeout is None else monotonic() + timeout
        while waiting and (deadline is None or monotonic() < deadline):
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies

    def _handle(self, job: list[Message]) -> list[Message]:
        """What a SuperNode does: an app that raises is answered for, without its text."""
        contexts = [self._contexts[message.metadata.dst_node_id] for message in job]
        try:
            if self._cohort is not None:
                return self._cohort(job, contexts)
            return [self._client_app(job[0], contexts[0])]
        except Exception:
            log.exception("the ClientApp raised")
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the ClientApp raised")
            return [Message(error, reply_to=message) for message in job]


def _go_together(message: Message, other: Message) -> bool:
    """Whether two messages are of one kind and round."""
    mine, theirs = message.metadata, other.metadata
    return (mine.message_type, mine.group_id) == (theirs.message_type, theirs.group_id)


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


def _context(partition: int, partitions: int) -> Context:
    return Context(
        run_id=RUN_ID,
        node_id=COORDINATOR_NODE_ID + 1 + partition,
        node_config={"partition-id": partition, "num-partitions": partitions},
        state=RecordDict(),
        run_config={},
    )
