"""Partition: how a simulation deals one dataset to many sites."""

import warnings

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner

from common.config import FederationConfig, Partition
from common.data import Records
from common.errors import ConfigError


def deal(records: Records, config: FederationConfig, *, seed: int) -> list[Records]:
    """The records of each site: disjoint, all of them dealt, the same for the same seed.

    Raises: ConfigError if there are more sites than records, or no such Dirichlet deal exists.
    """
    if config.sites > len(records):
        raise ConfigError(
            f"federation.sites={config.sites}: must be at most {len(records)}, "
            "the number of training records"
        )
    order = np.random.default_rng(seed).permutation(len(records))
    rows = Dataset.from_dict({"row": order.tolist(), "label": records.labels[order].tolist()})
    partitioner = _partitioner(config, seed)
    partitioner.dataset = rows
    try:
        with warnings.catch_warnings():
            # Each failed Dirichlet attempt warns; what matters is whether one succeeds.
            warnings.simplefilter("ignore", UserWarning)
            return _load(partitioner, records, config.sites)
    except ValueError as error:
        raise ConfigError(
            f"federation.dirichlet_alpha={config.dirichlet_alpha:g}: no deal gives every one of "
            f"{config.sites} sites a record; raise it, or lower federation.sites"
        ) from error


def _load(partitioner: Partitioner, records: Records, sites: int) -> list[Records]:
    rows = [partitioner.load_partition(site)["row"] for site in range(sites)]
    return [records.subset(np.array(indices, dtype=np.int64)) for indices in rows]


def _partitioner(config: FederationConfig, seed: int) -> Partitioner:
    if config.partition is Partition.iid:
        return IidPartitioner(num_partitions=config.sites)
    return DirichletPartitioner(
        num_partitions=config.sites,
        partition_by="label",
        alpha=config.dirichlet_alpha,
        min_partition_size=1,
        self_balancing=False,
        seed=seed,
    )
