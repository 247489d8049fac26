"""Nursery: a process that has imported what workers need, and makes each by a fork of itself.

It has run nothing: no torch thread is there that a fork could lose. Where the command line asks for
workers it is itself a fork of this process, which has imported everything and run nothing by then;
whoever asks later has one that imports by itself. A worker, and one that takes the place of a dead
one, is there in hundredths of a second and shares the memory of the imports.

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
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NoReturn

from common.cli import importing
from common.errors import FederationError

WORKER = "simulations.worker"
"""What the nursery imports; its `serve` is what a worker does."""
END_S = 2.0
"""How long its end is waited for before it is killed."""
POLL_S = 0.005
"""Between two looks at whether it has ended."""
_MAIN = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from simulations.nursery import tend; tend(int(sys.argv[2]), int(sys.argv[3]))"
)


class Nursery:
    """The process, from this side."""

    def __init__(self, *, fork: bool) -> None:
        """Starts it, and does not wait for it. Args: fork: of this process; see `nursery`."""
        self._requests, theirs = socket.socketpair()
        watched, self._life = os.pipe()
        with theirs, _interrupts_held():
            self.pid = (self._forked if fork else _spawned)(theirs, watched)
        os.close(watched)

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
        if not _ends(self.pid):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _forked(self, requests: socket.socket, life: int) -> int:
        """Returns: the id of the nursery; in the nursery itself it never does."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        try:
            os.close(self._life)  # or it would wait for its own end
            self._requests.close()
            with open(os.devnull, "rb") as nothing:
                os.dup2(nothing.fileno(), 0)
            os.dup2(2, 1)  # the simulation's own output may be one JSON object
            tend(requests.detach(), life)
        finally:
            os._exit(1)


def _spawned(requests: socket.socket, life: int) -> int:
    """A new process of this program. Returns: its id."""
    for handle in (requests.fileno(), life):
        os.set_inheritable(handle, True)
    command = [sys.executable, "-P", "-c", _MAIN, json.dumps(sys.path)]
    return os.posix_spawn(
        sys.executable,
        [*command, str(requests.fileno()), str(life)],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, 2, 1),  # as above
        ],
    )


def _ends(pid: int) -> bool:
    """Whether a child of this process ends within `END_S`; waits for it."""
    deadline = time.monotonic() + END_S
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


_NURSERY: list[Nursery] = []
"""The one of this process, once it was asked for."""


def nursery(*, fork: bool = False) -> Nursery:
    """This process's nursery, started by whoever asks first; ended when the process ends.

    Args: fork: as a fork of this process, which has imported `WORKER` and run nothing of it; else
    it imports by itself, and is ready seconds later.
    """
    if not _NURSERY:
        _NURSERY.append(Nursery(fork=fork))
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
    with importing():  # a collection would also write to what workers share
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
