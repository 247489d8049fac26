"""The cohort: which sites a round asks."""

from collections import Counter
from collections.abc import Mapping
from time import monotonic, sleep

from flwr.serverapp import Grid

from common.errors import FederationError

POLL_S = 0.2


def wait_for_sites(grid: Grid, *, sites: int, timeout_s: float) -> dict[int, str]:
    """Node ids of the federation with their names, once `sites` of them are there.

    Raises: FederationError after `timeout_s` seconds, with the number that came.
    """
    deadline = monotonic() + timeout_s
    while len(nodes := sites_of(grid)) < sites:
        if monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} of {sites} sites came within {timeout_s:g} s; start the others, "
                "or lower federation.sites"
            )
        sleep(POLL_S)
    return nodes


def in_order(nodes: Mapping[int, str]) -> tuple[int, ...]:
    """The nodes of one round, in an order that does not depend on when they came.

    Who is among them says the schedule of the plan, before the run: the coordinator sees who takes
    part, so drawing sites amplifies nothing against it.
    """
    return tuple(sorted(nodes))


def sites_of(grid: Grid) -> dict[int, str]:
    """Node ids that are there now, with their names, no two the same.

    Names are the nodes' own claims; where two claim the same, both get their id as well.
    """
    named = {node.node_id: node.name or f"node-{node.node_id}" for node in grid.get_nodes()}
    # Again, for whoever claims what another one is called with its id.
    while len(claims := Counter(named.values())) < len(named):
        named = {
            node: f"{name}-{node}" if claims[name] > 1 else name for node, name in named.items()
        }
    return named
