"""Link: what a simulation and one of its workers say to each other.

Both ends are our own processes, so objects travel pickled; nothing from anybody else is ever
unpickled. What is large goes beside the pickle, as the descriptor of a nameless file: arrays of
Flower's messages as segments, the texts of a table as the spool they are in.
"""

import io
import os
import pickle
import struct
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

from flwr.app import Array

from common.spool import Spool
from simulations.segment import Segment

LARGE = 1 << 18
"""Bytes from which an array of a reply is not copied through the pipe."""
SHARED = 1 << 12
"""The same for an array that several messages have in common."""
MOST_SHARED = 16
"""Arrays that are shared at a time, each of which takes a file handle here and in each worker."""
_COUNT = struct.Struct("<I")

Reference = tuple[Any, ...]
"""What stands in a pickle for what goes beside it."""


class Shares:
    """Arrays that many messages have in common: written once, for all workers.

    An array is known again by its data's being the same object, which is kept alive for that.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[bytes, int, Segment]] = {}
        self._next = 0

    def add(self, arrays: Collection[Array]) -> None:
        """Shares what stands there at least twice, as far as there is room."""
        times: dict[int, int] = {}
        for array in arrays:
            times[id(array.data)] = times.get(id(array.data), 0) + 1
            if times[id(array.data)] > 1 and len(array.data) >= SHARED:
                self._share(array.data)

    def find(self, array: Array) -> tuple[int, Segment] | None:
        """The number and the segment of an array that is shared."""
        known = self._known.get(id(array.data))
        return known and known[1:]

    def numbers(self) -> tuple[int, ...]:
        """Of all that is shared now."""
        return tuple(number for _, number, _ in self._known.values())

    def clear(self) -> None:
        """Nobody will ask for any of them any more."""
        for _, _, segment in self._known.values():
            segment.close()
        self._known.clear()

    def _share(self, data: bytes) -> None:
        if id(data) not in self._known and len(self._known) < MOST_SHARED:
            segment, _ = Segment.of([data])
            self._known[id(data)] = data, self._next, segment
            self._next += 1


@dataclass(frozen=True)
class Parcel:
    """An object, packed once, to be sent to any number of workers.

    Arrays in it lie in one segment that all of them map, and are not copied until written to.
    """

    segment: Segment
    places: list[tuple[int, int]]
    handles: list[int]
    """Of spools in it, which stay their own."""

    @classmethod
    def of(cls, value: object) -> "Parcel":
        """Packs what can be pickled."""
        buffers: list[pickle.PickleBuffer] = []
        payload, packed = _packed(value, None, None, buffers.append)
        segment, places = Segment.of([payload, *(buffer.raw() for buffer in buffers)])
        return cls(segment, places, packed.handles)

    def open(self) -> Any:
        """What was packed."""
        whole = self.segment.copied_on_write()
        payload, *buffers = (whole[start : start + size] for start, size in self.places)
        return _Unpickler(payload, buffers, self.handles, {}).load()


class Link:
    """One end: any thread sends, one receives. Raises: EOFError, OSError if the other is gone."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._sending = threading.Lock()
        self._given: set[int] = set()
        """Numbers of shared arrays that the other end has."""
        self._kept: dict[int, memoryview] = {}
        """Data of shared arrays that the other end has given."""

    def fileno(self) -> int:
        """For who waits for several of them."""
        return self.connection.fileno()

    def send(self, value: object, shares: Shares | None = None) -> None:
        """Args: shares: what messages in it have in common."""
        if shares is not None:
            self._given &= {*shares.numbers()}
        payload, packed = _packed(value, shares, self._given)
        try:
            self._send(payload, packed.handles)
        finally:
            for segment in packed.made:
                segment.close()

    def send_parcel(self, parcel: Parcel) -> None:
        """What `receive_parcel` at the other end waits for."""
        facts = pickle.dumps((parcel.segment.size, parcel.places))
        self._send(facts, [parcel.segment.handle, *parcel.handles])

    def receive(self) -> Any:
        """Waits for what was sent next."""
        payload, handles = self._receive()
        try:
            return _Unpickler(memoryview(payload), (), handles, self._kept).load()
        finally:
            for handle in handles:
                os.close(handle)

    def receive_parcel(self) -> Any:
        """Waits for a parcel, and opens it."""
        payload, (handle, *handles) = self._receive()
        size, places = pickle.loads(payload)  # noqa: S301 - of our own process
        parcel = Parcel(Segment(handle, size), places, handles)
        try:
            return parcel.open()
        finally:
            for each in (handle, *handles):
                os.close(each)

    def keep_only(self, numbers: Collection[int]) -> None:
        """Lets go of shared arrays but these."""
        self._kept = {n: data for n, data in self._kept.items() if n in numbers}

    def close(self) -> None:
        """The other end then finds this one gone."""
        self.connection.close()

    def _send(self, payload: bytes, handles: list[int]) -> None:
        with self._sending:
            self.connection.send_bytes(_COUNT.pack(len(handles)) + payload)
            for handle in handles:
                send_handle(self.connection, handle, None)

    def _receive(self) -> tuple[bytes, list[int]]:
        message = self.connection.recv_bytes()
        (count,) = _COUNT.unpack_from(message)
        return message[_COUNT.size :], [recv_handle(self.connection) for _ in range(count)]


class _Pickler(pickle.Pickler):
    """Notes what goes beside the pickle."""

    def __init__(
        self,
        file: io.BytesIO,
        shares: Shares | None,
        given: set[int] | None,
        callback: Callable[[pickle.PickleBuffer], Any] | None,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=callback)
        self._shares, self._given = shares, given
        self.handles: list[int] = []
        self.made: list[Segment] = []
        """Segments of this pickle alone, for whoever has sent them to close."""
        self._spools: dict[int, int] = {}

    def persistent_id(self, value: object) -> Reference | None:
        kind = type(value)
        if kind is Array:
            return self._array(value)  # type: ignore[arg-type] # its type is what was asked
        if kind is Spool:
            return self._spool(value)  # type: ignore[arg-type]
        return None

    def _array(self, array: Array) -> Reference | None:
        facts = array.dtype, array.shape, array.stype
        shared = self._shares and self._shares.find(array)
        if shared and self._given is not None:
            number, segment = shared
            place = -1 if number in self._given else self._beside(segment.handle)
            self._given.add(number)
            return "shared", place, facts, segment.size, number
        if self._given is None or len(array.data) < LARGE:
            return None
        segment, _ = Segment.of([array.data])
        self.made.append(segment)
        return "sent", self._beside(segment.handle), facts, segment.size

    def _spool(self, spool: Spool) -> Reference:
        place = self._spools.get(id(spool))
        if place is None:
            place = self._spools[id(spool)] = self._beside(spool.handle)
        return "spool", place, spool.kind

    def _beside(self, handle: int) -> int:
        self.handles.append(handle)
        return len(self.handles) - 1


class _Unpickler(pickle.Unpickler):
    """Puts in place what came beside the pickle."""

    def __init__(
        self,
        payload: memoryview,
        buffers: Collection[memoryview],
        handles: list[int],
        kept: dict[int, memoryview],
    ) -> None:
        super().__init__(io.BytesIO(payload), buffers=buffers)
        self._handles, self._kept = handles, kept
        self._spools: dict[int, Spool] = {}

    def persistent_load(self, reference: Reference) -> Array | Spool:
        kind, place, *facts = reference
        if kind == "spool":
            if place not in self._spools:
                self._spools[place] = Spool(os.dup(self._handles[place]), facts[0])
            return self._spools[place]
        described, size, *numbers = facts
        for number in numbers:
            if place >= 0:
                self._kept[number] = Segment(self._handles[place], size).view()
            return array_over(self._kept[number], *described)
        return array_over(Segment(self._handles[place], size).view(), *described)


def array_over(data: memoryview, dtype: str, shape: tuple[int, ...], stype: str) -> Array:
    """Flower's array over memory that is not copied.

    Its constructor takes `bytes` alone; like Flower's own `inflate`, this sets the data after it.
    Whatever reads an array (numpy, its chunks for sending) takes a view as well; only putting it
    into a new `ArrayRecord`, which constructs it anew, does not.
    """
    array = Array(dtype, shape, stype, b"")
    array.data = data  # type: ignore[assignment] # a view, read-only as bytes are
    return array


def _packed(
    value: object,
    shares: Shares | None,
    given: set[int] | None,
    callback: Callable[[pickle.PickleBuffer], Any] | None = None,
) -> tuple[bytes, _Pickler]:
    file = io.BytesIO()
    pickler = _Pickler(file, shares, given, callback)
    try:
        pickler.dump(value)
    except BaseException:
        for segment in pickler.made:
            segment.close()
        raise
    return file.getvalue(), pickler
