"""Whether somebody is writing into the folder of a run: its lock tells, whatever its files say."""

import fcntl
import os
from pathlib import Path


def is_occupied(run_dir: Path) -> bool:
    """Whether a process is writing into the folder of a run."""
    if not run_dir.is_dir():
        return False
    handle = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return not is_locked(handle)
    finally:
        os.close(handle)


def is_locked(handle: int) -> bool:
    """Takes the lock of an open folder, until it is closed. Returns: whether nobody else had it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
