"""One contract for all strategies: what each does with the updates of a round, and remembers."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from common import messages
from common.composition import CONF
from common.errors import FederationError
from common.parameters import Layout, largest_magnitude
from common.strategies import StrategyName
from server.checkpoint import RunState, read_checkpoint, write_checkpoint
from server.strategy import _built, _put, aggregate, gathering

SIZE, SITES, ROUNDS = 7, 5, 3
LAYOUT = Layout(("weight",), ((SIZE,),))
START = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
NAMES = [name.name for name in StrategyName]
SELECTS = ["fedavg", "fedprox", "fedmedian", "fedtrimmedavg", "krum", "multikrum"]
"""Whose result is made of updates alone, and not of steps by the coordinator."""
ROBUST = ["fedmedian", "fedtrimmedavg", "krum", "multikrum"]


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@pytest.fixture(params=NAMES)
def strategy(request, compose_config):
    return compose_config(f"strategy={request.param}").strategy


def chosen(compose_config, name):
    return compose_config(f"strategy={name}").strategy


def updates_of(number, sites=SITES):
    """What sites send in a round: values of which float32 sums depend on the order."""
    draw = np.random.default_rng(number)
    scale = 10.0 ** draw.integers(-4, 1, (sites, SIZE))
    return dict(enumerate((draw.normal(size=(sites, SIZE)) * scale).astype(np.float32), start=2))


def gathered(strategy, updates):
    collected = gathering(strategy, SIZE, capacity=max(SITES, len(updates)))
    for node, vector in updates.items():
        collected.add(node, vector, largest=largest_magnitude(vector))
    return collected


def step(strategy, state, updates):
    made = aggregate(
        strategy,
        gathered(strategy, updates),
        state.vector,
        state.memory,
        round_number=state.round + 1,
        layout=LAYOUT,
    )
    return replace(state, round=state.round + 1, vector=made.vector, memory=made.memory)


def run(strategy, between=lambda state: state):
    state = RunState("run", 0, START)
    for number in range(ROUNDS):
        state = between(step(strategy, state, updates_of(number)))
    return state


def bits(state):
    memory = {name: vector.tobytes() for name, vector in state.memory.items()}
    return state.vector.tobytes(), memory


def test_every_strategy_has_a_file_and_every_file_a_strategy():
    """The contract below is empty without them."""
    assert sorted(NAMES) == sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
    assert len(NAMES) == 10
    assert {*SELECTS, *ROBUST} <= {*NAMES}


def test_the_order_in_which_updates_come_changes_no_bit(strategy):
    state = run(strategy)
    updates = [*updates_of(ROUNDS).items()]
    results = {
        str(bits(step(strategy, state, dict(order))))
        for order in itertools.islice(itertools.permutations(updates), 0, 120, 7)
    }
    assert len(results) == 1


def test_what_a_checkpoint_keeps_is_all_that_the_next_round_needs(strategy, tmp_path):
    def through_a_file(state):
        write_checkpoint(tmp_path, state, private=True)
        return read_checkpoint(tmp_path, state.round)

    unbroken, resumed = run(strategy), run(strategy, through_a_file)
    assert bits(unbroken) == bits(resumed)
    assert not np.array_equal(unbroken.vector, START)


def test_rounds_are_those_of_flowers_own_strategy_kept_from_round_to_round(strategy):
    """The same class, never taken apart, fed every update: what its user would get."""
    flower, vector = _built(strategy), START
    _put(flower, START, {})
    for number in range(ROUNDS):
        if hasattr(flower, "m_t"):
            flower.current_arrays = {messages.VECTOR: vector}
        replies = [messages.for_aggregation(each) for each in updates_of(number).values()]
        arrays, _ = flower.aggregate_train(number + 1, replies)
        vector = messages.aggregated(arrays)
    assert run(strategy).vector == pytest.approx(vector, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", SELECTS)
def test_of_equal_updates_the_result_is_that_update(name, compose_config):
    update = updates_of(0)[2]
    update[np.abs(update) < 1e-6] = 0.0
    state = step(
        chosen(compose_config, name), RunState("run", 0, START), dict.fromkeys(range(2, 7), update)
    )
    assert np.array_equal(state.vector, update)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("corrupted", [9e3, -9e3])
def test_as_many_corrupted_updates_as_tolerated_leave_the_result_among_the_others(
    name, corrupted, compose_config
):
    strategy = chosen(compose_config, name)
    updates = updates_of(0)
    tolerated = strategy.tolerated(SITES)
    assert tolerated >= 1
    for node in range(2, 2 + tolerated):
        updates[node] = np.full(SIZE, corrupted, np.float32)
    honest = np.stack([updates[node] for node in range(2 + tolerated, 2 + SITES)])
    vector = step(strategy, RunState("run", 0, START), updates).vector
    assert (vector >= honest.min(axis=0)).all()
    assert (vector <= honest.max(axis=0)).all()


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm"])
def test_one_corrupted_update_moves_a_mean_by_its_share(name, compose_config):
    strategy, updates = chosen(compose_config, name), updates_of(0)
    assert strategy.tolerated(SITES) == 0
    before = step(strategy, RunState("run", 0, START), updates).vector
    after = step(
        strategy, RunState("run", 0, START), {**updates, 2: np.full(SIZE, np.float32(9e3))}
    )
    assert (np.abs(after.vector - before) > 9e3 / SITES - 10).all()


def test_with_fewer_updates_than_it_needs_nothing_changes(strategy):
    state = run(strategy)
    few = dict(itertools.islice(updates_of(9).items(), strategy.fewest_updates - 1))
    after = step(strategy, state, few)
    assert bits(after) == bits(state)
    enough = dict(itertools.islice(updates_of(9).items(), strategy.fewest_updates))
    assert bits(step(strategy, state, enough)) != bits(state)


def test_parameters_that_no_site_would_accept_end_the_run(compose_config):
    strategy = replace(chosen(compose_config, "fedadam"), server_learning_rate=1e6)
    with pytest.raises(FederationError, match=r"round 1: strategy=fedadam left .*lower its step"):
        step(strategy, RunState("run", 0, START), updates_of(0))


def test_values_are_compared_in_pieces_without_a_seam(compose_config, monkeypatch):
    for name in ("fedmedian", "fedtrimmedavg"):
        strategy = chosen(compose_config, name)
        whole = run(strategy)
        monkeypatch.setattr("server.strategy.COLUMNS", 3)
        assert bits(run(strategy)) == bits(whole)
        monkeypatch.undo()


@pytest.mark.parametrize("seed", range(8))
def test_krum_tells_close_updates_apart_far_from_zero(seed, compose_config):
    """In float32 their distances would be rounding alone."""
    strategy, draw = chosen(compose_config, "krum"), np.random.default_rng(seed)
    far = draw.normal(size=SIZE) * 3000
    spread = draw.normal(size=(SITES, SIZE)) * np.array([[0.1], [0.1], [0.01], [0.01], [0.01]])
    updates = dict(enumerate((far + spread).astype(np.float32), start=2))
    picked = step(strategy, RunState("run", 0, START), updates).vector
    assert any(np.array_equal(picked, updates[node]) for node in (4, 5, 6))


def test_of_updates_that_krum_finds_equally_good_the_order_picks_none(compose_config):
    strategy = chosen(compose_config, "krum")
    updates = {
        node: np.full(SIZE, value, np.float32)
        for node, value in zip(range(2, 7), (-2, -1, 1, 2, 100), strict=True)
    }
    picked = {
        step(strategy, RunState("run", 0, START), dict(order)).vector[0]
        for order in itertools.permutations(updates.items())
    }
    assert len(picked) == 1
