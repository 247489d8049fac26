"""The instruction that a node is answering, on its disk until the answer is with the SuperLink.

Flower hands an instruction out once. A node that is killed in the middle finds it here when it is
started again, and answers it: with what it had prepared, byte for byte, if it had come so far. One
that is killed between the SuperLink's handing out and the disk finds that it was asking.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from client.fleet import Parcel
from common.durable import sync_folder, write_atomic
from common.errors import ConfigError, VerificationError

INSTRUCTION, SENDING, IDENTITY, LOCK = "instruction", "sending", "node", "lock"
ASKING = "asking"
"""Files of the folder."""


class Inbox:
    """A folder of one node, which it has alone."""

    def __init__(self, folder: Path) -> None:
        """Makes it if it is not there. Raises: ConfigError if another process has it."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ConfigError(
                f"inbox={folder}: another node has it; one site has one node at a time"
            ) from error
        self.unsure = os.path.exists(folder / ASKING)
        """Whether somebody asked for an instruction and did not live to hear what came of it."""

    def close(self) -> None:
        """Lets go of the folder."""
        os.close(self._lock)

    def identity(self, fingerprint: str) -> int | None:
        """The node id that this key had at that address. Args: fingerprint: of both."""
        try:
            known, _, node_id = (self.folder / IDENTITY).read_text("ascii").partition(" ")
            return int(node_id) if known == fingerprint else None
        except (FileNotFoundError, ValueError):
            return None

    def remember(self, fingerprint: str, node_id: int) -> None:
        """Keeps the node id."""
        write_atomic(self.folder / IDENTITY, f"{fingerprint} {node_id}\n")

    def asking(self) -> None:
        """From here until `heard`, an instruction may be handed out that is not on this disk yet.

        Not forced to the disk, for it is written at every look: it outlives the process. A machine
        that loses power is away for longer than Flower waits for it, or its round's deadline ends.
        """
        self.unsure = True
        with suppress(OSError):  # where there is no room for it, an instruction is refused anyway
            (self.folder / ASKING).touch(mode=0o600)

    def heard(self) -> None:
        """Nothing was handed out, or what was is here, or nobody waits for it."""
        self.unsure = False
        with suppress(OSError):  # at worst the next process lets the coordinator know for nothing
            (self.folder / ASKING).unlink(missing_ok=True)

    def put(self, parcel: Parcel) -> None:
        """Keeps an instruction; on disk when this returns."""
        (self.folder / SENDING).unlink(missing_ok=True)
        write_atomic(self.folder / INSTRUCTION, parcel.to_bytes())
        self.heard()

    def waiting(self) -> Parcel | None:
        """The instruction that was not answered. Raises: VerificationError if it was altered."""
        try:
            content = (self.folder / INSTRUCTION).read_bytes()
        except FileNotFoundError:
            return None
        try:
            return Parcel.from_bytes(content)
        except VerificationError as error:
            raise VerificationError(f"{self.folder / INSTRUCTION}: {error}") from error

    def sending(self, reply: str, session: str) -> None:
        """Keeps in which session of the SuperLink a reply, by its id, goes there."""
        write_atomic(self.folder / SENDING, f"{reply} {session}\n")

    def session(self, reply: str) -> str:
        """In which session an earlier process began to send this reply; empty if none did.

        The SuperLink hands a reply on before all parts of it are there, and takes the others in
        that session only: its coordinator would wait three minutes for them.
        """
        try:
            known, _, session = (self.folder / SENDING).read_text("ascii").partition(" ")
        except (FileNotFoundError, ValueError):
            return ""
        return session.strip() if known == reply else ""

    def clear(self) -> None:
        """Forgets the instruction: its answer was sent, or nobody waits for it."""
        (self.folder / INSTRUCTION).unlink(missing_ok=True)
        (self.folder / SENDING).unlink(missing_ok=True)
        self.heard()
        sync_folder(self.folder)
