"""One instruction to each site of a cohort, and what comes back before the deadline."""

from collections.abc import Iterator, Mapping
from time import monotonic, sleep
from types import MappingProxyType

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common import messages
from common.config import Config
from common.messages import Instruction
from common.privacy.chain import Receipt
from server.cohort import POLL_S


class Exchange:
    """The messages of one round.

    Guarantee: a site whose attempt was lost is asked again while it has spare rounds, never
    after the deadline; every attempt counts as charged, answered or not.
    """

    def __init__(
        self,
        grid: Grid,
        instruction: Instruction,
        *,
        timeout_s: float,
        receipts: Mapping[int, Receipt],
        spares: dict[int, int],
        configs: Mapping[int, Config] = MappingProxyType({}),
    ) -> None:
        """Args: receipts, spares, configs: by node id; a repeated attempt is taken from `spares`,
        which outlives the round; a node is told its own config, where it has one, in the place of
        the instruction's.
        """
        self.sent: dict[str, int] = {}
        """Node id by message id, repeated attempts included."""
        self.bytes_down = 0
        self._grid, self._group = grid, str(instruction.round)
        self._content, self._configs = messages.pack_instruction(instruction), configs
        self._on_terms: dict[int, RecordDict] = {}
        """By the identity of a config, which many nodes share."""
        self._bytes = messages.content_bytes(self._content)
        self._receipts, self._spares = receipts, spares
        self._deadline = monotonic() + timeout_s

    def send(self, nodes: tuple[int, ...], kind: str = MessageType.TRAIN) -> list[str]:
        """Pushes the instruction to these nodes; returns the ids of the messages that went."""
        outgoing = [self._addressed(node, kind) for node in nodes]
        ids = self._grid.push_messages(outgoing)
        went = {sent: node for sent, node in zip(ids, nodes, strict=True) if sent}
        self.sent.update(went)
        self.bytes_down += len(went) * self._bytes
        return list(went)

    def replies(self) -> Iterator[Message]:
        """The last reply of each site, as they come; ends when all have, or at the deadline."""
        waiting = dict.fromkeys(self.sent)  # in the order sent
        while waiting and monotonic() < self._deadline:
            nothing = True
            for reply in [*self._grid.pull_messages(waiting.keys())]:
                answered = reply.metadata.reply_to_message_id
                if answered not in waiting:  # unasked, or a second reply to the same message
                    continue
                nothing = False
                del waiting[answered]
                again = self._again(self.sent[answered], reply)
                waiting.update(dict.fromkeys(again))
                if not again:
                    yield reply
            if nothing:
                sleep(POLL_S)

    def _again(self, node: int, reply: Message) -> list[str]:
        """Asks once more where the site lost the round and its plan still has a spare."""
        lost = reply.has_error() and reply.error.code == messages.LOCAL_FAILURE
        if not lost or self._spares.get(node, 0) < 1 or monotonic() >= self._deadline:
            return []
        self._spares[node] -= 1
        return self.send((node,))

    def _told(self, node: int) -> RecordDict:
        config = self._configs.get(node)
        if config is None:
            return self._content
        if id(config) not in self._on_terms:
            self._on_terms[id(config)] = messages.on_terms(self._content, config)
        return self._on_terms[id(config)]

    def _addressed(self, node: int, kind: str) -> Message:
        content: RecordDict = messages.addressed(self._told(node), self._receipts.get(node))
        return Message(
            content,
            dst_node_id=node,
            message_type=kind,
            ttl=max(self._deadline - monotonic(), POLL_S),
            group_id=self._group,
        )
