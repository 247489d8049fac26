"""Stragglers: sites that are still at work on a round that has closed without them.

What they send is not read: the round that it is for is over. It is fetched all the same, so that
the SuperLink keeps it no longer, and counted. As long as nothing has come a site is not asked for
another round: it would answer the old one first, and be late in every round from there on.
"""

from time import monotonic

from flwr.serverapp import Grid

from server.exchange import Exchange


class Stragglers:
    """Of one run. A run that is taken up again has none: its earlier messages are forgotten."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._waiting: dict[str, tuple[int, float]] = {}
        """By message id: the node, and until when its reply may come."""

    def remember(self, exchange: Exchange) -> None:
        """Those that a round has left behind, unless its time is over: no reply is taken then."""
        until = exchange.deadline
        if monotonic() < until:
            self._waiting |= {sent: (node, until) for sent, node in exchange.left.items()}

    def heard(self) -> tuple[int, ...]:
        """The nodes whose late updates have come since the last look, one for each; dropped."""
        if not self._waiting:
            return ()
        late = []
        for reply in self._grid.pull_messages([*self._waiting]):
            node, _ = self._waiting.pop(reply.metadata.reply_to_message_id, (None, 0.0))
            if node is not None and not reply.has_error():
                late.append(node)
        now = monotonic()
        self._waiting = {sent: each for sent, each in self._waiting.items() if each[1] > now}
        return tuple(late)

    def spared(self, cohort: tuple[int, ...], *, enough: int) -> tuple[int, ...]:
        """Of a cohort those to ask: without who is still at work, but never fewer than `enough`.

        Who has been at work the longest is asked first, if it must be.
        """
        busy = dict.fromkeys(node for node, _ in self._waiting.values())
        at_work = [node for node in busy if node in cohort]
        spared = {*at_work[max(0, len(at_work) - (len(cohort) - enough)) :]}
        return tuple(node for node in cohort if node not in spared)
