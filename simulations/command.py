"""`coterie simulate`, as far as it must be there before anything large is imported."""

from common.cli import Invocation
from simulations.nursery import nursery

ASKED = "engine.workers="


def simulate(invocation: Invocation) -> None:
    """Fine-tune one model across simulated sites, privately; the main job."""
    if are_asked(invocation.arguments):
        nursery()  # imports beside this process
    from simulations.run import simulate as run  # noqa: PLC0415 - torch and all: after the nursery

    run(invocation)


def are_asked(arguments: tuple[str, ...]) -> bool:
    """Whether a command line asks for workers by number; who asks otherwise gets them later."""
    given = [a.removeprefix(ASKED) for a in arguments if a.startswith(ASKED)]
    return bool(given) and given[-1] not in ("0", "1")
