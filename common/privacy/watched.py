"""What a site measures of every private step, and what its books say of that.

The measurements themselves stay at the site: from the exact energy of the noise somebody who knows
all records but one could tell whether that one was there. What may be told is which checks a step
had to pass, and how many rounds were stopped by one: an alarm ends a round before anything of it is
prepared, so what was released passed all of them.
"""

from dataclasses import asdict, dataclass
from typing import Any

from common.privacy.books import Books


@dataclass(frozen=True)
class Check:
    """One measurement that is always on."""

    name: str
    """As an alarm names it in a site's own log."""
    watches: str
    """What would have gone wrong, in plain words."""


CHECKS = (
    Check("noise-scale", "noise smaller or larger than was charged for, or none, anywhere"),
    Check("noise-correlation", "noise that is the same, or alike, in neighbouring coordinates"),
    Check("noise-reuse", "noise that was used before"),
    Check("sampler-rate", "more or fewer records drawn than was charged for"),
    Check("sampler-dispersion", "draws whose sizes vary too little or too much to be by chance"),
    Check("sampler-overlap", "draws that avoid, or repeat, the one before, as shuffling does"),
    Check(
        "sampler-passes", "records that are shuffled and used up, or drawn in batches of one size"
    ),
    Check("sampler-repeat", "a record, or person, that is drawn twice in one step"),
    Check("step-count", "a step that was skipped, for example one that drew nobody"),
    Check("clip-bound", "a contribution larger than the noise was made for"),
    Check("optimizer-coverage", "something that is released and was trained without noise"),
)
"""The last three are of the program; the others are statistics of noise and coins."""
FALSE_ALARMS = 2e-7
"""Odds, at most, that a sound step sets off any of them."""


def watched(books: Books) -> dict[str, Any]:
    """What a report may say of the measurements at a site, from its ledger alone.

    Guarantee: it depends on nothing but the entries. `alarms` counts rounds that were charged and,
    because a measurement alarmed, never released; older ledgers call those failures.
    """
    states = [reservation.state for reservation in books.reservations.values()]
    return {
        "rounds_released": states.count("released"),
        "alarms": books.alarms(),
        "checks": [asdict(check) for check in CHECKS],
        "false_alarms_per_step": FALSE_ALARMS,
    }
