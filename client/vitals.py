"""How a node does, as its own operator may watch it: metrics, and whether it is well.

Nothing here was measured on records: what was asked and answered, how long that took, and what the
ledger was charged, which the log and `coterie ledger show` tell as well.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from threading import Lock
from time import time

from common import messages
from common.exposition import Family, Health, Sample, gpu_memory
from common.privacy.books import Books

CONNECTED = "node"
"""The service of `grpc.health.v1` that says whether the node is connected; "" is the process."""
ANSWERED = "answered"


@dataclass
class Vitals:
    """Counted by the node's main thread, read by whoever scrapes it."""

    site: str
    health: Health = field(default_factory=Health)
    connected: bool = False
    answers: Counter[str] = field(default_factory=Counter)
    """By outcome: answered, or why it was refused."""
    received: int = 0
    """Bytes of instructions."""
    sent: int = 0
    """Bytes of replies."""
    answered_at: float = 0.0
    """Seconds since 1970; 0 before the first answer."""
    answered_in: float = 0.0
    """Seconds that the last answer took."""
    _spent: tuple[float, float] | None = None
    """Epsilon that was spent, and the cap."""
    _turn: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.online(connected=False)

    def online(self, *, connected: bool) -> None:
        """Whether the coordinator has this node for one that is there."""
        self.connected = connected
        self.health.tell(CONNECTED, well=connected)

    def took(self, outcome: int | None, seconds: float) -> None:
        """An instruction is dealt with. Args: outcome: code of the refusal, if it was one."""
        with self._turn:
            name = ANSWERED if outcome is None else messages.REFUSALS.get(outcome, "unknown")
            self.answers[name] += 1
            self.answered_at, self.answered_in = time(), seconds

    def moved(self, *, received: int = 0, sent: int = 0) -> None:
        """Bytes went over the wire."""
        with self._turn:
            self.received += received
            self.sent += sent

    def priced(self, books: Books) -> None:
        """The ledger is at this end now."""
        self._spent = (books.spent(), books.cap)

    def families(self) -> Iterator[Family]:
        """What a scrape is told."""
        with self._turn:
            outcomes = tuple(
                Sample((name,), float(count))
                for name, count in sorted({ANSWERED: 0, **self.answers}.items())
            )
            moved, last = (self.received, self.sent), (self.answered_at, self.answered_in)
        version, flwr = metadata.version("coterie"), metadata.version("flwr")
        yield Family(
            "coterie_node_info",
            "Always 1: whose node this is, and of which versions.",
            ("site", "version", "flwr"),
            (Sample((self.site, version, flwr), 1.0),),
        )
        yield _one("coterie_node_connected", "1 while the coordinator answers.", self.connected)
        yield Family(
            "coterie_node_answers",
            "Instructions that were answered, or refused and why.",
            ("outcome",),
            outcomes,
            counts=True,
        )
        yield _one("coterie_node_received_bytes", "Of instructions.", moved[0], counts=True)
        yield _one("coterie_node_sent_bytes", "Of replies.", moved[1], counts=True)
        yield _one(
            "coterie_node_answered_timestamp_seconds", "When it last answered; 0: never.", last[0]
        )
        yield _one("coterie_node_answer_seconds", "How long the last answer took.", last[1])
        if self._spent is not None:
            spent, cap = self._spent
            yield _one("coterie_node_epsilon_spent", "Of this ledger, over all runs.", spent)
            yield _one("coterie_node_epsilon_cap", "Of this ledger.", cap)
            left = max(0.0, cap - spent)
            yield _one("coterie_node_epsilon_remaining", "Up to the cap of this ledger.", left)
        yield from gpu_memory()


def _one(name: str, text: str, value: float, *, counts: bool = False) -> Family:
    return Family(name, text, (), (Sample((), float(value)),), counts)
