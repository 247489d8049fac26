"""What travels: the only module that spells record keys.

Downwards an `Instruction`, upwards an `Update`; everything else is refused on arrival. An
update carries released tensors, a public constant weight, ids and the charge, and nothing
that was measured on private records.
"""

import math
from collections.abc import Set
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import SType
from numpy.typing import NDArray

from common.coding import decoded
from common.config import Coding, Config, config_hash, from_canonical, to_canonical
from common.errors import ConfigError, VerificationError
from common.frames import FLOAT_BYTES, frame_of, header_of
from common.parameters import Vector
from common.privacy.accounting import Event
from common.privacy.chain import LINK_BYTES, MIN_RATE, Head, Receipt

VECTOR, FACTS, WEIGHT = "vector", "facts", "weight"
RECEIPT = ("receipt-head", "receipt-key", "receipt-signature")
BOOKS = ("ledger-head", "links", "cap", "spent", "charged")
UPDATE_FACTS = frozenset(
    {"run-id", "round", "layout-digest", "noise-multiplier", "sample-rate", "steps", *BOOKS}
)
"""All that leaves a site beside the vector."""
COUNT_FACTS = frozenset({"run-id", "correct", *BOOKS})
"""All that leaves a site when it counts."""
MAX_VECTOR_BYTES = 2**31 - 1
"""Larger payloads do not fit a protobuf frame, so no honest peer sends them."""
MAX_STEPS = 10**9
"""Of one event of a charged history: what accountants can price."""
MAX_CHARGED = 3 * 1000
"""Numbers of a charged history: three for each distinct event. Pricing one takes a tenth of a
second."""
MAX_COUNT = 2.0**53
"""Of a noisy count, either way: far above any, and sums of such stay finite."""
MAX_LINKS = 100_000
"""Entries a ledger may have grown by since its last receipt."""

CODED_KIND = "|u1"
"""Numpy's name of what coded parameters travel as: bytes."""
NOBODY = 0
"""Addressee of what a coordinator hands to a strategy, and never sends."""
Wide = NDArray[np.float64]
"""(P,) float64: a vector that is compared with others more exactly than it travels."""

INVALID_INSTRUCTION, BUDGET_EXHAUSTED, LOCAL_FAILURE, AGAINST_POLICY = 601, 602, 603, 604
BOOKS_BEHIND, NO_SPARE_ROUND = 605, 606
REFUSALS = {
    INVALID_INSTRUCTION: "invalid instruction",
    BUDGET_EXHAUSTED: "budget exhausted",
    LOCAL_FAILURE: "local failure",
    AGAINST_POLICY: "against the site's policy",
    BOOKS_BEHIND: "the site's ledger is an older copy, or a fork, of the one this coordinator knew",
    NO_SPARE_ROUND: "the round was lost at the site, and its plan has no spare round left",
}
"""Every reason a site gives for not answering. Fixed texts: exception texts never leave."""


@dataclass(frozen=True)
class Instruction:
    """What the coordinator asks of a site in one round."""

    run_id: str
    round: int
    """1-based."""
    config: Config
    layout_digest: str
    vector: Vector
    """The global parameters."""
    receipt: Receipt | None = None
    """The last head of this site's ledger that the coordinator has seen, under its signature."""


@dataclass(frozen=True)
class SiteBooks:
    """What a site says of its ledger: enough to price its whole history again."""

    head: Head
    """The end of its chain, after this release."""
    cap: float
    """Epsilon it will not exceed, at its ledger's delta."""
    spent: float
    """Epsilon of what was charged, by whichever accountant its ledger may use."""
    charged: tuple[Event, ...]
    """Everything ever charged to its records, equal events joined."""
    links: bytes = b""
    """Content digests of the entries between the instruction's receipt and `head`; see
    `chain.continued`. Empty without a receipt."""


@dataclass(frozen=True)
class Update:
    """What a site releases in one round."""

    run_id: str
    round: int
    layout_digest: str
    charge: Event
    """What the round cost at the site, charged before its data were touched."""
    vector: Vector
    """Parameters after the private steps: a function of noisy sums only."""
    books: SiteBooks | None = None
    """None where nothing is protected, and so nothing charged."""
    coded: bytes | None = None
    """What travels in the place of `vector`, which is what it decodes to; see `common.coding`."""


@dataclass(frozen=True)
class Count:
    """What a site releases of its own records, once, after the last round."""

    run_id: str
    correct: float
    """Records that the final model classifies correctly, plus the noise that was charged."""
    books: SiteBooks


def pack_instruction(instruction: Instruction) -> RecordDict:
    """The message content of an instruction."""
    facts = ConfigRecord(
        {
            "run-id": instruction.run_id,
            "round": instruction.round,
            "layout-digest": instruction.layout_digest,
            **_pack_config(instruction.config),
            **_pack_receipt(instruction.receipt),
        }
    )
    return RecordDict({VECTOR: pack_vector(instruction.vector), FACTS: facts})


def addressed(content: RecordDict, receipt: Receipt | None) -> RecordDict:
    """The same instruction for one more site: its own receipt, and the one vector shared."""
    known = _config_record(content)
    if receipt is None and not known[RECEIPT[0]]:
        return content
    facts = known.copy()
    facts.update(_pack_receipt(receipt))
    return RecordDict({VECTOR: content[VECTOR], FACTS: facts})


def on_terms(content: RecordDict, config: Config) -> RecordDict:
    """The same instruction for sites on other terms, and the one vector shared."""
    facts = {**_config_record(content), **_pack_config(config)}
    return RecordDict({VECTOR: content[VECTOR], FACTS: ConfigRecord(facts)})


def _pack_config(config: Config) -> dict[str, str]:
    return {"config": to_canonical(config), "config-hash": config_hash(config)}


def _pack_receipt(receipt: Receipt | None) -> dict[str, str]:
    if receipt is None:
        return dict.fromkeys(RECEIPT, "")
    values = (str(receipt.head), receipt.key, receipt.signature)
    return dict(zip(RECEIPT, values, strict=True))


def _read_receipt(facts: ConfigRecord) -> Receipt | None:
    head, key, signature = (_text(facts, name) for name in RECEIPT)
    if not head and not key and not signature:
        return None
    receipt = Receipt(Head.parse(head), key, signature)
    receipt.check()
    return receipt


def read_instruction(message: Message) -> Instruction:
    """Parses an instruction. Raises: VerificationError or ConfigError, never anything else."""
    names = {"run-id", "round", "config", "config-hash", "layout-digest"}
    facts = _facts(message, names | {*RECEIPT})
    config, known_hash = _read_config(_text(facts, "config"))
    if known_hash != _text(facts, "config-hash"):
        raise VerificationError("instruction: config and config-hash disagree")
    return Instruction(
        run_id=_text(facts, "run-id"),
        round=_whole(facts, "round"),
        config=config,
        layout_digest=_text(facts, "layout-digest"),
        vector=_unpack_vector(message),
        receipt=_read_receipt(facts),
    )


@lru_cache(maxsize=64)
def _read_config(text: str) -> tuple[Config, str]:
    """A config and its hash. A process with many sites reads the same few texts for all of them."""
    config = from_canonical(text)
    return config, config_hash(config)


def read_alike(message: Message, asked: Message, instruction: Instruction) -> Instruction | None:
    """What a message asks if, but for its receipt, it asks what another one did: parsed once.

    Args: asked: the other message; instruction: what was read of it. Returns: None if they
    differ in anything else; the vector must be the same memory.
    Raises: VerificationError for a receipt that is none.
    """
    if message.has_error():
        return None
    if message.content is asked.content:
        return instruction
    if not _asks_alike(message.content, asked.content):
        return None
    return replace(instruction, receipt=_read_receipt(_config_record(message.content)))


def _asks_alike(content: RecordDict, other: RecordDict) -> bool:
    if content.keys() != {VECTOR, FACTS} or not _is_one(content[VECTOR], other[VECTOR]):
        return False
    facts, theirs = content[FACTS], other[FACTS]
    if not isinstance(facts, ConfigRecord) or facts.keys() != theirs.keys():
        return False
    both = ((facts[name], theirs[name]) for name in facts if name not in RECEIPT)
    return all(type(mine) is type(their) and mine == their for mine, their in both)


def _is_one(arrays: object, other: object) -> bool:
    """Whether two records hold one vector, in one memory that nobody writes."""
    if arrays is other:
        return True
    if not isinstance(arrays, ArrayRecord) or not isinstance(other, ArrayRecord):
        return False
    if arrays.keys() != {VECTOR} or other.keys() != {VECTOR}:
        return False
    mine, theirs = arrays[VECTOR], other[VECTOR]
    facts = [(each.dtype, each.shape, each.stype) for each in (mine, theirs)]
    return mine.data is theirs.data and facts[0] == facts[1]


def pack_update(update: Update) -> RecordDict:
    """The message content of an update: the whole egress of a round."""
    alike = _update_alike(update.run_id, update.round, update.layout_digest, update.charge)
    content, coded = alike.copy(), update.coded
    content[VECTOR] = pack_vector(update.vector) if coded is None else _pack_bytes(coded)
    if update.books is not None:  # without, the facts of all are one record, which nobody writes
        facts = _config_record(alike).copy()
        facts.update(_pack_books(update.books))
        content[FACTS] = facts
    return content


@lru_cache(maxsize=4)
def _update_alike(run_id: str, number: int, layout_digest: str, charge: Event) -> RecordDict:
    """What updates of one round have in common: Flower checks each value when it is first set."""
    facts = ConfigRecord(
        {
            "run-id": run_id,
            "round": number,
            "layout-digest": layout_digest,
            "noise-multiplier": charge.noise_multiplier,
            "sample-rate": charge.sample_rate,
            "steps": charge.steps,
            **_pack_books(None),
        }
    )
    return RecordDict({VECTOR: ArrayRecord(), FACTS: facts})


def pack_count(count: Count) -> RecordDict:
    """The message content of a count: the whole egress of one."""
    books = _pack_books(count.books)
    facts = ConfigRecord({"run-id": count.run_id, "correct": count.correct, **books})
    return RecordDict({FACTS: facts})


def read_count(message: Message) -> Count:
    """Parses a count. Raises: VerificationError, never anything else."""
    facts = _facts(message, COUNT_FACTS, records={FACTS})
    correct = _number(facts, "correct")
    try:
        books = _read_books(facts)
    except ConfigError as error:
        raise VerificationError(f"count: {error}") from error
    if books is None or not correct.is_integer() or abs(correct) > MAX_COUNT:
        raise VerificationError("count: comes without books, or is no whole number")
    return Count(_text(facts, "run-id"), correct, books)


def _pack_books(books: SiteBooks | None) -> dict[str, str | bytes | float | list[float]]:
    if books is None:
        return {"ledger-head": "", "links": b"", "cap": 0.0, "spent": 0.0, "charged": []}
    charged = [
        value
        for event in books.charged
        for value in (event.noise_multiplier, event.sample_rate, float(event.steps))
    ]
    return {
        "ledger-head": str(books.head),
        "links": books.links,
        "cap": books.cap,
        "spent": books.spent,
        "charged": charged,
    }


class UpdateReader:
    """Reads updates one after the other; facts that they have in common are parsed once.

    Guarantee: as `read_update`, of each by itself. Books are never taken for those of another site.
    """

    def __init__(self, coding: Coding = Coding.float32, start: Vector | None = None) -> None:
        """Args: coding: of the updates; start: (P,) the parameters that they began with, where
        they are coded as the way from these.
        """
        self._coding, self._start = coding, start
        self._known: list[tuple[str, object]] = []
        self._common: dict[str, Any] = {}
        """Fields of an update with the facts that are known, but for its vector."""

    def read(self, message: Message) -> Update:
        """Parses an update. Raises: VerificationError, never anything else."""
        facts = _facts(message, UPDATE_FACTS)
        if self._common and _are_equal(facts, self._known):
            return self._with_vector(self._common, message)
        common = _common_of(facts)
        if common["books"] is None:
            # Whoever sent them may still hold them; of lists this is a copy.
            self._known = [(n, [*v] if isinstance(v, list) else v) for n, v in facts.items()]
            self._common = common
        return self._with_vector(common, message)

    def _with_vector(self, common: dict[str, Any], message: Message) -> Update:
        if self._coding is Coding.float32:
            return Update(vector=_unpack_vector(message), **common)
        assert self._start is not None
        data = _unpack_bytes(message)
        return Update(vector=decoded(data, self._start, self._coding), coded=data, **common)


def _are_equal(facts: ConfigRecord, known: list[tuple[str, object]]) -> bool:
    """Whether facts are the same in the same order, 1 and 1.0 and True being three things."""
    found = [*facts.items()]
    return found == known and [type(v) for _, v in found] == [type(v) for _, v in known]


def read_update(message: Message) -> Update:
    """Parses an update. Raises: VerificationError, never anything else."""
    return UpdateReader().read(message)


def _common_of(facts: ConfigRecord) -> dict[str, Any]:
    """Fields of an update, but for its vector."""
    try:
        books = _read_books(facts)
        charge = Event(
            _number(facts, "noise-multiplier"),
            _number(facts, "sample-rate"),
            _whole(facts, "steps"),
        )
    except ConfigError as error:
        raise VerificationError(f"update: {error}") from error
    return {
        "run_id": _text(facts, "run-id"),
        "round": _whole(facts, "round"),
        "layout_digest": _text(facts, "layout-digest"),
        "charge": charge,
        "books": books,
    }


def _read_books(facts: ConfigRecord) -> SiteBooks | None:
    """Raises: VerificationError, or ConfigError for a number no accountant prices."""
    head, cap = _text(facts, "ledger-head"), _number(facts, "cap")
    spent = _number(facts, "spent")
    charged, links = _numbers(facts, "charged"), _links(facts)
    if len(charged) % 3 or len(charged) > MAX_CHARGED:
        raise VerificationError("message: charged must be a list of events")
    if not head and not cap and not spent and not charged and not links:
        return None
    if (
        not 0 < cap < math.inf
        or not 0 <= spent <= cap
        or not all(steps.is_integer() and steps <= MAX_STEPS for steps in charged[2::3])
        or not all(rate >= MIN_RATE for rate in charged[1::3])
    ):
        raise VerificationError("message: the site's books are malformed")
    triples = zip(charged[::3], charged[1::3], charged[2::3], strict=True)
    events = tuple(Event(sigma, rate, int(steps)) for sigma, rate, steps in triples)
    return SiteBooks(Head.parse(head), cap, spent, events, links)


def pack_vector(vector: Vector) -> ArrayRecord:
    """A flat vector as the record Flower's strategies average: what `Array(vector)` holds."""
    if vector.dtype.str != "<f4" or vector.ndim != 1:
        return ArrayRecord({VECTOR: Array(vector)})
    # Copies of what Flower has checked before: built anew, both cost more than their frame. What is
    # copied never leaves, and so has no id of its own that would be copied, too.
    record, array = _EMPTY.copy(), Array.__new__(Array)
    array.__dict__.update(_array_of(vector.shape).__dict__, data=frame_of(vector))
    record[VECTOR] = array
    return record


_EMPTY = ArrayRecord()


@lru_cache(maxsize=4)
def _array_of(shape: tuple[int, ...]) -> Array:
    return Array("float32", shape, SType.NUMPY, b"")


def unpack_arrays(arrays: ArrayRecord) -> Vector:
    """The flat vector of a record. Raises: VerificationError."""
    if arrays.keys() != {VECTOR}:
        raise VerificationError("message: must hold one vector")
    array = arrays[VECTOR]
    if array.dtype != "float32" or len(array.data) > MAX_VECTOR_BYTES:
        raise VerificationError("message: not one flat float32 vector")  # a peer's words stay out
    # The header is compared with the only one we write, and never parsed: numpy's parser
    # evaluates a literal, and a small message could declare a large array.
    count = (len(array.data) - len(header_of(0))) // FLOAT_BYTES
    header = header_of(max(count, 0))
    if array.data[: len(header)] != header or len(array.data) != len(header) + FLOAT_BYTES * count:
        raise VerificationError("message: not one flat float32 vector")
    return np.frombuffer(array.data, dtype=np.float32, offset=len(header))


def _pack_bytes(data: bytes) -> ArrayRecord:
    frame = header_of(len(data), CODED_KIND) + data
    return ArrayRecord({VECTOR: Array("uint8", (len(data),), SType.NUMPY, frame)})


def _unpack_bytes(message: Message) -> bytes:
    """The coded parameters of a message. Raises: VerificationError."""
    record = message.content[VECTOR]
    assert isinstance(record, ArrayRecord)  # as _facts has seen
    if record.keys() != {VECTOR}:
        raise VerificationError("message: must hold one vector")
    array = record[VECTOR]
    header = header_of(max(len(array.data) - len(header_of(0, CODED_KIND)), 0), CODED_KIND)
    if array.dtype != "uint8" or len(array.data) > MAX_VECTOR_BYTES:
        raise VerificationError("message: not one coded vector")
    if array.data[: len(header)] != header:
        raise VerificationError("message: not one coded vector")
    return array.data[len(header) :]


def for_aggregation(vector: Vector | Wide) -> Message:
    """A message in the shape Flower's strategies expect, with the public constant weight 1."""
    arrays = ArrayRecord({VECTOR: Array(vector)})
    content = RecordDict({VECTOR: arrays, WEIGHT: MetricRecord({WEIGHT: 1.0})})
    return Message(content, NOBODY, MessageType.TRAIN)


def aggregated(arrays: ArrayRecord) -> Vector:
    """What a strategy made of such messages, in float32 as parameters travel."""
    return np.asarray(arrays[VECTOR].numpy(), dtype=np.float32)


def let_go(message: Message) -> None:
    """Empties what was handed to a strategy, whose views of it would keep it in memory."""
    record = message.content[VECTOR]
    assert isinstance(record, ArrayRecord)
    record.clear()


def content_bytes(content: RecordDict) -> int:
    """Bytes of the arrays of a message; its few facts are not counted."""
    count = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            count += sum([len(array.data) for array in record.values()])
    return count


def _unpack_vector(message: Message) -> Vector:
    record = message.content[VECTOR]
    assert isinstance(record, ArrayRecord)  # as _facts has seen
    return unpack_arrays(record)


def _facts(
    message: Message, names: Set[str], records: Set[str] = frozenset({VECTOR, FACTS})
) -> ConfigRecord:
    """The facts of a message that holds exactly these records, and in its facts these names."""
    if message.has_error():
        raise VerificationError("message: carries an error, not content")
    content = message.content
    # Not by `content.array_records`: its views refer to each other, and would keep the vectors of a
    # whole round in memory until Python looks for such rings.
    vectors = isinstance(content.get(VECTOR), ArrayRecord)
    if content.keys() != records or vectors != (VECTOR in records):
        raise VerificationError(
            f"message: must hold {', '.join(sorted(records))}, and nothing else"
        )
    facts = content.get(FACTS)
    if not isinstance(facts, ConfigRecord) or facts.keys() != names:
        raise VerificationError(f"message: facts must be exactly {', '.join(sorted(names))}")
    return facts


def _config_record(content: RecordDict) -> ConfigRecord:
    record = content[FACTS]
    assert isinstance(record, ConfigRecord)
    return record


def _text(facts: ConfigRecord, name: str) -> str:
    value = facts[name]
    if not isinstance(value, str):
        raise VerificationError(f"message: {name} must be text")
    return value


def _links(facts: ConfigRecord) -> bytes:
    value = facts["links"]
    if not isinstance(value, bytes) or len(value) % LINK_BYTES:
        raise VerificationError("message: links must be whole digests")
    if len(value) > MAX_LINKS * LINK_BYTES:
        raise VerificationError(f"message: its ledger grew by more than {MAX_LINKS} entries")
    return value


def _whole(facts: ConfigRecord, name: str) -> int:
    value = facts[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise VerificationError(f"message: {name} must be a whole number, 0 or more")
    return value


def _numbers(facts: ConfigRecord, name: str) -> list[float]:
    values = facts[name]
    if isinstance(values, list):
        numbers = [value for value in values if isinstance(value, float) and math.isfinite(value)]
        if len(numbers) == len(values):
            return numbers
    raise VerificationError(f"message: {name} must be a list of numbers")


def _number(facts: ConfigRecord, name: str) -> float:
    value = facts[name]
    if not isinstance(value, float) or value != value:  # noqa: PLR0124 - NaN
        raise VerificationError(f"message: {name} must be a number")
    return value
