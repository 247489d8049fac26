"""Partition: how a simulation deals one dataset to many sites.

Where records name persons, persons are dealt, each with all of their records: the bound of a
person at two sites would be the sum of two. Of what a person has written the most frequent label
stands for them where labels are skewed.
"""

import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.config import FederationConfig, Partition
from common.errors import ConfigError
from common.records import Records

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def deal(records: Records, config: FederationConfig, *, seed: int) -> list[Records]:
    """The records of each site: disjoint, all of them dealt, the same for the same seed.

    Guarantee: no person's records are at two sites. Raises: ConfigError if there are more sites
    than records, or persons, or no such deal exists.
    """
    if config.partition is Partition.natural:
        return _natural(records, config.sites)
    if records.persons is None:
        return [records.subset(rows) for rows in _dealt(records.labels, "records", config, seed)]
    owners = records.owners()
    labels = _usual_labels(owners, records.labels)
    return [
        records.subset(np.flatnonzero(np.isin(owners, persons)))
        for persons in _dealt(labels, "persons", config, seed)
    ]


def _natural(records: Records, sites: int) -> list[Records]:
    """Every site its own records, in the order of their names. Raises: ConfigError."""
    if records.homes is None:
        raise ConfigError(
            "federation.partition=natural: these records do not say whose they are; "
            "give data.site_column"
        )
    homes = sorted(set(records.homes))
    if len(homes) != sites:
        raise ConfigError(
            f"federation.sites={sites}: must be {len(homes)}, the number of sites that "
            "data.site_column names among the training records"
        )
    pairs = set(zip(records.homes, records.persons or (), strict=False))
    if len(pairs) != len({person for _, person in pairs}):
        raise ConfigError(
            "federation.partition=natural: a person has records at two sites, and the bound of "
            "a person would be the sum of both; deal them by another partition"
        )
    at = np.array(records.homes)
    return [records.subset(np.flatnonzero(at == home)) for home in homes]


def _usual_labels(owners: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P,) each person's most frequent label; of several the first."""
    counts = np.zeros((int(owners.max(initial=-1)) + 1, int(labels.max(initial=0)) + 1), np.int64)
    np.add.at(counts, (owners, labels), 1)
    return np.asarray(counts.argmax(1), dtype=np.int64)


def _dealt(
    labels: NDArray[np.int64], what: str, config: FederationConfig, seed: int
) -> list[NDArray[np.int64]]:
    """Whom each site gets, of those with these labels, by index."""
    if not len(labels):
        raise ConfigError(
            f"the training split has no {what} to deal; give data with some, or lower "
            "data.holdout_fraction and data.validation_fraction"
        )
    if config.sites > len(labels):
        raise ConfigError(
            f"federation.sites={config.sites}: must be at most {len(labels)}, "
            f"the number of training {what}"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    if config.partition is Partition.iid:
        return np.array_split(order, config.sites)
    from datasets import Dataset  # noqa: PLC0415 - pandas, seaborn and all, for these deals only

    partitioner = _partitioner(config, seed)
    partitioner.dataset = Dataset.from_dict({"row": order, "label": labels[order]})
    try:
        with warnings.catch_warnings():
            # Each failed Dirichlet attempt warns; what matters is whether one succeeds.
            warnings.simplefilter("ignore", UserWarning)
            return _load(partitioner, config.sites, len(labels))
    except ValueError as error:
        raise ConfigError(
            f"{_setting(config)}: no deal gives every one of {config.sites} sites one "
            f"of the {what}; {_REMEDY[config.partition]}, or lower federation.sites"
        ) from error


def _load(partitioner: "Partitioner", sites: int, everybody: int) -> list[NDArray[np.int64]]:
    """Raises: ValueError if a site is left with nothing, or a record with no site."""
    parts = (partitioner.load_partition(site).with_format("numpy") for site in range(sites))
    rows = [part["row"][:] for part in parts]
    if not all(len(indices) for indices in rows) or sum(map(len, rows)) != everybody:
        raise ValueError("a site has no record, or a record no site")
    return [np.array(indices, dtype=np.int64) for indices in rows]


_REMEDY = {
    Partition.dirichlet: "raise it",
    Partition.pathological: "take no more than there are classes, and all of them somewhere",
    Partition.quantity: "give more records",
}


def _setting(config: FederationConfig) -> str:
    """The setting that a deal which is not possible hangs on."""
    if config.partition is Partition.dirichlet:
        return f"federation.dirichlet_alpha={config.dirichlet_alpha:g}"
    if config.partition is Partition.pathological:
        return f"federation.classes_per_site={config.classes_per_site}"
    return f"federation.partition={config.partition.name}"


def _partitioner(config: FederationConfig, seed: int) -> "Partitioner":
    from flwr_datasets.partitioner import (  # noqa: PLC0415 - the same
        DirichletPartitioner,
        LinearPartitioner,
        PathologicalPartitioner,
    )

    if config.partition is Partition.quantity:
        return LinearPartitioner(num_partitions=config.sites)
    if config.partition is Partition.pathological:
        return PathologicalPartitioner(
            num_partitions=config.sites,
            partition_by="label",
            num_classes_per_partition=config.classes_per_site,
            class_assignment_mode="first-deterministic",  # every class is at some site
            seed=seed,
        )
    return DirichletPartitioner(
        num_partitions=config.sites,
        partition_by="label",
        alpha=config.dirichlet_alpha,
        min_partition_size=1,
        self_balancing=False,
        seed=seed,
    )
