"""A witness, as those who ask it see it: the messages, and the line to it.

A *witness* holds the highest head of each ledger that an officer enrolled with it, outside the
coordinator and the sites, so that nobody can put a ledger back to an older copy unseen. It is told
digests of entries, never an entry (but for a new key's), and answers with its signature.

Messages are canonical JSON over gRPC with TLS on both sides (decision 0035): every field is
required, none is skipped, and what is not written as we write it is refused.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import grpc

from common.canonical import canonical_json
from common.errors import ConfigError, FederationError, VerificationError
from common.keys import check_secret
from common.privacy import chain
from common.privacy.books import Books
from common.privacy.chain import LINK_BYTES, Entry, Head, Kind, Receipt, continued

SERVICE = "coterie.witness.v1.Witness"
VERSION = 1
MAX_LINKS = 2048
"""Entries that one message may add."""
MAX_BYTES = 1 << 18
"""Of one message."""
MAX_ID = 200
DEADLINE_S = 5.0
"""How long a caller waits for an answer."""
AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, WITNESS_FILE = (
    "ca.crt",
    "client.crt",
    "client.key",
    "witness.pub",
)
"""What a pass holds: the folder by which a site, or an officer, and a witness know each other."""


class Refusal(Enum):
    """Why a witness does not do as it is asked; the text is what the caller is told."""

    malformed = "the request is not as a request must be"
    unknown = "no ledger is enrolled under this id"
    revoked = "this pass was taken back, or never given; the witness's officer gives another"
    stranger = "this pass is not the one that speaks for this ledger"
    wrong_key = "the head is not signed by the key that is enrolled"
    gap = "entries between the witness's head and the one offered are missing"
    fork = "the ledger does not go on from the head that the witness holds; it is a fork"
    older = "the head offered is older than the one the witness holds"


class WitnessAwayError(FederationError):
    """Nobody answers as the witness: it may be down, or not believed, or not believe us."""


class WitnessRefusedError(VerificationError):
    """The witness answered, and refused."""

    def __init__(self, text: str, refusal: Refusal) -> None:
        super().__init__(text)
        self.refusal = refusal


class WitnessAheadError(VerificationError):
    """The witness holds a head that this ledger does not contain: it went back, or is a fork."""


@dataclass(frozen=True)
class Advance:
    """A ledger went on: from a head that the witness may know, by these entries."""

    ledger: str
    """The id under which it is enrolled."""
    after: Head
    links: bytes
    """Content digests of the entries after it, 32 bytes each."""
    signature: str
    """Of the last entry, by the site's key: the site wrote it, whoever brings it."""
    rotation: str = ""
    """The last entry itself, if it names a new key."""

    @property
    def end(self) -> Head:
        """Where the ledger is said to stand."""
        return continued(self.after, self.links)


@dataclass(frozen=True)
class Question:
    """Where does a ledger stand, and did it ever stand here?"""

    ledger: str
    head: Head | None = None


@dataclass(frozen=True)
class Testimony:
    """What a witness says of one ledger."""

    ledger: str
    receipt: Receipt
    """The highest head, under the witness's signature."""
    included: bool = True
    """Whether the head that was asked for is in the ledger; True if none was."""


def write_advance(step: Advance) -> bytes:
    """As it travels."""
    return _written(
        ledger=step.ledger,
        after=str(step.after),
        links=step.links.hex(),
        signature=step.signature,
        rotation=step.rotation,
    )


def read_advance(content: bytes) -> Advance:
    """Raises: VerificationError if it is not exactly one."""
    fields = _read(content, {"ledger", "after", "links", "signature", "rotation"})
    links = fields["links"]
    whole = re.fullmatch(r"(?:[0-9a-f]{64})*", links) is not None
    if not whole or len(links) > 2 * LINK_BYTES * MAX_LINKS:
        raise VerificationError("links: are no digests, or too many")
    if re.fullmatch(r"[0-9a-f]{128}", fields["signature"]) is None:
        raise VerificationError("signature: is none")
    step = Advance(
        _id(fields["ledger"]),
        _head(fields["after"]),
        bytes.fromhex(links),
        fields["signature"],
        fields["rotation"],
    )
    if step.rotation and not step.links:
        raise VerificationError("rotation: is of an entry that is not there")
    return step


def write_question(question: Question) -> bytes:
    """As it travels."""
    return _written(ledger=question.ledger, head=str(question.head or ""))


def read_question(content: bytes) -> Question:
    """Raises: VerificationError if it is not exactly one."""
    fields = _read(content, {"ledger", "head"})
    return Question(_id(fields["ledger"]), _head(fields["head"]) if fields["head"] else None)


def write_testimony(found: Testimony) -> bytes:
    """As it travels."""
    return _written(
        ledger=found.ledger,
        head=str(found.receipt.head),
        key=found.receipt.key,
        signature=found.receipt.signature,
        included="yes" if found.included else "no",
    )


def read_testimony(content: bytes) -> Testimony:
    """Raises: VerificationError if it is not exactly one, or its signature does not hold."""
    fields = _read(content, {"ledger", "head", "key", "signature", "included"})
    if fields["included"] not in {"yes", "no"}:
        raise VerificationError("included: is neither yes nor no")
    receipt = Receipt(_head(fields["head"]), fields["key"], fields["signature"])
    if not chain.is_signed_head(receipt):
        raise VerificationError("testimony: its signature is not that of the key it names")
    return Testimony(_id(fields["ledger"]), receipt, fields["included"] == "yes")


def _written(**fields: str) -> bytes:
    return canonical_json({"version": VERSION, **fields}).encode()


def _read(content: bytes, names: set[str]) -> dict[str, str]:
    """Fields of a message, all of them text. Raises: VerificationError."""
    if len(content) > MAX_BYTES:
        raise VerificationError("message: too long")
    try:
        text = content.decode("utf-8")
        fields = json.loads(text)
        canonical = canonical_json(fields) == text
    except (ValueError, RecursionError) as error:
        raise VerificationError("message: is not JSON") from error
    if not isinstance(fields, dict) or not canonical or set(fields) != {*names, "version"}:
        raise VerificationError("message: has other fields than it must, or is written otherwise")
    version = fields.pop("version")
    if type(version) is not int or version != VERSION:
        raise VerificationError("message: is of an unknown version")
    if not all(isinstance(value, str) for value in fields.values()):
        raise VerificationError("message: a field is no text")
    return fields


def is_id(value: str) -> bool:
    """Whether a ledger may be enrolled under this id."""
    return 0 < len(value) <= MAX_ID and value.isprintable() and value == value.strip()


def _id(value: str) -> str:
    if not is_id(value):
        raise VerificationError("ledger: is no id")
    return value


def _head(text: str) -> Head:
    try:
        return Head.parse(text)
    except ConfigError as error:
        raise VerificationError("head: must be SEQ:HASH") from error


def id_of(books: Books) -> str:
    """The id under which a ledger is enrolled where nobody chose another."""
    return f"{books.genesis['dataset']}/{books.genesis['site']}"


def steps_after(ledger: str, head: Head, entries: Sequence[Entry]) -> Iterator[Advance]:
    """What brings a witness from `head` to the last of `entries`, those that follow it.

    A step ends where a key is replaced: what follows is signed by another one.
    """
    after, links = head, b""
    for entry in entries:
        links += bytes.fromhex(entry.content_digest)
        rotates = entry.kind is Kind.KEY_ROTATE
        if rotates or len(links) == LINK_BYTES * MAX_LINKS or entry is entries[-1]:
            line = entry.line if rotates else ""
            yield Advance(ledger, after, links, entry.signature, line)
            after, links = Head(entry.seq, entry.hash), b""


@dataclass(frozen=True)
class Pass:
    """A folder of `coterie witness admit`."""

    folder: Path

    def credentials(self) -> grpc.ChannelCredentials:
        """For TLS, both ways. Raises: ConfigError if something of it is missing."""
        check_secret(self._file(KEY_FILE))
        authority, key, certificate = (
            self._file(name).read_bytes() for name in (AUTHORITY_FILE, KEY_FILE, CERTIFICATE_FILE)
        )
        return grpc.ssl_channel_credentials(authority, key, certificate)

    @property
    def witness_key(self) -> str:
        """By which the witness signs, and by no other. Raises: ConfigError."""
        text = self._file(WITNESS_FILE).read_text("ascii", "replace").strip()
        if re.fullmatch(r"[0-9a-f]{64}", text) is None:
            raise ConfigError(f"{self.folder / WITNESS_FILE}: holds no public key")
        return text

    def _file(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise ConfigError(
                f"{path}: is not there; `coterie witness admit` makes a pass, all in one folder"
            )
        return path


class WitnessLine:
    """Calls to one witness. Raises, each: WitnessAwayError, WitnessRefusedError; VerificationError
    where the answer is not that witness's.
    """

    def __init__(self, address: str, given: Pass, *, patient: bool = False) -> None:
        """Args: patient: a call waits its whole deadline for a witness that is not there yet."""
        self._patient = patient
        self.address, self.key = address, given.witness_key
        options = [
            ("grpc.max_receive_message_length", MAX_BYTES),
            ("grpc.enable_http_proxy", 0),
            ("grpc.enable_retries", 0),
        ]
        self._channel = grpc.secure_channel(address, given.credentials(), options)

    def close(self) -> None:
        """Hangs up."""
        self._channel.close()

    def latest(self, ledger: str) -> Receipt:
        """The highest head that the witness holds of a ledger."""
        return self._call("Head", ledger, write_question(Question(ledger))).receipt

    def includes(self, ledger: str, head: Head) -> bool:
        """Whether the witness knows the ledger to have gone through `head`."""
        return self._call("Includes", ledger, write_question(Question(ledger, head))).included

    def advance(self, step: Advance) -> Receipt:
        """Brings the witness to the end of `step`; on its disk when this returns."""
        receipt = self._call("Advance", step.ledger, write_advance(step)).receipt
        if receipt.head != step.end:
            raise VerificationError(f"witness {self.address}: signed another head than it was told")
        return receipt

    def _call(self, method: str, ledger: str, request: bytes) -> Testimony:
        call: Callable[..., bytes] = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            content = call(request, timeout=DEADLINE_S, wait_for_ready=self._patient)
        except grpc.RpcError as error:
            raise self._fault(error, ledger) from error
        try:
            found = read_testimony(content)
        except VerificationError as error:
            raise VerificationError(f"witness {self.address}: {error}") from error
        if found.ledger != ledger or found.receipt.key != self.key:
            raise VerificationError(
                f"witness {self.address}: answered of another ledger, or by another key "
                "than its own"
            )
        return found

    def _fault(self, error: grpc.RpcError, ledger: str) -> Exception:
        """Only words of ours are repeated."""
        said = error.details() if isinstance(error, grpc.Call) else ""
        if said in Refusal.__members__:
            refusal = Refusal[said]
            return WitnessRefusedError(
                f"witness {self.address}: {ledger}: {refusal.value}", refusal
            )
        code = error.code() if isinstance(error, grpc.Call) else None
        name = "unknown" if code is None else code.name.lower().replace("_", " ")
        return WitnessAwayError(
            f"witness {self.address}: does not answer ({name}); is it running, and is the pass its "
            "own?"
        )


@contextmanager
def opened(address: str, folder: Path | None, *, patient: bool = True) -> Iterator[WitnessLine]:
    """A line for a while.

    Args: patient: as `WitnessLine`. Raises: ConfigError without a pass, or a HOST:PORT.
    """
    if folder is None:
        raise ConfigError("--witness: needs --pass FOLDER, which `coterie witness admit` made")
    line = WitnessLine(checked_address(address), Pass(folder), patient=patient)
    try:
        yield line
    finally:
        line.close()


def checked_address(address: str) -> str:
    """HOST:PORT. Raises: ConfigError."""
    found = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[^:/\s\[\]]+):([0-9]{1,5})", address)
    if found is None or not 0 <= int(found[1]) < 1 << 16:
        raise ConfigError(f"witness={address}: must be HOST:PORT")
    return address


@dataclass(frozen=True)
class Confirmation:
    """A ledger contains what the witness holds."""

    ledger: str
    receipt: Receipt
    entries_after: int
    """Of the ledger, which the witness was not told of yet."""


def confirmed(line: WitnessLine, books: Books, ledger: str = "") -> Confirmation:
    """Holds books against a witness.

    Args: ledger: its id there, if it is not `id_of`.
    Raises: WitnessAheadError if the witness holds a head that these books do not contain.
    """
    name = ledger or id_of(books)
    receipt = line.latest(name)
    if not books.contains(receipt.head):
        raise WitnessAheadError(
            f"entry {receipt.head.seq}: the witness holds {name} at the head {receipt.head}, which "
            "is not in this ledger: it is an older copy, was cut off, or is a fork"
        )
    return Confirmation(name, receipt, books.head.seq - receipt.head.seq)


def as_fields(found: Confirmation, address: str) -> Mapping[str, Any]:
    """For `--json`."""
    return {
        "address": address,
        "ledger": found.ledger,
        "head": str(found.receipt.head),
        "key": found.receipt.key,
        "entries_after": found.entries_after,
    }
