"""Where a run goes on that was interrupted: after the last round that is whole.

A round is whole once its checkpoint and its line of `metrics.jsonl` are there, in this order. What
comes after is done again: sites that had prepared an update send the same bytes once more, and are
charged nothing; the others charge a new attempt, with fresh noise, where a spare round pays for it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import Config, Resume, config_hash, differences, from_yaml, setting, to_yaml
from common.durable import write_atomic
from common.errors import ConfigError
from common.messages import NO_SPARE_ROUND, REFUSALS, SiteBooks
from common.parameters import Layout, Vector, check_vector
from common.privacy.accounting import Event
from common.privacy.mechanism import is_private
from server.aggregate import Verdicts
from server.checkpoint import RunState, read_checkpoint, write_checkpoint
from server.plan import RunPlan, not_private_reason
from server.record import RoundLine, whole_lines, write_lines
from server.run_folder import CHECKPOINTS, CONFIG, has_begun


@dataclass(frozen=True)
class Beginning:
    """Where a run, or a run that is taken up again, begins."""

    state: RunState
    lines: list[RoundLine]
    """Of the rounds before."""

    @property
    def elapsed_s(self) -> float:
        """Seconds that went into these rounds; what was lost to an interruption is not in it."""
        return self.lines[-1].elapsed_s if self.lines else 0.0


def stored_config(run_dir: Path) -> Config:
    """The resolved settings of a run. Raises: ConfigError if there are none, or malformed ones."""
    try:
        text = (run_dir / CONFIG).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"run_dir={run_dir}: holds no run to go on with, as it has no {CONFIG}; choose another"
        ) from error
    try:
        return from_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{run_dir / CONFIG}: {error}") from error


def check_same(config: Config, stored: Config, run_dir: Path) -> None:
    """Raises: ConfigError naming each setting in which a run differs from the one that began."""
    if differ := differences(config, stored):
        clauses = [f"{n}={setting(config, n)}, and was {setting(stored, n)}" for n in differ]
        raise ConfigError(
            f"resume=auto: the run in {run_dir} began with other settings ({'; '.join(clauses)}); "
            "give these, or resume and run_dir alone, or another run_dir"
        )


def opened(run_dir: Path, config: Config, vector: Vector, layout: Layout) -> Beginning:
    """The beginning of a run, on disk when this returns; of one that began, where it goes on.

    Args: config: resolved; vector: the parameters of round 0.
    Raises: ConfigError if the run began with other settings; VerificationError if what it left is
    damaged.
    """
    if config.resume is Resume.auto and has_begun(run_dir):
        return _taken_up(run_dir, config, layout)
    stamp = "" if is_private(config) else f"# {not_private_reason(config)}\n"
    write_atomic(run_dir / CONFIG, stamp + to_yaml(config))
    state = RunState(os.urandom(16).hex(), 0, vector)
    write_checkpoint(run_dir / CHECKPOINTS, state, private=is_private(config))
    return Beginning(state, [])


def _taken_up(run_dir: Path, config: Config, layout: Layout) -> Beginning:
    stored = stored_config(run_dir)
    if config_hash(stored) != config_hash(config):
        check_same(config, stored, run_dir)
    lines = whole_lines(run_dir)
    state = read_checkpoint(run_dir / CHECKPOINTS, len(lines))
    check_vector(state.vector, layout)
    state = replace(state, resumed_after=(*state.resumed_after, state.round))
    write_checkpoint(run_dir / CHECKPOINTS, state, private=is_private(config))
    write_lines(run_dir, lines)
    return Beginning(state, lines)


def _was_under_way(state: RunState, number: int) -> bool:
    """Whether sites may have been asked for this round before the run was interrupted."""
    return state.resumed_after[-1:] == (number - 1,)


def without_spare(state: RunState, number: int, verdicts: Verdicts) -> set[int]:
    """Sites that lost the round when the run was interrupted, and sit it out."""
    if not _was_under_way(state, number):
        return set()
    reason = REFUSALS[NO_SPARE_ROUND]
    return {node for node, why in verdicts.refused.items() if why == reason}


def asked_before(
    state: RunState,
    number: int,
    verdicts: Verdicts,
    spares: dict[int, int],
    *,
    run_plan: RunPlan,
    nodes: Mapping[int, str],
) -> list[int]:
    """Sites that may have been charged for an attempt of before the interruption, too.

    Those that answered tell it in their books. Of the others each is taken to have used a spare
    round, where it had one left; without one it cannot have been charged twice. In `spares`
    what was used is taken off.
    """
    if not _was_under_way(state, number):
        return []
    if not run_plan.config.books_last:
        for node, books in verdicts.books.items():
            name = nodes[node]
            used = attempts_told(books, run_plan.of(name).event) - run_plan.turn(name, number)
            spares[node] = max(0, min(spares[node], run_plan.config.privacy.spare_rounds - used))
    unknown = {*verdicts.refused} - without_spare(state, number, verdicts)
    used_by = [node for node in sorted(unknown) if spares[node] > 0]
    for node in used_by:
        spares[node] -= 1
    return used_by


def attempts_told(books: SiteBooks, event: Event) -> int:
    """Rounds of `event` each that a site's ledger holds; of other runs, too, where it lasts."""
    alike = (each for each in books.charged if replace(each, steps=event.steps) == event)
    return sum(each.steps for each in alike) // event.steps
