"""Faults: sites that drop out, come late, die, or send what they should not, by configuration.

Coordinator and site are the real ones. What is on the way is done by a Grid around the real one;
what happens inside a site, by a ledger around the real one, in whatever process holds the site.
Which round of which site is hit follows from the configuration alone, so that any process can tell.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from flwr.app import Context, Error, Message, MessageType, Metadata, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from client.ledger import Ledger
from client.site import Site
from common import messages
from common.config import Config, FaultsConfig, PrivacyMode, share_of
from common.messages import Update
from common.parameters import MAX_MAGNITUDE, Vector
from common.privacy.mechanism import is_counting
from server.record import RoundLine
from server.wire import GridAround

CRASHES = ("crash", "crash_prepared")
DROPOUT, LATE = "dropout", "straggler"
GONE = (DROPOUT, *CRASHES)
"""Faults of sites of which it does not matter how slow they are."""
UNHEARD = ErrorCode.REPLY_MESSAGE_UNAVAILABLE
"""What Flower itself answers for a node whose reply never came."""


class InjectedCrashError(Exception):
    """A site dies, on purpose."""


def fault_of(faults: FaultsConfig, number: int, site: str) -> str:
    """The fault that hits a site in a round, or "".

    Guarantee: a function of `faults`, of the round and of the site's name; a higher rate hits
    whatever a lower one does.
    """
    if not faults.sites or site in faults.sites:
        for kind, rate in faults.rates.items():
            if rate and _coin(faults.seed, kind, number, site) < rate:
                return kind
    return ""


def _coin(*labels: int | str) -> float:
    """Uniform in [0, 1), the same for the same labels."""
    text = "\x1f".join(map(str, labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


class Clock:
    """The simulated clock of a run: what its sites' rounds would take, which nobody waits for."""

    def __init__(self, config: Config) -> None:
        self._faults, self._enough = config.faults, config.federation.enough
        self._places = {name: at for at, name in enumerate(config.federation.site_names)}
        self.deadline_s = config.faults.deadline_s or config.federation.round_timeout_s

    def site_s(self, number: int, site: str) -> float:
        """Seconds until a site has answered, by its speed and the fault that hits it."""
        speeds = self._faults.speeds or [1.0]
        speed = speeds[self._places.get(site, 0) % len(speeds)]
        late = fault_of(self._faults, number, site) == LATE
        return self._faults.round_s / speed * (self._faults.slowdown if late else 1.0)

    def fault_of(self, number: int, site: str) -> str:
        """The fault of a site in a round, or "": a slow one may be late without being hit."""
        kind = fault_of(self._faults, number, site)
        return LATE if kind not in GONE and self.is_late(number, site) else kind

    def is_late(self, number: int, site: str) -> bool:
        """Whether the coordinator has gone on by the time that the site has answered."""
        return self.site_s(number, site) > self.deadline_s

    def round_s(self, line: RoundLine) -> float:
        """Seconds of a whole round: until enough updates, until the last answer, or the deadline if
        one is missing.
        """
        asked, enough = Counter(line.asked), self._enough
        took = {site: self.site_s(line.round, site) * attempts for site, attempts in asked.items()}
        accepted = [seconds for site, seconds in took.items() if site not in line.refused]
        if enough < 1 and len(accepted) >= share_of(len(asked), enough):
            return min(max(accepted), self.deadline_s)
        missing = any(fault_of(self._faults, line.round, site) == DROPOUT for site in asked)
        slowest = max(took.values(), default=0.0)
        return self.deadline_s if missing else min(slowest, self.deadline_s)


class FaultyGrid(GridAround):
    """A Grid on which faults happen to training instructions and their replies.

    Guarantee: every pushed message is answered as on the grid inside; where a fault or the
    simulated deadline hides a reply, by Flower's error for one that never came. A repeated
    attempt at a round is never hit.
    """

    def __init__(self, grid: Grid, config: Config) -> None:
        super().__init__(grid)
        self._faults, self._clock = config.faults, Clock(config)
        self._without_books = config.privacy.mode is PrivacyMode.none
        self._names = {node.node_id: node.name for node in grid.get_nodes()}
        self._seen: set[tuple[int, int]] = set()
        self._kinds: dict[str, tuple[str, Message]] = {}
        """The fault that waits for the reply to a message, and the message."""
        self._ready: dict[str, Message] = {}
        self._lenders: dict[str, str] = {}
        """By the id of a message, that of whose reply is to be sent in its place."""
        self._held: dict[str, Message] = {}
        self._lent: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queues messages; those that never reach their site are answered at once."""
        outgoing = list(messages)
        kinds = [self._kind(message) for message in outgoing]
        lost = [self._is_lost(kind) for kind in kinds]
        went = iter(
            self._grid.push_messages(m for m, gone in zip(outgoing, lost, strict=True) if not gone)
        )
        ids = []
        for message, kind, gone in zip(outgoing, kinds, lost, strict=True):
            identity = self._unanswered(message, kind) if gone else next(went)
            if kind and not gone and identity:
                self._kinds[identity] = kind, message
            ids.append(identity)
        self._lend(outgoing, ids)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that have come, as the faults left them."""
        wanted = set(message_ids)
        ready = [self._ready.pop(identity) for identity in sorted(wanted & set(self._ready))]
        if ready:
            return ready
        for reply in self._grid.pull_messages(sorted(wanted - set(self._held))):
            ready += self._befallen(reply)
        return ready

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """As on the grid inside: nothing befalls what is sent this way."""
        return list(self._grid.send_and_receive(messages, timeout=timeout))

    def _kind(self, message: Message) -> str:
        """The fault of a training instruction, in the first attempt at its round."""
        node, group = message.metadata.dst_node_id, message.metadata.group_id
        if message.metadata.message_type != MessageType.TRAIN or not group.isdigit():
            return ""
        attempt = int(group), node
        if attempt in self._seen:
            return ""
        self._seen.add(attempt)
        site = self._names[node]
        kind = self._clock.fault_of(int(group), site)
        in_time = kind == LATE and not self._clock.is_late(int(group), site)
        return "" if in_time else kind

    def _is_lost(self, kind: str) -> bool:
        """Whether the site never sees the message; without books it cannot die in the middle."""
        return kind == DROPOUT or (self._without_books and kind in CRASHES)

    def _unanswered(self, message: Message, kind: str) -> str:
        identity = f"lost-{len(self._seen)}"
        code = UNHEARD if kind == DROPOUT else int(messages.LOCAL_FAILURE)
        known = message.metadata
        metadata = Metadata(
            run_id=known.run_id,
            message_id="",
            src_node_id=known.dst_node_id,
            dst_node_id=known.src_node_id,
            reply_to_message_id=identity,
            group_id=known.group_id,
            created_at=known.created_at,
            ttl=known.ttl,
            message_type=known.message_type,
        )
        self._ready[identity] = _message(metadata, error=Error(code, kind))
        return identity

    def _lend(self, outgoing: Sequence[Message], ids: Sequence[str]) -> None:
        """Says whose reply stands for whose: that of the next node asked with it."""
        order = sorted(
            (message.metadata.dst_node_id, identity)
            for message, identity in zip(outgoing, ids, strict=True)
            if identity and identity not in self._ready
        )
        for at, (_, identity) in enumerate(order):
            if self._kinds.get(identity, ("",))[0] == "other_site":
                self._lenders[identity] = order[(at + 1) % len(order)][1]

    def _befallen(self, reply: Message) -> list[Message]:
        """What the coordinator hears when this reply comes."""
        identity = reply.metadata.reply_to_message_id
        kind, sent = self._kinds.pop(identity, ("", reply))
        if identity in self._lenders.values():
            self._lent[identity] = reply
        if kind == "other_site":
            self._held[identity] = reply
            heard = []
        elif kind == LATE:
            heard = [_unheard(reply)]
        elif kind in ALTERED and not reply.has_error():
            heard = [_altered(reply, sent, kind, self._faults)]
        else:
            heard = [reply]
        return heard + [self._exchanged(held) for held in self._exchangeable()]

    def _exchangeable(self) -> list[str]:
        """Held replies of which it is known now what stands in their place."""
        return [held for held in self._held if self._lenders[held] in self._lent]

    def _exchanged(self, identity: str) -> Message:
        own, lender = self._held.pop(identity), self._lenders.pop(identity)
        other = self._lent[lender]
        if lender not in self._lenders.values():
            del self._lent[lender]
        if other.has_error() or other is own:
            return _unheard(own)
        return _message(own.metadata, content=other.content)


def _unheard(reply: Message) -> Message:
    return _message(reply.metadata, error=Error(UNHEARD, "no reply"))


def _message(
    metadata: Metadata, *, content: RecordDict | None = None, error: Error | None = None
) -> Message:
    """A message with this metadata."""
    made: Message = Message(  # type: ignore[call-overload] # Flower types the public forms only
        **({"error": error} if content is None else {"content": content}), metadata=metadata
    )
    return made


def _altered(reply: Message, sent: Message, kind: str, faults: FaultsConfig) -> Message:
    update = messages.read_update(reply)
    start = messages.unpack_arrays(sent.content.array_records[messages.VECTOR])
    changed = ALTERED[kind](update, start, faults)
    return _message(reply.metadata, content=messages.pack_update(changed))


Alteration = Callable[[Update, Vector, FaultsConfig], Update]
"""From an update, the parameters it started from, and the settings, what is sent instead."""


def _moved(update: Update, start: Vector, factor: float) -> Update:
    """As far as is accepted: an adversary would not be found out by a size."""
    away = start + np.float32(factor) * (update.vector - start)
    return replace(update, vector=np.clip(away, -MAX_MAGNITUDE, MAX_MAGNITUDE))


def _with_value(update: Update, value: float) -> Update:
    vector = update.vector.copy()
    vector[:1] = value
    return replace(update, vector=vector)


def _extreme(update: Update, start: Vector, _: FaultsConfig) -> Update:
    away = np.where(update.vector < start, MAX_MAGNITUDE, -MAX_MAGNITUDE)
    return replace(update, vector=away.astype(np.float32))


ALTERED: dict[str, Alteration] = {
    "not_finite": lambda update, _, __: _with_value(update, np.nan),
    "wrong_length": lambda update, _, __: replace(update, vector=update.vector[:-1]),
    "wrong_layout": lambda update, _, __: replace(
        update, layout_digest=hashlib.sha256(update.layout_digest.encode()).hexdigest()
    ),
    "oversized": lambda update, _, __: _with_value(update, 2 * MAX_MAGNITUDE),
    "other_round": lambda update, _, __: replace(update, round=update.round - 1),
    "extreme": _extreme,
    "flipped": lambda update, start, _: _moved(update, start, -1.0),
    "scaled": lambda update, start, faults: _moved(update, start, faults.scale),
}
"""What a fault makes of an update on its way."""


class DyingLedger:
    """A site's ledger, and the two moments at which the site may die; all else is the ledger's.

    It stands where the site's process is, and needs to remember nothing: the first attempt at a
    round is told from later ones by the books.
    """

    def __init__(self, ledger: Ledger, faults: FaultsConfig) -> None:
        self._ledger, self._faults, self._prepared = ledger, faults, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    def prepare(self, reservation: int, content: bytes, *, steps: int) -> None:
        """Raises: InjectedCrashError before anything is prepared, where the round is hit."""
        kind = self._fault(reservation)
        if kind == "crash":
            raise InjectedCrashError("a site dies before its update is prepared")
        self._ledger.prepare(reservation, content, steps=steps)
        if kind == "crash_prepared":
            self._prepared = reservation

    def release(self, reservation: int) -> bytes:
        """Raises: InjectedCrashError, once, where the site dies after it has prepared."""
        if reservation == self._prepared:
            self._prepared = -1
            raise InjectedCrashError("a site dies after its update is prepared")
        return self._ledger.release(reservation)

    def _fault(self, reservation: int) -> str:
        books = self._ledger.books
        attempt = books.reservations[reservation]
        again = len(books.attempts[attempt.run, attempt.round]) > 1
        if again or is_counting(attempt.run):
            return ""
        return fault_of(self._faults, attempt.round, self._ledger.site)


class FaultySites:
    """What `client_app` opens a site with, where sites may die; plain values, in any process."""

    def __init__(self, open_site: Callable[[Context], Site], faults: FaultsConfig) -> None:
        self._open, self._faults = open_site, faults
        logging.getLogger("client.egress").addFilter(_is_no_injected_crash)

    def __call__(self, context: Context) -> Site:
        """The site, with a ledger that may die."""
        site = self._open(context)
        if site.ledger is None or not may_crash(self._faults):
            return site
        return replace(site, ledger=cast("Ledger", DyingLedger(site.ledger, self._faults)))


def may_crash(faults: FaultsConfig) -> bool:
    """Whether sites may die: each is then answered for by itself."""
    return any(faults.rates[kind] for kind in CRASHES)


def _is_no_injected_crash(record: logging.LogRecord) -> bool:
    """A traceback of what was asked for would hide those that were not; the report has them."""
    error = record.exc_info[1] if record.exc_info else None
    while error is not None:
        if isinstance(error, InjectedCrashError):
            return False
        error = error.__cause__
    return True


def faults_section(config: Config, lines: Iterable[RoundLine]) -> dict[str, Any]:
    """The section `faults` of a report: what hit whom, what became of it, and the clock.

    `outcome` is `accepted`, `repeated` (accepted in a later attempt), or the reason why the round
    had no update of the site.
    """
    rows, clock = [*lines], Clock(config)
    hits = [
        {"round": line.round, "site": site, "fault": kind, "outcome": _outcome(line, site)}
        for line in rows
        for site in dict.fromkeys(line.asked)
        if (kind := clock.fault_of(line.round, site))
    ]
    return {
        "seed": config.faults.seed,
        "injected": hits,
        "counts": dict(sorted(Counter(str(hit["fault"]) for hit in hits).items())),
        "clock_s": round(sum(clock.round_s(line) for line in rows), 3),
        "deadline_s": clock.deadline_s,
    }


def _outcome(line: RoundLine, site: str) -> str:
    if site in line.refused:
        return line.refused[site]
    return "repeated" if line.asked.count(site) > 1 else "accepted"
