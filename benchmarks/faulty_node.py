"""`coterie node` that fails when it is told to, by files in its working folder.

`fault` holds PHASE SIGNAL COUNT: at the COUNT-th time from now that an answer reaches PHASE the
process sends itself SIGNAL, once. `ahead` holds the seconds by which its clock is wrong while the
file is there.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import flwr.supernode.node_auth_http_interceptor as signing

import client.fleet
import client.service
from client.inbox import Inbox
from client.ledger import Ledger
from client.train import Trainer
from common.cli import main as coterie

FAULT, AHEAD = "fault", "ahead"
BEFORE_RESERVE, AFTER_RESERVE, AFTER_PREPARE = "before-reserve", "after-reserve", "after-prepare"


def main() -> int:
    """As `coterie node ARGUMENTS`."""
    _fails_at(BEFORE_RESERVE, Inbox, "put")
    _fails_at(AFTER_RESERVE, Trainer, "train", first=True)
    _fails_at(AFTER_PREPARE, Ledger, "prepare")
    clock: Callable[[], float] = time.time
    now: Callable[[], datetime] = signing.now
    for module in (client.fleet, client.service):
        module.time = lambda: clock() + _ahead()  # type: ignore[attr-defined] # a clock of its own
    signing.now = lambda: now() + timedelta(seconds=_ahead())
    return coterie(["node", *sys.argv[1:]])


def _fails_at(phase: str, owner: type, name: str, *, first: bool = False) -> None:
    """Args: first: before the method runs, and not after it."""
    whole = getattr(owner, name)

    def method(*arguments: Any, **named: Any) -> Any:
        if first:
            _reached(phase)
        result = whole(*arguments, **named)
        if not first:
            _reached(phase)
        return result

    setattr(owner, name, method)


def _reached(phase: str) -> None:
    path = Path(FAULT)
    if not path.exists():
        return
    wanted, number, count = path.read_text().split()
    if wanted != phase:
        return
    if int(count) > 1:
        path.write_text(f"{wanted} {number} {int(count) - 1}")
        return
    path.unlink()
    os.kill(os.getpid(), signal.Signals[number])


def _ahead() -> float:
    try:
        return float(Path(AHEAD).read_text())
    except FileNotFoundError:
        return 0.0


if __name__ == "__main__":
    sys.exit(main())
