"""The updates of a round become the next global parameters, by Flower's own strategies.

Flower's classes keep state between rounds (momentum, second moments, current parameters). Here one
is built for each round, given what the last round left, and asked what it leaves: state is a value
that stands in the checkpoint, and a round after a resumption is a round like any other.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
)
from flwr.serverapp.strategy.fedopt import FedOpt

from common import messages
from common.errors import FederationError, VerificationError
from common.exact_sum import ExactSum
from common.parameters import Layout, Vector, check_vector
from common.strategies import StrategyConfig, StrategyName

Memory = Mapping[str, Vector]
"""What a strategy carries from round to round: (P,) float32 by name. Empty before the first."""

COLUMNS = 1 << 20
"""Values compared at a time where each is aggregated by itself."""


class Gathered(Protocol):
    """The accepted updates of a round, as far as its strategy needs them."""

    @property
    def count(self) -> int:
        """How many there are."""

    def add(self, node: int, vector: Vector, *, largest: float, weight: float = 1.0) -> None:
        """One more update, of `node`; a view of a message need not outlive the call.

        Args: vector: one that `check_vector` let pass; largest: what that found; weight: what it
        counts where a mean is taken.
        """


class Summed:
    """Their sum, and no update: what strategies on the mean need. Order changes no bit."""

    def __init__(self, size: int, *, capacity: int) -> None:
        self.sum = ExactSum(size, capacity=capacity)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.sum.count

    def add(self, node: int, vector: Vector, *, largest: float, weight: float = 1.0) -> None:
        """One more update."""
        self.sum.add_checked(vector, weight, largest=largest)


class Kept:
    """Every update: what strategies need that compare them. 4 bytes a value and site."""

    def __init__(self) -> None:
        self._vectors: dict[int, Vector] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._vectors)

    def add(self, node: int, vector: Vector, *, largest: float, weight: float = 1.0) -> None:
        """One more update."""
        self._vectors[node] = vector

    def in_order(self) -> list[Vector]:
        """The updates in order of node id, whenever they came."""
        return [vector for _, vector in sorted(self._vectors.items())]


def gathering(strategy: StrategyConfig, size: int, *, capacity: int) -> Gathered:
    """What collects the updates of one round: at most `capacity`, of `size` values each."""
    return Summed(size, capacity=capacity) if strategy.is_mean else Kept()


@dataclass(frozen=True)
class Aggregated:
    """What a round makes of its updates."""

    vector: Vector
    """The new global parameters."""
    memory: Memory


def aggregate(
    strategy: StrategyConfig,
    gathered: Gathered,
    before: Vector,
    memory: Memory,
    *,
    round_number: int,
    layout: Layout,
) -> Aggregated:
    """The next global parameters, from those `before` and the updates of a round.

    Guarantee: a function of its arguments, where the order in which updates came changes no bit;
    no weight follows a number of records, as that would release it. With
    fewer updates than the strategy needs for what it promises, nothing changes.
    Raises: FederationError if the result is none that sites accept.
    """
    if gathered.count < strategy.fewest_updates:
        return Aggregated(before, memory)
    flower = _built(strategy)
    _put(flower, before, memory)
    if isinstance(gathered, Summed):
        vector = _ask(flower, [gathered.sum.mean()], round_number)
    else:
        assert isinstance(gathered, Kept)
        vector = _compare(flower, gathered.in_order(), round_number)
    try:
        check_vector(vector, layout)
    except VerificationError as error:
        raise FederationError(
            f"round {round_number}: strategy={strategy.name.name} left {error}; "
            "lower its step size, or that of the sites"
        ) from error
    return Aggregated(vector, _taken(flower))


def _compare(flower: FedAvg, vectors: list[Vector], round_number: int) -> Vector:
    """In float64: differences of close vectors are lost in float32, and so is a mean of equal ones.

    Krum looks at whole vectors; the others at each value by itself, so many at a time.
    """
    whole = isinstance(flower, MultiKrum)
    columns = len(vectors[0]) if whole else COLUMNS
    parts = (
        _ask(
            flower,
            (vector[at : at + columns].astype(np.float64) for vector in vectors),
            round_number,
        )
        for at in range(0, max(1, len(vectors[0])), max(1, columns))
    )
    return np.concatenate([*parts])


def _ask(flower: FedAvg, vectors: Iterable[Vector | messages.Wide], round_number: int) -> Vector:
    """What Flower's `aggregate_train` makes of these, in this order, each of weight 1."""
    replies = [messages.for_aggregation(vector) for vector in vectors]
    arrays, _ = flower.aggregate_train(round_number, replies)
    assert arrays is not None
    for reply in replies:
        messages.let_go(reply)
    return messages.aggregated(arrays)


def _put(flower: FedAvg, before: Vector, memory: Memory) -> None:
    """Gives a new strategy what `configure_train` and earlier rounds would have left in it."""
    if isinstance(flower, FedOpt):
        flower.current_arrays = {messages.VECTOR: before}
        if memory:
            flower.m_t = {messages.VECTOR: memory["mean"]}
            flower.v_t = {messages.VECTOR: memory["square"]}
    elif isinstance(flower, FedAvgM):
        flower.current_arrays = messages.pack_vector(before)
        if memory:
            flower.momentum_vector = [memory["momentum"]]


def _taken(flower: FedAvg) -> Memory:
    """What the next round needs of a strategy that has aggregated."""
    kept: dict[str, Vector] = {}
    if isinstance(flower, FedOpt):
        assert flower.m_t is not None
        assert flower.v_t is not None
        kept = {"mean": flower.m_t[messages.VECTOR], "square": flower.v_t[messages.VECTOR]}
    elif isinstance(flower, FedAvgM) and flower.momentum_vector is not None:
        kept = {"momentum": flower.momentum_vector[0]}
    return {name: np.asarray(vector, dtype=np.float32) for name, vector in kept.items()}


def _built(config: StrategyConfig) -> FedAvg:
    """A new strategy of Flower's, with our options in it."""
    kind, options = _KINDS[config.name]
    given: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in options.items()}
    return kind(weighted_by_key=messages.WEIGHT, arrayrecord_key=messages.VECTOR, **given)


_ADAPTIVE = {"server_learning_rate": "eta", "tau": "tau"}
_DECAYING = {**_ADAPTIVE, "beta_1": "beta_1", "beta_2": "beta_2"}
_KINDS: dict[StrategyName, tuple[type[FedAvg], dict[str, str]]] = {
    StrategyName.fedavg: (FedAvg, {}),
    StrategyName.fedprox: (FedProx, {"proximal_mu": "proximal_mu"}),
    StrategyName.fedavgm: (
        FedAvgM,
        {"server_learning_rate": "server_learning_rate", "momentum": "server_momentum"},
    ),
    StrategyName.fedadam: (FedAdam, _DECAYING),
    StrategyName.fedyogi: (FedYogi, _DECAYING),
    StrategyName.fedadagrad: (FedAdagrad, _ADAPTIVE),
    StrategyName.fedmedian: (FedMedian, {}),
    StrategyName.fedtrimmedavg: (FedTrimmedAvg, {"trim_fraction": "beta"}),
    StrategyName.krum: (Krum, {"faulty_sites": "num_malicious_nodes"}),
    StrategyName.multikrum: (
        MultiKrum,
        {"faulty_sites": "num_malicious_nodes", "selected_sites": "num_nodes_to_select"},
    ),
}
"""Flower's strategy for each of our names, and its names for our options."""
