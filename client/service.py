"""A node at work: one instruction after the other, until somebody stops it.

Only what is installed here runs: an instruction is data, the bundle that a coordinator submitted is
never fetched, and the records are those of the node's own settings. The order is a safety argument:

 1. the instruction is on this machine's disk before the SuperLink may forget it; where it may have
    been handed out and never came so far, this node is offline for a moment, and is asked again;
 2. policy, charge, training and preparation are `client.app`'s, the same as everywhere;
 3. the answer leaves, and only when it is with the SuperLink is the instruction forgotten;
 4. the officer's witness, if there is one, is told how far the ledger got; see `client.anchor`.

Whatever is killed in between goes on from the disk: see `client.inbox`.
"""

import hashlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import uniform
from time import monotonic, sleep, time
from types import FrameType
from typing import Any, TypeVar

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.anchor import Anchor
from client.app import client_app
from client.commitment import commit_to
from client.doubts import Doubts
from client.fleet import (
    Fleet,
    Handed,
    NotAdmittedError,
    NotReachedError,
    Parcel,
    RunOverError,
    UnreachableError,
    run_of,
)
from client.inbox import Inbox
from client.ledger import Ledger, Store
from client.looks import Looks
from client.settings import NodeSettings
from client.site import Site
from client.vitals import Vitals
from common import messages
from common.allocation import keep_freed_memory, trim_freed_memory
from common.certificates import Credentials, read_node_key
from common.config import ModelConfig, PrivacyMode
from common.data import Reading, check_files, load_splits
from common.device import device_of
from common.errors import ConfigError, CoterieError, FederationError, VerificationError
from common.exposition import health_at, metrics_at
from common.folding import folded, unfold
from common.intake import ReadsRows
from common.privacy.chain import Head
from common.privacy.mechanism import counting
from common.privacy.witness import opened
from common.records import Records
from common.tasks import TASKS, FileTask, reader_of

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)

BEAT_S, BEAT_AGAIN_S = 15.0, 3.0
"""From one sign of life to the next, and after one that was not heard. Flower waits 60 s."""
FIRST_DELAY_S, MAX_DELAY_S = 0.25, 20.0
"""Before a call is tried again: doubled each time, and drawn from its upper half."""
STAY_S = 2.0
"""How long a node stays online after an answer, and offline to be noticed: several times what a
coordinator waits between two looks."""
STOPPING = b"stopping once what is under way is answered; again to stop at once\n"

Result = TypeVar("Result")


def run_node(settings: NodeSettings) -> dict[str, Any]:
    """Answers until it is stopped; returns what `--json` prints.

    Raises: ConfigError where a setting, a file or the SuperLink does not fit, FederationError where
    nobody was there for `patience_s`, VerificationError where the ledger is not the one that a
    witness knows; nothing was answered then. KeyboardInterrupt where it was told twice to stop.
    """
    _configure_process(settings)
    device_of(settings.device, setting="device")  # one that is not there is said at once
    check_files(settings.data)
    key = read_node_key(Path(settings.key).expanduser())
    fleet = Fleet(settings.superlink, Path(settings.authority), key, own=own_credentials(settings))
    with ExitStack() as stack:
        health = stack.enter_context(health_at("health", settings.health))
        vitals = Vitals(settings.name, health)
        stack.enter_context(metrics_at("metrics", settings.metrics, vitals.families))
        inbox = Inbox(settings.inbox_path)
        stack.callback(inbox.close)
        ledger = _ledger(settings, stack)
        anchor = _anchor(settings, ledger, stack)
        stopping = stack.enter_context(_stopped_by_signals())
        line = Line(settings, stopping, vitals)
        stack.enter_context(_leaving(fleet))
        node_id = _join(fleet, line, inbox, fingerprint(settings, key))
        if node_id is None:  # stopped before it got there
            return _summary(settings, 0, 0, 0)
        stack.enter_context(_beating(fleet))
        site = open_site(settings, ledger)
        node = Node(settings, site, fleet, line, inbox, vitals=vitals, anchor=anchor)
        log.info(
            "%s: connected to %s as node %d; waiting for instructions",
            *(settings.name, settings.superlink, node_id),
        )
        node.serve()
    return _summary(settings, node_id, node.answered, node.refused)


def open_site(settings: NodeSettings, ledger: Ledger | None) -> Site:
    """The site of these settings: its records read, and bound to its ledger.

    Raises: ConfigError if the records are not as the settings say, or are another ledger's.
    """
    records = read_records(settings)
    if ledger is not None:
        unit = ledger.books.unit
        if unit == PrivacyMode.person.name and records.persons is None:
            raise ConfigError(
                "data.person_column='': must name the column of person ids; the unit of "
                f"{settings.ledger} is person"
            )
        ledger.bind(commit_to(records, ledger.store.secret, unit=unit))
    classes = tuple(settings.data.labels)
    return Site(settings.name, records, classes, ledger, settings.node)


def read_records(settings: NodeSettings) -> Records:
    """All records of these settings. Raises: ConfigError if they are not as the settings say."""
    task = TASKS[settings.task.name]
    read: Reading | None = task if isinstance(task, ReadsRows) else None
    if isinstance(task, FileTask):
        if not settings.reader:
            raise ConfigError(
                "reader='': must name the model, by its model.name, whose processor reads the "
                f"files of task={settings.task.name.name}"
            )
        model = ModelConfig(name=settings.reader, feature_scale=1.0)
        read = reader_of(settings.task.name, task.load_processor(model))
    splits = load_splits(settings.data, task.toy_examples, read)
    rows = read if isinstance(read, ReadsRows) else None
    for kind in splits.tally.told(rows):  # to the site's own operator, who may see records
        log.info("%s: data: rows: %s", settings.name, kind)
    return splits.train


class Line:
    """Calls that are tried again until somebody answers."""

    def __init__(
        self, settings: NodeSettings, stopping: threading.Event, vitals: Vitals | None = None
    ) -> None:
        self._vitals = vitals or Vitals(settings.name)
        self._name, self._patience_s = settings.name, settings.patience_s or float("inf")
        self.stopping = stopping

    def call(
        self,
        call: Callable[[], Result],
        *,
        until: float = float("inf"),
        passing: tuple[type[CoterieError], ...] = (UnreachableError,),
    ) -> Result:
        """What `call` returns, once it does not raise one of `passing`.

        Args: until: on the monotonic clock, when nobody waits for it any more.
        Raises: FederationError after `patience_s`; RunOverError after `until`; the passing error
        itself once this node is to stop.
        """
        since, delay, told = monotonic(), FIRST_DELAY_S, False
        while True:
            try:
                result = call()
            except passing as error:
                if self.stopping.is_set():
                    raise
                if monotonic() - since > self._patience_s:
                    raise FederationError(
                        f"{error}; gave up after {self._patience_s:g} s (patience_s)"
                    ) from error
                if monotonic() > until:
                    raise RunOverError("nobody waits for this answer any more") from error
                if not told:
                    self._vitals.online(connected=False)
                    log.warning("%s: %s; trying again until it is otherwise", self._name, error)
                told = True
                self.stopping.wait(_apart(delay))
                delay = min(2 * delay, MAX_DELAY_S)
            else:
                if told:
                    log.info(
                        "%s: the coordinator answers again, after %.0f s",
                        *(self._name, monotonic() - since),
                    )
                if not self._vitals.connected:
                    self._vitals.online(connected=True)
                return result


class Node:
    """One site's answers, over one line."""

    def __init__(
        self,
        settings: NodeSettings,
        site: Site,
        fleet: Fleet,
        line: Line,
        inbox: Inbox,
        *,
        vitals: Vitals | None = None,
        anchor: Anchor | None = None,
    ) -> None:
        self._vitals = vitals or Vitals(settings.name)
        self._site, self._fleet, self._line, self._inbox = site, fleet, line, inbox
        self._anchor = anchor
        self._looks, self._doubts = Looks(settings.poll_s), Doubts()
        self._app: ClientApp = client_app(
            lambda _: site,
            allow_unprotected=settings.allow_unprotected,
            device=device_of(settings.device, setting="device"),
        )
        self._foreseen: Head | None = None
        """The end of the ledger when what comes next was priced."""
        self.answered = self.refused = 0
        self._sent_at = -STAY_S
        """When the last answer left, on the monotonic clock."""

    def serve(self) -> None:
        """Answers what was left, and then what comes, until the node is to stop.

        Raises: FederationError where nobody was there for too long; VerificationError where a
        witness knows another ledger than this one.
        """
        self._answer_left_over()
        stopping = self._line.stopping
        while not stopping.is_set():
            try:
                parcel = self._receive()
            except NotAdmittedError as error:
                self._join_again(error)
            except UnreachableError:  # stopped while nobody was there
                return
            else:
                if parcel is None:
                    self._rest()
                else:
                    self._answer(parcel)
        self._stay()

    def _stay(self) -> None:
        """Until the coordinator has had the time to fetch the last answer: of a node that is gone
        Flower gives out none, and says that it is gone.
        """
        sleep(max(0.0, self._sent_at + STAY_S - monotonic()))

    def _rest(self) -> None:
        """While there is nothing to answer, what the next answer will say is priced, once."""
        if self._anchor is not None:
            self._anchor.keep_up()
        ledger = self._site.ledger
        if ledger is not None and ledger.head != self._foreseen:
            self._vitals.priced(ledger.books)
            ledger.books.foresee()
            self._foreseen = ledger.head
            trim_freed_memory()  # prices have sizes of their own, and leave gaps: more every round
        self._line.stopping.wait(self._looks.rest_s())

    def _receive(self) -> Parcel | None:
        """The next instruction, on disk here when this returns; None if there is none."""
        got = self._line.call(self._look)
        if got is None:
            return None
        self._looks.came()
        self._doubts.settled()
        envelope, tree = got
        run = run_of(envelope)
        try:
            parcel = self._line.call(lambda: self._fleet.fetch(run, envelope, tree))
            # 1. On disk before the SuperLink may forget it.
            try:
                self._inbox.put(parcel)
            except OSError as error:
                self._refuse_unkept(parcel, error)
                return None
            self._vitals.moved(received=sum(map(len, parcel.parts.values())))
            self._line.call(lambda: self._fleet.confirm(run, parcel.root))
        except (RunOverError, VerificationError) as error:
            self._inbox.clear()
            log.warning("%s: run %d: an instruction was lost: %s", self._site.name, run, error)
            return None
        return parcel

    def _look(self) -> Handed | None:
        """What the SuperLink hands out; where it may have handed out something before that never
        came here, the coordinator is let know.
        """
        unsure = self._inbox.unsure
        self._inbox.asking()
        try:
            got = self._fleet.receive()
        except (NotReachedError, NotAdmittedError):
            if not unsure:
                self._inbox.heard()  # nothing was handed out
            raise
        # A coordinator has one instruction at a time here: what comes now is what was missed.
        if got is None and not (unsure and self._doubts.remain(self._let_know)):
            self._inbox.heard()
        return got

    def _let_know(self) -> None:
        """Flower answers the coordinator for a node that is away: that there will be no answer."""
        log.warning(
            "%s: an instruction may have been lost on its way here; offline for %g s, so that the "
            "coordinator asks again",
            *(self._site.name, STAY_S),
        )
        self._fleet.step_away(lambda: self._line.stopping.wait(STAY_S))

    def _refuse_unkept(self, parcel: Parcel, error: OSError) -> None:
        """No disk, no charge, no answer: the coordinator asks again, where a spare round pays."""
        addressed = parcel.addressed()
        log.error(
            "%s: %s: cannot be kept in %s: %s",
            *(self._site.name, _what(addressed), self._inbox.folder, error.strerror),
        )
        reply = _dated(_refusal(messages.LOCAL_FAILURE, addressed), addressed)
        self._sent(reply, until=monotonic() + _expires_in(addressed))
        self._inbox.heard()
        self._looks.answered()

    def _answer_left_over(self) -> None:
        """What an earlier process had received, and did not get to answer."""
        try:
            parcel = self._inbox.waiting()
        except VerificationError as error:
            log.warning("%s: %s; it is forgotten", self._site.name, error)
            self._inbox.clear()
            return
        if parcel is None:
            return
        run = run_of(parcel.envelope)
        try:
            self._line.call(lambda: self._fleet.check_running(run))
        except RunOverError as error:
            log.info("%s: run %d: what was left is forgotten: %s", self._site.name, run, error)
            self._inbox.clear()
        except (UnreachableError, NotAdmittedError):  # stopped meanwhile; or `serve` hears the same
            return
        else:
            log.info("%s: run %d: going on with what was not answered", self._site.name, run)
            self._answer(parcel, left_over=True)

    def _answer(self, parcel: Parcel, *, left_over: bool = False) -> None:
        started, addressed = monotonic(), parcel.addressed()
        if left_over and _expires_in(addressed) <= 0:
            log.info("%s: nobody waits for what was not answered", self._site.name)
            self._inbox.clear()
            return
        # 2. The same as everywhere.
        reply = _dated(self._reply(parcel, addressed, left_over=left_over), addressed)
        # 3. Forgotten only when the answer is there.
        outcome = self._sent(reply, until=started + _expires_in(addressed))
        if outcome is None:
            return
        self._sent_at = monotonic()
        self._looks.answered()
        seconds = self._sent_at - started
        self._vitals.took(reply.error.code if reply.has_error() else None, seconds)
        log.info("%s: %s: %s, %.1f s", self._site.name, _what(addressed), outcome, seconds)
        self._inbox.clear()
        # 4. The witness hears of it when nobody waits for it any more.
        if self._anchor is not None:
            self._anchor.keep_up()

    def _reply(self, parcel: Parcel, addressed: Message, *, left_over: bool) -> Message:
        try:
            message = parcel.message()
        except VerificationError as error:
            log.warning("%s: %s", self._site.name, error)
            return _refusal(messages.INVALID_INSTRUCTION, addressed)
        came_folded = unfold(message)
        reply = self._reply_to(message, addressed, left_over=left_over)
        if came_folded and reply.has_content():  # to whom understands it
            reply.content = folded(reply.content)
        return reply

    def _reply_to(self, message: Message, addressed: Message, *, left_over: bool) -> Message:
        try:
            lost = self._was_lost(message)
        except OSError as error:  # nothing can be charged then, and nothing is begun
            log.warning("%s: its ledger cannot be written: %s", self._site.name, error.strerror)
            return _refusal(messages.LOCAL_FAILURE, addressed)
        if lost and left_over:
            # The coordinator counts attempts: it asks again, if a spare round pays for it.
            log.warning("%s: %s: was charged, and is lost", self._site.name, _what(addressed))
            return _refusal(messages.LOCAL_FAILURE, addressed)
        context = Context(
            run_id=message.metadata.run_id,
            node_id=self._fleet.node_id,
            node_config={},
            state=RecordDict(),
            run_config={},
        )
        try:
            return self._app(message, context)
        except Exception:  # of a kind that the ClientApp does not answer: nothing has run
            log.warning("%s: a message of a kind that no site answers", self._site.name)
            return _refusal(messages.INVALID_INSTRUCTION, addressed)

    def _was_lost(self, message: Message) -> bool:
        """Whether the last attempt at what is asked ended before it was prepared.

        Also declares such an attempt lost, where it did not come to that: on a full disk, or where
        another program had the ledger open when this node was started.
        """
        ledger = self._site.ledger
        try:
            asked = messages.read_instruction(message)
        except CoterieError:
            return False
        if ledger is None:
            return False
        # The inbox is this process's alone: nobody else can be at work on that run here.
        if ledger.books.open_reservations("reserved"):
            ledger.lose_unfinished(asked.run_id, counting(asked.run_id))
        counts = message.metadata.message_type.startswith("evaluate")
        key = (counting(asked.run_id), 1) if counts else (asked.run_id, asked.round)
        books = ledger.books
        attempts = books.attempts.get(key, [])
        return bool(attempts) and books.reservations[attempts[-1]].state == "lost"

    def _sent(self, reply: Message, *, until: float) -> str | None:
        """What became of a reply, in words; None if it is to be sent when the node is back."""
        error = reply.error.code if reply.has_error() else None
        try:
            self._line.call(lambda: self._send(reply), until=until)
        except UnreachableError as unreachable:  # stopped meanwhile
            log.warning("%s: %s; kept for the next start", self._site.name, unreachable)
            return None
        except (RunOverError, NotAdmittedError) as over:
            return f"not sent: {over}"
        if error is None:
            self.answered += 1
            return "answered"
        self.refused += 1
        return f"refused: {messages.REFUSALS.get(error, 'for no known reason')}"

    def _send(self, reply: Message) -> None:
        name = reply.object_id
        begun = self._inbox.session(name)

        def began(session: str) -> None:
            with suppress(OSError):  # a full disk costs no more than the time to send it again
                self._inbox.sending(name, session)

        self._vitals.moved(sent=self._fleet.send(reply, begun, began) or 0)

    def _join_again(self, error: NotAdmittedError) -> None:
        """The coordinator let this node in before: what is wrong with it now may pass."""
        log.warning("%s: %s; trying again until it is otherwise", self._site.name, error)
        self._vitals.online(connected=False)
        self._line.stopping.wait(FIRST_DELAY_S)
        try:
            self._line.call(
                lambda: self._fleet.join(self._fleet.node_id),
                passing=(UnreachableError, NotAdmittedError),
            )
        except (UnreachableError, NotAdmittedError):  # stopped meanwhile
            return


def _join(fleet: Fleet, line: Line, inbox: Inbox, fingerprint: str) -> int | None:
    """Comes online; its node id, or None if it is to stop meanwhile. Raises: NotAdmittedError."""
    known = inbox.identity(fingerprint)
    try:
        line.call(lambda: fleet.join(known))
    except UnreachableError:
        return None
    if fleet.node_id != known:
        inbox.remember(fingerprint, fleet.node_id)
    return fleet.node_id


def own_credentials(settings: NodeSettings) -> Credentials | None:
    """What this node shows at a door."""
    if not settings.certificate:
        return None
    return Credentials(Path(settings.certificate), Path(settings.certificate_key))


def fingerprint(settings: NodeSettings, key: ec.EllipticCurvePrivateKey) -> str:
    """Of a key at an address: a node id is of both."""
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(public + settings.superlink.encode()).hexdigest()


def _ledger(settings: NodeSettings, stack: ExitStack) -> Ledger | None:
    """The site's own books. Raises: ConfigError if there are none of that name."""
    if not settings.ledger:
        return None
    path, site = settings.books
    return stack.enter_context(Store(path)).ledger(site)


def _anchor(settings: NodeSettings, ledger: Ledger | None, stack: ExitStack) -> Anchor | None:
    """What ties the ledger to the officer's witness, which has been asked once when this returns.

    Raises: VerificationError if that witness knows another ledger than this one.
    """
    if not settings.witness or ledger is None:
        return None
    folder = Path(settings.witness_pass).expanduser()
    line = stack.enter_context(opened(settings.witness, folder, patient=False))
    anchor = Anchor(line, ledger, settings.witness_id)
    anchor.begin()
    return anchor


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """Set by the first SIGTERM or SIGINT; the second raises KeyboardInterrupt where the main thread
    is, as if the machine had stopped there.
    """
    stopping = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt("stopped at once; start the node again to go on")
        stopping.set()
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, STOPPING)

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _beating(fleet: Fleet) -> Iterator[None]:
    """Says that this node is alive, whatever else it does; the main thread hears of any fault."""
    ending = threading.Event()

    def beat() -> None:
        delay = BEAT_S
        while not ending.wait(delay):
            try:
                fleet.beat()
                delay = BEAT_S
            except CoterieError:
                delay = BEAT_AGAIN_S

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()


@contextmanager
def _leaving(fleet: Fleet) -> Iterator[None]:
    """Goes offline at the end, unless somebody cannot wait for that."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        fleet.leave()
        raise
    fleet.leave()


def _apart(delay: float) -> float:
    """Some of it: nodes that lost one coordinator should not all come back at once."""
    return uniform(delay / 2, delay)  # noqa: S311 - nobody gains by foreseeing it


def _refusal(code: int, message: Message) -> Message:
    return Message(Error(code, messages.REFUSALS[code]), reply_to=message)


def _dated(reply: Message, instruction: Message) -> Message:
    """The reply under the instruction's own date: made again, it is the same message, of which the
    SuperLink takes what it has not got yet; and it tells nothing of this machine's clock.
    """
    reply.metadata.created_at = instruction.metadata.created_at
    reply.metadata.ttl = instruction.metadata.ttl
    return reply


def _expires_in(message: Message) -> float:
    """Seconds until nobody waits for an answer."""
    facts = message.metadata
    return float(facts.created_at + facts.ttl - time())


def _what(message: Message) -> str:
    """Which instruction that is; a stranger's words are not repeated."""
    facts = message.metadata
    number = facts.group_id if facts.group_id.isascii() and facts.group_id.isdigit() else "?"
    kind = "a count" if facts.message_type.startswith("evaluate") else f"round {number[:9]}"
    return f"run {facts.run_id}, {kind}"


def _summary(settings: NodeSettings, node_id: int, answered: int, refused: int) -> dict[str, Any]:
    return {"site": settings.name, "node": node_id, "answered": answered, "refused": refused}


def _configure_process(settings: NodeSettings) -> None:
    """Memory and threads; and what must be said at the start."""
    keep_freed_memory()
    torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
    if settings.allow_unprotected:
        log.warning(
            "%s: NOT PRIVATE: allow_unprotected=true, so this node also answers instructions that "
            "protect nothing",
            settings.name,
        )
