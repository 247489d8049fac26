"""Arrivals: in which order the replies of a simulated round come, where not all are waited for.

In a deployment the quickest sites close a round (`federation.enough`). A simulation's own machine
must not decide that: with other workers, or another load, other sites would be late, and a seeded
run would end elsewhere. So all are heard, each trains and is charged, and which of them came first
follows from the simulated speeds, and among equals from public coins.
"""

from collections import Counter
from collections.abc import Iterable
from time import monotonic

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from common.config import Config
from server.wire import GridAround
from simulations.faults import Clock

LABEL = 0xA441
"""Keeps these coins apart from others by the same seed."""

Place = tuple[int, float, float]
"""Which attempt at its round a message is, the simulated seconds until it is answered, a coin."""


class Arrivals(GridAround):
    """A grid that hands on replies once all have come, in the order in which they would have.

    Guarantee: that order is a function of `seed`, of `faults`, of the round and the sites' names.
    Memory: all replies of a round.
    """

    def __init__(self, grid: Grid, config: Config) -> None:
        super().__init__(grid)
        self._clock, self._seed = Clock(config), config.seed
        self._names = {node.node_id: node.name for node in grid.get_nodes()}
        self._attempts: Counter[tuple[str, int]] = Counter()
        self._places: dict[str, Place] = {}
        self._until: dict[str, float] = {}
        self._held: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """As on the grid inside."""
        outgoing = [*messages]
        places = [self._place(message) for message in outgoing]
        ids = [*self._grid.push_messages(outgoing)]
        for identity, place, message in zip(ids, places, outgoing, strict=True):
            if identity:
                self._places[identity] = place
                self._until[identity] = monotonic() + message.metadata.ttl
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages, in order, once all have come; what has, if one expires."""
        wanted = {*message_ids}
        while missing := wanted - self._held.keys():
            for reply in self._grid.pull_messages(sorted(missing)):
                if (identity := reply.metadata.reply_to_message_id) in missing:
                    self._held[identity] = reply
            if any(monotonic() > self._until.get(identity, 0.0) for identity in missing):
                break
        there = sorted((self._places.pop(each), each) for each in wanted & self._held.keys())
        return [self._held.pop(identity) for _, identity in there]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """As on the grid inside."""
        return [*self._grid.send_and_receive(messages, timeout=timeout)]

    def _place(self, message: Message) -> Place:
        node, group = message.metadata.dst_node_id, message.metadata.group_id
        number = int(group) if group.isdigit() else 0
        self._attempts[group, node] += 1
        coins = np.random.default_rng([self._seed, LABEL, number, node])
        took = self._clock.site_s(number, self._names[node])
        return self._attempts[group, node], took, float(coins.random())
