"""Large requests reach Flower in one piece; everything else as it comes."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import ENVIRONMENT
from server.superlink import PROGRAM, Whole

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


def served(events, path="/v1/fleet/push-object", kind="http"):
    """What an application behind `Whole` reads until its sender is gone; None if nobody asks it."""
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

    asyncio.run(Whole(application)({"type": kind, "path": path}, receive, send))
    assert sent == ([{"type": "answer"}] if read else [])
    return read or None


@pytest.mark.parametrize("path", ["/v1/fleet/push-object", "/v1/runtime/push-object"])
@pytest.mark.parametrize("pieces", [PIECES, [b"x"], [b""]], ids=len)
def test_a_part_comes_in_one_piece_and_what_follows_after_it(path, pieces):
    whole = {"type": "http.request", "body": b"".join(pieces), "more_body": False}
    assert served([*request(pieces), GONE], path) == [whole, GONE]


def test_a_request_without_a_body_has_an_empty_one():
    whole = {"type": "http.request", "body": b"", "more_body": False}
    assert served([{"type": "http.request"}, GONE]) == [whole, GONE]


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/control/start-run", "http"), ("/v1/fleet/pull-messages", "http"), ("/x", "lifespan")],
)
def test_everything_else_comes_as_it_came(path, kind):
    events = [*request(PIECES), GONE]
    assert served(events, path, kind) == events


def test_of_a_sender_who_leaves_in_the_middle_nobody_is_told():
    assert served([*request(PIECES)[:2], GONE]) is None


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
    assert told == ["SERVED Whole FastAPI 1", "RESTORED True"]


def test_its_help_is_flowers():
    done = subprocess.run(
        [str(COTERIE), "superlink", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"usage: {PROGRAM}")
    assert "--enable-supernode-auth" in done.stdout
