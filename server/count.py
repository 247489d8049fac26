"""How well the final model does on private records: each site's own noisy count, once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common import messages
from common.errors import VerificationError
from common.messages import Count, Instruction
from common.privacy.accounting import Event
from common.privacy.chain import Receipt
from common.privacy.mechanism import count_event, count_std
from server.aggregate import reason_of
from server.cohort import in_order
from server.exchange import Exchange
from server.heads import HeadBook, check_continuation, receipts_of
from server.plan import RunPlan
from server.record import SiteLine, site_lines
from server.spending import Asked


@dataclass(frozen=True)
class Counted:
    """What the sites' counts add up to."""

    asked: tuple[str, ...]
    correct: float
    """Noisy, summed over the sites that answered: may be below zero, or above all records."""
    records: float
    """That these sites hold, by declaration."""
    deviation: float
    """Standard deviation of the noise in `correct`."""
    refused: dict[str, str]
    books: dict[str, SiteLine] = field(default_factory=dict)

    def question(self, event: Event) -> Asked:
        """What it cost whom."""
        return Asked(event, self.asked, self.books)

    def section(self) -> dict[str, Any]:
        """As `report.json` has it, where any site answered; one that did not is named there."""
        return {
            "accuracy": round(min(max(self.correct / self.records, 0.0), 1.0), 4),
            "standard_error": round(self.deviation / self.records, 4),
            "correct": self.correct,
            "records": self.records,
            "sites": len(self.asked) - len(self.refused),
            "not_answered": dict(self.refused),
        }


def count_correct(
    grid: Grid,
    run_plan: RunPlan,
    final: Instruction,
    heads: HeadBook | None,
    nodes: Mapping[int, str],
) -> Counted | None:
    """Asks every site that had a round once how many of its records the final model gets right.

    Guarantee: waits no longer than a round; a site that does not answer is left out and named.
    Args: final: the last round's instruction, with the final parameters; nodes: of the rounds,
    with the names they had there, by which they are charged and known.
    Returns: None where the plan counts nothing.
    """
    config, event = run_plan.config, count_event(run_plan.config)
    if event is None:
        return None
    terms = run_plan.seated(nodes)
    nodes = {node: name for node, name in nodes.items() if node in terms}
    exchange = Exchange(
        grid,
        final,
        timeout_s=config.federation.round_timeout_s,
        receipts=(receipts := receipts_of(nodes, heads)),
        spares={},
        configs={node: own.config for node, own in terms.items()},
    )
    exchange.send(in_order(nodes), kind=MessageType.EVALUATE)
    accepted: dict[str, Count] = {}
    refused = dict.fromkeys(nodes.values(), "no reply before the deadline")
    for reply in exchange.replies():
        node = exchange.sent[reply.metadata.reply_to_message_id]
        try:
            accepted[nodes[node]] = _judged(reply, final, receipts.get(node))
            refused.pop(nodes[node])
        except VerificationError as error:
            refused[nodes[node]] = str(error)
    if heads is not None:
        heads.countersign({site: count.books.head for site, count in accepted.items()})
    return _counted(run_plan, event, nodes, accepted, refused)


def _judged(reply: Message, final: Instruction, receipt: Receipt | None) -> Count:
    if reply.has_error():
        raise VerificationError(reason_of(reply))
    count = messages.read_count(reply)
    if count.run_id != final.run_id:
        raise VerificationError("count: of another run")
    check_continuation(receipt, count.books)
    return count


def _counted(
    run_plan: RunPlan,
    event: Event,
    nodes: Mapping[int, str],
    accepted: dict[str, Count],
    refused: dict[str, str],
) -> Counted:
    config, sites = run_plan.config, len(accepted)
    records = config.data.declared_records
    assert records is not None  # no step could be taken without it
    return Counted(
        asked=tuple(nodes.values()),
        correct=sum(count.correct for count in accepted.values()),
        records=records / config.federation.sites * max(sites, 1),
        deviation=count_std(config) * math.sqrt(sites),
        refused=refused,
        books=site_lines({site: count.books for site, count in accepted.items()}),
    )
