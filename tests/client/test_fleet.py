"""The contract with Flower: every semi-private name and behaviour that `client/fleet.py` rests on.

A test that fails here says which flwr broke what; `common.code.FLOWERS` is widened when all pass.
"""

import ast
import gzip
import inspect
import os
import subprocess
import sys
from base64 import b64encode
from importlib import metadata
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.common import constant
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.supercore import constant as names
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.superlink.routers.fleet.router import router
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

import client.fleet
from client.fleet import Fleet, Parcel, UnreachableError, run_of
from common.certificates import make_authority
from common.cli import ENVIRONMENT
from common.code import FLOWERS, check_flower
from common.errors import ConfigError, VerificationError
from server.federation import Door

COUNT_PARTS = """
import numpy as np
from flwr.app import Array
parts = [part for _, part in Array(np.zeros(30 << 20, np.uint8)).slice_array()]
print(len(parts), max(len(part.data) for part in parts))
"""
FLWR = f"flwr {metadata.version('flwr')}"
ROOT = Path(__file__).resolve().parents[2]
CALLS = {
    "ActivateNode": ("/v1/fleet/activate-node", fleet_pb2.ActivateNodeRequest),
    "DeactivateNode": ("/v1/fleet/deactivate-node", fleet_pb2.DeactivateNodeRequest),
    "SendNodeHeartbeat": (
        "/v1/fleet/send-node-heartbeat",
        heartbeat_pb2.SendNodeHeartbeatRequest,
    ),
    "PullMessages": ("/v1/fleet/pull-messages", fleet_pb2.PullMessagesRequest),
    "PushMessages": ("/v1/fleet/push-messages", fleet_pb2.PushMessagesRequest),
    "GetRun": ("/v1/fleet/get-run", run_pb2.GetRunRequest),
    "PullObject": ("/v1/fleet/pull-object", message_pb2.PullObjectRequest),
    "PushObject": ("/v1/fleet/push-object", message_pb2.PushObjectRequest),
    "ConfirmMessageReceived": (
        "/v1/fleet/confirm-message-received",
        message_pb2.ConfirmMessageReceivedRequest,
    ),
}
FIELDS = {
    fleet_pb2.ActivateNodeRequest: {"public_key", "heartbeat_interval"},
    fleet_pb2.ActivateNodeResponse: {"node_id"},
    fleet_pb2.DeactivateNodeRequest: {"node_id"},
    fleet_pb2.PullMessagesRequest: {"node"},
    fleet_pb2.PullMessagesResponse: {"messages_list", "message_object_trees"},
    fleet_pb2.PushMessagesRequest: {
        *("node", "messages_list", "message_object_trees", "clientapp_runtime_list"),
    },
    fleet_pb2.PushMessagesResponse: {"objects_to_push", "session_id"},
    heartbeat_pb2.SendNodeHeartbeatRequest: {"node", "heartbeat_interval"},
    heartbeat_pb2.SendNodeHeartbeatResponse: {"success"},
    run_pb2.GetRunRequest: {"node", "run_id"},
    message_pb2.PullObjectRequest: {"node", "run_id", "object_id"},
    message_pb2.PullObjectResponse: {"object_found", "object_available", "object_content"},
    message_pb2.PushObjectRequest: {
        *("node", "run_id", "object_id", "object_content", "session_id"),
    },
    message_pb2.PushObjectResponse: {"stored"},
    message_pb2.ConfirmMessageReceivedRequest: {"node", "run_id", "message_object_id"},
    message_pb2.ObjectTree: {"object_id", "children"},
}


class Wire:
    """What a Fleet client was made to send."""

    def __init__(self, monkeypatch):
        self.path = ""
        monkeypatch.setattr(FleetHttpClient, "_unary_unary", self._take)

    def _take(self, **facts):
        self.path = facts["path"]


def message(seed=0):
    """An instruction as a SuperLink sends it."""
    vector = np.random.default_rng(seed).normal(size=2_000_000).astype(np.float32)
    arrays = ArrayRecord({"vector": Array(vector)})
    content = RecordDict({"vector": arrays, "facts": ConfigRecord({"round": 1})})
    facts = Metadata(7, "", 1, 2, "", "3", 1_800_000_000.0, 60.0, "train")
    made = Message(content, metadata=facts)
    facts.__dict__["_message_id"] = made.object_id
    return made


def parcel_of(made):
    with no_object_id_recompute():
        tree = get_object_tree(made)
        parts = {name: each.deflate() for name, each in get_all_nested_objects(made).items()}
    stub = Message(RecordDict(), metadata=made.metadata)
    envelope = PullMessagesResponse(
        messages_list=[message_to_proto(stub)], message_object_trees=[tree]
    )
    return Parcel(envelope.SerializeToString(), tree.object_id, parts)


@pytest.mark.parametrize("name", CALLS)
def test_flower_has_each_call_under_its_path_for_its_request(monkeypatch, name):
    path, request = CALLS[name]
    wire = Wire(monkeypatch)
    with FleetHttpClient("https://127.0.0.1:1") as fleet:
        getattr(fleet, name)(request())
    assert wire.path == path, f"{FLWR}: FleetHttpClient.{name} goes to {wire.path}"
    assert path in {route.path for route in router.routes}, f"{FLWR}: no SuperLink has {path}"


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.DESCRIPTOR.name)
def test_flowers_messages_have_the_fields_that_are_used(kind):
    missing = FIELDS[kind] - {field.name for field in kind.DESCRIPTOR.fields}
    assert not missing, f"{FLWR}: {kind.DESCRIPTOR.name} has no {', '.join(sorted(missing))}"


def test_flowers_client_is_built_as_it_is_here():
    parameters = inspect.signature(FleetHttpClient.__init__).parameters
    for name in ("base_url", "interceptors", "verify", "timeout"):
        assert name in parameters, f"{FLWR}: FleetHttpClient takes no {name}"
    assert [*inspect.signature(NodeAuthHttpInterceptor.__init__).parameters] == [
        *("self", "private_key", "public_key")
    ], f"{FLWR}: NodeAuthHttpInterceptor is built otherwise"
    assert constant.HEARTBEAT_DEFAULT_INTERVAL * constant.HEARTBEAT_PATIENCE == 60, (
        f"{FLWR}: a silent node counts as there for another time than 60 s"
    )


def test_a_message_survives_its_parts_and_the_disk():
    """As Flower takes it apart, so it is put together; a kept one is the one that came."""
    made = message()
    parcel = Parcel.from_bytes(parcel_of(made).to_bytes())
    assert parcel == parcel_of(made)
    assert len(parcel.parts) > 5, f"{FLWR}: a vector of 8 MB travels in one part"
    again = parcel.message()
    assert again.metadata.message_id == made.metadata.message_id
    assert (again.metadata.run_id, again.metadata.created_at) == (7, 1_800_000_000.0)
    vectors = [each.content["vector"]["vector"].numpy() for each in (again, made)]
    assert np.array_equal(*vectors)
    assert run_of(parcel.envelope) == 7
    assert parcel.addressed().metadata.message_id == made.metadata.message_id


def test_a_reply_made_again_is_the_same_message():
    """What a killed node had pushed in part is not refused as a second answer."""
    made = message()
    replies = [Message(Error(603, "local failure"), reply_to=made) for _ in range(2)]
    for reply in replies:
        reply.metadata.created_at = made.metadata.created_at
        reply.metadata.ttl = made.metadata.ttl
    assert replies[0].object_id == replies[1].object_id, f"{FLWR}: a message's id is of more"


@pytest.mark.parametrize("fault", ["a byte", "a part", "the head", "the end"])
def test_an_instruction_that_was_altered_is_not_read(fault):
    content = bytearray(parcel_of(message()).to_bytes())
    if fault == "a byte":
        content[-5] ^= 1
    elif fault == "the end":
        del content[-5:]
    elif fault == "the head":
        del content[:5]
    if fault == "a part":
        parcel = Parcel.from_bytes(bytes(content))
        del parcel.parts[next(iter(parcel.parts))]
        with pytest.raises(VerificationError):
            parcel.message()
    else:
        with pytest.raises(VerificationError):
            Parcel.from_bytes(bytes(content))


@pytest.fixture
def fleet(tmp_path):
    """A line to nobody."""
    authority = make_authority(tmp_path / "authority").certificate
    return Fleet("127.0.0.1:1", authority, ec.generate_private_key(ec.SECP384R1()))


def pulled(fleet, monkeypatch, parcel):
    """Fetches an instruction whose parts lie in a parcel; how many were asked for."""
    asked = []

    def pull(request):
        asked.append(request.object_id)
        content = parcel.parts[request.object_id]
        return message_pb2.PullObjectResponse(
            object_found=True, object_available=True, object_content=content
        )

    monkeypatch.setattr(fleet._client, "PullObject", pull)
    response = PullMessagesResponse.FromString(parcel.envelope)
    return fleet.fetch(7, parcel.envelope, response.message_object_trees[0]), len(asked)


def test_a_node_takes_an_instruction_of_the_size_allowed_and_no_larger_one(fleet, monkeypatch):
    """A coordinator cannot fill a node's memory: parts are counted while they come."""
    parcel = parcel_of(message())
    size = sum(map(len, parcel.parts.values()))
    monkeypatch.setattr(client.fleet, "MAX_PARCEL_BYTES", size)
    assert pulled(fleet, monkeypatch, parcel) == (parcel, len(parcel.parts))
    monkeypatch.setattr(client.fleet, "MAX_PARCEL_BYTES", size - 1)
    with pytest.raises(VerificationError, match="too large"):
        pulled(fleet, monkeypatch, parcel)


def test_a_node_reads_no_more_of_an_answer_than_a_superlink_can_have_to_say(fleet, monkeypatch):
    """Also where a few packed bytes would become many."""
    monkeypatch.setattr(client.fleet, "MAX_ANSWER_BYTES", 100_000)
    read, packed = [], gzip.compress(bytes(50_000_000))

    def endless(request):
        if request.url.path.endswith("get-run"):
            return httpx.Response(200, headers={"content-encoding": "gzip"}, content=packed)

        def chunks():
            while True:
                read.append(10_000)
                yield bytes(10_000)

        return httpx.Response(200, content=chunks())

    monkeypatch.setattr(
        fleet._bounded, "_client", httpx.Client(transport=httpx.MockTransport(endless))
    )
    with pytest.raises(UnreachableError, match="its answer is none"):
        fleet.receive()
    assert sum(read) <= 110_000
    with pytest.raises(UnreachableError, match="its answer is none"):
        fleet.check_running(7)


def test_no_instruction_makes_a_node_evaluate_what_it_names():
    """Flower builds objects by class name, from a list of seven."""
    parcel = parcel_of(message())
    body = b"os.system\x00\x00"
    parts = {**parcel.parts, parcel.root: body}
    with pytest.raises(VerificationError):
        Parcel(parcel.envelope, parcel.root, parts).message()
    with pytest.raises(KeyError):
        inflate_object_from_contents("a", {"a": b"os.system  0\x00"})


def test_only_one_file_knows_flowers_semi_private_names():
    """Those of `flwr.supernode`, `flwr.superlink`, `flwr.supercore` and `flwr.proto`."""
    private = ("flwr.supernode", "flwr.superlink", "flwr.supercore", "flwr.proto")
    users = set()
    for path in (ROOT / "client").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(private):
                users.add(path.name)
    assert users == {"fleet.py"}


def test_a_node_has_no_way_to_ask_for_a_bundle():
    source = Path(client.fleet.__file__).read_text()
    names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    assert {"GetFab", "get_fab"}.isdisjoint(names)


def test_this_flower_is_one_that_is_known():
    check_flower(metadata.version("flwr"))
    assert tuple(map(int, metadata.version("flwr").split(".")[:2])) in FLOWERS


@pytest.mark.parametrize("version", ["1.40.0", "1.43.0", "2.41.0", "nightly", "1", ""])
def test_any_other_flower_is_refused_in_one_line(version):
    with pytest.raises(ConfigError, match=r"needs 1\.41 or 1\.42") as refused:
        check_flower(version)
    assert "\n" not in str(refused.value)


def test_a_call_is_signed_by_the_nodes_key():
    """The SuperLink believes a call by these headers and by nothing else."""
    key = ec.generate_private_key(ec.SECP384R1())
    request = httpx.Request("POST", "https://127.0.0.1:1/v1/fleet/get-run")
    context = ProtobufRequestContext("", run_pb2.GetRunRequest(), request)
    signing = NodeAuthHttpInterceptor(key, key.public_key())
    signing.intercept(context, lambda _: httpx.Response(200))
    headers = request.headers
    assert (
        headers[names.FLEET_HTTP_PUBLIC_KEY_HEADER]
        == b64encode(client.fleet.public_key_to_bytes(key.public_key())).decode()
    ), f"{FLWR}: says otherwise whose call it is"
    assert names.FLEET_HTTP_SIGNATURE_HEADER in headers, f"{FLWR}: signs no call"


def test_a_node_that_steps_away_is_offline_until_it_is_back(fleet, monkeypatch):
    """No sign of life comes between: its thread would have the node online again at once."""
    calls = []

    def answering(kind, answer):
        return lambda _: calls.append(kind) or answer

    alive = heartbeat_pb2.SendNodeHeartbeatResponse(success=True)
    monkeypatch.setattr(fleet._client, "DeactivateNode", answering("offline", None))
    monkeypatch.setattr(fleet._client, "SendNodeHeartbeat", answering("online", alive))
    beating = Thread(target=fleet.beat)

    def rest():
        beating.start()
        beating.join(0.2)
        calls.append("rested")

    fleet.step_away(rest)
    beating.join()
    assert calls == ["offline", "rested", "online", "online"]


def test_vectors_travel_in_parts_of_the_size_that_we_ask_for():
    """The setting is Flower's own and private; without it large models take a fifth longer."""
    size = ENVIRONMENT["FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"]
    said = subprocess.run(
        [sys.executable, "-c", COUNT_PARTS],
        env={**os.environ, **ENVIRONMENT},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert said.split() == ["3", size], f"{FLWR} reads another setting"
    assert int(size) < Door().max_body_mb << 20
