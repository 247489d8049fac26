"""What runs in Flower's simulation and in Coterie's alike: a ClientApp, and the rounds of a server.

`echo` is Flower's plain message API. `mlp` is Coterie's: its messages, list of what may leave,
exchange, checks of each reply, and average; of the ClientApp's own steps the policy and the books
are left out, as no peer has such.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from numpy.typing import NDArray

from benchmarks.arms.pace import Case, Pace, Shown

Round = Callable[[], Shown]
PATIENCE_S = 3600.0


def client_app(case: Case) -> ClientApp:
    """The sites' side. Nothing large is bound to it: Ray pickles it with every message."""
    return _mlp_app(case.values) if case.work == "mlp" else _echo_app()


def answer_of(case: Case) -> Callable[..., list[Message]]:
    """What answers for the sites in a process of Coterie's."""
    from simulations.answer import one_by_one

    return one_by_one(_trained_app(case.values) if case.work == "mlp" else client_app(case))


def rounds(grid: Grid, case: Case, pace: Pace) -> Round:
    """The server's side: each call is one round with all sites."""
    while len(nodes := sorted(grid.get_node_ids())) < case.sites:
        time.sleep(0.05)
    make = _mlp_rounds if case.work == "mlp" else _echo_rounds
    return make(grid, nodes, case, pace)


def _echo_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        known = context.state.get("count")
        context.state["count"] = ConfigRecord({"n": (known["n"] if known else 0) + 1})
        echo = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        return Message(RecordDict({"arrays": echo}), reply_to=message)

    return app


def _echo_rounds(grid: Grid, nodes: list[int], case: Case, pace: Pace) -> Round:
    record = ArrayRecord({name: Array(array) for name, array in case.arrays().items()})

    def one_round() -> Shown:
        content = RecordDict({"arrays": record})
        outgoing = [Message(content, node, MessageType.TRAIN) for node in nodes]
        waiting, last = {*grid.push_messages(outgoing)}, None
        while waiting:
            replies = [*grid.pull_messages(waiting)]
            for reply in replies:
                pace.answered()
                waiting.discard(reply.metadata.reply_to_message_id)
                last = reply
            if not replies:
                time.sleep(0.01)
        assert last is not None
        arrays = last.content["arrays"].values()
        return lambda: np.concatenate([array.numpy().ravel() for array in arrays])

    return one_round


@cache
def _config() -> Any:
    from hydra import compose, initialize_config_dir

    from common.composition import CONF
    from common.config import from_composed, register_schemas

    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_composed(compose("simulate", ["privacy=none", "run_dir=unused"]))


def _mlp_app(values: int) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        # Looked up here, once in each process, so that the app itself stays small.
        return trained(values, message, context)

    return app


@cache
def _trained_app(values: int) -> ClientApp:
    from benchmarks.arms import mlp
    from client.egress import egress
    from common import messages, parameters
    from common.privacy.mechanism import round_event

    model, optimizer = mlp.trained_model(values)
    layout, whole = parameters.Layout.of(model), mlp.as_one(model)
    checked: NDArray[np.float32] | None = None
    app = ClientApp()

    @app.train(mods=[egress])
    def train(message: Message, context: Context) -> Message:
        instruction = messages.read_instruction(message)
        nonlocal checked
        assert instruction.layout_digest == layout.digest
        if checked is None or instruction.vector.base is not checked.base:
            parameters.check_vector(instruction.vector, layout)  # once, as our Trainer does
            checked = instruction.vector
        whole[:] = instruction.vector
        mlp.train(model, optimizer, int(context.node_config["partition-id"]))
        update = messages.Update(
            instruction.run_id,
            instruction.round,
            instruction.layout_digest,
            round_event(instruction.config),
            whole,  # packing copies it
        )
        return Message(messages.pack_update(update), reply_to=message)

    return app


def trained(values: int, message: Message, context: Context) -> Message:
    """What the app of this process answers."""
    return _trained_app(values)(message, context)


def _mlp_rounds(grid: Grid, nodes: list[int], case: Case, pace: Pace) -> Round:
    from benchmarks.arms import mlp
    from common import parameters
    from common.messages import Instruction
    from common.privacy.mechanism import round_event
    from server.aggregate import Judge
    from server.exchange import Exchange
    from server.strategy import aggregate, gathering

    config, model = _config(), mlp.model_of(case.values)
    layout, charge = parameters.Layout.of(model), round_event(config)
    state = {"round": 0, "vector": parameters.flatten(model)}

    def one_round() -> Shown:
        state["round"] += 1
        instruction = Instruction("run", state["round"], config, layout.digest, state["vector"])
        exchange = Exchange(grid, instruction, timeout_s=PATIENCE_S, receipts={}, spares={})
        gathered = gathering(config.strategy, layout.size, capacity=len(nodes))
        asked = {"sent": exchange.sent, "instruction": instruction, "receipts": {}}
        judge = Judge(gathered, layout=layout, charges=dict.fromkeys(nodes, charge), **asked)
        exchange.send(tuple(nodes))
        for reply in exchange.replies():
            pace.answered()
            judge.read(reply)
        verdicts = judge.verdicts()
        assert not verdicts.refused, verdicts.refused
        made = aggregate(
            config.strategy, gathered, state["vector"], {}, round_number=1, layout=layout
        )
        state["vector"] = made.vector
        return lambda: made.vector

    return one_round
