"""What a process needs to be any site of a simulation: this one, or a worker."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp

from client.app import client_app
from client.ledger import Store
from client.site import Site
from common.config import NodeConfig
from common.records import Records
from simulations.answer import Answer, one_by_one


@dataclass(frozen=True)
class Sites:
    """The sites that train. To a worker it goes as it is, the ledgers' file by its path."""

    records: Mapping[str, Records] = field(repr=False)
    """By name, in the order of `partition-id`."""
    classes: tuple[str, ...]
    policy: NodeConfig
    books: Path | None
    """The one file that all of their ledgers are in; None without privacy."""

    def app(self, store: Store | None) -> ClientApp:
        """The ClientApp of them all. A site, and its ledger, is opened when it is first asked.

        Args: store: `books`, as this process has opened it.
        """
        opened: dict[str, Site] = {}
        names = [*self.records]

        def open_site(context: Context) -> Site:
            name = names[int(context.node_config["partition-id"])]
            if name not in opened:
                ledger = None if store is None else store.ledger(name)
                opened[name] = Site(name, self.records[name], self.classes, ledger, self.policy)
            return opened[name]

        return client_app(open_site, allow_unprotected=True)

    def answer(self, store: Store | None) -> Answer:
        """What answers for them in this process; see `app`."""
        return one_by_one(self.app(store))

    def answer_of_worker(self) -> Answer:
        """The same in a process of its own, which opens the books itself."""
        return self.answer(None if self.books is None else Store(self.books))
