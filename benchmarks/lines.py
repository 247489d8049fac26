"""Lines that can be cut: a network namespace with a cable to pull, or bytes that are held back.

Where this program may make one (root, Debian's iproute2), a node stands in a network namespace of
its own, whose one cable leads to a switch beside the SuperLink. With the cable out, packets of
calls under way are lost and new calls find nobody, as at a site whose uplink fails. Elsewhere a
relay keeps what either side sends, which is a line that stalls; each says which it is.
"""

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LOOPBACK = "127.0.0.1"


class NoNamespaceError(Exception):
    """None may be made here; the text says why."""


class Cable:
    """A namespace whose one cable leads to a switch at `host`."""

    what = "a network namespace whose cable was pulled"

    def __init__(self) -> None:
        """Makes it. Raises: NoNamespaceError."""
        number = os.getpid() % 65_536
        self._space, self._switch, self._plug = (f"cot{each}{number}" for each in ("n", "s", "p"))
        net = f"10.231.{number % 256}"
        self.host = f"{net}.1"
        """Where the SuperLink is to listen."""
        self.inside: tuple[str, ...] = ("ip", "netns", "exec", self._space)
        """The beginning of a command that runs at the far end."""
        self.by: tuple[str, ...] = ()
        """Settings of a node there."""
        if shutil.which("ip") is None or os.geteuid() != 0:
            raise NoNamespaceError("there is no ip here, or this is not root")
        try:
            self._make(f"{net}.2/24")
        except NoNamespaceError:
            self.close()
            raise

    def _make(self, far: str) -> None:
        _ip("netns", "add", self._space)
        _ip("link", "add", self._switch, "type", "bridge")
        _ip("address", "add", f"{self.host}/24", "dev", self._switch)
        _ip("link", "set", self._switch, "up")
        _ip("link", "add", self._plug, *f"type veth peer name far netns {self._space}".split())
        _ip("link", "set", self._plug, "master", self._switch)
        _ip("link", "set", self._plug, "up")
        _ip("-n", self._space, "address", "add", far, "dev", "far")
        for device in ("far", "lo"):
            _ip("-n", self._space, "link", "set", device, "up")

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Packets are lost inside."""
        _ip("link", "set", self._plug, "down")
        try:
            yield
        finally:
            _ip("link", "set", self._plug, "up")

    def close(self) -> None:
        """Takes it away."""
        for gone in (("link", "delete", self._plug), ("link", "delete", self._switch)):
            with suppress(NoNamespaceError):
                _ip(*gone)
        with suppress(NoNamespaceError):
            _ip("netns", "delete", self._space)


def _ip(*arguments: str) -> None:
    """Raises: NoNamespaceError with what `ip` said."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)  # noqa: S607 - by PATH
    if done.returncode:
        raise NoNamespaceError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Relay:
    """Carries bytes from a port of its own to another one; cut, it keeps them, and nobody hears."""

    what = "a relay that held all bytes back"

    def __init__(self, port: int) -> None:
        self._port, self._whole = port, threading.Event()
        self._whole.set()
        self._listening = socket.create_server((LOOPBACK, 0))
        self.inside: tuple[str, ...] = ()
        self.by = (f"superlink={LOOPBACK}:{self._listening.getsockname()[1]}",)
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing gets through inside; afterwards what was kept does."""
        self._whole.clear()
        try:
            yield
        finally:
            self._whole.set()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
                far = socket.create_connection((LOOPBACK, self._port))
            except ConnectionRefusedError:
                near.close()
                continue
            except OSError:
                return
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._whole.wait()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):  # closed from the other side already
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        """Takes no more."""
        self._listening.close()
