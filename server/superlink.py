"""`coterie superlink`: Flower's SuperLink, started so that it costs less, and with one guard more.

- A part of a vector reaches Flower in one piece: it comes off the line in pieces of 256 KB or less,
  and each would pass nine layers of middleware by itself, a third of a round with 85 MB.
- No collection of Python's looks at what was imported.
- A node pushes replies of its own, and nothing else. Flower asks which node calls, and not whether
  what it brings is from that node: a site could instruct another one, at that one's expense.

Names of Flower's that are used: its command's function, that it calls `uvicorn.run`, and routes;
`tests/server/test_superlink.py` says so.
"""

import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import flwr.superlink.main  # noqa: F401 - Flower imports it late; here it is not looked at again
import uvicorn
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.superlink.cli.flower_superlink import flower_superlink
from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # ships no types

from common.cli import Invocation
from common.code import check_flower

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
"""As ASGI has them (https://asgi.readthedocs.io, 3.0)."""

PUSH = "/v1/fleet/push-messages"
WHOLE = frozenset({PUSH, "/v1/fleet/push-object", "/v1/runtime/push-object"})
"""Routes whose requests are read whole here, as Flower reads them whole before it asks who sent
them: nobody can make it hold more than it would."""
FORBIDDEN = b'{"code": 403, "detail": "a node pushes replies of its own, and nothing else"}'
PROGRAM = "flower-superlink"


def superlink(invocation: Invocation) -> None:
    """Run Flower's SuperLink, with its own options: in less time, and nodes only answer."""
    check_flower(metadata.version("flwr"))
    sys.argv = [PROGRAM, *invocation.arguments]
    with _careful():
        flower_superlink()


class Careful:
    """Flower's application, as ASGI has them, behind what is said above."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Any other kind of request passes as it comes."""
        posted = scope["type"] == "http" and scope["method"] == "POST"
        if not posted or scope["path"] not in WHOLE:
            await self._app(scope, receive, send)
            return
        body = await _whole(receive)
        if body is None:  # its sender has gone, and nobody waits
            return
        if scope["path"] == PUSH and not is_own_reply(body):
            await _refuse(send)
            return
        left = [{"type": "http.request", "body": body, "more_body": False}]
        del body  # whoever reads it is its only holder

        async def again() -> Event:
            return left.pop() if left else await receive()

        await self._app(scope, again, send)


def is_own_reply(body: bytes) -> bool:
    """Whether all that a node pushes is from itself, for the coordinator, and an answer; True of
    what cannot be read, which Flower refuses.
    """
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return True
    node = request.node.node_id  # which Flower holds against the key that signed the call
    facts = [message.metadata for message in request.messages_list]
    return all(
        each.src_node_id == node
        and each.dst_node_id == SUPERLINK_NODE_ID
        and each.reply_to_message_id
        for each in facts
    )


async def _whole(receive: Receive) -> bytes | None:
    pieces, ended = [], False
    while not ended:
        event = await receive()
        if event["type"] != "http.request":
            return None
        pieces.append(event.get("body", b""))
        ended = not event.get("more_body", False)
    return b"".join(pieces)


async def _refuse(send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": FORBIDDEN})


@contextmanager
def _careful() -> Iterator[None]:
    """What uvicorn is given to serve inside this is wrapped in `Careful`."""
    plain = uvicorn.run

    def run(app: App, **options: Any) -> None:
        plain(Careful(app), **options)

    uvicorn.run = run  # type: ignore[assignment] # of its options none is used here
    try:
        yield
    finally:
        uvicorn.run = plain
