"""Flower's grid over a network, made as careful as the loop needs it.

Flower's own pulls all replies in one call and raises for the first that it cannot read, which ends
the run and loses the others: whoever can answer could stop everybody. Here each reply is pulled
by itself, and what cannot be read is an error of the one who sent it.
"""

import logging
import time
from collections.abc import Callable, Iterable

import httpx
from flwr.app import Error, Message, MessageType, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from common.messages import NOBODY
from server.aggregate import UNREADABLE

log = logging.getLogger(__name__)


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
        ids = [*self._grid.push_messages(outgoing)] or [""] * len(outgoing)
        return [each or "" for each in ids]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come to these messages, each read by itself."""
        return [reply for sent in [*message_ids] for reply in self._pull(sent)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Not used: it sleeps for 3 seconds at a time."""
        raise NotImplementedError

    def _pull(self, sent: str) -> list[Message]:
        try:
            replies = [*self._grid.pull_messages([sent])]
        except httpx.HTTPError:  # the network, which Flower has tried again already
            raise
        except Exception as error:
            # Its text may repeat what a peer wrote.
            log.warning("a reply could not be read: %s", type(error).__name__)
            refusal = Error(UNREADABLE, "the reply could not be read")
            known = Metadata(0, "", NOBODY, NOBODY, sent, "", time.time(), 0.0, MessageType.TRAIN)
            replies = [make_message(metadata=known, error=refusal)]
        return replies
