"""What a process needs to be any site of a simulation: this one, or a worker."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import MakeTrainer, OpenSite, client_app
from client.cohort import TOGETHER, Cohort
from client.ledger import Store
from client.site import Site
from client.train import Trainer
from common.config import FaultsConfig, NodeConfig
from common.records import Records
from simulations.answer import Answer
from simulations.faults import FaultySites


@dataclass(frozen=True)
class Sites:
    """The sites that train. To a worker it goes as it is, the ledgers' file by its path."""

    records: Mapping[str, Records] = field(repr=False)
    """By name, in the order of `partition-id`."""
    classes: tuple[str, ...]
    policy: NodeConfig
    books: Path | None
    """The one file that all of their ledgers are in; None without privacy."""
    most: int = 1
    """How many may be answered at once; see `client.agreement.sites_together`."""
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    """What befalls them on purpose."""
    make: MakeTrainer = Trainer
    """What trains; of an audit, one that adds canaries."""

    def app(self, store: Store | None) -> ClientApp:
        """The ClientApp of them all. Args: store: `books`, as this process has opened it."""
        return client_app(self._opening(store), allow_unprotected=True, make=self.make)

    def answer(self, store: Store | None) -> Cohort:
        """What answers for them in this process, for many at once where it can; see `app`."""
        return Cohort(self._opening(store), most=self.most, allow_unprotected=True, make=self.make)

    def _opening(self, store: Store | None) -> OpenSite:
        """A site, and its ledger, is opened when it is first asked."""
        opened: dict[str, Site] = {}
        names = [*self.records]

        def open_site(context: Context) -> Site:
            name = names[int(context.node_config["partition-id"])]
            if name not in opened:
                ledger = None if store is None else store.ledger(name)
                opened[name] = Site(name, self.records[name], self.classes, ledger, self.policy)
            return opened[name]

        return FaultySites(open_site, self.faults)

    def size(self, message: Message) -> int:
        """How many sites may be answered by one call, where the first is sent this message."""
        return self.most if message.metadata.message_type in TOGETHER else 1

    def answer_of_worker(self) -> Answer:
        """The same in a process of its own, which opens the books itself."""
        return self.answer(None if self.books is None else Store(self.books))
