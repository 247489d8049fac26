"""The loop: one round of the federation, on one page.

Steps 3 to 7 happen at each site, beside the data; see `client/app.py`. Step 12, the report,
follows the last round; see `server/report.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter

from flwr.serverapp import Grid

from common import messages
from common.config import Config, as_told, share_of
from common.errors import FederationError
from common.messages import Instruction, SiteBooks
from common.parameters import Layout, Vector
from common.privacy.mechanism import is_private
from server.aggregate import Judge, Verdicts
from server.checkpoint import RunState, write_checkpoint
from server.cohort import in_order, wait_for_sites
from server.exchange import Exchange
from server.heads import HeadBook, receipts_of
from server.plan import RunPlan
from server.resume import asked_before, without_spare
from server.stragglers import Spared, Stragglers
from server.strategy import aggregate, gathering

OnReply = Callable[[int, str], None]
"""Called with (round, site) when a reply arrives."""


@dataclass(frozen=True)
class RoundOutcome:
    """What one round left behind."""

    state: RunState
    """What the next one begins with."""
    nodes: dict[int, str]
    """The sites of the run: node ids with names, which stay while it goes on."""
    asked: tuple[str, ...]
    """Sites that were sent the instruction, and count as charged whatever they answered; twice
    where a spare round paid for another attempt, or may have."""
    refused: dict[str, str]
    """Sites without an accepted update, with the reason."""
    bytes_down: int
    bytes_up: int
    sites_s: float
    """Seconds from sending to the last reply."""
    books: dict[str, SiteBooks] = field(default_factory=dict)
    """What each site that answered says of its ledger."""
    late: tuple[str, ...] = ()
    """Sites whose updates came after a round had closed, this one or one before; none was used."""

    @property
    def round(self) -> int:
        """Its number, from 1."""
        return self.state.round

    @property
    def vector(self) -> Vector:
        """The new global parameters."""
        return self.state.vector


def run_rounds(
    grid: Grid,
    run_plan: RunPlan,
    state: RunState,
    *,
    layout: Layout,
    heads: HeadBook | None,
    checkpoints: Path,
    on_reply: OnReply,
) -> Iterator[RoundOutcome]:
    """Runs the planned rounds that come after `state`.

    Guarantee: every wait has a deadline; a round that ends has its checkpoint, and the heads of
    its sites' ledgers, on disk.
    Args: heads: None where no site keeps a ledger.
    Raises: FederationError if too few sites come, or answer, in time.
    """
    config = run_plan.config
    timeout_s = config.federation.round_timeout_s
    nodes = wait_for_sites(grid, sites=config.federation.training_sites, timeout_s=timeout_s)
    terms = run_plan.seated(nodes)
    spares = {n: state.spares.get(name, config.privacy.spare_rounds) for n, name in nodes.items()}
    stragglers = Stragglers(grid)
    for number in range(state.round + 1, config.federation.rounds + 1):
        # 1. Sample the cohort: the plan did, from public coins. Who is still at work on a round
        # before is not asked; or later, once it is through, if the round would fail without it.
        cohort = in_order(run_plan.cohort(number, nodes))
        enough = share_of(len(cohort), config.federation.enough)
        asked = stragglers.spared(cohort, enough=enough)
        # 2. Send the instruction, to each site with its own terms, and with the last head of its
        # ledger that we signed.
        instruction = Instruction(
            state.run_id, number, as_told(config), layout.digest, state.vector
        )
        receipts = receipts_of(nodes, heads)
        started = perf_counter()
        exchange = Exchange(
            grid,
            instruction,
            timeout_s=timeout_s,
            receipts=receipts,
            spares=spares,
            configs={node: own.config for node, own in terms.items()},
        )
        exchange.send(asked)
        spared = Spared(stragglers, (node for node in cohort if node not in asked))
        needed = share_of(len(cohort), config.federation.quorum)
        # 8. Collect replies until enough have come, or the deadline; 9. validate each by itself,
        # and gather its update.
        gathered = gathering(config.strategy, layout.size, capacity=len(cohort))
        judge = Judge(
            gathered,
            sent=exchange.sent,
            instruction=instruction,
            layout=layout,
            charges={node: terms[node].event for node in cohort},
            receipts=receipts,
            weights={node: run_plan.weight_of(nodes[node]) for node in cohort},
            enough=enough if enough < len(cohort) else None,
        )
        for reply in exchange.replies(partial(judge.has, needed), judge.is_closed, spared):
            judge.read(reply)
            on_reply(number, nodes[exchange.sent[reply.metadata.reply_to_message_id]])
        sites_s, verdicts = perf_counter() - started, judge.verdicts()
        # Countersign the ledgers first: what was accepted was released, whatever becomes of it.
        books = {nodes[node]: books for node, books in verdicts.books.items()}
        if heads is not None:
            heads.countersign({site: each.head for site, each in books.items()})
        # What sites were asked before the run was interrupted: no checkpoint tells, their books do.
        again = asked_before(state, number, verdicts, spares, run_plan=run_plan, nodes=nodes)
        excused = without_spare(state, number, verdicts)
        _check_quorum(verdicts, config, number, asked=len(cohort), excused=excused)
        # 9. Aggregate.
        made = aggregate(
            config.strategy,
            gathered,
            state.vector,
            state.memory,
            round_number=number,
            layout=layout,
        )
        # 10. Checkpoint, atomically.
        left = {nodes[node]: spare for node, spare in spares.items()}
        state = replace(state, round=number, vector=made.vector, memory=made.memory, spares=left)
        write_checkpoint(checkpoints, state, private=is_private(config))
        # Those of earlier rounds, who have had this one to send what they had to send.
        late = (*verdicts.late, *stragglers.heard())
        stragglers.remember(exchange.left, exchange.deadline)
        # 11. Record.
        yield RoundOutcome(
            state=state,
            nodes=nodes,
            asked=tuple(nodes[node] for node in (*exchange.sent.values(), *again)),
            refused={nodes[node]: reason for node, reason in verdicts.refused.items()},
            bytes_down=exchange.bytes_down,
            bytes_up=verdicts.bytes_up,
            sites_s=sites_s,
            books=books,
            late=tuple(nodes[node] for node in late),
        )


def _check_quorum(
    verdicts: Verdicts, config: Config, number: int, *, asked: int, excused: set[int]
) -> None:
    """Args: asked: how many sites were; excused: nodes that cannot answer any more, whom no quorum
    waits for.
    """
    sites, quorum = asked, config.federation.quorum
    if len(verdicts.accepted) < min(share_of(sites, quorum), sites - len(excused)):
        reasons = sorted(set(verdicts.refused.values()))
        raise FederationError(
            f"round {number}: {len(verdicts.accepted)} of {sites} sites answered, "
            f"federation.quorum={quorum:g} asks for more ({'; '.join(reasons)}); "
            "see the sites' own logs; resume=auto goes on after the last whole round"
            f"{_beforehand(verdicts)}"
        )


def _beforehand(verdicts: Verdicts) -> str:
    """What would have let the run go on by itself, where a site lost what it was charged for."""
    if messages.REFUSALS[messages.LOCAL_FAILURE] not in verdicts.refused.values():
        return ""
    return (
        "; in runs to come privacy.spare_rounds pays for attempts that sites lose, and a lower "
        "federation.quorum goes on without them"
    )
