"""`coterie superlink`: Flower's SuperLink as it is, started in a way that costs it less.

Two things differ from `flower-superlink`, and neither is in what it answers. A part of a vector
reaches Flower in one piece: it comes off the line in pieces of 256 KB or less, and each would pass
nine layers of middleware by itself, which was a quarter of a round with 85 MB. And no collection of
Python's looks at what was imported. Names of Flower's that are used: its command's function, and
that it calls `uvicorn.run`; `tests/server/test_superlink.py` says so.
"""

import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import flwr.superlink.main  # noqa: F401 - Flower imports it late; here it is not looked at again
import uvicorn
from flwr.superlink.cli.flower_superlink import flower_superlink

from common.cli import Invocation
from common.code import check_flower

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
"""As ASGI has them (https://asgi.readthedocs.io, 3.0)."""

LARGE = "/push-object"
"""How the only routes end whose bodies are large. Flower itself reads those whole before it asks
who sent them, so nobody can make it hold more than it would."""
PROGRAM = "flower-superlink"


def superlink(invocation: Invocation) -> None:
    """Run Flower's SuperLink: the same options, and less time for each call."""
    check_flower(metadata.version("flwr"))
    sys.argv = [PROGRAM, *invocation.arguments]
    with _handing_over_whole():
        flower_superlink()


class Whole:
    """An ASGI application whose large requests come in one piece."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Any other kind of request passes as it comes."""
        if scope["type"] != "http" or not scope["path"].endswith(LARGE):
            await self._app(scope, receive, send)
            return
        pieces, ended = [], False
        while not ended:
            event = await receive()
            if event["type"] != "http.request":  # its sender has gone, and nobody waits
                return
            pieces.append(event.get("body", b""))
            ended = not event.get("more_body", False)
        left = [{"type": "http.request", "body": b"".join(pieces), "more_body": False}]

        async def whole() -> Event:
            return left.pop() if left else await receive()

        await self._app(scope, whole, send)


@contextmanager
def _handing_over_whole() -> Iterator[None]:
    """What uvicorn is given to serve inside this is wrapped in `Whole`."""
    plain = uvicorn.run

    def run(app: App, **options: Any) -> None:
        plain(Whole(app), **options)

    uvicorn.run = run  # type: ignore[assignment] # of its options none is used here
    try:
        yield
    finally:
        uvicorn.run = plain
