"""The rules of the books: what is charged, what is committed, and who says no."""

import contextlib
import copy
import math
import random

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import PrivacyRefusedError, VerificationError
from common.privacy import chain
from common.privacy.accounting import Event, epsilon_pld, epsilon_rdp, within
from common.privacy.books import Books, NoSpareRoundError, filter_order
from common.privacy.chain import Head, Kind, event_body

SITE, OFFICER, NEXT = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3))
DELTA, ORDER = 1e-4, 8
ROUND = Event(2.2, 0.25, 5)
OTHER = Event(3.0, 1.0, 1)
SINGLE = Event(30.0, 1.0, 1)


class Site:
    """Writes entries as a site does, each under the rules; keeps the lines and its own counts."""

    def __init__(self, cap=3.0, unit="record"):
        self.books, self.lines, self.key = Books(), [], SITE
        self.charges, self.promised = [], []
        self.take(
            Kind.GENESIS,
            version=chain.VERSION,
            site="clinic",
            dataset="letters",
            dataset_root="0" * 64,
            unit=unit,
            relation="add_or_remove_one",
            cap=cap,
            delta=DELTA,
            filter_order=ORDER,
            site_key=chain.public_hex(SITE),
            officer_key=chain.public_hex(OFFICER),
        )

    def take(self, kind, **body):
        """One entry, or the refusal, which must leave no trace."""
        before = copy.deepcopy(self.books)
        entry = chain.write_entry(kind, body, after=self.books.head, key=self.key)
        try:
            self.books.apply(entry)
        except (PrivacyRefusedError, VerificationError):
            assert self.books == before
            raise
        self.lines.append(entry.line)
        return entry.seq

    def plan(self, run="a", event=ROUND, *, rounds=2, spares=1, admission="plan", unit=None):
        self.take(
            Kind.PLAN,
            run=run,
            plan="1" * 64,
            model="tiny",
            unit=unit or self.books.unit,
            event=event_body(event),
            rounds=rounds,
            spare_rounds=spares,
            admission=admission,
        )
        self.promised.append(times(event, rounds + spares))

    def reserve(self, number, run="a", *, attempt=1):
        event = self.books.plans[run].event if run in self.books.plans else ROUND
        seq = self.take(
            Kind.RESERVE, run=run, round=number, attempt=attempt, event=event_body(event)
        )
        self.charges.append(event)
        return seq

    def prepare(self, reservation, **changes):
        found = self.books.reservations.get(reservation)
        body = {
            "reservation": reservation,
            "update": "2" * 64,
            "steps": found.event.steps if found else 1,
        }
        self.take(Kind.PREPARE, **body | changes)

    def release(self, reservation):
        self.take(Kind.RELEASE, reservation=reservation)

    def lose(self, reservation):
        self.take(Kind.LOST, reservation=reservation, reason="failure")

    def answer(self, number, run="a"):
        reservation = self.reserve(number, run)
        self.prepare(reservation)
        self.release(reservation)

    def close(self, run="a"):
        self.take(Kind.CLOSE, run=run)

    def misc(self, event=SINGLE, admission="plan", unit=None):
        self.take(
            Kind.MISC_EVENT,
            purpose="x",
            unit=unit or self.books.unit,
            event=event_body(event),
            admission=admission,
        )
        self.charges.append(event)

    def cap(self, cap):
        signature = chain.sign_cap(OFFICER, cap=cap, after=self.books.head)
        self.take(Kind.CAP_CHANGE, cap=cap, officer_signature=signature)

    def restart(self):
        """Reads the chain again, as a process does that begins."""
        before, self.books = self.books, Books()
        for number, line in enumerate(self.lines, 1):
            self.books.apply(chain.read_entry(line, number))
        assert self.books == before


def times(event, count):
    return Event(event.noise_multiplier, event.sample_rate, event.steps * count)


def filtered(*events):
    return epsilon_rdp(events, DELTA, ORDER)


def refuses(call, *arguments, error=PrivacyRefusedError, match=None, **keywords):
    with pytest.raises(error, match=match) as refused:
        call(*arguments, **keywords)
    assert type(refused.value) in {error, NoSpareRoundError}


# Any sequence at all.

RUNS = ("a", "b", "c")
EVENTS = (ROUND, Event(6.0, 0.25, 5), SINGLE)
RARE = ("reserve", "prepare", "release", "lose", "rotate", "other", "restart")
STEPS = st.tuples(
    st.sampled_from((*("round", "plan", "retry") * 3, "round", "misc", "cap", "close", *RARE)),
    st.integers(0, 2**32),
)


def perform(site, name, seed):
    """Something that may be allowed: mostly what fits, sometimes what cannot."""
    draw, books = random.Random(seed), site.books
    planned = [*books.plans] or ["a"]
    run = draw.choice([*planned, *planned, draw.choice(RUNS)])
    reservation = draw.choice([*books.reservations, 1, 10**6][-6:])
    if name == "plan":
        site.plan(
            draw.choice(RUNS),
            draw.choice(EVENTS),
            rounds=draw.randint(0, 4),
            spares=draw.randint(0, 2),
            admission=draw.choice(["plan", "filter", books.admission()]),
        )
    elif name == "reserve":
        site.reserve(draw.randint(0, 5), run, attempt=draw.randint(1, 3))
    elif name in ("round", "retry"):
        tried = [r.round for r in books.reservations.values() if r.run == run]
        number = draw.choice(tried or [1]) if name == "retry" else max(tried, default=0) + 1
        reservation = site.reserve(number, run, attempt=1 + tried.count(number))
        if draw.random() < 0.7:
            site.prepare(reservation)
            getattr(site, draw.choice(["release", "release", "lose"]))(reservation)
        elif draw.random() < 0.7:
            site.lose(reservation)
    elif name == "misc":
        site.misc(draw.choice(EVENTS), draw.choice(["plan", "filter"]))
    elif name == "cap":
        site.cap(draw.choice([0.5, 2.0, 3.0, 4.0, 4.0, 5.0]))
    elif name == "rotate":
        new = NEXT if site.key is SITE else SITE
        old = books.site_key
        proof = chain.prove_rotation(new, old, after=books.head)
        site.take(Kind.KEY_ROTATE, site_key=chain.public_hex(new), proof=proof)
        site.key = new
    elif name == "other":
        site.take(Kind.DATASET, dataset_root=f"{seed:064x}")
        site.take(
            Kind.AUDIT,
            report="3" * 64,
            design="made",
            m=1000,
            confidence=0.95,
            lower_bound=0.1,
            claimed_epsilon=3.0,
            ceiling=6.5,
            verdict="NOT FALSIFIED",
        )
    elif name == "restart":
        site.restart()
    elif name == "close":
        site.close(run)
    else:
        getattr(site, name)(reservation)


def affordable(events, cap):
    return within(events, epsilon=cap + 1e-9, delta=DELTA)


@settings(max_examples=150)
@given(st.lists(STEPS, min_size=15, max_size=40), st.sampled_from([1.5, 3.0]))
def test_no_sequence_of_entries_outspends_the_cap_or_forgets_a_charge(steps, cap):
    site = Site(cap)
    highest = 0.0
    for name, seed in steps:
        length = len(site.lines)
        with contextlib.suppress(PrivacyRefusedError, VerificationError):
            perform(site, name, seed)
        new = [chain.read_entry(line, 1).kind for line in site.lines[length:]]
        books = site.books
        assert sorted(split_once(books.charges())) == sorted(split_once(site.charges))
        if {Kind.PLAN, Kind.RESERVE, Kind.MISC_EVENT} & set(new):
            # Whatever was admitted, is within the cap that holds now, whatever it was before.
            assert affordable(site.charges, books.cap)
            highest = max(highest, books.cap)
        if Kind.PLAN in new and books.all_fixed():
            assert affordable([*site.promised, *books.misc], books.cap)
        assert affordable(site.charges, highest)
    site.restart()


def split_once(events):
    """Steps, one by one, by what they cost."""
    counts = {}
    for event in events:
        key = (event.noise_multiplier, event.sample_rate)
        counts[key] = counts.get(key, 0) + event.steps
    return [(key, count) for key, count in counts.items() if count]


INTERLEAVED = st.lists(
    st.sampled_from(["a", "b", "a lost", "b lost", "restart", "misc", "c"]), max_size=12
)


@settings(max_examples=25)
@given(INTERLEAVED, st.randoms(use_true_random=False))
def test_rounds_of_several_runs_cost_exactly_their_composition(steps, draw):
    """However rounds, losses and restarts follow each other."""
    site = Site(cap=100.0)
    site.plan("a", rounds=20, spares=20)
    site.plan("b", OTHER, rounds=20, spares=20)
    done = {"a": 0, "b": 0}
    for step in steps:
        run, _, lost = step.partition(" ")
        if step == "restart":
            site.restart()
        elif step == "misc":
            site.misc(admission="filter")
        elif step == "c":
            refuses(site.reserve, 1, "c", error=VerificationError)
        else:
            done[run] += 1
            if lost:
                site.lose(site.reserve(done[run], run))
                site.reserve(done[run], run, attempt=2)
            else:
                site.answer(done[run], run)
    reserved = [
        chain.event_of(entry.body["event"])
        for entry in (chain.read_entry(line, 1) for line in site.lines)
        if entry.kind in (Kind.RESERVE, Kind.MISC_EVENT)
    ]
    assert reserved == site.charges
    pieces = []
    for event in reserved:
        cut = draw.randint(0, event.steps)
        whole = (event.noise_multiplier, event.sample_rate)
        pieces += [Event(*whole, cut), Event(*whole, event.steps - cut)]
    draw.shuffle(pieces)
    for events in (reserved, reserved[::-1], pieces):
        assert site.books.spent_pld() == pytest.approx(epsilon_pld(events, DELTA), abs=1e-6)
        assert site.books.spent_rdp() == pytest.approx(epsilon_rdp(events, DELTA), abs=1e-6)


# Plan admission.


def test_all_plans_and_their_spares_share_the_cap():
    """Eight rounds fit, nine do not; who comes last is refused."""
    site = Site()
    site.plan("a", rounds=2, spares=1)
    refuses(site.plan, "b", rounds=5, spares=1)
    site.plan("b", rounds=4, spares=1)
    refuses(site.plan, "c", rounds=1, spares=0)
    refuses(site.misc, OTHER)
    assert site.books.spent_pld() == 0


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.booleans()), max_size=8))
def test_unused_rounds_of_a_plan_are_never_forgotten(plans):
    """Under plan admission, closed or not: their end may have depended on what was seen."""
    site, committed = Site(), 0
    for number, (rounds, spares, closed) in enumerate(plans):
        run = f"run {number}"
        if committed + rounds + spares <= 8:
            site.plan(run, rounds=rounds, spares=spares)
            committed += rounds + spares
            if closed:
                site.close(run)
        else:
            refuses(site.plan, run, rounds=rounds, spares=spares)
        site.restart()


def test_nothing_is_admitted_as_a_plan_after_a_release():
    site = Site()
    site.plan(rounds=1)
    reservation = site.reserve(1)
    site.prepare(reservation)
    site.plan("b", rounds=1)  # prepared is not released: nobody has seen it
    assert site.books.admission() == "plan"
    site.release(reservation)
    assert site.books.admission() == "filter"
    refuses(site.plan, "c", rounds=1, spares=0, error=VerificationError)
    refuses(site.misc, error=VerificationError)
    site.misc(admission="filter")
    site.close("a")
    site.close("b")
    refuses(site.plan, "c", rounds=1, spares=0, error=VerificationError)
    site.plan("c", rounds=1, spares=0, admission="filter")


def test_nothing_is_admitted_as_a_plan_beside_a_filter():
    site = Site()
    site.plan(admission="filter", rounds=1, spares=0)
    assert site.books.admission() == "filter"
    refuses(site.plan, "b", rounds=1, spares=0, error=VerificationError)
    site.plan("b", rounds=1, spares=0, admission="filter")


def test_an_output_of_a_single_event_was_seen():
    """No entry says when it leaves: what is planned after it may have been chosen by it."""
    site = Site()
    site.misc()
    assert site.books.admission() == "filter"


# Filter admission.

WHOLE = times(ROUND, 3)
"""Run a, with its spare."""
UP, DOWN = 1 + 1e-9, 1 - 1e-9


@pytest.mark.parametrize("used", [0, 1, 2])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("kind", ["plan", "misc"])
def test_the_filter_adds_charges_open_plans_and_the_new_one_at_its_order(used, closed, kind):
    """Open plans count in full, closed ones with what they used; a billionth decides."""
    site = Site()
    site.plan()
    for number in range(1, used + 1):
        site.answer(number)
    site.misc(admission="filter")
    if closed:
        site.close()
    new = times(OTHER, 2) if kind == "plan" else OTHER
    price = filtered(times(ROUND, used) if closed else WHOLE, SINGLE, new)

    def ask():
        if kind == "plan":
            site.plan("b", OTHER, rounds=1, spares=1, admission="filter")
        else:
            site.misc(OTHER, "filter")

    site.cap(price * DOWN)
    refuses(ask, match="does not allow it; the officer can raise the cap")
    site.cap(price * UP)
    ask()


def test_rounds_of_a_closed_plan_are_free_again_under_the_filter_only():
    """The same plan, the same cap: whoever was admitted as a plan stays committed in full."""
    site = Site()
    site.plan(rounds=5, spares=1)
    site.close()
    refuses(site.plan, "b", rounds=3, spares=0)
    site.plan("b", rounds=3, spares=0, admission="filter")
    assert site.books.commitments() == [times(ROUND, 0), times(ROUND, 3)]


def test_the_filter_never_admits_what_the_exact_price_forbids():
    """At the fixed order it is dearer than PLD for every history of this size."""
    for sigma in (1.5, 4.0):
        for rate in (0.01, 0.25, 1.0):
            for steps in (1, 40):
                event = Event(sigma, rate, steps)
                assert filtered(event) >= epsilon_pld([event], DELTA) - 1e-6


@pytest.mark.parametrize("cap", [1.0, 3.0, 8.0, 30.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_the_order_of_the_filter_prices_a_gaussian_history_almost_best(cap, delta):
    order = filter_order(cap, delta)
    assert isinstance(order, int)
    assert order >= 2
    low, high = 0.01, 1e4
    for _ in range(60):  # the noise at which this order says just `cap`
        middle = math.sqrt(low * high)
        fits = epsilon_rdp([Event(middle, 1.0, 1)], delta, order) <= cap
        low, high = (low, middle) if fits else (middle, high)
    best = min(epsilon_rdp([Event(high, 1.0, 1)], delta, other) for other in range(2, 256))
    assert best >= 0.9 * cap


# A cap that changes.


@pytest.mark.parametrize("admission", ["plan", "filter"])
def test_a_lowered_cap_stops_what_was_admitted_and_a_raised_one_lets_it_go_on(admission):
    site = Site()
    site.plan(rounds=4, spares=0, admission=admission)
    site.answer(1)
    whole = times(ROUND, 4)
    price = epsilon_pld([whole], DELTA) if admission == "plan" else filtered(whole)
    site.cap(price * 0.99)
    refuses(site.reserve, 2)
    refuses(site.misc, admission="filter")
    site.cap(price * 0.5)
    refuses(site.reserve, 2)
    site.cap(price * 1.001)
    site.answer(2)
    site.cap(0.1)
    refuses(site.reserve, 3)
    site.restart()
    refuses(site.reserve, 3)
    site.cap(3.0)
    site.answer(3)
    assert len(site.charges) == 3


def test_a_round_that_was_reserved_is_finished_under_a_lowered_cap():
    """It is charged; whether its output leaves changes no price."""
    site = Site()
    site.plan()
    reservation = site.reserve(1)
    site.cap(0.01)
    site.prepare(reservation)
    site.release(reservation)
    refuses(site.reserve, 2)


def test_a_raised_cap_admits_more_and_is_forgotten_when_lowered_again():
    site = Site()
    site.plan("a", rounds=8, spares=0)
    refuses(site.plan, "b")
    site.cap(5.0)
    site.plan("b")
    site.cap(3.0)
    for run in ("a", "b"):
        refuses(site.reserve, 1, run)
    site.cap(5.0)
    site.reserve(1, "a")


def test_closing_a_run_makes_room_under_a_lowered_filter():
    site = Site()
    site.plan("a", rounds=2, spares=0, admission="filter")
    site.plan("b", rounds=3, spares=0, admission="filter")
    site.answer(1, "b")
    site.cap(filtered(times(ROUND, 4)) * 1.001)
    refuses(site.reserve, 2, "b")
    site.close("a")
    site.answer(2, "b")


def test_a_lowered_cap_is_compared_by_the_filter_where_anything_was_chosen_late():
    """An event admitted after a release was chosen by who had seen it: PLD does not price it."""
    site = Site()
    site.plan(rounds=3, spares=1)
    site.answer(1)
    site.misc(OTHER, "filter")
    events = [times(ROUND, 4), OTHER]
    exact, late = epsilon_pld(events, DELTA), filtered(*events)
    site.cap((exact + late) / 2)
    refuses(site.reserve, 2)


def test_a_lowered_cap_frees_no_rounds_of_a_closed_plan():
    """As at admission: its end may have depended on what was seen."""
    site = Site()
    site.plan("a", rounds=3, spares=0)
    site.plan("b", rounds=3, spares=0)
    site.answer(1, "a")
    site.close("a")
    site.cap(epsilon_pld([times(ROUND, 4)], DELTA) * 1.01)
    refuses(site.reserve, 1, "b")


# Rounds.


def test_what_is_lost_stays_charged_and_is_tried_again_on_spares_only():
    site = Site()
    site.plan(rounds=2, spares=2)
    for attempt in (1, 2):
        site.lose(site.reserve(1, attempt=attempt))
    third = site.reserve(1, attempt=3)
    site.lose(third)
    refuses(site.reserve, 1, attempt=4, match="no spare round left")
    site.reserve(2)
    assert site.books.remaining_rounds("a") == 0
    assert site.books.lost_rounds() == 3
    assert site.books.charges() == [times(ROUND, 4)]
    assert len(site.charges) == 4


def test_spare_rounds_are_shared_by_all_rounds_and_rounds_by_none():
    """A retry never takes the place of a round that has not had its turn."""
    site = Site()
    site.plan(rounds=3, spares=1)
    site.lose(site.reserve(2))
    site.lose(site.reserve(2, attempt=2))
    refuses(site.reserve, 2, attempt=3)
    for number in (3, 1):
        site.answer(number)
    refuses(site.reserve, 1, attempt=2, match="already answered")
    assert site.books.remaining_rounds("a") == 0


@pytest.mark.parametrize("numbers", [(1, 2), (2, 9), (2**53 - 1, 1)])
def test_as_many_rounds_as_planned_are_paid_for_whatever_their_numbers(numbers):
    """A site may be asked in some rounds of a run only; one more than planned is refused."""
    site = Site()
    site.plan(rounds=2, spares=1)
    for number in numbers:
        site.lose(site.reserve(number)) if number == 1 else site.answer(number)
    refuses(site.reserve, 5, error=VerificationError, match="is not next in its plan")
    if 1 in numbers:  # a spare pays for the same round once more, and for no other
        site.lose(site.reserve(1, attempt=2))
    refuses(site.reserve, 5, error=VerificationError, match="is not next in its plan")


@pytest.mark.parametrize("number", [0, 3, 2**53 - 1])
def test_a_round_that_is_not_planned_is_refused(number):
    site = Site()
    site.plan()
    if number:
        site.answer(1)
        site.answer(2)
    refuses(site.reserve, number, error=VerificationError, match="is not next in its plan")


def test_states_of_a_reservation_follow_each_other_and_no_other_way():
    ways = {
        "reserved": {"prepare": "prepared", "lose": "lost"},
        "prepared": {"release": "released", "lose": "lost"},
        "released": {},
        "lost": {},
    }
    paths = {
        "reserved": [],
        "prepared": ["prepare"],
        "released": ["prepare", "release"],
        "lost": ["lose"],
    }
    for state, path in paths.items():
        for step in ("prepare", "release", "lose"):
            site = Site()
            site.plan()
            reservation = site.reserve(1)
            for name in path:
                getattr(site, name)(reservation)
            found = site.books.reservations[reservation]
            assert found.state == state
            if step in ways[state]:
                getattr(site, step)(reservation)
                assert found.state == ways[state][step]
            else:
                text = f"reservation {reservation} is {state}$"
                refuses(getattr(site, step), reservation, error=VerificationError, match=text)


# Order, and what others remember.


def test_an_entry_is_taken_once_and_in_its_place():
    site = Site()
    site.plan()
    entries = [chain.read_entry(line, number) for number, line in enumerate(site.lines, 1)]
    for entry in entries:
        refuses(site.books.apply, entry, error=VerificationError, match="does not follow")
    refuses(Books().apply, entries[1], error=VerificationError, match="does not follow")


def test_the_books_contain_every_head_they_went_through_and_no_other():
    site = Site()
    heads = [chain.EMPTY, site.books.head]
    site.plan()
    heads.append(site.books.head)
    site.close()
    assert all(site.books.contains(head) for head in [*heads, site.books.head])
    for seq in (0, 1, 2, 3, 4, 10**15):
        assert not site.books.contains(Head(seq, "f" * 64))
    assert not site.books.contains(Head(2, heads[1].hash))
    assert not site.books.contains(Head(-1, heads[-1].hash))


# Units.


@pytest.mark.parametrize(("unit", "other"), [("record", "person"), ("person", "record")])
@pytest.mark.parametrize("admission", ["plan", "filter"])
def test_a_ledger_takes_events_of_its_own_unit_only(unit, other, admission):
    site = Site(unit=unit)
    for wrong in (site.plan, site.misc):
        refuses(
            wrong,
            admission=admission,
            unit=other,
            error=VerificationError,
            match=rf"is priced by {other}, in a ledger whose unit is {unit}$",
        )
    assert not site.books.plans
    site.plan(admission=admission)
    site.answer(1)
    assert site.books.unit == unit
