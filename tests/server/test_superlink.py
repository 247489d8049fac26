"""Large requests reach Flower in one piece; everything else as it comes."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from common.cli import ENVIRONMENT
from server.superlink import FORBIDDEN, PROGRAM, PUSH, WHOLE, Careful, is_own_reply

COTERIE = Path(sys.executable).parent / "coterie"

PIECES = [b"one", b"", b"two", b"three"]


def request(pieces):
    """The events of a request whose body comes so."""
    last = len(pieces) - 1
    return [
        {"type": "http.request", "body": piece, "more_body": at < last}
        for at, piece in enumerate(pieces)
    ]


GONE = {"type": "http.disconnect"}


def served(events, path="/v1/fleet/push-object", kind="http", method="POST"):
    """What is read behind `Careful` until the sender is gone; None if nobody is asked."""
    coming, read = list(events), []

    async def application(scope, receive, send):
        assert scope["path"] == path
        while not read or read[-1] != GONE:
            read.append(await receive())
        await send({"type": "answer"})

    async def receive():
        return coming.pop(0)

    sent = []

    async def send(event):
        sent.append(event)

    asyncio.run(Careful(application)({"type": kind, "path": path, "method": method}, receive, send))
    assert sent == ([{"type": "answer"}] if read else [])
    return read or None


@pytest.mark.parametrize("path", sorted(WHOLE))
@pytest.mark.parametrize("pieces", [PIECES, [b"x"], [b""]], ids=len)
def test_a_part_comes_in_one_piece_and_what_follows_after_it(path, pieces):
    whole = {"type": "http.request", "body": b"".join(pieces), "more_body": False}
    assert served([*request(pieces), GONE], path) == [whole, GONE]


def test_a_request_without_a_body_has_an_empty_one():
    whole = {"type": "http.request", "body": b"", "more_body": False}
    assert served([{"type": "http.request"}, GONE]) == [whole, GONE]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *(("/v1/control/start-run", "http"), ("/v1/fleet/pull-messages", "http")),
        *(("/x/v1/fleet/push-object", "http"), ("/v1/fleet/push-object", "lifespan")),
    ],
)
def test_everything_else_comes_as_it_came(path, kind):
    events = [*request(PIECES), GONE]
    assert served(events, path, kind) == events


def test_what_flower_would_not_read_is_not_read():
    events = [*request(PIECES), GONE]
    assert served(events, method="PUT") == events


def test_of_a_sender_who_leaves_in_the_middle_nobody_is_told():
    assert served([*request(PIECES)[:2], GONE]) is None


def pushed(node=7, **changes):
    """What a node pushes: an answer of its own, but for some of it."""
    facts = {"src_node_id": 7, "dst_node_id": 1, "reply_to_message_id": "m-1", "run_id": 3}
    return PushMessagesRequest(
        node=Node(node_id=node), messages_list=[Message(metadata=Metadata(**{**facts, **changes}))]
    ).SerializeToString()


NOT_OWN = {
    "of another node": pushed(src_node_id=8),
    "of nobody": pushed(src_node_id=0),
    "of the SuperLink": pushed(src_node_id=1),
    "under another's name": pushed(node=8),
    "for another node": pushed(dst_node_id=8),
    "an instruction": pushed(dst_node_id=8, reply_to_message_id=""),
    "an instruction for the coordinator": pushed(reply_to_message_id=""),
    "a second message": pushed() + pushed(src_node_id=8),
}


@pytest.mark.parametrize("body", NOT_OWN.values(), ids=NOT_OWN)
def test_a_node_pushes_nothing_but_answers_of_its_own(body):
    answered = []

    async def application(scope, receive, send):
        raise AssertionError("Flower heard of it")

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(event):
        answered.append(event)

    scope = {"type": "http", "method": "POST", "path": PUSH}
    asyncio.run(Careful(application)(scope, receive, send))
    assert [each.get("status", each.get("body")) for each in answered] == [403, FORBIDDEN]


@pytest.mark.parametrize("body", [pushed(), pushed() + pushed(), b"", b"no protobuf"])
def test_its_own_answers_pass_and_what_flower_refuses_itself(body):
    assert is_own_reply(body)


def test_the_routes_are_flowers():
    """The contract with flwr 1.41; were one renamed, nothing would be guarded or quicker."""
    assert {("POST", path) for path in WHOLE} <= PROTOBUF_REQUEST_TYPES.keys()
    assert PROTOBUF_REQUEST_TYPES["POST", PUSH] is PushMessagesRequest


SERVING = """
import uvicorn
from common.cli import Invocation
from server.superlink import superlink

def show(app, **options):
    print("SERVED", type(app).__name__, type(app._app).__name__, options["workers"])

uvicorn.run = show
superlink(Invocation("superlink", ("--insecure", "--database", ":memory:"), json=False))
print("RESTORED", uvicorn.run is show)
"""


def test_flower_serves_by_uvicorn_and_what_it_serves_is_wrapped(tmp_path):
    """The contract with flwr 1.41: its command calls `uvicorn.run(app=...)`, and nothing before."""
    done = subprocess.run(
        [sys.executable, "-c", SERVING],
        env={**os.environ, **ENVIRONMENT, "FLWR_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = [line for line in done.stdout.splitlines() if line[:6] in ("SERVED", "RESTOR")]
    assert told == ["SERVED Careful FastAPI 1", "RESTORED True"]


def test_its_help_is_flowers():
    done = subprocess.run(
        [str(COTERIE), "superlink", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"usage: {PROGRAM}")
    assert "--enable-supernode-auth" in done.stdout
