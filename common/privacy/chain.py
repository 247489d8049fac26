"""The ledger's format: signed, chained entries, one canonical line each.

An entry's hash covers its content and the hash before it; its Ed25519 signature covers the hash.
A chain shows that nothing in it was edited, left out or put in another order. It cannot show that
its end was cut off: for that, somebody else must remember a head (`seq:hash`).

Exports are canonical: every byte is under a signature, and the last line, signed too, names the
head. Sources: FIPS 180-4 (SHA-256), RFC 8032 (Ed25519).
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from functools import cached_property
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.canonical import canonical_json
from common.errors import ConfigError, VerificationError
from common.privacy.accounting import MAX_SIGMA, MIN_SIGMA, Event
from common.privacy.lower_bounds import VERDICTS

VERSION = 1
"""Of the format. Another one is not guessed at."""
NOTHING = "0" * 64
"""What stands before the first entry."""
NONCE_BYTES = 16
"""Secret bits inside each hash: a digest tells nothing about a content that could be guessed."""
MANY, MIN_ORDER, MAX_ORDER, MIN_RATE = 10**6, 2, 256, 1e-6
"""Steps of an event and rounds of a plan, Renyi orders, Poisson rates: what accountants can price
in seconds. A release that would cost nothing (no step, rate zero) is none of ours."""
LINK_BYTES = 32
"""Of a content digest."""
MAX_LINE, MAX_TEXT = 1 << 16, 200
"""Characters of a line, far above any entry of ours, and of a name in it."""
_ENTRY, _TAIL, _CAP = b"coterie ledger entry\n", b"coterie ledger tail\n", b"coterie ledger cap\n"
_HEAD, _ROTATION = b"coterie ledger head\n", b"coterie ledger key\n"
"""What a signature is for: one of each kind can never stand for one of another."""


class Kind(Enum):
    """What an entry says."""

    GENESIS = "GENESIS"
    PLAN = "PLAN"
    CLOSE = "CLOSE"
    RESERVE = "RESERVE"
    PREPARE = "PREPARE"
    RELEASE = "RELEASE"
    LOST = "LOST"
    RECEIPT = "RECEIPT"
    MISC_EVENT = "MISC_EVENT"
    CAP_CHANGE = "CAP_CHANGE"
    DATASET = "DATASET"
    AUDIT = "AUDIT"
    KEY_ROTATE = "KEY_ROTATE"


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _hex(size: int) -> Callable[[Any], bool]:
    pattern = re.compile(f"[0-9a-f]{{{2 * size}}}")
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _real(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300  # noqa: PLR2004 - not NaN, not inf


def _positive(value: Any) -> bool:
    return _real(value) and value > 0


def _not_negative(value: Any) -> bool:
    return _real(value) and value >= 0


def _one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in values


def _event(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"noise_multiplier", "sample_rate", "steps"}:
        return False
    sigma, rate, steps = value["noise_multiplier"], value["sample_rate"], value["steps"]
    priced = _real(sigma) and _real(rate) and _count(steps)
    return priced and MIN_SIGMA <= sigma <= MAX_SIGMA and MIN_RATE <= rate <= 1 <= steps <= MANY


def _key(value: Any) -> bool:
    """A public key under which not every signature holds."""
    if not _hash(value):
        return False
    point = bytes.fromhex(value)
    return (point[:-1] + bytes([point[-1] & 0x7F])).hex() not in _SMALL_ORDER


_PLAIN_NAME = re.compile("[a-z_]{1,30}")
"""Names that may be repeated to a terminal."""
_Check = Callable[[Any], bool]
_hash, _signature = _hex(32), _hex(64)
_SMALL_ORDER = {
    "00" * 32,
    "01" + "00" * 31,
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
}
"""Encodings, without their sign bit, of the points of order 8 or less (libsodium's list)."""
_MODE = _one_of("plan", "filter")
UNITS = ("record", "person")
"""Whose presence an event is the price of."""
_UNIT = _one_of(*UNITS)
LOSSES = ("crash", "failure", "alarm")
"""Why a round was charged and released nothing: the process died; something failed; a measurement
of its noise, its coins or its clipping alarmed, so that it must not be released."""
BODIES: dict[Kind, dict[str, _Check]] = {
    Kind.GENESIS: {
        "version": _count,
        "site": _text,
        "dataset": _text,
        "dataset_root": _hash,
        "unit": _UNIT,
        "relation": _one_of("add_or_remove_one"),
        "cap": _positive,
        "delta": _positive,
        "filter_order": lambda value: _count(value) and MIN_ORDER <= value <= MAX_ORDER,
        "site_key": _key,
        "officer_key": _key,
    },
    Kind.PLAN: {
        "run": _text,
        "plan": _hash,
        "model": _text,
        "unit": _UNIT,
        "event": _event,
        "rounds": lambda value: _count(value) and 1 <= value <= MANY,
        "spare_rounds": lambda value: _count(value) and value <= MANY,
        "admission": _MODE,
    },
    Kind.CLOSE: {"run": _text},
    Kind.RESERVE: {"run": _text, "round": _count, "attempt": _count, "event": _event},
    Kind.PREPARE: {
        "reservation": _count,
        "update": _hash,
        "steps": _count,
    },
    Kind.RELEASE: {"reservation": _count},
    Kind.LOST: {
        "reservation": _count,
        "reason": _one_of(*LOSSES),
    },
    Kind.RECEIPT: {"seq": _count, "hash": _hash, "coordinator_key": _key, "signature": _signature},
    Kind.MISC_EVENT: {"purpose": _text, "unit": _UNIT, "event": _event, "admission": _MODE},
    Kind.CAP_CHANGE: {"cap": _positive, "officer_signature": _signature},
    Kind.DATASET: {"dataset_root": _hash},
    Kind.AUDIT: {
        "report": _hash,
        "design": _text,
        "m": _count,
        "confidence": lambda value: _positive(value) and value < 1,
        "lower_bound": _not_negative,
        "claimed_epsilon": _positive,
        "ceiling": _not_negative,
        "verdict": _one_of(*VERDICTS),
    },
    Kind.KEY_ROTATE: {"site_key": _key, "proof": _signature},
}
"""What the body of each kind holds, and nothing else."""


@dataclass(frozen=True)
class Entry:
    """One line of the books."""

    seq: int
    """From 1."""
    kind: Kind
    time: str
    """UTC, ISO 8601, seconds. By the site's own clock: nothing rests on it."""
    nonce: str
    prev: str
    """Hash of the entry before; `NOTHING` in the first."""
    body: Mapping[str, Any]
    signature: str

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 of everything but `prev` and the signature."""
        return hashlib.sha256(canonical_json(self._content()).encode()).hexdigest()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of `prev` and the content's digest: a list of digests proves a continuation."""
        return linked(self.prev, self.content_digest)

    @property
    def line(self) -> str:
        """The canonical line, without its end."""
        return canonical_json({**self._content(), "prev": self.prev, "signature": self.signature})

    def _content(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "kind": self.kind.value,
            "time": self.time,
            "nonce": self.nonce,
            "body": dict(self.body),
        }


@dataclass(frozen=True)
class Head:
    """The end of a chain: what somebody else remembers."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> "Head":
        """Reads `SEQ:HASH`. Raises: ConfigError."""
        found = re.fullmatch(r"([0-9]{1,15}):([0-9a-f]{64})", text)
        if found is None:
            raise ConfigError(f"head={text}: must be SEQ:HASH, as `coterie ledger show` prints it")
        return cls(int(found[1]), found[2])


EMPTY = Head(0, NOTHING)


@dataclass(frozen=True)
class Receipt:
    """A head under the signature of a coordinator, or a witness, that has seen it."""

    head: Head
    key: str
    """Public key of whoever signed, in hex."""
    signature: str

    @classmethod
    def sign(cls, head: Head, key: Ed25519PrivateKey) -> "Receipt":
        """A receipt by the owner of `key`."""
        return cls(head, public_hex(key), sign_head(key, head))

    def check(self) -> None:
        """Raises: VerificationError unless the key's owner has seen this head."""
        if not _key(self.key) or not head_is_signed(self.key, self.signature, self.head):
            raise VerificationError("receipt: its signature is not that of the key it names")


def linked(prev: str, content_digest: str) -> str:
    """The hash of an entry with this content after one with the hash `prev`."""
    return hashlib.sha256(bytes.fromhex(prev) + bytes.fromhex(content_digest)).hexdigest()


def continued(head: Head, links: bytes) -> Head:
    """The head of the chain that went on from `head` by entries with these content digests.

    Args: links: 32 bytes an entry. Whoever has a head can so tell a chain that goes on from it
    from any other, and learns nothing of its entries: each digest covers a secret nonce.
    """
    digests = [links[at : at + LINK_BYTES] for at in range(0, len(links), LINK_BYTES)]
    last = functools.reduce(linked, (digest.hex() for digest in digests), head.hash)
    return Head(head.seq + len(digests), last)


def write_entry(
    kind: Kind, body: Mapping[str, Any], *, after: Head, key: Ed25519PrivateKey
) -> Entry:
    """A new entry, signed. Raises: VerificationError if `body` is not what its kind holds."""
    check_body(after.seq + 1, kind, body)
    unsigned = Entry(
        seq=after.seq + 1,
        kind=kind,
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        nonce=os.urandom(NONCE_BYTES).hex(),
        prev=after.hash,
        body=dict(body),
        signature="",
    )
    signature = key.sign(_ENTRY + bytes.fromhex(unsigned.hash)).hex()
    return replace(unsigned, signature=signature)


def read_entry(line: str, number: int) -> Entry:
    """Parses one line, the `number`-th. Raises: VerificationError naming it."""
    fields = _fields(line, f"entry {number}")
    if set(fields) != {"seq", "kind", "time", "nonce", "prev", "body", "signature"}:
        raise VerificationError(f"entry {number}: has other fields than an entry has")
    well_formed = (
        type(fields["seq"]) is int
        and isinstance(fields["time"], str)
        and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", fields["time"], re.ASCII)
        and _hex(NONCE_BYTES)(fields["nonce"])
        and _hash(fields["prev"])
        and _signature(fields["signature"])
        and isinstance(fields["body"], dict)
        and isinstance(fields["kind"], str)
        and fields["kind"] in Kind.__members__
    )
    if not well_formed:
        raise VerificationError(f"entry {number}: a field is malformed, or its kind is unknown")
    entry = Entry(**{**fields, "kind": Kind(fields["kind"])})
    check_body(number, entry.kind, entry.body)
    return entry


def check_body(number: int, kind: Kind, body: Mapping[str, Any]) -> None:
    """Raises: VerificationError if `body` is not what an entry of this kind holds."""
    checks = BODIES[kind]
    if kind is Kind.GENESIS and body.get("version") != VERSION:
        raise VerificationError(
            f"entry {number}: schema version {body.get('version')!r} is unknown here; "
            f"this program reads version {VERSION}"
        )
    wrong = sorted({*checks} ^ {*body}) or [
        name for name, holds in checks.items() if not holds(body[name])
    ]
    if wrong:
        names = ", ".join(name if _PLAIN_NAME.fullmatch(name) else "a field" for name in wrong)
        raise VerificationError(f"entry {number} ({kind.value}): {names}: not as it must be")


def check_signature(entry: Entry, key: str) -> None:
    """Raises: VerificationError unless the key's owner signed this entry at this place."""
    if not hash_is_signed(key, entry.signature, entry.hash):
        raise VerificationError(
            f"entry {entry.seq} ({entry.kind.value}): its signature is not the site's; "
            "it was edited, or signed by another key"
        )


def hash_is_signed(key: str, signature: str, entry_hash: str) -> bool:
    """Whether the key's owner wrote the entry with this hash: for who knows no more of it."""
    return _signed(key, signature, _ENTRY + bytes.fromhex(entry_hash))


def sign_cap(key: Ed25519PrivateKey, *, cap: float, after: Head) -> str:
    """The officer's signature under a new cap, good at this place of this chain only."""
    return key.sign(_CAP + _cap_statement(cap, after)).hex()


def cap_is_signed(officer_key: str, signature: str, *, cap: float, after: Head) -> bool:
    """Whether the officer signed this cap for this place."""
    return _signed(officer_key, signature, _CAP + _cap_statement(cap, after))


def sign_head(key: Ed25519PrivateKey, head: Head) -> str:
    """A coordinator's or witness's signature under a head it has seen."""
    return key.sign(_HEAD + str(head).encode()).hex()


def head_is_signed(key: str, signature: str, head: Head) -> bool:
    """Whether the key's owner has seen this head."""
    return _signed(key, signature, _HEAD + str(head).encode())


def is_signed_head(receipt: Receipt) -> bool:
    """Whether a receipt holds; False for what is no key or no signature."""
    return is_signed(receipt.key, receipt.signature, _HEAD + str(receipt.head).encode())


def prove_rotation(new: Ed25519PrivateKey, old_key: str, *, after: Head) -> str:
    """The new key's consent to follow the old one, at this place of this chain only."""
    return new.sign(_ROTATION + f"{old_key} {after}".encode()).hex()


def rotation_is_proved(new_key: str, proof: str, old_key: str, *, after: Head) -> bool:
    """Whether the new key's owner agreed to follow the old key here."""
    return _signed(new_key, proof, _ROTATION + f"{old_key} {after}".encode())


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half, as the books hold it."""
    return key.public_key().public_bytes_raw().hex()


def event_body(event: Event) -> dict[str, float | int]:
    """An event as the books hold it."""
    return {
        "noise_multiplier": float(event.noise_multiplier),
        "sample_rate": float(event.sample_rate),
        "steps": event.steps,
    }


def event_of(body: Mapping[str, Any]) -> Event:
    """The event an entry holds."""
    return Event(float(body["noise_multiplier"]), float(body["sample_rate"]), body["steps"])


def export(entries: Iterable[Entry], claims: Mapping[str, Any], key: Ed25519PrivateKey) -> str:
    """The chain as a file: a line an entry, and the tail with what the site claims it spent."""
    lines, head = [], EMPTY
    for entry in entries:
        lines.append(entry.line)
        head = Head(entry.seq, entry.hash)
    tail = {"tail": str(head), "claims": dict(claims)}
    signature = key.sign(_TAIL + canonical_json(tail).encode()).hex()
    return "\n".join([*lines, canonical_json({**tail, "signature": signature}), ""])


@dataclass(frozen=True)
class Export:
    """A parsed export, whose entries nobody has judged yet."""

    entries: tuple[Entry, ...]
    head: Head
    """As the tail names it."""
    claims: Mapping[str, Any]
    _signed_tail: bytes
    _signature: str

    def check_tail(self, key: str) -> None:
        """Raises: VerificationError unless the key's owner signed the tail."""
        if not _signed(key, self._signature, _TAIL + self._signed_tail):
            raise VerificationError("tail: its signature is not the site's; the file was edited")


CLAIMS: dict[str, _Check] = {"epsilon_pld": _real, "epsilon_rdp": _real}
"""What a tail says was spent, at the ledger's delta."""


def read_export(content: bytes) -> Export:
    """Parses an exported file. Raises: VerificationError naming the line."""
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise VerificationError("ledger: not UTF-8 text") from error
    if len(lines) < 2 or lines[-1]:  # noqa: PLR2004 - an entry or tail, and the end of its line
        raise VerificationError("tail: is missing; the file was cut off")
    entries = [read_entry(line, number) for number, line in enumerate(lines[:-2], 1)]
    tail = _fields(lines[-2], "tail")
    if set(tail) != {"tail", "claims", "signature"}:
        raise VerificationError("tail: is missing; the file was cut off")
    claims, signature = tail["claims"], tail["signature"]
    held = isinstance(claims, dict) and set(claims) == {*CLAIMS}
    if not held or not all(holds(claims[name]) for name, holds in CLAIMS.items()):
        raise VerificationError("tail: its claims are malformed")
    if not _signature(signature) or not isinstance(tail["tail"], str):
        raise VerificationError("tail: is malformed")
    try:
        head = Head.parse(tail["tail"])
    except ConfigError as error:
        raise VerificationError("tail: names no head") from error
    signed = canonical_json({"tail": tail["tail"], "claims": claims}).encode()
    return Export(tuple(entries), head, claims, signed, signature)


def _fields(line: str, name: str) -> dict[str, Any]:
    """The object on a line, which must be written as we write it."""
    if len(line) > MAX_LINE:
        raise VerificationError(f"{name}: longer than any entry")
    try:
        fields = json.loads(line)
        canonical = canonical_json(fields) == line
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{name}: not JSON") from error
    if not isinstance(fields, dict) or not canonical:
        raise VerificationError(f"{name}: not written as a ledger writes it")
    return fields


def _cap_statement(cap: float, after: Head) -> bytes:
    return canonical_json({"cap": cap, "after": str(after)}).encode()


def is_signed(key: str, signature: str, message: bytes) -> bool:
    """Whether the key's owner signed these bytes; False for what is no key or no signature."""
    return _key(key) and _signature(signature) and _signed(key, signature, message)


def _signed(key: str, signature: str, message: bytes) -> bool:
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True
