"""The store: charged before data are touched, whoever dies when, and however many write.

Processes are really killed, and really race. What stands on the disk afterwards is judged by the
verifier, from an export, and not by the store itself.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace

import pytest

from client.commitment import UNBOUND, Commitment
from client.ledger import Store
from common.errors import ConfigError, CoterieError, PrivacyRefusedError, VerificationError
from common.privacy.accounting import Event, coalesce, epsilon_rdp, within
from common.privacy.books import filter_order
from common.privacy.chain import Kind
from common.privacy.verification import verify

from .ledger_worker import (
    CHEAP,
    DELTA,
    RUN,
    SITE,
    commit,
    content_of,
    digest_of,
    dying_at,
    ended,
    forked,
    kill,
    next_round,
    notes,
    race,
    take_a_round_up_to,
    take_rounds,
    take_rounds_until_killed,
    terms,
)

DEAR = Event(2.0, 0.15, 2)
ROUNDS = 5
WHOLE = Event(2.0, 0.15, DEAR.steps * ROUNDS)
"""What a committed run of DEAR rounds costs."""


@pytest.fixture
def path(tmp_path):
    """A ledger of one site with one run of cheap rounds, closed."""
    made = tmp_path / "ledger"
    with Store.create(made) as store:
        commit(store.open(SITE, terms()))
    return made


@pytest.fixture
def store(path):
    with Store(path) as opened:
        yield opened


@pytest.fixture
def ledger(store):
    return store.ledger(SITE)


def prepare(ledger, reservation, event=CHEAP):
    ledger.prepare(reservation, content_of(reservation), steps=event.steps)


def take_one(ledger, run=RUN, event=CHEAP, round_number=1):
    """One whole round. Returns: its reservation."""
    reservation = ledger.reserve(run, round_number, event)
    prepare(ledger, reservation, event)
    assert ledger.release(reservation) == content_of(reservation)
    return reservation


def states(ledger):
    return [r.state for r in ledger.books.reservations.values()]


def verified(ledger):
    return verify(ledger.export().encode())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def chains(path):
    """All chains as they are on the disk."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT * FROM entry ORDER BY site, seq").fetchall()


# Killed.


class Witness:
    """Opens a ledger after each kill, and remembers what must not shrink."""

    def __init__(self, path):
        self.path = path
        self.steps = self.epsilon = 0
        self.states = Counter()

    def look(self):
        with Store(self.path) as store:
            ledger = store.ledger(SITE)
            assert not ledger.books.open_reservations("reserved")
            prepared = ledger.books.open_reservations("prepared")
            assert len(prepared) <= 1
            for reservation in prepared:
                for _ in range(2):
                    assert ledger.release(reservation) == content_of(reservation)
            books = verified(ledger).books
        self.states = Counter(r.state for r in books.reservations.values())
        self.states["prepared"] += len(prepared)
        self._check_nothing_was_uncharged(books)
        steps = sum(event.steps for event in coalesce(books.charges()))
        assert steps == CHEAP.steps * len(books.reservations)
        assert steps >= self.steps
        assert books.spent_rdp() >= self.epsilon
        self.steps, self.epsilon = steps, books.spent_rdp()

    def _check_nothing_was_uncharged(self, books):
        touched = [int(line) for line in notes(self.path.parent / "touched")]
        sent = [line.split() for line in notes(self.path.parent / "sent")]
        assert {*touched} <= {*books.reservations}
        for number, digest in sent:
            reservation = books.reservations[int(number)]
            assert reservation.state == "released"
            assert digest == reservation.update == digest_of(int(number))


def killed_after(delay_s, path, *, ready_first):
    ready, is_ready = os.pipe()
    child = forked(take_rounds_until_killed, path, is_ready)
    os.close(is_ready)
    if ready_first:
        assert os.read(ready, 1)
    time.sleep(delay_s)
    kill(child)
    os.close(ready)


KILLS = 20
SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_kill_at_any_instant_loses_rounds_and_no_charge(path, seed):
    """240 kills in all; some hit a worker that recovers from the kill before."""
    draw, witness = random.Random(seed), Witness(path)
    take_rounds(path, rounds=1)
    start = time.perf_counter()
    take_rounds(path, rounds=3)
    round_s = (time.perf_counter() - start) / 3
    kills = 0
    while kills < KILLS:
        killed_after(4 * round_s * draw.random(), path, ready_first=draw.random() < 0.8)
        kills += 1
        if draw.random() < 0.7:
            witness.look()
    witness.look()
    assert witness.states["lost"] > 0
    assert witness.states["released"] > 4
    assert not {*witness.states} - {"lost", "released", "prepared"}


@pytest.mark.slow  # dozens of processes, and all books are verified after each
def test_a_kill_before_any_statement_loses_rounds_and_no_charge(path):
    """Of two openings with a round each, one statement further every time."""
    witness = Witness(path)

    def work():
        take_rounds(path, rounds=1, training_s=0)
        take_rounds(path, rounds=1, training_s=0)

    statuses = []
    while 0 not in statuses and len(statuses) < 200:
        statuses.append(ended(forked(dying_at, len(statuses), work)))
        witness.look()
    assert len(statuses) > 30
    assert {*statuses[:-1]} == {-signal.SIGKILL}


STEPS = {
    "opened": [],
    "reserved": ["lost"],
    "touched": ["lost"],
    "prepared": ["prepared"],
    "released": ["released"],
    "sent": ["released"],
}


@pytest.mark.parametrize("step", STEPS)
def test_what_a_kill_leaves_depends_on_what_was_done(path, step):
    ready, is_ready = os.pipe()
    child = forked(take_a_round_up_to, step, path, is_ready)
    assert os.read(ready, 1)
    kill(child)
    with Store(path) as store:
        assert states(store.ledger(SITE)) == STEPS[step]
        assert store.ledger(SITE).books.lost_rounds() == (STEPS[step] == ["lost"])
    Witness(path).look()
    os.close(ready)
    os.close(is_ready)


def test_a_lost_round_is_charged_again_when_it_is_taken_again(ledger):
    first = ledger.reserve(RUN, 1, CHEAP)
    ledger.lose(first)
    second = ledger.reserve(RUN, 1, CHEAP)
    assert states(ledger) == ["lost", "reserved"]
    assert second > first
    assert coalesce(ledger.books.charges()) == (Event(50.0, 0.01, 4),)


def test_of_a_dead_process_only_what_its_run_left_unfinished_is_lost(ledger):
    """Another run may be alive on the same books, and what was prepared may still be sent."""
    commit(ledger, "other")
    ledger.reserve("other", 1, CHEAP)
    prepare(ledger, ledger.reserve(RUN, 1, CHEAP))
    ledger.reserve(RUN, 2, CHEAP)
    assert ledger.lose_unfinished(RUN)
    assert states(ledger) == ["reserved", "prepared", "lost"]
    assert not ledger.lose_unfinished(RUN)
    assert coalesce(ledger.books.charges()) == (replace(CHEAP, steps=3 * CHEAP.steps),)


@pytest.mark.parametrize("statement", range(14))
def test_a_killed_creation_never_leaves_a_ledger_without_its_rules(tmp_path, statement):
    path = tmp_path / "ledger"
    ended(forked(dying_at, statement, Store.create, path))
    with contextlib.suppress(CoterieError), Store(path):
        assert len(triggers(path)) >= 2
        assert columns(path) == COLUMNS


# What may be sent, and sent again.


def test_only_what_was_prepared_is_released(path, ledger):
    reservation = ledger.reserve(RUN, 1, CHEAP)
    with pytest.raises(VerificationError, match="nothing is prepared"):
        ledger.release(reservation)
    prepare(ledger, reservation)
    with pytest.raises(VerificationError, match="is prepared"):
        ledger.prepare(reservation, b"other", steps=CHEAP.steps)
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE prepared SET content = x'00'")
    with pytest.raises(VerificationError, match="not what was prepared"):
        ledger.release(reservation)
    assert states(ledger) == ["prepared"]


def test_an_update_is_sent_again_identically_until_the_next_reservation(path, ledger):
    first = take_one(ledger)
    assert ledger.release(first) == content_of(first)
    with Store(path) as other:
        assert other.ledger(SITE).release(first) == content_of(first)
    assert [entry.kind for entry in ledger.entries()].count(Kind.RELEASE) == 1
    ledger.reserve(RUN, 2, CHEAP)
    with pytest.raises(VerificationError, match="nothing is prepared"):
        ledger.release(first)


def test_a_lost_update_is_not_released(ledger):
    reservation = ledger.reserve(RUN, 1, CHEAP)
    prepare(ledger, reservation)
    ledger.lose(reservation)
    with pytest.raises(VerificationError, match="is lost"):
        ledger.release(reservation)


def test_a_prepared_update_outlives_a_reservation_of_another_run(ledger):
    """Or its round is lost, and may be taken again: it is not stuck between the two."""
    commit(ledger, "other")
    reservation = ledger.reserve(RUN, 1, CHEAP)
    prepare(ledger, reservation)
    ledger.reserve("other", 1, CHEAP)
    if states(ledger)[0] != "lost":
        assert ledger.release(reservation) == content_of(reservation)


COLUMNS = {
    "entry": ["site", "seq", "line"],
    "prepared": ["site", "seq", "content"],
    "seen": ["tag", "site"],
}


def columns(path):
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(
            "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c "
            "WHERE m.type = 'table'"
        )
        found = {}
        for table, column in rows:
            found.setdefault(table, []).append(column)
    return found


def triggers(path):
    with closing(sqlite3.connect(path)) as connection:
        return {
            name
            for (name,) in connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'trigger'"
            )
        }


def test_nothing_but_entries_and_updates_is_kept(path, ledger):
    """And tags of texts. No batch size, no norm has a place to be in."""
    reservation = take_one(ledger)
    assert columns(path) == COLUMNS
    bodies = [dict(entry.body) for entry in ledger.entries() if entry.kind is Kind.PREPARE]
    assert bodies == [
        {
            "reservation": reservation,
            "update": digest_of(reservation),
            "steps": CHEAP.steps,
        }
    ]


def test_what_is_written_is_flushed(store):
    """To the disk at each commit: no entry is in memory only when a method returns."""

    def setting(name):
        return store._connection.execute(f"PRAGMA {name}").fetchone()[0]

    assert setting("synchronous") == 2  # FULL
    assert setting("journal_mode") == "wal"


# The cap.


class Untouchable:
    """Records that nobody may read."""

    def __len__(self):
        raise AssertionError("data were touched")

    __getitem__ = __iter__ = __len__


def round_on(ledger, records, **asked):
    ledger.reserve(**{"run": RUN, "round_number": 1, "event": CHEAP, **asked})
    return list(records)


REFUSED = {
    "answered": ({}, PrivacyRefusedError, "already answered"),
    "no spare left": ({}, PrivacyRefusedError, "no spare round left"),
    "not planned": ({"run": "other"}, VerificationError, "no open plan"),
    "not its event": ({"round_number": 2, "event": DEAR}, VerificationError, "another event"),
    "not its round": ({"round_number": 0}, VerificationError, "not next in its plan"),
    "a round too many": ({"round_number": 3}, VerificationError, "not next in its plan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_round_is_refused_before_data_are_touched(tmp_path, name):
    asked, error, text = REFUSED[name]
    with Store.create(tmp_path / "ledger") as store:
        ledger = store.open(SITE, terms())
        commit(ledger, rounds=2, spare_rounds=0)
        if name == "no spare left":
            ledger.lose(ledger.reserve(RUN, 1, CHEAP))
        else:
            take_one(ledger)
        if name == "a round too many":  # rounds are paid for by their number, whichever they are
            take_one(ledger, round_number=7)
        head = ledger.head
        with pytest.raises(error, match=text):
            round_on(ledger, Untouchable(), **asked)
        assert ledger.head == head
        assert len(chains(store.path)) == head.seq


def test_a_round_over_the_cap_is_refused_before_data_are_touched(ledger):
    """Its run is refused already, so it has no plan to be charged to."""
    head = ledger.head
    with pytest.raises(PrivacyRefusedError, match="the cap of epsilon 3"):
        commit(ledger, "dear", Event(0.5, 1.0, 1), rounds=5, spare_rounds=0)
    with pytest.raises(VerificationError, match="no open plan"):
        round_on(ledger, Untouchable(), run="dear")
    assert ledger.head == head


def fitting(mode, cap=3.0):
    """How many runs of DEAR rounds fit under the cap."""
    order = filter_order(cap, DELTA)

    def fits(runs):
        if mode == "plan":
            return within(runs, epsilon=cap, delta=DELTA)
        return epsilon_rdp([*runs, CHEAP], DELTA, order) <= cap

    return next(count for count in range(1, 99) if not fits([WHOLE] * (count + 1)))


def open_for(mode, path):
    """A ledger; where `mode` is `filter`, one that has released something."""
    store = Store.create(path)
    ledger = store.open(SITE, terms())
    if mode == "filter":
        commit(ledger, "first", rounds=1, spare_rounds=0)
        take_one(ledger, "first")
    return store


def commit_dear(ledger, run):
    commit(ledger, run, DEAR, rounds=ROUNDS, spare_rounds=0)


def same_store(store, run):
    commit_dear(store.ledger(SITE), run)


def second_store(store, run):
    with Store(store.path) as other:
        commit_dear(other.ledger(SITE), run)


def other_process(store, run):
    def work():
        second_store(store, run)

    if status := ended(forked(work)):
        raise {3: PrivacyRefusedError}[status]


@pytest.mark.parametrize("coordinator", [same_store, second_store, other_process])
@pytest.mark.parametrize("mode", ["plan", "filter"])
def test_a_second_coordinator_finds_what_the_first_left(tmp_path, mode, coordinator):
    """A new run id, a new store and a new process begin with no fresh budget."""
    fit = fitting(mode)
    with open_for(mode, tmp_path / "ledger") as store:
        ledger = store.ledger(SITE)
        for run in range(fit - 1):
            commit_dear(ledger, f"run {run}")
        coordinator(store, "another")
        with pytest.raises(PrivacyRefusedError):
            coordinator(store, "one too many")
        assert "one too many" not in ledger.books.plans
        assert len(ledger.books.plans) == fit + (mode == "filter")
        verified(ledger)


@pytest.mark.parametrize("mode", ["plan", "filter"])
@pytest.mark.parametrize("warm", [True, False], ids=["opened before", "opened at once"])
def test_processes_at_once_do_not_pass_the_cap_together(tmp_path, mode, warm):
    path, fit = tmp_path / "ledger", fitting(mode)
    assert 1 < fit < 8
    open_for(mode, path).close()

    def contestant(run):
        def go():
            with Store(path) as store:
                ledger = store.ledger(SITE)
                assert ledger.head.seq
                yield
                commit_dear(ledger, run)

        return go

    statuses = race([contestant(f"run {number}") for number in range(8)], warm=warm)
    assert Counter(statuses) == {0: fit, PrivacyRefusedError.exit_code: 8 - fit}
    with Store(path) as store:
        books = verified(store.ledger(SITE)).books
    assert len(books.plans) == fit + (mode == "filter")
    assert books.admits([WHOLE], mode) is False


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("warm", [True, False], ids=["opened before", "opened at once"])
def test_a_round_is_reserved_by_one_of_those_who_race_for_it(tmp_path, rounds, warm):
    path = tmp_path / "ledger"
    with Store.create(path) as store:
        commit(store.open(SITE, terms()), rounds=rounds, spare_rounds=0)

    def contestant(round_number):
        def go():
            with Store(path) as store:
                ledger = store.ledger(SITE)
                assert ledger.head.seq
                yield
                prepare(ledger, ledger.reserve(RUN, round_number, CHEAP))

        return go

    statuses = race([contestant(1 + number % rounds) for number in range(8)], warm=warm)
    assert Counter(statuses) == {0: rounds, PrivacyRefusedError.exit_code: 8 - rounds}
    with Store(path) as store:
        books = verified(store.ledger(SITE)).books
    assert [r.state for r in books.reservations.values()] == ["prepared"] * rounds
    assert books.remaining_rounds(RUN) == 0


def test_two_connections_take_turns(store, path):
    """Each finds what the other wrote, in one chain."""
    with Store(path) as other:
        ledgers = [store.ledger(SITE), other.ledger(SITE)] * 5
        for ledger in ledgers:
            take_one(ledger, round_number=next_round(ledger.books))
        assert ledgers[0].head == ledgers[1].head
        assert states(ledgers[0]) == ["released"] * 10
        verified(ledgers[0])


def test_an_export_is_sound_while_rounds_go_on(store, path):
    """Its claims and its entries are of one moment."""
    ready, is_ready = os.pipe()
    child = forked(take_rounds_until_killed, path, is_ready)
    assert os.read(ready, 1)
    exports = []
    while len(exports) < 8 or store.ledger(SITE).head.seq < 100:
        exports.append(store.ledger(SITE).export())
    kill(child)
    os.close(ready)
    os.close(is_ready)
    for export in exports:
        verify(export.encode())


# Somebody else alive.


def reserve_and_wait(path, ready):
    take_a_round_up_to("reserved", path, ready)


def test_what_a_living_process_reserved_is_not_lost(path):
    ready, is_ready = os.pipe()
    alive = forked(reserve_and_wait, path, is_ready)
    assert os.read(ready, 1)
    with Store(path) as other:
        assert states(other.ledger(SITE)) == ["reserved"]
        kill(alive)
        assert states(other.ledger(SITE)) == ["reserved"]
        with Store(path) as third:  # not alone
            assert states(third.ledger(SITE)) == ["reserved"]
    for _ in range(2):
        with Store(path) as alone:
            assert states(alone.ledger(SITE)) == ["lost"]
            assert alone.ledger(SITE).entries()[-1].body["reason"] == "crash"
    os.close(ready)
    os.close(is_ready)


def test_a_second_store_in_one_process_does_not_lose_rounds_of_the_first(store, ledger, path):
    reservation = ledger.reserve(RUN, 1, CHEAP)
    for _ in range(2):
        with Store(path) as other:
            assert states(other.ledger(SITE)) == ["reserved"]
    prepare(ledger, reservation)
    assert ledger.release(reservation) == content_of(reservation)


def test_what_was_left_in_a_closed_store_is_lost(path):
    with Store(path) as store:
        store.ledger(SITE).reserve(RUN, 1, CHEAP)
    with Store(path) as store:
        assert states(store.ledger(SITE)) == ["lost"]


@pytest.mark.parametrize("end", [Store.close, lambda store: None], ids=["closes", "ends"])
def test_a_forked_child_takes_nothing_with_it(store, ledger, path, end):
    """Loaders of data fork; what they inherit is not theirs to let go of."""
    reservation = ledger.reserve(RUN, 1, CHEAP)
    assert ended(forked(end, store)) == 0
    with Store(path) as other:
        assert states(other.ledger(SITE)) == ["reserved"]
    prepare(ledger, reservation)
    assert ledger.release(reservation) == content_of(reservation)
    verified(ledger)


def test_nothing_is_released_uncharged_through_a_store_that_a_child_inherited(path):
    """The parent closes it: SQLite thinks it was the last to, and removes the log."""
    gun, trigger = os.pipe()
    store = Store(path)

    def work():
        os.close(trigger)
        os.read(gun, 1)
        take_one(store.ledger(SITE))

    child = forked(work)
    store.close()
    os.close(trigger)
    released = ended(child) == 0  # any error will do
    os.close(gun)
    with Store(path) as store:
        assert states(store.ledger(SITE)) == ["released"] * released


def test_a_thread_is_not_told_of_a_reservation_that_another_rolls_back(store, ledger, path):
    """What `reserve` returned is on the disk, whatever happens to others."""
    told, done = [], threading.Event()

    def reserve():
        with contextlib.suppress(CoterieError, sqlite3.Error):
            told.append(ledger.reserve(RUN, 2, CHEAP))
        done.set()

    thread = threading.Thread(target=reserve)
    with contextlib.suppress(CrashError), store.together():
        ledger.reserve(RUN, 1, CHEAP)
        thread.start()
        done.wait(0.3)
        raise CrashError
    thread.join()
    with Store(path) as other:
        assert {*told} <= {*other.ledger(SITE).books.reservations}
        assert 1 not in [r.round for r in other.ledger(SITE).books.reservations.values()]


def test_a_thread_does_not_read_what_another_has_not_committed(store, ledger, path):
    """It would build on entries that are rolled back, and leave a chain with a hole."""
    seen, done = [], threading.Event()

    def read():
        seen.append(ledger.head)
        done.set()

    before, thread = ledger.head, threading.Thread(target=read)
    with contextlib.suppress(CrashError), store.together():
        ledger.reserve(RUN, 1, CHEAP)
        thread.start()
        done.wait(0.3)
        raise CrashError
    thread.join()
    assert seen == [before]
    ledger.reserve(RUN, 1, CHEAP)
    with Store(path) as other:
        assert states(other.ledger(SITE)) == ["reserved"]


# Append-only.

EDITS = {
    "edited": "UPDATE entry SET line = 'x' WHERE seq = 2",
    "renumbered": "UPDATE entry SET seq = 9 WHERE seq = 2",
    "deleted": "DELETE FROM entry WHERE seq = 2",
    "emptied": "DELETE FROM entry",
    "replaced": "REPLACE INTO entry VALUES ('north', 2, 'x')",
    "upserted": (
        "INSERT INTO entry VALUES ('north', 2, 'x') ON CONFLICT DO UPDATE SET line = 'x' WHERE TRUE"
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_entries_are_neither_edited_nor_deleted(path, edit):
    before = chains(path)
    with (
        closing(sqlite3.connect(path)) as connection,
        connection,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        connection.execute(EDITS[edit])
    assert chains(path) == before


def tamper(path, *statements):
    with closing(sqlite3.connect(path)) as connection, connection:
        for name in triggers(path):
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(*statement if isinstance(statement, tuple) else [statement])


def edited(seq, **changes):
    """A statement that changes the body of an entry, canonically."""

    def make(path):
        line = json.loads(chains(path)[seq - 1][2])
        line["body"] |= changes
        text = json.dumps(line, sort_keys=True, separators=(",", ":"))
        return ("UPDATE entry SET line = ? WHERE seq = ?", (text, seq))

    return make


TAMPERED = {
    "first body": (edited(1, cap=9.0), "entry 1 .GENESIS.: its signature"),
    "body": (edited(2, rounds=5000), "entry 2 .PLAN.: its signature"),
    "last body": (edited(5, reservation=9), "entry 5 .RELEASE.: its signature"),
    "first deleted": ("DELETE FROM entry WHERE seq = 1", "entry 2 .PLAN.: does not follow"),
    "middle deleted": ("DELETE FROM entry WHERE seq = 3", "entry 4 .PREPARE.: does not follow"),
    "last replaced": (
        "UPDATE entry SET line = (SELECT line FROM entry WHERE seq = 4) WHERE seq = 5",
        "entry 4 .PREPARE.: does not follow",
    ),
    "swapped": (
        "UPDATE entry SET line = (SELECT e.line FROM entry e WHERE e.seq = 7 - entry.seq) "
        "WHERE seq IN (3, 4)",
        "entry [34] .*does not follow",
    ),
    "other text": ("UPDATE entry SET line = 'x' WHERE seq = 3", "entry 3: not JSON"),
    "no text": ("UPDATE entry SET line = x'00ff' WHERE seq = 3", "entry 3: not JSON"),
    "not UTF-8": ("UPDATE entry SET line = CAST(x'ff' AS TEXT) WHERE seq = 3", "entry 3|not a led"),
    "another site's": (
        "UPDATE entry SET site = 'south' WHERE seq > 2",
        "entry 3 .*does not follow",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_chain_that_was_tampered_with_is_refused_where_it_was(path, name):
    make, text = TAMPERED[name]
    with Store(path) as store:
        take_one(store.ledger(SITE))
    tamper(path, make if isinstance(make, str) else make(path))
    with pytest.raises(VerificationError, match=text) as refused:
        Store(path).close()
    assert "\n" not in str(refused.value)


def open_twice(path):
    for _ in range(2):
        with contextlib.suppress(CoterieError):
            Store(path).close()


def test_a_refused_opening_holds_up_nobody(path):
    """The lock goes with the store that was not to be: the next is refused too, and soon."""
    tamper(path, edited(2, rounds=5000)(path))
    child = forked(open_twice, path)
    deadline = time.monotonic() + 5
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if status[0] == 0:
        kill(child)
    assert status == (child, 0), "the second opening waits for ever"


# Files.


def test_a_new_ledger_is_three_files_and_its_key_is_private(tmp_path):
    path = tmp_path / "new" / "ledger"
    with Store.create(path) as store:
        assert store.sites() == []
    assert names(path.parent) == ["ledger", "ledger.key", "ledger.lock"]
    assert stat.S_IMODE((path.parent / "ledger.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("existing", ["ledger", "ledger.key"])
def test_nothing_is_overwritten(tmp_path, existing):
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ConfigError, match="exists already") as refused:
        Store.create(tmp_path / "ledger")
    assert "\n" not in str(refused.value)
    assert names(tmp_path) == [existing]
    assert (tmp_path / existing).read_text() == "precious"


class CrashError(Exception):
    """Stands for whatever ends the process in the middle."""


def no_folder(path, monkeypatch):
    path.symlink_to(path.parent / "missing" / "ledger")


def full_disk(path, monkeypatch):
    def fail(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


def broken_database(path, monkeypatch):
    def fail(*args, **kwargs):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(sqlite3, "connect", fail)


@pytest.mark.parametrize("fault", [no_folder, full_disk, broken_database])
def test_a_failed_creation_leaves_nothing_and_can_be_tried_again(tmp_path, monkeypatch, fault):
    path = tmp_path / "ledger"
    with monkeypatch.context() as patched:
        fault(path, patched)
        with pytest.raises((CoterieError, OSError)):
            Store.create(path)
    path.unlink(missing_ok=True)
    assert names(tmp_path) == []
    Store.create(path).close()


def remove(path):
    path.unlink()


def remove_key(path):
    key_of(path).unlink()


def share_key(path):
    key_of(path).chmod(0o640)


def blank_key(path):
    key_of(path).write_text("")


def binary_key(path):
    key_of(path).write_bytes(b"\xff\xfe")


def folder_for_key(path):
    key_of(path).unlink()
    key_of(path).mkdir(0o700)


def text_file(path):
    path.write_text("not a database " * 1000)


def empty_file(path):
    path.write_bytes(b"")


def other_database(path):
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE diary (day, line)")


def cut_at(size):
    def cut(path):
        assert path.stat().st_size > size
        os.truncate(path, size)

    cut.__name__ = f"cut at {size}"
    return cut


def garbled(path):
    content = bytearray(path.read_bytes())
    for page in range(4096, len(content), 4096):
        content[page : page + 64] = bytes(64)
    path.write_bytes(content)


def key_of(path):
    return path.with_name(path.name + ".key")


SPOILT = {
    remove: (ConfigError, "no such ledger"),
    remove_key: (ConfigError, "the key is not there"),
    share_key: (ConfigError, "chmod 600"),
    blank_key: (ConfigError, "holds no key"),
    binary_key: (ConfigError, "holds no key"),
    folder_for_key: (ConfigError, "key"),
    text_file: (VerificationError, "not a ledger file"),
    empty_file: (VerificationError, "not a ledger file"),
    other_database: (VerificationError, "not a ledger file"),
    cut_at(100): (VerificationError, "not a ledger file"),
    cut_at(5000): (VerificationError, "not a ledger file"),
    cut_at(16384): (VerificationError, "not a ledger file"),
    garbled: (VerificationError, "not a ledger file"),
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_file_is_refused_in_one_line_that_names_it(path, spoil):
    with Store(path) as store:
        for round_number in range(1, 11):
            take_one(store.ledger(SITE), round_number=round_number)
    error, text = SPOILT[spoil]
    spoil(path)
    with pytest.raises(error, match=text) as refused:
        Store(path).close()
    assert type(refused.value) is error
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def another_key(path):
    """The key of another site's ledger."""
    other = path.with_name("other")
    Store.create(other).close()
    shutil.copy(key_of(other), key_of(path))


def test_another_sites_key_continues_no_chain(path):
    right = key_of(path).read_bytes()
    before = chains(path)
    another_key(path)
    with Store(path) as store:
        for act in (
            lambda ledger: ledger.reserve(RUN, 1, CHEAP),
            lambda ledger: commit(ledger, "other"),
        ):
            with pytest.raises(VerificationError, match="signed by another key"):
                act(store.ledger(SITE))
    assert chains(path) == before
    key_of(path).write_bytes(right)
    with Store(path) as store:
        take_one(store.ledger(SITE))
        verified(store.ledger(SITE))


def test_another_sites_key_exports_nothing_that_is_refused_elsewhere(path):
    """Either the key is refused here, or the file is good there."""
    another_key(path)
    with Store(path) as store:
        try:
            exported = store.ledger(SITE).export()
        except CoterieError:
            return
        verify(exported.encode())


def test_a_store_may_be_closed_twice(path):
    """The second time its handle may be another file's."""
    store = Store(path)
    store.close()
    with (path.parent / "another").open("w") as another:
        store.close()
        another.write("still open")


def test_a_site_has_one_chain(store):
    with pytest.raises(ConfigError, match="north: has a ledger already"):
        store.open(SITE, terms())
    with pytest.raises(ConfigError, match="south: no such site; it holds north"):
        store.ledger("south")


WRONG = {
    "no delta": {"delta": 0.0},
    "delta above 1": {"delta": 2.0},
    "no cap": {"cap": 0.0},
    "cap below 0": {"cap": -1.0},
    "cap not a number": {"cap": float("nan")},
    "endless cap": {"cap": float("inf")},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_terms_open_no_chain(store, name):
    with pytest.raises(CoterieError):
        store.open("south", replace(terms(), **WRONG[name]))
    assert store.sites() == [SITE]
    with pytest.raises(ConfigError, match="no such site"):
        store.ledger("south")
    with pytest.raises(CoterieError):
        store.open("south", terms(), Commitment("no hash", frozenset({b"tag"})))
    assert store.read("SELECT * FROM seen") == []
    commit(store.open("south", terms()))


# Many chains.


def test_a_thousand_sites_reserve_in_one_transaction(tmp_path):
    path = tmp_path / "ledger"
    sites = [f"site {number:04}" for number in range(1000)]
    with Store.create(path) as store:
        with store.together():
            for site in sites:
                commit(store.open(site, terms()))
        with store.together() as connection:
            reserved = [store.ledger(site).reserve(RUN, 1, CHEAP) for site in sites]
            assert connection.in_transaction
        assert reserved == [3] * 1000
        before = chains(path)
        assert len(before) == 3000
        assert [site for site, seq, _ in before if seq == 3] == sites
        for site in sites[::97]:
            assert verified(store.ledger(site)).books.head.seq == 3
    with Store(path) as store:
        assert store.sites() == sites
        assert {state for site in sites for state in states(store.ledger(site))} == {"lost"}


def test_a_transaction_of_many_chains_is_whole_or_not_at_all(tmp_path):
    """Killed in the middle, no chain has a part of it."""
    path = tmp_path / "ledger"
    sites = ["a", "b", "c"]
    with Store.create(path) as store:
        for site in sites:
            commit(store.open(site, terms()))
    before = chains(path)

    def work():
        with Store(path) as store, store.together():
            for site in sites:
                store.ledger(site).reserve(RUN, 1, CHEAP)

    seen = set()
    for statement in range(100):
        killed = ended(forked(dying_at, statement, work))
        added = len(chains(path)) - len(before)
        assert added in (0, 3)
        seen.add(added)
        if added:
            break
    assert seen == {0, 3}
    assert killed in (0, -9)


def caller_fails(ledgers):
    raise CrashError


def refused(ledgers):
    ledgers[3].reserve("unknown", 1, CHEAP)


def disk_is_full(ledgers):
    connection = ledgers[0]._store._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    for round_number in range(2, 100):
        ledgers[0].reserve(RUN, round_number, CHEAP)


@pytest.mark.parametrize("fault", [caller_fails, refused, disk_is_full])
@pytest.mark.parametrize("first", [0, 1, 3], ids="{} done before".format)
def test_after_a_rollback_all_chains_and_ledgers_are_as_before(tmp_path, fault, first):
    path = tmp_path / "ledger"
    with Store.create(path) as store:
        ledgers = [store.open(f"site {number}", terms()) for number in range(5)]
        for ledger in ledgers:
            commit(ledger)
            take_one(ledger)
        before, heads = chains(path), [ledger.head for ledger in ledgers]

        def some_of_all():
            with store.together():
                for ledger in ledgers[:first]:
                    ledger.reserve(RUN, 2, CHEAP)
                fault(ledgers)

        with pytest.raises((CrashError, CoterieError, OSError)):
            some_of_all()
        store._connection.execute("PRAGMA max_page_count = 1000000")
        assert chains(path) == before
        assert [ledger.head for ledger in ledgers] == heads
        assert [states(ledger) for ledger in ledgers] == [["released"]] * 5
        assert ledgers[0].release(3) == content_of(3)
        for ledger in ledgers:
            take_one(ledger, round_number=next_round(ledger.books))
            verified(ledger)
    with Store(path) as store:
        assert len(chains(path)) == len(before) + 5 * 3


def test_a_chain_whose_opening_was_rolled_back_is_not_there(store):
    def open_and_fail():
        with store.together():
            commit(store.open("south", terms()))
            raise CrashError

    with pytest.raises(CrashError):
        open_and_fail()
    assert store.sites() == [SITE]
    with pytest.raises(ConfigError, match="no such site"):
        store.ledger("south")
    take_one(store.ledger(SITE))


def test_a_full_disk_ends_a_round_and_not_the_chain(store, ledger, path):
    """What could not be written is not remembered either."""
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    rounds = iter(range(1, 1000))

    def reserve_all():
        for round_number in rounds:
            ledger.reserve(RUN, round_number, CHEAP)

    with pytest.raises(OSError, match="No space left on device"):  # and no fault of SQLite's
        reserve_all()
    done = next(rounds) - 2
    store._connection.execute("PRAGMA max_page_count = 1000000")
    assert states(ledger) == ["reserved"] * done
    assert ledger.head.seq == len(chains(path))
    take_one(ledger, round_number=done + 1)
    verified(ledger)
    with Store(path) as other:
        assert other.ledger(SITE).head == ledger.head


def test_one_refusal_inside_a_transaction_may_be_passed_over(store, ledger):
    """Of many sites, those that can go on do."""
    commit(store.open("south", terms()))
    with store.together():
        with contextlib.suppress(VerificationError):
            ledger.reserve("unknown", 1, CHEAP)
        store.ledger("south").reserve(RUN, 1, CHEAP)
        ledger.reserve(RUN, 1, CHEAP)
    for site in (SITE, "south"):
        assert states(store.ledger(site)) == ["reserved"]
        verified(store.ledger(site))


def test_the_dataset_may_be_bound_anew_and_spending_goes_on(ledger):
    take_one(ledger)
    head = ledger.head
    ledger.bind(UNBOUND)
    assert ledger.head == head
    for _ in range(2):
        ledger.bind(Commitment("cd" * 32, frozenset()))
        assert ledger.head.seq == head.seq + 1
    take_one(ledger, round_number=2)
    assert verified(ledger).books.genesis["dataset_root"] == "cd" * 32
    assert states(ledger) == ["released"] * 2
