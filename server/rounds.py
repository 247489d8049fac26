"""The loop: one round of the federation, on one page.

Steps 3 to 7 happen at each site, beside the data; see `client/app.py`. Step 12, the report,
follows the last round; see `server/report.py`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from flwr.serverapp import Grid

from common.errors import FederationError
from common.messages import Instruction, SiteBooks
from common.parameters import Layout, Vector
from server.aggregate import Verdicts, average, fedavg, judge
from server.checkpoint import write_checkpoint
from server.cohort import sample_cohort, wait_for_sites
from server.exchange import Exchange
from server.heads import HeadBook, receipts_of
from server.plan import RunPlan, is_private

ROUNDING = 1e-9
"""So that 0.28 of 25 sites is 7, and not a little more."""

OnReply = Callable[[int, str], None]
"""Called with (round, site) when a reply arrives."""


@dataclass(frozen=True)
class RoundOutcome:
    """What one round left behind."""

    round: int
    nodes: dict[int, str]
    """The sites of the run: node ids with names, which stay while it goes on."""
    asked: tuple[str, ...]
    """Sites that were sent the instruction, and count as charged whatever they answered; twice
    where a spare round paid for another attempt."""
    refused: dict[str, str]
    """Sites without an accepted update, with the reason."""
    vector: Vector
    """The new global parameters."""
    bytes_down: int
    bytes_up: int
    sites_s: float
    """Seconds from sending to the last reply."""
    books: dict[str, SiteBooks] = field(default_factory=dict)
    """What each site that answered says of its ledger."""


def run_rounds(
    grid: Grid,
    run_plan: RunPlan,
    vector: Vector,
    *,
    run_id: str,
    layout: Layout,
    heads: HeadBook | None,
    checkpoints: Path,
    on_reply: OnReply,
) -> Iterator[RoundOutcome]:
    """Runs the planned rounds, from `vector`.

    Guarantee: every wait has a deadline; a round that ends has its checkpoint, and the heads of
    its sites' ledgers, on disk.
    Args: heads: None where no site keeps a ledger.
    Raises: FederationError if too few sites come, or answer, in time.
    """
    config, strategy = run_plan.config, fedavg()
    timeout_s = config.federation.round_timeout_s
    nodes = wait_for_sites(grid, sites=config.federation.training_sites, timeout_s=timeout_s)
    spares = dict.fromkeys(nodes, config.privacy.spare_rounds)
    for number in range(1, config.federation.rounds + 1):
        # 1. Sample the cohort.
        cohort = sample_cohort(nodes)
        # 2. Send the instruction, to each site with the last head of its ledger that we signed.
        instruction = Instruction(run_id, number, config, layout.digest, vector)
        receipts = receipts_of(nodes, heads)
        started = perf_counter()
        exchange = Exchange(
            grid, instruction, timeout_s=timeout_s, receipts=receipts, spares=spares
        )
        exchange.send(cohort)
        # 8. Collect replies until all have come, or the deadline.
        replies = []
        for reply in exchange.replies():
            replies.append(reply)
            on_reply(number, nodes[exchange.sent[reply.metadata.reply_to_message_id]])
        sites_s = perf_counter() - started
        # 9. Validate each reply by itself, then aggregate.
        verdicts = judge(
            replies,
            sent=exchange.sent,
            instruction=instruction,
            layout=layout,
            charge=run_plan.event,
            receipts=receipts,
        )
        books = {nodes[node]: books for node, books in verdicts.books.items()}
        # Countersign the ledgers first: what was accepted was released, whatever becomes of it.
        if heads is not None:
            heads.countersign({site: each.head for site, each in books.items()})
        _check_quorum(verdicts, run_plan, number)
        vector = average(verdicts, round_number=number, strategy=strategy)
        # 10. Checkpoint, atomically.
        write_checkpoint(
            checkpoints,
            run_id=run_id,
            round_number=number,
            private=is_private(config),
            vector=vector,
        )
        # 11. Record.
        yield RoundOutcome(
            round=number,
            nodes=nodes,
            asked=tuple(nodes[node] for node in exchange.sent.values()),
            refused={nodes[node]: reason for node, reason in verdicts.refused.items()},
            vector=vector,
            bytes_down=exchange.bytes_down,
            bytes_up=verdicts.bytes_up,
            sites_s=sites_s,
            books=books,
        )


def _check_quorum(verdicts: Verdicts, run_plan: RunPlan, number: int) -> None:
    federation = run_plan.config.federation
    sites, quorum = federation.training_sites, federation.quorum
    if len(verdicts.accepted) < max(1, math.ceil(quorum * sites - ROUNDING)):
        reasons = sorted(set(verdicts.refused.values()))
        raise FederationError(
            f"round {number}: {len(verdicts.accepted)} of {sites} sites answered, "
            f"federation.quorum={quorum:g} asks for more ({'; '.join(reasons)}); "
            "see the sites' own logs"
        )
