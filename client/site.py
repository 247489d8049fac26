"""A site: its name, its records, and the books that say what was charged to them."""

from dataclasses import dataclass, field

from client.ledger import Ledger
from common.config import NodeConfig
from common.privacy.accounting import Event
from common.records import Records


@dataclass
class Site:
    """One owner of records, and of the ledger of these records."""

    name: str
    records: Records = field(repr=False)
    classes: tuple[str, ...]
    """The class names its labels index, in order: the site's own, whatever an instruction says."""
    ledger: Ledger | None
    """None in a simulation without privacy only: nothing can be charged for what is unlimited."""
    policy: NodeConfig = field(default_factory=NodeConfig)
    """What this site never does."""

    @property
    def charges(self) -> dict[tuple[str, int], Event]:
        """What each (run id, round) ever started here cost, as the ledger has it."""
        if self.ledger is None:
            return {}
        made = self.ledger.books.reservations.values()
        return {(r.run, r.round): r.event for r in made}
