"""What each site was charged, after a round and at the end, priced from what it was asked."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from common.errors import VerificationError
from common.privacy.accounting import (
    LIVE_INTERVAL,
    Epsilons,
    Event,
    check_agreement,
    coalesce,
    epsilon_pld,
    epsilons,
    number,
)
from common.privacy.mechanism import is_private
from common.privacy.verification import TOLERANCE
from server.plan import RunPlan, SitePlan
from server.record import RoundLine, SiteLine, site_lines
from server.resume import attempts_told
from server.rounds import RoundOutcome


@dataclass(frozen=True)
class Asked:
    """One thing that was asked of sites: a round, or a count."""

    event: Event
    """What it costs a site that has no other price in `own`."""
    names: tuple[str, ...]
    """Whom it was asked of; a name stands twice if it was asked twice."""
    books: Mapping[str, SiteLine] = field(default_factory=dict)
    """What those that answered said of their ledgers."""
    own: Mapping[str, Event] = field(default_factory=dict)
    """What it costs sites that are on terms of their own."""

    @cached_property
    def times(self) -> Counter[str]:
        """How often it was asked of each."""
        return Counter(self.names)

    def event_of(self, name: str) -> Event:
        """What it costs a site, whether it answers or not."""
        return self.own.get(name, self.event)


def rounds_asked(run_plan: RunPlan, lines: Iterable[RoundLine]) -> list[Asked]:
    """The rounds of a run, as questions that cost something."""
    if run_plan.is_uniform:
        return [Asked(run_plan.event, line.asked, line.books) for line in lines]
    own = {name: each.event for name, each in run_plan.sites.items()}
    return [Asked(run_plan.event, line.asked, line.books, own) for line in lines]


@dataclass(frozen=True)
class Spending:
    """What one site was charged."""

    history: tuple[Event, ...]
    """By which it is priced: of its whole ledger where that lasts."""
    price: Epsilons
    books: SiteLine | None
    """Its ledger, when it last answered."""
    told: float
    """Epsilon that this ledger may stand at by now, by its own account."""

    @property
    def bound(self) -> float:
        """Epsilon that holds: PLD, or more where plans followed outputs (a Renyi filter)."""
        return max(self.price.pld, self.told)


def round_line(
    outcome: RoundOutcome,
    metrics: dict[str, float],
    before: list[RoundLine],
    run_plan: RunPlan,
    *,
    elapsed_s: float = 0.0,
) -> RoundLine:
    """The line of a round that just ended, after the lines `before` it."""
    line = RoundLine(
        round=outcome.round,
        private=is_private(run_plan.config),
        metrics=metrics,
        epsilon="inf",
        asked=(*outcome.asked, *_untold(outcome, before, run_plan)),
        refused=outcome.refused,
        bytes_down=outcome.bytes_down,
        bytes_up=outcome.bytes_up,
        sites_s=round(outcome.sites_s, 3),
        books=site_lines(outcome.books),
        elapsed_s=round(elapsed_s, 3),
        late=outcome.late,
    )
    spent = _epsilons_so_far(run_plan, [*before, line])
    each = {} if run_plan.is_uniform else {name: number(spent[name]) for name in spent}
    return replace(line, epsilon=number(max(spent.values())), epsilons=each)


def _untold(outcome: RoundOutcome, before: list[RoundLine], run_plan: RunPlan) -> list[str]:
    """Attempts that sites' ledgers tell of, and that were asked for before an interruption.

    Never more than a plan allows. Books that last tell of other runs as well, and are priced whole.
    """
    if not outcome.state.resumed_after or run_plan.config.books_last:
        return []
    seen = Counter(name for line in before for name in line.asked) + Counter(outcome.asked)
    extra = {
        name: min(attempts_told(books, terms.event), terms.config.charged_rounds) - seen[name]
        for name, books in outcome.books.items()
        for terms in [run_plan.of(name)]
    }
    return [name for name, attempts in extra.items() for _ in range(attempts)]


def _epsilons_so_far(run_plan: RunPlan, lines: list[RoundLine]) -> dict[str, float]:
    """Of each site that was asked, answered or not."""
    asked, delta = rounds_asked(run_plan, lines), run_plan.config.privacy.delta
    times = Counter(name for each in asked for name in each.names)
    spent = {name: _planned(run_plan.of(name), n) for name, n in times.items()}
    if run_plan.config.books_last:  # other runs are in its books, too
        for name in times:
            priced = epsilon_pld(_told(asked, name), delta, LIVE_INTERVAL)
            spent[name] = max(spent[name], priced, _said(asked, name, delta))
    return dict(sorted(spent.items(), key=lambda each: _natural(each[0])))


def _planned(terms: SitePlan, attempts: int) -> float:
    """Spent after so many attempts; its plan allows a site no more, however often asked."""
    return terms.epsilon_by_round[min(attempts, len(terms.epsilon_by_round)) - 1]


def spendings(run_plan: RunPlan, asked: Iterable[Asked]) -> dict[str, Spending]:
    """What every site was charged, by name, in their natural order.

    Guarantee: never less than everything the site was asked in this run, answered or not,
    whatever its ledger says; on what it was asked the accountants agree. Raises:
    VerificationError if they do not.
    """
    questions = list(asked)
    here: dict[str, list[Event]] = {}
    for question in questions:
        for name in question.names:
            here.setdefault(name, []).append(question.event_of(name))
    return {
        name: _spending(run_plan, questions, name, tuple(here[name]))
        for name in sorted(here, key=_natural)
    }


def _spending(
    run_plan: RunPlan, asked: list[Asked], name: str, here: tuple[Event, ...]
) -> Spending:
    """Args: here: what each attempt of this run cost."""
    books = _last(asked, name)
    if not is_private(run_plan.config):
        return Spending(here, Epsilons(math.inf, math.inf, math.inf), books, math.inf)
    told = _told(asked, name)
    delta = run_plan.config.privacy.delta
    asked_here = epsilons(here, delta)
    check_agreement(asked_here)
    priced = [(here, asked_here), (told, _highest(epsilons(told, delta)))]
    history, price = max(priced, key=lambda each: each[1].pld)
    return Spending(history, price, books, _said(asked, name, delta))


def _last(asked: list[Asked], name: str) -> SiteLine | None:
    return next((each.books[name] for each in reversed(asked) if name in each.books), None)


def _said(asked: list[Asked], name: str, delta: float) -> float:
    """What its ledger stands at, by its own account: its cap, if a filter counts (which no PLD
    bounds) and the site was asked since it last answered.
    """
    books = _last(asked, name)
    if books is None:
        return 0.0
    charged = _charged(books)
    by_filter = books["spent"] > epsilon_pld(charged, delta) + TOLERANCE
    asked_since = coalesce(_told(asked, name)) != coalesce(charged)
    return books["cap"] if by_filter and asked_since else books["spent"]


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
            history = _charged(each.books[name])
        else:  # it may have answered, and paid, all the same
            history += (each.event_of(name),) * each.times[name]
    return history


def _charged(books: SiteLine) -> tuple[Event, ...]:
    return tuple(Event(sigma, q, int(steps)) for sigma, q, steps in books["charged"])


def _natural(name: str) -> tuple[str, int, str]:
    """Sorts numbers by size, however long: a name is its peer's choice."""
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :].lstrip("0")
    return stem, len(digits), digits
