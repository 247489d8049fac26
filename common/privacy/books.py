"""What a chain of entries means: what is committed, charged and allowed, entry by entry.

The same rules admit an entry at the site and judge it in an exported file, so that no site can
write what a verifier would refuse. They look at entries alone, never at data.

Two ways a plan is admitted. `plan`: before the first release, all plans together, every round and
spare of them, must fit under the cap by PLD; nobody has seen an output, so all parameters were
fixed in advance. `filter`: any time, by a Renyi filter at the one order fixed at the start
(Feldman & Zrnic 2021, arXiv:2008.11193): what was charged, what open plans may still charge, and
the new plan add up at that order. It holds for parameters chosen after seeing models, and costs
8 to 40 percent of the budget.

An event is the price of a unit's presence, a record's or a person's, and a ledger takes events of
its own unit only. A record's price says too little about a person; a person's is no bound for one
record among others of that person (decision 0010).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from common.errors import PrivacyRefusedError, VerificationError
from common.privacy import chain
from common.privacy.accounting import Event, epsilon_pld, epsilon_rdp, within
from common.privacy.chain import Entry, Head, Kind
from common.privacy.lower_bounds import FALSIFIED

MOST_STEPS = 10**7
"""Steps of a whole plan."""


class NoSpareRoundError(PrivacyRefusedError):
    """The round was lost before, and its plan has no spare round left."""


@dataclass
class Plan:
    """A committed run: at most `rounds + spare_rounds` reservations of one event, for at most
    `rounds` different rounds, whatever their numbers: a site may be asked in some of a run only.
    """

    run: str
    event: Event
    rounds: int
    spare_rounds: int
    admission: str
    config: str
    """Hash of the configuration that was committed."""
    reserved: int = 0
    retries: int = 0
    """Of these, how many were for a round that had been lost."""
    open: bool = True

    @property
    def whole(self) -> Event:
        """All rounds and spares as one event."""
        return replace(self.event, steps=self.event.steps * (self.rounds + self.spare_rounds))

    @property
    def charged(self) -> Event:
        """What was reserved of it."""
        return replace(self.event, steps=self.event.steps * self.reserved)


@dataclass
class Reservation:
    """One attempt at one round."""

    run: str
    round: int
    event: Event
    state: str = "reserved"
    """`reserved`, `prepared`, `released` or `lost`; charged in each."""
    reason: str = ""
    """Why it was lost, one of `chain.LOSSES`."""
    update: str = ""
    """SHA-256 of the update that was prepared: only these bytes may be sent."""


@dataclass
class Books:
    """The state after some entries. Empty before the first.

    Raises, from `apply`: PrivacyRefusedError where the budget says no, VerificationError naming
    the entry where it cannot be a ledger's; the state is as before then.
    """

    head: Head = chain.EMPTY
    genesis: dict[str, Any] = field(default_factory=dict)
    site_key: str = ""
    cap: float = 0.0
    highest_cap: float = 0.0
    """There ever was: plans may have been admitted under it."""
    plans: dict[str, Plan] = field(default_factory=dict)
    reservations: dict[int, Reservation] = field(default_factory=dict)
    """By the number of the entry that reserved."""
    attempts: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    """The reservations of each (run, round)."""
    misc: list[Event] = field(default_factory=list)
    """Single releases, each with its own entry."""
    released: bool = False
    """Whether any output may have been seen: from then on only `filter` admits."""
    filtered: bool = False
    """Whether anything was admitted by `filter`."""
    hashes: list[str] = field(default_factory=list)
    receipts: dict[str, Head] = field(default_factory=dict)
    """The latest head each coordinator, by its key, has signed."""
    audits: list[Mapping[str, Any]] = field(default_factory=list)
    """Results of audits, as their entries hold them, oldest first."""

    @property
    def unit(self) -> str:
        """What neighbouring datasets differ in, `record` or `person`: of every epsilon here."""
        return str(self.genesis["unit"])

    @property
    def delta(self) -> float:
        """Of every epsilon of this ledger."""
        return float(self.genesis["delta"])

    def charges(self) -> list[Event]:
        """What was charged: every reservation ever made, and single events."""
        return [*(plan.charged for plan in self.plans.values()), *self.misc]

    def commitments(self) -> list[Event]:
        """What is charged or may still be under the plans that are open."""
        plans = self.plans.values()
        return [*(plan.whole if plan.open else plan.charged for plan in plans), *self.misc]

    def spent(self) -> float:
        """Epsilon of what was charged that holds whenever its parameters were chosen.

        PLD as long as all of them were fixed before any output was seen, else the filter's.
        """
        return self._filtered(self.charges()) if self.filtered else self.spent_pld()

    def committed(self) -> float:
        """The same, once everything that open plans may still charge was charged."""
        events = self.commitments()
        if self.filtered:
            return self._filtered(events)
        return min(epsilon_rdp(events, self.delta), epsilon_pld(events, self.delta))

    def spent_pld(self) -> float:
        """Epsilon of what was charged, by PLD; by RDP where PLD's grid has drifted above it."""
        return min(self.spent_rdp(), epsilon_pld(self.charges(), self.delta))

    def foresee(self) -> None:
        """Prices what one more round of the run that was charged last will make of these books.

        That is half a second by PLD, and kept: whoever is answered then need not wait for it.
        """
        last = next(reversed(self.reservations.values()), None)
        if last is None or self.filtered or not self.remaining_rounds(last.run):
            return
        plan = self.plans[last.run]
        ahead = replace(plan, reserved=plan.reserved + 1)
        plans = [ahead if each is plan else each for each in self.plans.values()]
        epsilon_pld([*(each.charged for each in plans), *self.misc], self.delta)

    def spent_rdp(self) -> float:
        """Epsilon of what was charged, by RDP."""
        return epsilon_rdp(self.charges(), self.delta)

    def contains(self, head: Head) -> bool:
        """Whether this chain went through `head`."""
        if head == chain.EMPTY:
            return True
        return 1 <= head.seq <= len(self.hashes) and self.hashes[head.seq - 1] == head.hash

    def remaining_rounds(self, run: str) -> int:
        """Reservations its plan still allows."""
        plan = self.plans[run]
        return plan.rounds + plan.spare_rounds - plan.reserved if plan.open else 0

    def lost_rounds(self) -> int:
        """Attempts that were charged and released nothing."""
        return Counter(r.state for r in self.reservations.values())["lost"]

    def alarms(self) -> int:
        """Attempts that were charged and not released because a measurement alarmed."""
        return Counter(r.reason for r in self.reservations.values())["alarm"]

    def open_reservations(self, *states: str) -> list[int]:
        """Reservations in one of these states, oldest first."""
        return [seq for seq, r in self.reservations.items() if r.state in states]

    def apply(self, entry: Entry) -> None:
        """Takes one more entry, or refuses it."""
        if entry.seq != self.head.seq + 1 or entry.prev != self.head.hash:
            _fault(
                entry,
                "does not follow the entry before it; one is missing, or the order was changed",
            )
        if (entry.kind is Kind.GENESIS) != (entry.seq == 1):
            _fault(entry, "a ledger begins with GENESIS, and has one")
        chain.check_signature(
            entry, str(entry.body["site_key"]) if entry.kind is Kind.GENESIS else self.site_key
        )
        _TAKE[entry.kind](self, entry)
        self.head = Head(entry.seq, entry.hash)
        self.hashes.append(entry.hash)

    def admits(self, more: Iterable[Event], admission: str) -> bool:
        """Whether `more` fits under the cap beside all commitments."""
        if admission == "filter":
            return self._filtered([*self.commitments(), *more]) <= self.cap
        return self.all_fixed() and self._affordable([*self._whole_plans(), *more])

    def admission(self) -> str:
        """Which of the two ways is open to a new plan."""
        return "plan" if self.all_fixed() else "filter"

    def all_fixed(self) -> bool:
        """Whether everything so far was fixed before any output was seen."""
        return not self.released and not self.filtered

    def covers_commitments(self) -> bool:
        """Whether a cap that was lowered still covers what was admitted under a higher one."""
        if self.cap >= self.highest_cap:
            return True
        if self.filtered:
            return self._filtered(self.commitments()) <= self.cap
        return self._affordable(self._whole_plans())

    def _whole_plans(self) -> list[Event]:
        """For PLD a plan closed early is not freed: its end may have depended on what was seen."""
        return [*(plan.whole for plan in self.plans.values()), *self.misc]

    def _affordable(self, events: list[Event]) -> bool:
        """Whether RDP or PLD, upper bounds both, put a history under the cap."""
        cheap = epsilon_rdp(events, self.delta) <= self.cap
        return cheap or within(events, epsilon=self.cap, delta=self.delta)

    def _filtered(self, events: Iterable[Event]) -> float:
        """Epsilon at the one order fixed at the start, where sums form a Renyi filter."""
        return epsilon_rdp(events, self.delta, float(self.genesis["filter_order"]))


def filter_order(cap: float, delta: float) -> int:
    """The order at which a Gaussian history that just meets the cap is priced best.

    Whole, and so at least 2: at fractional orders the series of a sampled mechanism may not
    converge.

    >>> filter_order(3.0, 1e-4), filter_order(8.0, 1e-5), filter_order(100.0, 1e-3)
    (8, 4, 2)
    """
    root = math.sqrt(math.log(1 / delta) + cap) - math.sqrt(math.log(1 / delta))
    return max(2, round(1 + math.sqrt(math.log(1 / delta)) / root))


def _take_genesis(books: Books, entry: Entry) -> None:
    body = dict(entry.body)
    if body["delta"] >= 1:
        _fault(entry, "delta must be below 1")
    if body["officer_key"] == body["site_key"]:
        _fault(entry, "the officer's key is the site's own")
    books.genesis, books.site_key = body, body["site_key"]
    books.cap = books.highest_cap = float(body["cap"])


def _take_plan(books: Books, entry: Entry) -> None:
    body = entry.body
    if body["run"] in books.plans:
        _fault(entry, f"run {body['run']} is already planned")
    plan = Plan(
        body["run"],
        chain.event_of(body["event"]),
        body["rounds"],
        body["spare_rounds"],
        body["admission"],
        body["plan"],
    )
    if plan.whole.steps > MOST_STEPS:
        _fault(entry, f"plans more than {MOST_STEPS} steps")
    _admit(books, entry, plan.whole)
    books.plans[plan.run] = plan


def _take_close(books: Books, entry: Entry) -> None:
    plan = books.plans.get(entry.body["run"])
    if plan is None or not plan.open:
        _fault(entry, f"run {entry.body['run']} is not open")
    plan.open = False


def _take_reserve(books: Books, entry: Entry) -> None:
    body = entry.body
    plan = books.plans.get(body["run"])
    if plan is None or not plan.open:
        _fault(entry, f"run {body['run']} has no open plan")
    if chain.event_of(body["event"]) != plan.event:
        _fault(entry, "charges another event than its plan; an under-count, or another run's")
    attempts = books.attempts.get((plan.run, body["round"]), [])
    earlier = [books.reservations[seq] for seq in attempts]
    first = plan.reserved - plan.retries
    beyond = not earlier and first >= plan.rounds  # rounds are paid for by number, not by name
    if body["round"] < 1 or beyond or body["attempt"] != len(earlier) + 1:
        _fault(entry, f"round {body['round']}, attempt {body['attempt']}, is not next in its plan")
    if any(r.state != "lost" for r in earlier):
        raise PrivacyRefusedError(f"round {body['round']} of run {plan.run} was already answered")
    if earlier and plan.retries >= plan.spare_rounds:
        raise NoSpareRoundError(
            f"round {body['round']} of run {plan.run} was lost; its plan has no spare round left"
        )
    if not books.covers_commitments():
        _over(books)
    plan.reserved += 1
    plan.retries += bool(earlier)
    books.reservations[entry.seq] = Reservation(plan.run, body["round"], plan.event)
    books.attempts[plan.run, body["round"]] = [*attempts, entry.seq]


def _take_prepare(books: Books, entry: Entry) -> None:
    body, reservation = entry.body, _reservation(books, entry, "reserved")
    if body["steps"] != reservation.event.steps:
        _fault(entry, "what was measured differs from what was planned")
    reservation.state, reservation.update = "prepared", body["update"]


def _take_release(books: Books, entry: Entry) -> None:
    _reservation(books, entry, "prepared").state = "released"
    books.released = True


def _take_lost(books: Books, entry: Entry) -> None:
    reservation = _reservation(books, entry, "reserved", "prepared")
    reservation.state, reservation.reason = "lost", entry.body["reason"]


def _take_receipt(books: Books, entry: Entry) -> None:
    body = entry.body
    head = Head(body["seq"], body["hash"])
    if not books.contains(head):
        _fault(entry, "is for a head that this chain never had")
    if not chain.head_is_signed(body["coordinator_key"], body["signature"], head):
        _fault(entry, "its receipt is not signed by the key it names")
    books.receipts[body["coordinator_key"]] = head


def _take_misc(books: Books, entry: Entry) -> None:
    event = chain.event_of(entry.body["event"])
    _admit(books, entry, event)
    books.misc.append(event)
    books.released = True


def _admit(books: Books, entry: Entry, event: Event) -> None:
    admission = entry.body["admission"]
    if entry.body["unit"] != books.unit:
        _fault(entry, f"is priced by {entry.body['unit']}, in a ledger whose unit is {books.unit}")
    if admission == "plan" and not books.all_fixed():
        _fault(entry, "is admitted as a plan after an output may have been seen")
    if not books.admits([event], admission):
        _over(books)
    books.filtered = books.filtered or admission == "filter"


def _take_cap(books: Books, entry: Entry) -> None:
    cap, signature = float(entry.body["cap"]), entry.body["officer_signature"]
    officer = books.genesis["officer_key"]
    if not chain.cap_is_signed(officer, signature, cap=cap, after=books.head):
        _fault(entry, "the cap is not signed by the officer, for this place in this ledger")
    books.cap, books.highest_cap = cap, max(cap, books.highest_cap)


def _take_dataset(books: Books, entry: Entry) -> None:
    books.genesis = {**books.genesis, "dataset_root": entry.body["dataset_root"]}


def _take_audit(books: Books, entry: Entry) -> None:
    """An audit charges nothing: what it trains on is made, or charged by itself."""
    body = entry.body
    falsified = body["lower_bound"] > body["claimed_epsilon"]
    if (body["verdict"] == FALSIFIED) != falsified:
        _fault(entry, "its verdict is not that of its own figures")
    books.audits.append(body)


def _take_rotation(books: Books, entry: Entry) -> None:
    new, proof = entry.body["site_key"], entry.body["proof"]
    if not chain.rotation_is_proved(new, proof, books.site_key, after=books.head):
        _fault(entry, "the new key did not sign that it follows the old one")
    if new == books.genesis["officer_key"]:
        _fault(entry, "the officer's key is the site's own")
    books.site_key = new


def _reservation(books: Books, entry: Entry, *states: str) -> Reservation:
    found = books.reservations.get(entry.body["reservation"])
    if found is None or found.state not in states:
        state = "was never reserved" if found is None else f"is {found.state}"
        _fault(entry, f"reservation {entry.body['reservation']} {state}")
    return found


def _fault(entry: Entry, text: str) -> NoReturn:
    raise VerificationError(f"entry {entry.seq} ({entry.kind.value}): {text}")


def _over(books: Books) -> NoReturn:
    raise PrivacyRefusedError(
        f"the cap of epsilon {books.cap:g} at delta {books.delta:g} does not allow it; the officer "
        "can raise the cap (coterie ledger cap)"
    )


_TAKE = {
    Kind.GENESIS: _take_genesis,
    Kind.PLAN: _take_plan,
    Kind.CLOSE: _take_close,
    Kind.RESERVE: _take_reserve,
    Kind.PREPARE: _take_prepare,
    Kind.RELEASE: _take_release,
    Kind.LOST: _take_lost,
    Kind.RECEIPT: _take_receipt,
    Kind.MISC_EVENT: _take_misc,
    Kind.CAP_CHANGE: _take_cap,
    Kind.DATASET: _take_dataset,
    Kind.AUDIT: _take_audit,
    Kind.KEY_ROTATE: _take_rotation,
}
