"""Nursery: a process that has imported what workers need, and makes each by a fork of itself.

It starts as soon as workers are asked for, and imports beside this process's own imports. It has
run nothing: no torch thread is there that a fork could lose. A worker, and one that takes the
place of a dead one, is there in hundredths of a second and shares the memory of the imports.

Guarantee: the nursery and its workers end when this process does, however it ends: each has a
thread that waits on a pipe whose other end only this process holds. They never see a Ctrl-C.
See decision 0018 for what multiprocessing's own fork server lacks here.
"""

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NoReturn

from common.errors import FederationError

WORKER = "simulations.worker"
"""What the nursery imports; its `serve` is what a worker does."""
END_S = 2.0
"""How long its end is waited for before it is killed."""
_MAIN = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from simulations.nursery import tend; tend(int(sys.argv[2]), int(sys.argv[3]))"
)


class Nursery:
    """The process, from this side."""

    def __init__(self) -> None:
        """Starts it, and does not wait for it."""
        requests, theirs = socket.socketpair()
        watched, self._life = os.pipe()
        command = [sys.executable, "-P", "-c", _MAIN, json.dumps(sys.path)]
        with theirs, _interrupts_held():
            self._process = subprocess.Popen(  # noqa: S603 - this program itself
                [*command, str(theirs.fileno()), str(watched)],
                pass_fds=(theirs.fileno(), watched),
                stdin=subprocess.DEVNULL,
                stdout=2,  # this process's own output may be one JSON object
            )
        os.close(watched)
        self._requests = requests

    @property
    def pid(self) -> int:
        """Of the nursery itself."""
        return self._process.pid

    def worker(self) -> Connection:
        """A new worker, by this end of the connection to it.

        Raises: FederationError if the nursery is gone.
        """
        ours, theirs = Pipe()
        with theirs:
            try:
                socket.send_fds(self._requests, [b"w"], [theirs.fileno()])
            except OSError as error:
                raise FederationError(
                    "the simulation's workers cannot be started: the process that makes them has "
                    "ended; see what it printed, or give engine.workers=1"
                ) from error
        return ours

    def close(self) -> None:
        """Ends it, and all workers."""
        with suppress(OSError):
            os.close(self._life)
        self._requests.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_NURSERY: list[Nursery] = []
"""The one of this process, once it was asked for."""


def nursery() -> Nursery:
    """This process's nursery, started by whoever asks first; ended when the process ends."""
    if not _NURSERY:
        _NURSERY.append(Nursery())
        atexit.register(_close)
    return _NURSERY[0]


def _close() -> None:
    while _NURSERY:
        _NURSERY.pop().close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A child that starts inside never sees a Ctrl-C; this process sees it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def tend(requests: int, life: int) -> NoReturn:
    """What the nursery process does: imports, then forks whenever it is sent a connection."""
    _end_with(life)
    worker = importlib.import_module(WORKER)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended workers leave nothing behind
    with socket.socket(fileno=requests) as asked:
        while True:
            _, handles, _, _ = socket.recv_fds(asked, 1, 1)
            if not handles:
                os._exit(0)
            if os.fork() == 0:
                asked.close()
                _become(worker.serve, handles[0], life)
            os.close(handles[0])


def _become(serve: Callable[[int], None], handle: int, life: int) -> NoReturn:
    """The rest of a worker's life."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _end_with(life)  # threads do not survive a fork
    try:
        serve(handle)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _end_with(life: int) -> None:
    """Ends this process when the other end of a pipe is closed, whatever it is doing."""

    def watch() -> None:
        os.read(life, 1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
