"""Processes that work on a ledger until somebody kills them: forked from a warm parent."""

import hashlib
import os
import signal
import sqlite3
import time
import traceback

from client.ledger import Store, Terms
from common.errors import CoterieError
from common.privacy.accounting import Event

SITE, RUN, DELTA = "north", "run", 1e-5
CHEAP = Event(50.0, 0.01, 2)
"""What a round of the worker costs."""
HASH = "ab" * 32
LIMIT_S = 60
"""A forgotten worker ends by itself."""


def terms(cap=3.0, unit="record"):
    return Terms("letters", cap, DELTA, HASH, unit)


def commit(ledger, run=RUN, event=CHEAP, *, rounds=1000, spare_rounds=1000, unit="record"):
    ledger.commit(
        run,
        event,
        rounds=rounds,
        spare_rounds=spare_rounds,
        plan=HASH,
        model="tiny",
        unit=unit,
    )


def content_of(reservation):
    """The update of a reservation, so that anybody can tell what it must be."""
    return f"update {reservation} ".encode() * 50


def digest_of(reservation):
    return hashlib.sha256(content_of(reservation)).hexdigest()


def note(path, line):
    """One more line of a file, on the platter."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(handle, f"{line}\n".encode())
    os.fsync(handle)
    os.close(handle)


def notes(path):
    return path.read_text().split("\n")[:-1] if path.exists() else []


def forked(work, *arguments):
    """Runs `work` in a child; its exit status is 0, or that of the error. Returns: its id."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        signal.alarm(LIMIT_S)
        work(*arguments)
        status = 0
    except CoterieError as error:
        status = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child):
    """Waits. Returns: the exit status of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(child):
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL, "it had ended before"


def next_round(books):
    """The first round that nobody answered; a lost one is tried again."""
    if not books.reservations:
        return 1
    last = list(books.reservations.values())[-1]
    return last.round + (last.state != "lost")


def take_rounds(path, *, rounds, reached=lambda step: None, training_s=0.001):
    """Opens the store at `path` and takes rounds, as a site does. Notes what it did beside it.

    Args: reached: told each step once it is done.
    """
    touched, sent = path.parent / "touched", path.parent / "sent"
    with Store(path) as store:
        ledger = store.ledger(SITE)
        reached("opened")

        def send(reservation):
            released = ledger.release(reservation)
            reached("released")
            note(sent, f"{reservation} {hashlib.sha256(released).hexdigest()}")
            reached("sent")

        for reservation in ledger.books.open_reservations("prepared"):
            send(reservation)
        for _ in range(rounds):
            reservation = ledger.reserve(RUN, next_round(ledger.books), CHEAP)
            reached("reserved")
            note(touched, reservation)
            time.sleep(training_s)
            reached("touched")
            ledger.prepare(reservation, content_of(reservation), steps=CHEAP.steps)
            reached("prepared")
            send(reservation)


def take_rounds_until_killed(path, ready):
    def reached(step):
        if step == "opened":
            os.write(ready, b".")

    take_rounds(path, rounds=10**6, reached=reached)


def take_a_round_up_to(last, path, ready):
    """Stands still after the step `last`, until it is killed."""

    def reached(step):
        if step == last:
            os.write(ready, b".")
            time.sleep(LIMIT_S)

    take_rounds(path, rounds=1, reached=reached)


def dying_at(statement, work, *arguments):
    """Does `work`, but is killed as its `statement`-th SQL statement begins. The first is 0."""
    left, connect = statement, sqlite3.connect

    def trace(_sql):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def traced(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(trace)
        return connection

    sqlite3.connect = traced  # in this child only
    work(*arguments)


def race(contestants, *, warm):
    """Runs functions of no argument in processes of their own, all at once.

    Args: contestants: functions that yield once, ready to go; warm: start once all are ready.
    Returns: their exit statuses.
    """
    ready, is_ready = os.pipe()
    gun, trigger = os.pipe()

    def run(contestant):
        os.close(trigger)
        ready_to_go = contestant()
        if warm:
            next(ready_to_go)
        os.write(is_ready, b".")
        os.read(gun, 1)  # until nobody holds the trigger
        for _ in ready_to_go:
            pass

    children = [forked(run, contestant) for contestant in contestants]
    os.close(is_ready)
    for _ in children:
        os.read(ready, 1)
    os.close(trigger)
    statuses = [ended(child) for child in children]
    os.close(ready)
    os.close(gun)
    return statuses
