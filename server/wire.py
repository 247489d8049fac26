"""Flower's grid over a network, made as careful as the loop needs it, by semi-private names of
Flower's.

Flower's own pull holds all replies of a look in memory, raises for the first that it cannot read,
which loses the others, and asks for a part that is still on its way again after 1, 2, 4, 8 and
10 s. Here replies are read one after the other, what cannot be read is an error of the one who
sent it, and what nobody asked for is not fetched. Small vectors travel folded, see
`common.folding`. `tests/server/test_wire.py` says what of flwr this needs.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast

from flwr.app import Error, Message, MessageType, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as Envelope
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_objects
from flwr.supercore.run import Run

from common.errors import VerificationError
from common.folding import folded, unfold
from common.inflation import inflated
from common.messages import NOBODY
from server.aggregate import UNREADABLE

log = logging.getLogger(__name__)

AGAIN_S, AGAIN_MOST_S = 0.1, 0.5
"""After which a part of a reply that is still on its way is asked for again; the most. How often
is not counted: a sender who stops is given up by the SuperLink, 180 s after his last part."""
AT_ONCE = 16
"""Messages whose replies are asked for in one call. The SuperLink lets go of replies before it
hands them out: of an answer that is lost on its way, so many sites' are."""

OnNodes = Callable[[dict[int, str]], None]


class GridAround(Grid):
    """A grid around another: what it does not change is as on that one."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """Not ours to set."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """As on the grid inside."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As `Message(...)`: deprecated by Flower, and what its abstract class asks for."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The ids of `get_nodes`."""
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """As on the grid inside."""
        return self._grid.get_nodes()


class HttpGrid(Protocol):
    """What is used of `flwr.superlink.grid.http_grid.HttpGrid` beyond a `Grid`."""

    node: Node

    @property
    def _runtime_client(self) -> Any: ...


class WireGrid(GridAround):
    """A grid of Flower's, and what it cannot read is a reply with an error."""

    def __init__(self, grid: Grid, on_nodes: OnNodes) -> None:
        """Args: on_nodes: called with the nodes that are there, whenever they are asked for."""
        super().__init__(grid)
        self._on_nodes = on_nodes

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Nodes that are online, with the names they were registered by."""
        nodes = [*self._grid.get_nodes()]
        self._on_nodes({node.node_id: node.name or f"node-{node.node_id}" for node in nodes})
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """The id of each, or an empty text for one that was not taken. What they have in common
        goes over the wire once.
        """
        outgoing = [*messages]
        for message in outgoing:
            message.content = folded(message.content)
        ids = [*self._grid.push_messages(outgoing)] or [""] * len(outgoing)
        return [each or "" for each in ids]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that have come to these messages, asked for at once and read one by one: the
        next is fetched when it is asked for, and the SuperLink gives out none of them again.
        """
        ids = [*message_ids]
        for start in range(0, len(ids), AT_ONCE):
            yield from self._pulled(ids[start : start + AT_ONCE])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Not used: it sleeps for 3 seconds at a time."""
        raise NotImplementedError

    def _pulled(self, ids: list[str]) -> Iterator[Message]:
        response = self._line.PullMessages(PullAppMessagesRequest(message_ids=ids))
        trees = response.message_object_trees
        for envelope, tree in zip(response.messages_list, trees, strict=True):
            asked = envelope.metadata.reply_to_message_id
            if asked not in ids:  # whoever may send can send this process anything
                continue
            yield self._read_or_error(envelope, tree, asked)

    def _read_or_error(self, envelope: Envelope, tree: ObjectTree, asked: str) -> Message:
        try:
            return self._read(envelope, tree)
        except ObjectPullError:  # its sender began to send it, and did not end
            return _error(ErrorCode.MESSAGE_UNAVAILABLE, "a part never came", asked)
        except (VerificationError, ValueError) as error:  # or no protobuf came
            # Its text may repeat what a peer wrote.
            log.warning("a reply could not be read: %s", type(error.__cause__ or error).__name__)
            return _error(UNREADABLE, "the reply could not be read", asked)

    @property
    def _line(self) -> Any:
        return self._flower._runtime_client

    @property
    def _flower(self) -> HttpGrid:
        return cast("HttpGrid", self._grid)

    def _read(self, envelope: Envelope, tree: ObjectTree) -> Message:
        """One reply, unfolded. Raises: ObjectPullError if it is not all there; VerificationError if
        it is none: of its sender's words nothing is told.
        """
        run, root, node = self._grid.run.run_id, envelope.metadata.message_id, self._flower.node
        part = make_pull_object_fn_protobuf(self._line.PullObject, node, run)
        ids = [each.object_id for each in iterate_object_tree(tree)]
        parts = pull_objects(
            *(ids, part),
            max_tries_per_object=None,
            initial_backoff=AGAIN_S,
            backoff_cap=AGAIN_MOST_S,
        )
        self._line.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=root)
        )
        reply = inflated(root, parts)
        reply.metadata.__dict__["_reply_to_message_id"] = envelope.metadata.reply_to_message_id
        unfold(reply)
        return reply


def _error(code: int, reason: str, asked: str) -> Message:
    known = Metadata(0, "", NOBODY, NOBODY, asked, "", time.time(), 0.0, MessageType.TRAIN)
    return make_message(metadata=known, error=Error(code, reason))
