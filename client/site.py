"""A site: its name, its records, and what has been charged to them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.data import Records
from common.prefix import Inputs
from common.privacy.accounting import Event


@dataclass
class Site:
    """One owner of records, for the life of one process.

    `charges` only grows: a round is charged before its data are touched and never refunded.
    Until the ledger (issue "privacy books") they live as long as the process.
    """

    name: str
    records: Records = field(repr=False)
    charges: dict[tuple[str, int], Event] = field(default_factory=dict)
    """What each (run id, round) ever started here cost."""
    inputs: Inputs = field(default_factory=dict, repr=False)
    """Prepared model inputs of the records, computed once; never leaves."""

    @property
    def labels(self) -> Tensor:
        """(N,) class index of each record."""
        return torch.from_numpy(self.records.labels)
