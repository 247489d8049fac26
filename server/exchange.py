"""One instruction to each site of a cohort, and what comes back before the deadline."""

from collections.abc import Callable, Iterator, Mapping
from time import monotonic, sleep
from types import MappingProxyType

from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from common import messages
from common.config import Config
from common.envelopes import Envelopes
from common.messages import Instruction
from common.privacy.chain import Receipt
from server.cohort import POLL_S
from server.stragglers import Spared

GONE = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE)
"""What Flower answers for a node it has given up, or whose reply it lost half of."""
FIRST_POLL_S = 0.02
"""Seconds to the next look for replies, after some came; doubled up to `POLL_S` while none do."""
GONE_POLL_S = 2.0
"""Seconds between two looks for sites that Flower has given up, or that were at work."""


class Exchange:
    """The messages of one round.

    Guarantee: a site whose attempt was lost, or that went away and came back, is asked again while
    it has spare rounds, never after the deadline; every attempt counts as charged, answered or not.
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
        self.deadline = monotonic() + timeout_s
        """On the monotonic clock; no reply is taken after it."""
        self._gone: set[int] = set()
        """Nodes that Flower has given up, and that may be asked once more."""
        self._look_at, self._spared_at = 0.0, monotonic() + timeout_s / 2
        self._spared_until = monotonic() + 0.75 * timeout_s
        self._waiting: dict[str, None] = {}

    def send(self, nodes: tuple[int, ...], kind: str = MessageType.TRAIN) -> list[str]:
        """Pushes the instruction to these nodes; returns the ids of the messages that went."""
        outgoing = [*self._addressed(nodes, kind)]
        ids = self._grid.push_messages(outgoing)
        went = {sent: node for sent, node in zip(ids, nodes, strict=True) if sent}
        self.sent.update(went)
        self.bytes_down += len(went) * self._bytes
        return list(went)

    def replies(
        self,
        enough: Callable[[], bool] = lambda: True,
        closed: Callable[[], bool] = lambda: False,
        spared: Spared | None = None,
    ) -> Iterator[Message]:
        """The last reply of each site, as they come; ends when all have, or at the deadline.

        Args: enough: whether the replies so far will do. If not, sites are waited for that Flower
        has given up: a machine that starts again does so within minutes; closed: whether nobody is
        waited for any more: who has not answered then stays in `left`; spared: sites that are asked
        once they are through with another round, where this one is about to fail: half of its time
        is over, and what has come will not do.
        """
        self._waiting = waiting = dict.fromkeys(self.sent)  # in the order sent
        pause = FIRST_POLL_S
        while (
            monotonic() < self.deadline
            and not closed()
            and (waiting or (self._gone and not enough()))
        ):
            nothing = True
            for reply in self._grid.pull_messages(waiting.keys()) if waiting else ():
                answered = reply.metadata.reply_to_message_id
                if answered not in waiting:  # unasked, or a second reply to the same message
                    continue
                nothing = False
                del waiting[answered]
                if self._is_gone(self.sent[answered], reply):
                    continue
                again = self._again(self.sent[answered], reply)
                waiting.update(dict.fromkeys(again))
                if not again:
                    yield reply
                del reply  # the next may be as large, and is fetched now
            waiting.update(dict.fromkeys(self._returned()))
            if spared and not enough() and not closed():
                waiting.update(dict.fromkeys(self._freed(spared)))
            pause = min(2 * pause, POLL_S) if nothing else FIRST_POLL_S
            if nothing:
                sleep(min(pause, max(self.deadline - monotonic(), 0)))

    def _again(self, node: int, reply: Message) -> list[str]:
        """Asks once more where the site lost the round and its plan still has a spare."""
        lost = reply.has_error() and reply.error.code == messages.LOCAL_FAILURE
        return self._repeated(node) if lost else []

    @property
    def left(self) -> dict[str, int]:
        """Node id by message id, where a reply was neither heard nor given up."""
        return {sent: self.sent[sent] for sent in self._waiting}

    def _is_gone(self, node: int, reply: Message) -> bool:
        """Whether Flower answers for the site, which may come back and has a spare round."""
        unheard = reply.has_error() and reply.error.code in GONE
        if not unheard or self._spares.get(node, 0) < 1:
            return False
        self._gone.add(node)
        return True

    def _returned(self) -> list[str]:
        """Asks those again that are back. What they had prepared they send as it is, for nothing;
        what they lost was charged: which of the two nobody knows here, so a spare round is taken.
        """
        if not self._gone or monotonic() < self._look_at:
            return []
        self._look_at = monotonic() + GONE_POLL_S
        back = sorted(self._gone & {*self._grid.get_node_ids()})
        self._gone -= {*back}
        return [sent for node in back for sent in self._repeated(node)]

    def _freed(self, spared: Spared) -> list[str]:
        """Asks those that were at work on another round, and are through; in the third quarter of
        the round's time, so that one that goes well does not look, and they have time to answer.
        """
        if not self._spared_at <= monotonic() < self._spared_until:
            return []
        self._spared_at = monotonic() + GONE_POLL_S
        freed = spared.freed()  # which may take its time, where a late update is still on its way
        return self.send(freed) if monotonic() < self._spared_until else []

    def _repeated(self, node: int) -> list[str]:
        if self._spares.get(node, 0) < 1 or monotonic() >= self.deadline:
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

    def _addressed(self, nodes: tuple[int, ...], kind: str) -> Iterator[Message]:
        envelopes, ttl = Envelopes(), max(self.deadline - monotonic(), POLL_S)
        for node in nodes:
            content = messages.addressed(self._told(node), self._receipts.get(node))
            yield envelopes.instruction(content, node, kind, ttl=ttl, group=self._group)
