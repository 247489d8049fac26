"""What each site was charged by the time a run is over, priced from what it was asked."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from common.errors import VerificationError
from common.privacy.accounting import Epsilons, Event, check_agreement, epsilons
from server.plan import RunPlan, is_private
from server.record import RoundLine, SiteLine


@dataclass(frozen=True)
class Asked:
    """One thing that was asked of sites: a round, or a count."""

    event: Event
    """What it costs whoever answers."""
    names: tuple[str, ...]
    """Whom it was asked of; a name stands twice if it was asked twice."""
    books: Mapping[str, SiteLine] = field(default_factory=dict)
    """What those that answered said of their ledgers."""


def rounds_asked(run_plan: RunPlan, lines: Iterable[RoundLine]) -> list[Asked]:
    """The rounds of a run, as questions that cost something."""
    return [Asked(run_plan.event, line.asked, line.books) for line in lines]


@dataclass(frozen=True)
class Spending:
    """What one site was charged."""

    history: tuple[Event, ...]
    """By which it is priced: of its whole ledger where that lasts."""
    price: Epsilons
    books: SiteLine | None
    """Its ledger, when it last answered."""

    @property
    def bound(self) -> float:
        """Epsilon that holds: PLD, or more where plans followed outputs (a Renyi filter)."""
        return max(self.price.pld, self.books["spent"] if self.books else 0.0)


def spendings(run_plan: RunPlan, asked: Iterable[Asked]) -> dict[str, Spending]:
    """What every site was charged, by name, in their natural order.

    Guarantee: never less than everything the site was asked in this run, answered or not,
    whatever its ledger says; on what it was asked the accountants agree. Raises:
    VerificationError if they do not.
    """
    questions = list(asked)
    names = {name for question in questions for name in question.names}
    return {name: _spending(run_plan, questions, name) for name in sorted(names, key=_natural)}


def _spending(run_plan: RunPlan, asked: list[Asked], name: str) -> Spending:
    books = next((each.books[name] for each in reversed(asked) if name in each.books), None)
    here = tuple(each.event for each in asked for one in each.names if one == name)
    if not is_private(run_plan.config):
        return Spending(here, Epsilons(math.inf, math.inf, math.inf), books)
    told = _told(asked, name)
    delta = run_plan.config.privacy.delta
    asked_here = epsilons(here, delta)
    check_agreement(asked_here)
    priced = [(here, asked_here), (told, _highest(epsilons(told, delta)))]
    history, price = max(priced, key=lambda each: each[1].pld)
    return Spending(history, price, books)


def _highest(price: Epsilons) -> Epsilons:
    """Of what a site tells, which may be made for the accountants to disagree: their highest."""
    try:
        check_agreement(price)
    except VerificationError:
        highest = max(price.pld, price.rdp, price.prv or 0.0)
        return Epsilons(highest, highest, None)
    return price


def _told(asked: list[Asked], name: str) -> tuple[Event, ...]:
    """What its ledger held when it last answered, and everything it was asked since."""
    history: tuple[Event, ...] = ()
    for each in asked:
        if name in each.books:
            charged = each.books[name]["charged"]
            history = tuple(Event(sigma, q, int(steps)) for sigma, q, steps in charged)
        else:  # it may have answered, and paid, all the same
            history += (each.event,) * each.names.count(name)
    return history


def _natural(name: str) -> tuple[str, int, str]:
    """Sorts numbers by size, however long: a name is its peer's choice."""
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :].lstrip("0")
    return stem, len(digits), digits
