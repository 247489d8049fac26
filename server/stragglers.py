"""Stragglers: sites that are still at work on a round that has closed without them.

What they send is not read: the round that it is for is over. It is fetched all the same, so that
the SuperLink keeps it no longer, and counted. As long as nothing has come a site is not asked for
another round: it would answer the old one first, and be late in every round from there on. Once it
has come the site is asked for the round that is under way by then, if that would otherwise fail.
"""

from collections.abc import Iterable, Mapping
from time import monotonic

from flwr.serverapp import Grid


class Stragglers:
    """Of one run. A run that is taken up again has none: its earlier messages are forgotten."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._waiting: dict[str, tuple[int, float]] = {}
        """By message id: the node, and until when its reply may come."""
        self._late: list[int] = []
        """Nodes whose late updates have come, and were not told of yet."""

    def remember(self, left: Mapping[str, int], until: float) -> None:
        """Those that a round has left behind, by message id, unless its time is over: no reply is
        taken then.
        """
        if monotonic() < until:
            self._waiting |= {sent: (node, until) for sent, node in left.items()}

    def heard(self) -> tuple[int, ...]:
        """The nodes whose late updates have come since it was last asked, one for each; dropped."""
        self._look()
        late, self._late = tuple(self._late), []
        return late

    def through(self, nodes: Iterable[int]) -> tuple[int, ...]:
        """Those of `nodes` whose late updates have come since `heard` told of the last ones, and
        that are at work on nothing else; in order.
        """
        self._look()
        busy = self._at_work()
        return tuple(node for node in nodes if node in self._late and node not in busy)

    def spared(self, cohort: tuple[int, ...], *, enough: int) -> tuple[int, ...]:
        """Of a cohort those to ask: without who is still at work, but never fewer than `enough`.

        Who has been at work the longest is asked first, if it must be.
        """
        at_work = [node for node in self._at_work() if node in cohort]
        spared = {*at_work[max(0, len(at_work) - (len(cohort) - enough)) :]}
        return tuple(node for node in cohort if node not in spared)

    def _at_work(self) -> dict[int, None]:
        """In the order in which they began."""
        return dict.fromkeys(node for node, _ in self._waiting.values())

    def _look(self) -> None:
        if not self._waiting:
            return
        for reply in self._grid.pull_messages([*self._waiting]):
            node, _ = self._waiting.pop(reply.metadata.reply_to_message_id, (None, 0.0))
            if node is not None and not reply.has_error():
                self._late.append(node)
        now = monotonic()
        self._waiting = {sent: each for sent, each in self._waiting.items() if each[1] > now}


class Spared:
    """Sites of one round's cohort that it has not asked, as they are at work on another."""

    def __init__(self, stragglers: Stragglers, nodes: Iterable[int]) -> None:
        self._stragglers, self._left = stragglers, dict.fromkeys(nodes)

    def __bool__(self) -> bool:
        return bool(self._left)

    def freed(self) -> tuple[int, ...]:
        """Those that are through by now, each once."""
        freed = self._stragglers.through(self._left)
        for node in freed:
            del self._left[node]
        return freed
