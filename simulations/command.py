"""`coterie simulate`, from before anything large is imported until all of it is."""

import sys

from common.cli import Invocation, importing
from simulations.nursery import nursery

ASKED = "engine.workers="


def simulate(invocation: Invocation) -> None:
    """Fine-tune one model across simulated sites, privately; the main job."""
    fresh = "torch" not in sys.modules  # or something of it may have run
    with importing():
        from simulations.run import simulate as run  # noqa: PLC0415 - see above

    if fresh and are_asked(invocation.arguments):
        nursery(fork=True)
    run(invocation)


def are_asked(arguments: tuple[str, ...]) -> bool:
    """Whether a command line asks for workers by number; who asks otherwise gets them later."""
    if "engine=ray" in arguments:
        return False
    given = [a.removeprefix(ASKED) for a in arguments if a.startswith(ASKED)]
    return bool(given) and given[-1] not in ("0", "1")
