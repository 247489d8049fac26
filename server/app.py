"""The ServerApp: reads the resolved config, runs the rounds, writes everything a run leaves."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common import parameters
from common.allocation import Trimming
from common.config import Config, PrivacyMode, as_told, from_canonical
from common.errors import VerificationError
from common.messages import Instruction
from common.parameters import Layout
from common.prefix import Inputs
from common.records import Records
from common.tasks import build_model
from server.cohort import sites_of
from server.count import count_correct
from server.evaluate import Evaluator
from server.heads import HeadBook
from server.left_out import check_left_out, measure_left_out
from server.plan import RunPlan, make_plan
from server.record import RoundLine, append_line
from server.release import write_model
from server.report import write_report
from server.resume import opened
from server.rounds import OnReply, run_rounds
from server.run_folder import CHECKPOINTS
from server.spending import round_line
from server.summary import RunFacts, build_report
from server.tracking import check_tracker, tracked

CONFIG_KEY = "config"
"""Key of the resolved config, one canonical string, in Flower's run config."""


Sections = Callable[[list[RoundLine]], Mapping[str, Any]]
"""From the rounds of a run, more sections of its report: of what a simulation did to it."""


@dataclass(frozen=True)
class Watch:
    """What a person may see while a run goes on."""

    on_reply: OnReply
    on_round: Callable[[RoundLine], None]
    on_resume: Callable[[int], None]
    """Called with the last round that is over, where a run is taken up again."""


def server_app(
    public: Callable[[Config], Records],
    watch: Watch,
    left_out: Records | None = None,
    sections: Sections = lambda _: {},
) -> ServerApp:
    """The ServerApp of one run.

    Args: public: reads the split the config evaluates on; left_out: in simulations only, the
    records of the site that does not train, and more sections of the report.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        text = context.run_config.get(CONFIG_KEY)
        if not isinstance(text, str):
            raise VerificationError("run config: holds no configuration")
        config = from_canonical(text)
        check_left_out(config, left_out)
        check_tracker(config.tracking)
        _run(grid, make_plan(config), public(config), watch, left_out, sections=sections)

    return app


def _run(
    grid: Grid,
    run_plan: RunPlan,
    public: Records,
    watch: Watch,
    left_out: Records | None,
    *,
    sections: Sections,
) -> None:
    config, started = run_plan.config, time.perf_counter()
    run_dir = Path(config.run_dir)
    model = build_model(config)
    layout = Layout.of(model)
    begun = opened(run_dir, config, parameters.flatten(model), layout)
    state, lines, before_s = begun.state, begun.lines, begun.elapsed_s
    if state.resumed_after:
        watch.on_resume(state.round)
    evaluator = Evaluator(config, model, public)
    heads = _heads(config, run_dir)
    rounds = run_rounds(
        grid,
        run_plan,
        state,
        layout=layout,
        heads=heads,
        checkpoints=run_dir / CHECKPOINTS,
        on_reply=watch.on_reply,
    )
    nodes: dict[int, str] = {}
    scores: Inputs = {}
    trimming = Trimming()
    with tracked(config, run_dir, after=state.round) as tracker:
        for outcome in rounds:
            state, nodes, metrics = outcome.state, outcome.nodes, {}
            if is_measured(config, outcome.round):
                scores = evaluator.score(state.vector)
                metrics = evaluator.metrics(scores)
            elapsed_s = before_s + time.perf_counter() - started
            lines.append(round_line(outcome, metrics, lines, run_plan, elapsed_s=elapsed_s))
            append_line(run_dir, lines[-1])
            trimming.after_round()  # a round's prices and arrays have sizes of their own: gaps
            watch.on_round(lines[-1])
            tracker.follow(lines[-1])
    last = Instruction(state.run_id, len(lines), as_told(config), layout.digest, state.vector)
    counted = count_correct(grid, run_plan, last, heads, nodes or sites_of(grid))
    # 12. Report, and release the model of the final round: never the best on the hold-out.
    key = heads.key if heads else ""
    detail = evaluator.detail(scores or evaluator.score(state.vector))
    elsewhere = measure_left_out(config, model, state.vector, left_out)
    spent_s = before_s + time.perf_counter() - started
    facts = RunFacts(
        state.run_id,
        spent_s,
        len(public),
        key,
        detail,
        elsewhere,
        resumed_after=state.resumed_after,
        sections=sections(lines),
    )
    report = build_report(run_plan, lines, facts, counted)
    write_model(run_dir / "model", model, state.vector, config, report)
    write_report(run_dir, report, lines)


def is_measured(config: Config, number: int) -> bool:
    """Whether the public split is measured after a round; after the last one it always is."""
    every = config.evaluation.every
    return number == config.federation.rounds or (every > 0 and number % every == 0)


def _heads(config: Config, run_dir: Path) -> HeadBook | None:
    """The coordinator's memory of its sites' ledgers; of books that last, one that lasts too."""
    if config.privacy.mode is PrivacyMode.none:
        return None
    lasting = config.heads or (f"{config.ledger}.heads" if config.ledger else "")
    return HeadBook(Path(lasting).expanduser() if lasting else run_dir / "ledgers" / "heads.db")
