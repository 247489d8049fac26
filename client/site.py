"""A site: its name, its records, and what has been charged to them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.data import Records
from common.privacy.accounting import Event


@dataclass
class Site:
    """One owner of records, for the life of one process.

    `charges` only grows: a round is charged before its data are touched and never refunded.
    Until the ledger (issue "privacy books") they live as long as the process.
    """

    name: str
    records: Records = field(repr=False)
    classes: tuple[str, ...]
    """The class names its labels index, in order: the site's own, whatever an instruction says."""
    charges: dict[tuple[str, int], Event] = field(default_factory=dict)
    """What each (run id, round) ever started here cost."""

    @property
    def labels(self) -> Tensor:
        """(N,) class index of each record."""
        return torch.from_numpy(self.records.labels)
