"""`coterie witness`: remembers, for a privacy officer, how far each site's ledger had got.

A party of its own, outside the coordinator and the sites. It holds heads, countersigns them, and
refuses what does not go on from them: a ledger that was put back to an older copy is found out at
its next word, or at the officer's next question. It needs no torch, no data and no model.

Who may ask is whoever has a pass (TLS, both ways) that was given and not taken back. Who may bring
a ledger on is the one node that was enrolled with it, and only by what the site's key signed.
Enrolment is done here, by the officer, and by nobody over the network.
"""

import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from common.certificates import AUTHORITY, Authority, make_authority
from common.cli import Invocation, emit_json, run_typer
from common.durable import folder_atomic
from common.errors import ConfigError, VerificationError
from common.keys import KEY_SUFFIX, generate_key, read_private_key, write_private
from common.privacy.chain import Head, Receipt, public_hex
from common.privacy.stored import Pins, read_chains
from common.privacy.witness import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    MAX_BYTES,
    SERVICE,
    WITNESS_FILE,
    Refusal,
    Testimony,
    checked_address,
    id_of,
    read_advance,
    read_question,
    write_testimony,
)
from server.witnessed import Given, RefusedError, Standing, WitnessBook

log = logging.getLogger(__name__)

BOOK, SERVER = "witness.db", "server"
DAYS = 1825
"""How long certificates are valid, if nobody says otherwise."""
THREADS, MOST_CALLS = 8, 64
"""That answer at a time, and calls that may be under way; more are told to come again."""
GRACE_S = 3.0
MAX_METADATA = 8192
"""Bytes of a call's headers."""
STATUS = {
    Refusal.malformed: grpc.StatusCode.INVALID_ARGUMENT,
    Refusal.unknown: grpc.StatusCode.NOT_FOUND,
    Refusal.revoked: grpc.StatusCode.PERMISSION_DENIED,
    Refusal.stranger: grpc.StatusCode.PERMISSION_DENIED,
    Refusal.wrong_key: grpc.StatusCode.PERMISSION_DENIED,
    Refusal.gap: grpc.StatusCode.OUT_OF_RANGE,
    Refusal.fork: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.older: grpc.StatusCode.FAILED_PRECONDITION,
}

FolderArgument = Annotated[Path, typer.Argument(help="Folder of the witness.")]


@dataclass(frozen=True)
class Witness:
    """What it answers. Every head it signs is on its disk first."""

    book: WitnessBook
    key: Ed25519PrivateKey

    def head(self, request: bytes, _node: str) -> bytes:
        """Where a ledger stands."""
        question = read_question(request)
        return self._testimony(question.ledger, self.book.latest(question.ledger))

    def includes(self, request: bytes, _node: str) -> bytes:
        """Whether a ledger ever stood where the question says."""
        question = read_question(request)
        if question.head is None:
            raise VerificationError("question: names no head")
        included = self.book.includes(question.ledger, question.head)
        return self._testimony(question.ledger, self.book.latest(question.ledger), included)

    def advance(self, request: bytes, node: str) -> bytes:
        """Takes a ledger on, and countersigns its head."""
        step = read_advance(request)
        return self._testimony(step.ledger, self.book.advance(step, node))

    def _testimony(self, ledger: str, head: Head, included: bool = True) -> bytes:
        return write_testimony(Testimony(ledger, Receipt.sign(head, self.key), included))


def handlers(witness: Witness) -> grpc.GenericRpcHandler:
    """The service, for a gRPC server: bytes in, bytes out; nothing is parsed before `Witness`."""
    methods = {"Head": witness.head, "Includes": witness.includes, "Advance": witness.advance}
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            name: grpc.unary_unary_rpc_method_handler(_answered(each, witness.book))
            for name, each in methods.items()
        },
    )


def _answered(
    method: Callable[[bytes, str], bytes], book: WitnessBook
) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    def call(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            book.check_pass(_serial_of(context))
            return method(request, _name_of(context))
        except RefusedError as error:
            refusal = error.refusal
        except VerificationError:
            refusal = Refusal.malformed
        except OSError as error:
            log.warning("cannot be kept: %s", error.strerror or error)
            context.abort(grpc.StatusCode.UNAVAILABLE, "its disk takes nothing")
        log.warning("%s: refused: %s", _printable(_name_of(context)), refusal.value)
        context.abort(STATUS[refusal], refusal.name)
        raise AssertionError("abort raises")

    return call


def _name_of(context: grpc.ServicerContext) -> str:
    """Whose pass it is: TLS has shown that this witness's authority signed it."""
    names = context.auth_context().get("x509_common_name", [])
    return names[0].decode("utf-8", "replace") if len(names) == 1 else ""


def _serial_of(context: grpc.ServicerContext) -> int:
    """Of the certificate that was shown. Raises: VerificationError if there is not one."""
    shown = context.auth_context().get("x509_pem_cert", [])
    try:
        (certificate,) = shown
        return x509.load_pem_x509_certificate(certificate).serial_number
    except ValueError as error:
        raise VerificationError("pass: is none") from error


def _printable(name: str) -> str:
    return "".join(each if each.isprintable() else " " for each in name)


@dataclass(frozen=True)
class Folder:
    """Where a witness keeps what it is: its book, its keys, its authority."""

    path: Path

    def book(self) -> WitnessBook:
        """Raises: ConfigError if this is no witness."""
        return WitnessBook(self.path / BOOK)

    def key(self) -> Ed25519PrivateKey:
        """By which it signs heads."""
        return read_private_key(self.path / f"{BOOK}{KEY_SUFFIX}")

    @property
    def authority(self) -> Authority:
        """That signs passes."""
        return Authority(self.path / f"{AUTHORITY}.crt", self.path / f"{AUTHORITY}.key")

    def credentials(self) -> grpc.ServerCredentials:
        """TLS with its own certificate, to holders of its passes alone."""
        pair = [(self.path / f"{SERVER}{end}").read_bytes() for end in (".key", ".crt")]
        return grpc.ssl_server_credentials(
            [(pair[0], pair[1])], self.authority.certificate.read_bytes(), require_client_auth=True
        )


def make_witness(folder: Path, hosts: list[str], days: int) -> str:
    """A new witness; returns its public key. Raises: ConfigError if there is one."""
    if (folder / BOOK).exists():
        raise ConfigError(f"{folder}: holds a witness already; it is never overwritten")
    if not 1 <= days <= 36_500:  # noqa: PLR2004 - a hundred years
        raise ConfigError(f"--days={days}: must be between 1 and 36500")
    with folder_atomic(folder) if not folder.exists() else _as_it_is(folder) as made:
        authority = make_authority(made, days=days)
        authority.issue(SERVER, hosts, days=days)
        key = generate_key(made / f"{BOOK}{KEY_SUFFIX}")
        WitnessBook.create(made / BOOK).close()
    folder.chmod(0o700)
    return public_hex(key)


@contextmanager
def _as_it_is(folder: Path) -> Iterator[Path]:
    if any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty; a witness gets a folder of its own")
    yield folder


def admit_to(folder: Folder, name: str, output: Path, days: int) -> None:
    """A pass for `name`: a folder to hand over. Raises: ConfigError if there is one."""
    if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) is None:
        raise ConfigError(f"{name}: must be 1 to 64 letters, digits, dots, dashes, underscores")
    if output.exists():
        raise ConfigError(f"{output}: exists already; a pass is never overwritten")
    public = public_hex(folder.key())
    with folder_atomic(output) as made:
        key = ec.generate_private_key(ec.SECP384R1())
        certificate = folder.authority.sign(name, key.public_key(), days=days)
        with folder.book() as book:
            book.give(certificate.serial_number, name, certificate.not_valid_after_utc)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_private(made / KEY_FILE, secret)
        (made / CERTIFICATE_FILE).write_bytes(certificate.public_bytes(Encoding.PEM))
        (made / AUTHORITY_FILE).write_bytes(folder.authority.certificate.read_bytes())
        (made / WITNESS_FILE).write_text(f"{public}\n")
    output.chmod(0o700)


def witness(invocation: Invocation) -> None:
    """Remember, for a privacy officer, how far each site's ledger got; no older copy passes."""

    def init(
        folder: Annotated[Path, typer.Argument(help="Folder to make.")],
        host: Annotated[
            list[str], typer.Option(help="Name or address it is reached by; repeatable.")
        ],
        days: Annotated[int, typer.Option(help="How long its certificates are valid.")] = DAYS,
    ) -> None:
        """Makes a witness: its key, its authority, an empty book.

        Keep the folder on a machine that neither the coordinator nor a site controls. Its public
        key is in every pass.

        Example: coterie witness init witness --host witness.example.org --host 10.0.0.7
        """
        _answer(invocation, {"witness": str(folder), "key": make_witness(folder, host, days)})

    def admit(
        folder: FolderArgument,
        name: Annotated[str, typer.Argument(help="Whose pass it is: a site's node, an officer.")],
        output: Annotated[Path, typer.Option(help="Folder to make, and to hand over.")],
        days: Annotated[int, typer.Option(help="How long it is valid.")] = DAYS,
    ) -> None:
        """Makes a pass: a folder with which one party and the witness know each other.

        With a pass anybody may ask; only the node that a ledger was enrolled with may bring it on.

        Example: coterie witness admit witness ward-1 --output passes/ward-1
        """
        admit_to(Folder(folder), name, output, days)
        _answer(invocation, {"pass": str(output), "name": name})

    def revoke(
        folder: FolderArgument,
        name: Annotated[str, typer.Argument(help="Whose passes are taken back.")],
    ) -> None:
        """Takes back every pass of a name: lost, stolen, or its holder has left.

        A witness that is running refuses them from its next answer on. The same name may be given
        another pass with `admit`; ledgers that were enrolled with it stay enrolled.

        Example: coterie witness revoke witness ward-1
        """
        with Folder(folder).book() as book:
            _answer(invocation, {"revoked": name, "passes": book.take_back(name)})

    def enrol(  # noqa: PLR0917 - options, which are given by name
        folder: FolderArgument,
        ledger: Annotated[str, typer.Argument(help="An exported ledger, from its site.")],
        node: Annotated[str, typer.Option(help="Name on the pass of the node that keeps it.")],
        ledger_id: Annotated[
            str, typer.Option("--id", help="What you call the data; DATASET/SITE if left out.")
        ] = "",
        key: Annotated[str, typer.Option(help="The site's public key, as you know it.")] = "",
        officer: Annotated[str, typer.Option(help="Your own public key.")] = "",
    ) -> None:
        """Binds a dataset's id to one ledger and its key: from now on it can only go on.

        The export is judged first, from its first entry to its last. One id has one ledger, and one
        ledger one id. The same records under another id, or another key, no witness can see.

        Example: coterie witness enrol witness ward-1.ledger --node ward-1 --officer 90c5...
        """
        (read,) = read_chains(ledger, Pins(key or None, officer or None))
        name = ledger_id or id_of(read.books)
        with Folder(folder).book() as book:
            head = book.enrol(name, node, read.entries)
        site_key = str(read.books.genesis["site_key"])
        _answer(invocation, {"id": name, "head": str(head), "site_key": site_key, "node": node})

    def serve(
        folder: FolderArgument,
        listen: Annotated[str, typer.Option(help="HOST:PORT to answer on.")] = "127.0.0.1:9443",
    ) -> None:
        """Answers until it is stopped. gRPC, TLS both ways, `grpc.health.v1` beside.

        Example: coterie witness serve witness --listen 0.0.0.0:9443
        """
        _serve(invocation, Folder(folder), checked_address(listen))

    def show(folder: FolderArgument) -> None:
        """Shows each enrolled ledger, where it stands and what was refused, and each pass.

        Example: coterie witness show witness
        """
        with Folder(folder).book() as book:
            standings, passes = book.standings(), book.passes()
        if invocation.json:
            told = {"passes": [asdict(each) for each in passes]}
            emit_json({"ledgers": [_fields(each) for each in standings], **told})
        else:
            _show(standings, Console(markup=False))
            _show_passes(passes, Console(markup=False))

    run_typer([init, admit, revoke, enrol, serve, show], invocation)


def _serve(invocation: Invocation, folder: Folder, listen: str) -> None:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", force=True
    )
    with folder.book() as book:
        key = folder.key()
        server, address = started(folder, Witness(book, key), listen)
        stopping = threading.Event()
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda *_: stopping.set())
        facts = {"address": address, "key": public_hex(key), "ledgers": len(book.standings())}
        _answer(invocation, facts)
        sys.stdout.flush()
        stopping.wait()
        server.stop(GRACE_S).wait()


def started(folder: Folder, witness: Witness, listen: str) -> tuple[grpc.Server, str]:
    """A server that answers, and where. Raises: ConfigError if the address is taken."""
    server = grpc.server(
        ThreadPoolExecutor(THREADS, "witness"),
        maximum_concurrent_rpcs=MOST_CALLS,
        options=[
            ("grpc.max_receive_message_length", MAX_BYTES),
            ("grpc.max_metadata_size", MAX_METADATA),
            ("grpc.so_reuseport", 0),
        ],
    )
    server.add_generic_rpc_handlers((handlers(witness),))
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name in ("", SERVICE):
        checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        port = server.add_secure_port(listen, folder.credentials())
    except RuntimeError as error:
        raise ConfigError(f"--listen={listen}: cannot be listened on; is it in use?") from error
    server.start()
    return server, f"{listen.rpartition(':')[0]}:{port}"


def _fields(standing: Standing) -> dict[str, Any]:
    return {
        "id": standing.ledger,
        "node": standing.node,
        "head": str(standing.head),
        "site_key": standing.key,
        "seen": standing.seen,
        "refused": list(standing.refused),
    }


def _show(standings: list[Standing], console: Console) -> None:
    table = Table(title="Ledgers witnessed", title_justify="left")
    for column in ("id", "node", "entries", "head", "last heard", "refused"):
        table.add_column(column)
    for each in standings:
        cells = (each.ledger, each.node, str(each.head.seq), each.head.hash[:16], each.seen)
        table.add_row(*cells, str(len(each.refused)))
    console.print(table)
    for each in standings:
        for found in each.refused:
            reason = Refusal[found["reason"]].value
            console.print(
                f"{each.ledger}: {found['seen']}: {reason} ({found['head']})", soft_wrap=True
            )


def _show_passes(passes: list[Given], console: Console) -> None:
    table = Table(title="Passes given", title_justify="left")
    for column in ("name", "given", "valid until", "taken back"):
        table.add_column(column)
    for each in passes:
        table.add_row(each.name, each.given, each.until, each.revoked or "no")
    console.print(table)


def _answer(invocation: Invocation, content: dict[str, Any]) -> None:
    if invocation.json:
        emit_json(content)
    else:
        print(", ".join(f"{name} {value}" for name, value in content.items()))
