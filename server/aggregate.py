"""Replies in, judged one by one as they come: each by itself, whatever the others hold.

What is accepted goes to where the strategy gathers updates (`server/strategy.py`), and the reply is
let go: for strategies on the mean, memory does not grow with the number of sites.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flwr.app import Message
from flwr.common.constant import ErrorCode

from common import messages
from common.config import PrivacyMode
from common.errors import VerificationError
from common.messages import Instruction, SiteBooks, Update
from common.parameters import Layout, check_vector
from common.privacy.accounting import Event
from common.privacy.chain import Receipt
from server.heads import check_continuation
from server.strategy import Gathered

SILENT = "no reply before the deadline"
LATE = "later than the updates that were enough"
UNREADABLE = 699
"""What stands in the place of a reply that is no message; no site's refusal, whoever says so."""
UNHEARD = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
)
"""What Flower answers itself, in the place of a node that it never heard of again."""


@dataclass(frozen=True)
class Verdicts:
    """What became of the instructions of one round, by node id."""

    accepted: frozenset[int]
    refused: dict[int, str]
    """Why there is no update: a refusal of the site, a fault of the reply, or silence."""
    books: dict[int, SiteBooks]
    """What each site with an accepted update says of its ledger, if it keeps one."""
    bytes_up: int
    """Bytes of the accepted vectors."""
    late: tuple[int, ...] = ()
    """Nodes whose update was there when the round was closed, and was not used."""


class Judge:
    """Accepts each reply that answers this round's instruction.

    Guarantee: at most one update per asked node is gathered; every gathered vector is finite
    float32 in the layout; a node that did not answer is listed as silent.
    """

    def __init__(
        self,
        gathered: Gathered,
        *,
        sent: Mapping[str, int],
        instruction: Instruction,
        layout: Layout,
        charges: Mapping[int, Event],
        receipts: Mapping[int, Receipt],
        weights: Mapping[int, float] = MappingProxyType({}),
        enough: int | None = None,
    ) -> None:
        """Args: gathered: where accepted updates go; sent: node id by message id, which may grow
        while replies come; by node id: charges: what the instruction costs there; receipts: the
        head of its ledger that it was sent, from which that ledger must go on; weights: what its
        update counts, 1 where it is not named; enough: updates that close the round; None: all.
        """
        self._gathered, self._sent, self._receipts = gathered, sent, receipts
        self._weights, self._enough = weights, enough
        self._instruction, self._layout, self._charges = instruction, layout, charges
        self._reader = messages.UpdateReader(
            instruction.config.federation.coding, instruction.vector
        )
        self._accepted: set[int] = set()
        self._refused: dict[int, str] = {}
        self._books: dict[int, SiteBooks] = {}
        self._bytes_up = 0
        self._late: tuple[int, ...] = ()

    def read(self, reply: Message) -> None:
        """Judges one reply; nothing of it is kept but its update, where that is accepted."""
        # The id of the message it answers, not the sender's claim: errors may come from Flower.
        node = self._sent.get(reply.metadata.reply_to_message_id)
        if node is None or node in self._accepted:
            return
        if self.is_closed():
            self._late += (node,) if not reply.has_error() else ()
            return
        if reply.has_error():
            self._refused[node] = reason_of(reply)
            return
        try:
            update = self._reader.read(reply)
            largest = _check(update, self._instruction, self._layout, self._charges[node])
            if update.books is not None:
                check_continuation(self._receipts.get(node), update.books)
        except VerificationError as error:
            self._refused[node] = str(error)
            return
        weight = self._weights.get(node, 1.0)
        self._gathered.add(node, update.vector, largest=largest, weight=weight)
        self._accept(node, update, messages.content_bytes(reply.content))

    def has(self, needed: int) -> bool:
        """Whether so many updates were accepted so far."""
        return len(self._accepted) >= needed

    def is_closed(self) -> bool:
        """Whether no further update counts in this round, whatever becomes of those under way."""
        return self._enough is not None and self.has(self._enough)

    def verdicts(self) -> Verdicts:
        """What became of all, once no more replies are waited for."""
        unread = set(self._sent.values()) - self._accepted - set(self._refused)
        refused = self._refused | dict.fromkeys(unread, LATE if self.is_closed() else SILENT)
        accepted, books = frozenset(self._accepted), dict(self._books)
        return Verdicts(accepted, refused, books, self._bytes_up, self._late)

    def _accept(self, node: int, update: Update, size: int) -> None:
        self._refused.pop(node, None)
        self._accepted.add(node)
        self._bytes_up += size
        if update.books is not None:
            self._books[node] = update.books


def _check(update: Update, instruction: Instruction, layout: Layout, charge: Event) -> float:
    """Returns: the largest magnitude of its values. Raises: VerificationError."""
    if (update.run_id, update.round) != (instruction.run_id, instruction.round):
        raise VerificationError("update: of another run or round")
    if update.layout_digest != instruction.layout_digest:
        raise VerificationError("update: of another layout")
    if update.charge != charge:
        raise VerificationError("update: charged something else than the plan")
    if (update.books is None) != (instruction.config.privacy.mode is PrivacyMode.none):
        raise VerificationError(
            "update: comes without the books of its site, or with needless ones"
        )
    return check_vector(update.vector, layout)


def reason_of(reply: Message) -> str:
    """A fixed text for a known code; whatever else a peer writes is not repeated."""
    if reply.error.code in UNHEARD:
        return SILENT
    if reply.error.code == UNREADABLE:
        return "the reply could not be read"
    return messages.REFUSALS.get(reply.error.code, f"error {reply.error.code}")
