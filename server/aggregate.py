"""Replies in, one vector out: each reply is judged alone, then Flower's strategy averages."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg

from common import messages
from common.config import PrivacyMode
from common.errors import VerificationError
from common.messages import Instruction, SiteBooks, Update
from common.parameters import Layout, Vector, check_vector
from common.privacy.accounting import Event
from common.privacy.chain import Receipt
from server.heads import check_continuation

SILENT = "no reply before the deadline"
UNHEARD = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
)
"""What Flower answers itself, in the place of a node that it never heard of again."""


@dataclass(frozen=True)
class Verdicts:
    """What became of the instructions of one round, by node id."""

    accepted: dict[int, tuple[Message, Update]]
    refused: dict[int, str]
    """Why there is no update: a refusal of the site, a fault of the reply, or silence."""

    @property
    def bytes_up(self) -> int:
        """Bytes of the accepted vectors."""
        return sum(messages.content_bytes(reply.content) for reply, _ in self.accepted.values())

    @property
    def books(self) -> dict[int, SiteBooks]:
        """What each site with an accepted update says of its ledger, if it keeps one."""
        accepted = ((node, update.books) for node, (_, update) in self.accepted.items())
        return {node: books for node, books in accepted if books is not None}


def judge(
    replies: Iterable[Message],
    *,
    sent: Mapping[str, int],
    instruction: Instruction,
    layout: Layout,
    charge: Event,
    receipts: Mapping[int, Receipt],
) -> Verdicts:
    """Accepts each reply that answers this round's instruction, whatever the others hold.

    Guarantee: at most one update per asked node; every accepted vector is finite float32 in
    the layout; a node that did not answer is listed as silent.
    Args: sent: node id by message id; charge: what the instruction costs; receipts: the head of
    its ledger that each node was sent, from which that ledger must go on.
    """
    accepted: dict[int, tuple[Message, Update]] = {}
    refused: dict[int, str] = {}
    for reply in replies:
        # The id of the message it answers, not the sender's claim: errors may come from Flower.
        node = sent.get(reply.metadata.reply_to_message_id)
        if node is None or node in accepted:
            continue
        if reply.has_error():
            refused[node] = reason_of(reply)
            continue
        try:
            update = messages.read_update(reply)
            _check(update, instruction, layout, charge)
            if update.books is not None:
                check_continuation(receipts.get(node), update.books)
        except VerificationError as error:
            refused[node] = str(error)
            continue
        refused.pop(node, None)
        accepted[node] = (reply, update)
    silent = set(sent.values()) - set(accepted) - set(refused)
    return Verdicts(accepted, refused | dict.fromkeys(silent, SILENT))


def average(verdicts: Verdicts, *, round_number: int, strategy: FedAvg) -> Vector:
    """The mean of the accepted vectors, each with weight 1, summed in order of node id.

    Constant weights: a weight by number of records would release that number. With the
    common divisor q * N_declared the mean already weighs every record alike.
    Source: McMahan et al. (2017), arXiv:1602.05629, through Flower's `aggregate_train`.
    """
    replies = [
        messages.for_aggregation(update.vector, reply_to=reply)
        for _, (reply, update) in sorted(verdicts.accepted.items())
    ]
    arrays, _ = strategy.aggregate_train(round_number, replies)
    assert arrays is not None
    return messages.unpack_arrays(arrays)


def fedavg() -> FedAvg:
    """Flower's FedAvg over our records."""
    return FedAvg(weighted_by_key=messages.WEIGHT, arrayrecord_key=messages.VECTOR)


def _check(update: Update, instruction: Instruction, layout: Layout, charge: Event) -> None:
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
    check_vector(update.vector, layout)


def reason_of(reply: Message) -> str:
    """A fixed text for a known code; whatever else a peer writes is not repeated."""
    if reply.error.code in UNHEARD:
        return SILENT
    return messages.REFUSALS.get(reply.error.code, f"error {reply.error.code}")
