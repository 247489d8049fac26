"""Flower's fleet protocol, as a node of ours speaks it: the only file with semi-private names.

Flower publishes no client of its Fleet API; what is taken from `flwr.supernode` and
`flwr.supercore` stands here, and `tests/client/test_fleet.py` says which name or behaviour of which
flwr it needs. Flower's own connection (`http_request_response`) is not used: it ends the process
where it cannot connect, and retries without telling anybody. The bundle of a run is never asked
for: there is no call of GetFab here.

Every call has a deadline of `CALL_S`, and none is repeated here: `client.service` decides that.
"""

import hashlib
import json
import ssl
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from threading import Lock
from time import monotonic, sleep, time
from typing import Any, TypeAlias, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from common.certificates import Credentials
from common.errors import ConfigError, CoterieError, FederationError, VerificationError
from common.inflation import inflated
from common.keys import check_secret
from common.messages import MAX_VECTOR_BYTES

CALL_S = 30.0
"""Deadline of one call."""
OBJECTS_S = 60.0
"""How long a part of an instruction may be on its way to the SuperLink itself."""
ASK_AGAIN_S = 0.1
TRANSFERS = 4
"""Parts that travel at a time."""
MAX_PARTS = 100_000
"""Of one instruction: at Flower's 5 MiB each, more than a protobuf frame could ever name."""
MAX_ANSWER_BYTES = 128 << 20
"""Of one call. Flower's parts are 5 MiB; a coordinator may choose larger ones."""
MAX_PARCEL_BYTES = MAX_VECTOR_BYTES + (16 << 20)
"""Of all parts of one instruction: the parameters, and what stands beside them."""
CLOCK_TOLERANCE_S = 4.0
"""Flower takes no call that is dated 5 s ahead of it or 305 s behind."""
UNAUTHORIZED, FORBIDDEN, PRECONDITION_FAILED, TOO_LARGE = 401, 403, 412, 413
DOOR = "coterie-door"
"""The header in which the door of a coordinator's kit says what is wrong with a certificate."""
NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})
"""What OpenSSL calls an answer in plain text; other faults of TLS pass."""
NOT_REACHED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
"""Faults before anything of a call was sent."""
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""What a SuperLink, or what stands before it, answers while something is wrong with it."""

Handed: TypeAlias = tuple[bytes, ObjectTree]
"""The envelope of an instruction, and the tree of its parts."""
Request = TypeVar("Request")
Response = TypeVar("Response")


class UnreachableError(FederationError):
    """Nobody answered; it may be otherwise in a moment."""


class NotReachedError(UnreachableError):
    """The call did not get there: nothing came of it."""


class NotAdmittedError(ConfigError):
    """The SuperLink does not know this node, or is none that this node believes."""


class RunOverError(CoterieError):
    """The run, or the instruction, is no longer waited for."""


@dataclass(frozen=True)
class Parcel:
    """One instruction as it came, in parts; enough to answer it at any time later."""

    envelope: bytes
    """The message without its content, as Flower sends it."""
    root: str
    """The id of the whole, by which Flower knows the message."""
    parts: dict[str, bytes]
    """By id, the SHA-256 of each."""

    def to_bytes(self) -> bytes:
        """One file: a line of JSON that says what follows."""
        head = {
            "envelope": b64encode(self.envelope).decode(),
            "root": self.root,
            "parts": {name: len(part) for name, part in self.parts.items()},
        }
        return b"".join((json.dumps(head).encode(), b"\n", *self.parts.values()))

    @classmethod
    def from_bytes(cls, content: bytes) -> "Parcel":
        """What `to_bytes` made. Raises: VerificationError if it is not that, or was altered."""
        line, _, rest = content.partition(b"\n")
        try:
            head = json.loads(line)
            parts, at = {}, 0
            for name, size in head["parts"].items():
                parts[name] = rest[at : at + size]
                at += size
            parcel = cls(b64decode(head["envelope"]), head["root"], parts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VerificationError("an instruction that was kept cannot be read") from error
        parcel._check()
        return parcel

    def _check(self) -> None:
        for name, part in self.parts.items():
            if hashlib.sha256(part).hexdigest() != name:
                raise VerificationError("an instruction is not what its name says")

    def message(self) -> Message:
        """The instruction itself. Raises: VerificationError if it is malformed."""
        self._check()
        try:
            message = inflated(self.root, self.parts)
        except VerificationError as error:
            raise VerificationError("an instruction is malformed") from error
        if not message.has_content():
            raise VerificationError("an instruction is malformed")
        return _named(message, self.root)

    def addressed(self) -> Message:
        """The instruction without its content: what a refusal replies to."""
        response = PullMessagesResponse.FromString(self.envelope)
        return _named(message_from_proto(response.messages_list[0]), self.root)


class Fleet:
    """A node's line to one SuperLink.

    Raises, from every method that calls: UnreachableError where it may be otherwise in a moment,
    NotAdmittedError where it will not, RunOverError where the run is over.
    """

    def __init__(
        self,
        address: str,
        authority: Path,
        key: ec.EllipticCurvePrivateKey,
        version: str = "",
        own: Credentials | None = None,
    ) -> None:
        """Args: address: HOST:PORT; authority: whose certificates are believed; version: of flwr,
        as the SuperLink is told it, if not the one that is installed; own: what a door before the
        SuperLink asks this node for.

        Raises: ConfigError if `authority` holds no certificate, or `own` is none.
        """
        self.address, self._version = address, version or metadata.version("flwr")
        self._trust = _trusting(authority, own)
        self._public = public_key_to_bytes(key.public_key())
        self._bounded = _Bounded(self._trust)
        self._client = FleetHttpClient(
            f"https://{address}",
            interceptors=[
                _Version(self._version),
                NodeAuthHttpInterceptor(key, key.public_key()),
                self._bounded,
            ],
            verify=self._trust,
            timeout=CALL_S,
        )
        self._node = Node()
        self._presence = Lock()
        """Held where it must not change: no sign of life while this node is to be away."""

    @property
    def node_id(self) -> int:
        """By which Flower knows this node, once it has joined."""
        return int(self._node.node_id)

    def join(self, known: int | None = None) -> None:
        """Comes online. Args: known: the node id of an earlier time, which need not have ended:
        Flower lets nobody in anew before it holds an earlier process for dead.
        """
        self.check_version()
        if known is not None and self._is_known(known):
            self._node = Node(node_id=known)
            return
        response = self._call(
            self._client.ActivateNode,
            ActivateNodeRequest(
                public_key=self._public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
            ),
        )
        self._node = Node(node_id=response.node_id)

    def leave(self) -> None:
        """Goes offline, if it was online and anybody hears it; closes the line in any case."""
        try:
            if self.node_id:
                request = DeactivateNodeRequest(node_id=self.node_id)
                self._call(self._client.DeactivateNode, request)
        except CoterieError:
            pass
        finally:
            self._client.close()
            self._bounded.close()

    def beat(self) -> None:
        """Says that this node is alive; every 30 s would do."""
        with self._presence:
            known = self._beat(self._node)
        if not known:
            raise NotAdmittedError(f"superlink={self.address}: no longer knows this node")

    def step_away(self, rest: Callable[[], object]) -> None:
        """Is offline while `rest` takes its time: a coordinator that looks for an answer meanwhile
        hears that there will be none, and asks again.
        """
        with self._presence:
            with suppress(NotAdmittedError):  # it was offline already
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self.node_id))
            rest()
        self.beat()

    def receive(self) -> Handed | None:
        """The envelope of the next instruction, and what it consists of; from now on it is nobody
        else's, and is not sent again.
        """
        response = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        return response.SerializeToString(), response.message_object_trees[0]

    def fetch(self, run: int, envelope: bytes, tree: ObjectTree) -> Parcel:
        """All parts of an instruction. Raises: VerificationError if one is not what its id says, or
        if together they are larger than an instruction may be.
        """
        ids = [*dict.fromkeys(each.object_id for each in iterate_object_tree(tree))]
        if len(ids) > MAX_PARTS:
            raise VerificationError("an instruction has too many parts")
        room, part = (
            _Room(MAX_PARCEL_BYTES),
            partial(self._part, run, until=monotonic() + OBJECTS_S),
        )
        parts = _at_once(lambda name: room.take(part(name)), ids)
        parcel = Parcel(envelope, tree.object_id, dict(zip(ids, parts, strict=True)))
        parcel._check()
        return parcel

    def confirm(self, run: int, root: str) -> None:
        """Lets the SuperLink forget the parts of an instruction."""
        request = ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=root)
        self._call(self._client.ConfirmMessageReceived, request)

    def check_running(self, run: int) -> None:
        """Raises: RunOverError if nobody would take an answer."""
        self._call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run))

    def send(self, reply: Message, begun: str, began: Callable[[str], None]) -> int:
        """Sends a reply, the whole of it or nothing that counts; it may be sent again.

        How long the answer took is not told: a node's own clock is its own.
        Args: begun: the session in which an earlier process began to send this reply, if one did;
        began: called with that of this one, before any part has gone.
        """
        with no_object_id_recompute():
            _named(reply, reply.object_id)
            tree = get_object_tree(reply)
            parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        run = reply.metadata.run_id
        if begun:  # of what is there, the SuperLink says that it does not keep it: that is well
            _at_once(lambda name: self._keeps(run, begun, name, parts[name]), parts)
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        response = self._call(self._client.PushMessages, request)
        wanted, session = [*response.objects_to_push], response.session_id
        size = sum(map(len, parts.values()))
        if not wanted:
            if begun:
                return size
            raise RunOverError("nobody waits for this answer any more, or it is there already")
        began(session)
        if not all(_at_once(lambda name: self._keeps(run, session, name, parts[name]), wanted)):
            raise UnreachableError(f"superlink={self.address}: did not keep a part of an answer")
        return size

    def check_version(self) -> None:
        """Raises: NotAdmittedError if the SuperLink says that it is of another flwr minor.

        What stands before a SuperLink may hide what it is; then nothing is known, and nothing said.
        """
        try:
            answer = self._bounded.get(f"https://{self.address}/openapi.json")
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        except ValueError as error:
            raise UnreachableError(f"superlink={self.address}: its answer is none") from error
        try:
            theirs = str(answer.json()["info"]["version"]) if answer.is_success else ""
        except (ValueError, KeyError, TypeError):
            return
        if theirs and _minor(theirs) != _minor(self._version):
            raise NotAdmittedError(
                f"superlink={self.address}: runs flwr {theirs[:20]!r}, and this node "
                f"{self._version}; both must be of one minor version"
            )

    def _is_known(self, node_id: int) -> bool:
        try:
            return self._beat(Node(node_id=node_id))
        except NotAdmittedError:
            return False

    def _beat(self, node: Node) -> bool:
        request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        return bool(self._call(self._client.SendNodeHeartbeat, request).success)

    def _part(self, run: int, name: str, *, until: float) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run, object_id=name)
        while True:
            response = self._call(self._client.PullObject, request)
            if not response.object_found or monotonic() > until:
                raise RunOverError("the SuperLink no longer has this instruction")
            if response.object_available:
                return bytes(response.object_content)
            sleep(ASK_AGAIN_S)

    def _keeps(self, run: int, session: str, name: str, part: bytes) -> bool:
        request = PushObjectRequest(
            node=self._node, run_id=run, object_id=name, object_content=part, session_id=session
        )
        return bool(self._call(self._client.PushObject, request).stored)

    def _call(self, call: Callable[[Request], Response], request: Request) -> Response:
        try:
            return call(request)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        except httpx.HTTPStatusError as error:
            raise self._refused(error.response) from error
        except ValueError as error:  # no protobuf: something else answers there
            raise UnreachableError(f"superlink={self.address}: its answer is none") from error

    def _unreachable(self, error: httpx.TransportError) -> CoterieError:
        where = f"superlink={self.address}"
        cause = _of_tls(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return NotAdmittedError(
                f"{where}: its certificate is not believed ({cause.verify_message}); have the "
                "coordinator renew it, or give the authority that signed it"
            )
        if cause is not None and cause.reason in NO_TLS:
            return NotAdmittedError(f"{where}: does not speak TLS, and nodes speak nothing else")
        kind = NotReachedError if isinstance(error, NOT_REACHED) else UnreachableError
        return kind(f"{where}: cannot be reached ({_words(error)})")

    def _refused(self, response: httpx.Response) -> CoterieError:
        where, status = f"superlink={self.address}", response.status_code
        if DOOR in response.headers or status == TOO_LARGE:
            return NotAdmittedError(f"{where}: its door {_of_door(response)}")
        if status == UNAUTHORIZED:
            return NotAdmittedError(f"{where}: {_of_signature(response)}")
        if status == PRECONDITION_FAILED:
            return NotAdmittedError(
                f"{where}: lets this node's key in no more than once, and only if it is "
                "registered: have the coordinator register it, or stop the node that has it, and "
                "wait a minute if that one was killed"
            )
        if status == FORBIDDEN:
            return RunOverError("the run is over")
        if status in PASSING:
            return UnreachableError(f"{where}: answers with status {status}")
        return NotAdmittedError(f"{where}: is no SuperLink, or speaks otherwise (status {status})")


class _Room:
    """How much of an instruction may still come."""

    def __init__(self, size: int) -> None:
        self._left, self._turn = size, Lock()

    def take(self, part: bytes) -> bytes:
        """The part. Raises: VerificationError if it is one too many."""
        with self._turn:
            self._left -= len(part)
            if self._left < 0:
                raise VerificationError("an instruction is too large")
        return part


class _Bounded:
    """The last of the interceptors: it makes the call itself, and reads no more of an answer than a
    SuperLink can have to say, whatever it is packed in. It follows nobody elsewhere.
    """

    def __init__(self, trust: ssl.SSLContext) -> None:
        self._client = httpx.Client(verify=trust, timeout=CALL_S)

    def intercept(self, context: ProtobufRequestContext, _: ProtobufCall) -> httpx.Response:
        """Raises: ValueError if there is no end to the answer."""
        return self._answer(context.request)

    def get(self, url: str) -> httpx.Response:
        """What is there. Raises: as before."""
        return self._answer(self._client.build_request("GET", url))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        content, unpacked = bytearray(), {"content-encoding", "content-length", "transfer-encoding"}
        response = self._client.send(request, stream=True)
        try:
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        finally:
            response.close()
        headers = [each for each in response.headers.multi_items() if each[0] not in unpacked]
        return httpx.Response(
            response.status_code, headers=headers, content=bytes(content), request=request
        )

    def close(self) -> None:
        """Ends the line."""
        self._client.close()


class _Version:
    """Tells the SuperLink which flwr this is, as Flower's own nodes do."""

    def __init__(self, version: str) -> None:
        self._headers = dict(
            RuntimeVersionMetadata.from_local_component(
                "SuperNode", package_version_value=version
            ).as_metadata()
        )

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Adds what every call says of its sender."""
        add_headers(context.request, self._headers)
        return call_next(context)


def run_of(envelope: bytes) -> int:
    """The number of the run, Flower's, that an instruction is of."""
    return int(PullMessagesResponse.FromString(envelope).messages_list[0].metadata.run_id)


def _named(message: Message, name: str) -> Message:
    """Flower gives a message its id outside of its constructor, in every client of its own."""
    message.metadata.__dict__["_message_id"] = name
    return message


def _trusting(authority: Path, own: Credentials | None) -> ssl.SSLContext:
    """Believes certificates of this authority, and of no other; shows `own` where it is asked for.

    Raises: ConfigError.
    """
    try:
        content = authority.expanduser().read_text("ascii")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=content)
    except FileNotFoundError as error:
        raise ConfigError(f"authority={authority}: no such file") from error
    except (ValueError, ssl.SSLError) as error:
        raise ConfigError(f"authority={authority}: holds no certificate in PEM") from error
    if own is not None:
        _show(context, own)
    return context


def _show(context: ssl.SSLContext, own: Credentials) -> None:
    certificate, key = own.certificate.expanduser(), own.key.expanduser()
    try:
        check_secret(key)
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except FileNotFoundError as error:
        missing = key if certificate.exists() else certificate
        raise ConfigError(f"certificate={certificate}: {missing} is not there") from error
    except (ValueError, ssl.SSLError) as error:
        raise ConfigError(
            f"certificate={certificate}: is no certificate in PEM, or {key} is not its private key"
        ) from error


def _no_passphrase() -> str:
    raise ValueError("a key with a passphrase")  # instead of asking at the terminal


def _of_tls(error: BaseException) -> ssl.SSLError | None:
    """The fault of TLS under a fault of transport, if that is what it was."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _of_signature(response: httpx.Response) -> str:
    """Why a SuperLink took a call for nobody's."""
    ahead = _ahead_s(response)
    if not -CLOCK_TOLERANCE_S < ahead < CLOCK_TOLERANCE_S:
        return (
            f"this machine's clock is {abs(ahead):.0f} s "
            f"{'ahead of' if ahead > 0 else 'behind'} the coordinator's; set it right"
        )
    return "does not know this node's key; have the coordinator register it"


def _of_door(response: httpx.Response) -> str:
    """Why the door of a coordinator's kit let something through no further."""
    if response.status_code == TOO_LARGE:
        return "takes no message of that size"
    words = "".join(each for each in response.headers[DOOR][:80] if each.isprintable())
    return (
        f"does not let this node in ({words}); give the certificate and certificate_key of this "
        "site's kit, or get the kit renewed"
    )


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _ahead_s(response: httpx.Response) -> float:
    """By how many seconds this machine's clock is ahead of the answer's date; 0 if it has none."""
    try:
        return time() - parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return 0.0


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def _at_once(work: Callable[[Any], Response], items: Iterable[Any]) -> list[Response]:
    """The results in order; the first fault ends what has not begun, and is raised."""
    with ThreadPoolExecutor(TRANSFERS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
