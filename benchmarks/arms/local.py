"""Coterie's LocalGrid: in this process, or with workers."""

from functools import partial

from benchmarks.arms.apps import answer_of, rounds
from benchmarks.arms.pace import Case, Pace
from simulations.grid import Crew, LocalGrid, ThisProcess


def main() -> None:
    """Takes its turns."""
    pace, case = Pace.of_command_line()
    with LocalGrid(crew_of(case), [f"site-{number}" for number in range(case.sites)]) as grid:
        pace.run(rounds(grid, case, pace))


def crew_of(case: Case) -> Crew:
    """Who answers."""
    if case.workers == 1:
        return ThisProcess(answer_of(case), case.sites)
    from simulations.nursery import nursery

    nursery()
    from simulations.workers import Workers

    return Workers(
        partial(answer_of, case),
        workers=case.workers,
        threads=1,
        work=[1.0] * case.sites,
        lost=lambda _: False,
    )


if __name__ == "__main__":
    main()
