"""A site: its name, its records, and the books that say what was charged to them."""

from dataclasses import dataclass, field

from client.ledger import Ledger
from common.config import NodeConfig
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
