"""Cluster: the sites' ClientApp through Flower's own simulation, on Ray: `engine=ray`.

Flower's simulation calls a ServerApp; here that one hands its Grid over and waits, so that a run
stays in this thread, as with every engine, and a Ctrl-C reaches it. What Flower and Ray are called
by stands in this file alone; decision 0024 says why so and not by `flwr run`.

Records go to Ray's object store once. What Flower sends with every message is a reference to them,
and a process of Ray's opens them, and the books, when it is first asked.
"""

import importlib.util
import io
import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Collection, Iterable
from functools import cache, partial
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from client.ledger import Store
from common import messages
from common.allocation import keep_freed_memory
from common.config import EngineConfig, EngineName
from common.errors import ConfigError, FederationError
from common.spool import Kind, Spool
from simulations.answer import partition_of
from simulations.sites import Sites
from simulations.workers import Lost, threads_of, workers_of

POLL_S = 0.02
"""Between two looks for replies: Flower's simulation tells nobody that they are there."""
START_S = 300.0
"""In which Ray must start, and every site's process answer for the first time."""
END_S = 5.0
"""How long an interrupted simulation may take to end by itself."""
PARTITION = "partition"


def check_installed(engine: EngineConfig) -> None:
    """Raises: ConfigError if the engine is Ray, and Ray is not there."""
    if engine.name is EngineName.ray and importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "engine=ray: Ray is not installed; pip install 'flwr[simulation]>=1.41,<1.43', "
            "or give engine=local"
        )


class OnRay:
    """Answers messages to sites, by actors of Ray; a `Crew` of a LocalGrid.

    Guarantee: as of `Workers`, but that Flower's simulation replaces no process that died: its
    later messages are answered as failures too. Nothing of Ray's runs on after `close`.
    """

    def __init__(self, sites: Sites, engine: EngineConfig, lost: Lost) -> None:
        """Raises: ConfigError if several machines would write the same books; FederationError if
        Ray does not start.
        """
        self._lost, self._asked = lost, dict[str, Message]()
        """What was pushed and not answered, by Flower's id; and who is told of losses."""
        self._ended, self._failure = threading.Event(), list[Exception]()
        self._handed: list[Grid] = []
        count = len(sites.records)
        workers = workers_of(engine, count)
        try:
            _start_ray(workers, sites)
            app = _app_of(_stored(sites), threads_of(engine, workers))
            run = partial(self._simulate, app, count, threads_of(engine, workers))
            self._thread = threading.Thread(target=run, name="flower-simulation", daemon=True)
            self._thread.start()
            self._flower = self._grid(count)
            self._nodes = self._partitions(count)
        except BaseException:
            self.close()
            raise

    def push(self, outgoing: Iterable[Message]) -> None:
        """See `Crew`."""
        TaskIdentity.run_id = self._flower.run.run_id  # its messages are of Flower's run
        for message in outgoing:
            known = message.metadata
            theirs = Message(
                message.content,
                self._nodes[partition_of(message)],
                known.message_type,
                ttl=known.ttl,
                group_id=known.group_id,
            )
            (identity,) = self._flower.push_messages([theirs])
            self._asked[identity] = message

    def pull(self, wanted: Collection[str], timeout_s: float) -> list[Message]:
        """See `Crew`. Raises: FederationError if Flower's simulation has ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            ids = [i for i, message in self._asked.items() if message.metadata.message_id in wanted]
            if found := [*self._flower.pull_messages(ids)]:
                return [self._ours(reply) for reply in found]
            if time.monotonic() >= deadline:
                return []
            self._wait()

    def close(self) -> None:
        """See `Crew`. Ends Ray, whatever its processes are doing."""
        import ray  # noqa: PLC0415 - an extra

        self._ended.set()
        thread = getattr(self, "_thread", None)
        if thread is not None and not self._asked:
            thread.join(END_S)
        ray.shutdown()
        if thread is not None:
            thread.join(END_S)

    def _ours(self, reply: Message) -> Message:
        """A reply of Flower's as one to the message that was pushed."""
        message = self._asked.pop(reply.metadata.reply_to_message_id)
        if not reply.has_error():
            return Message(reply.content, reply_to=message)
        code = reply.error.code
        if code not in messages.REFUSALS:  # of Flower's: the process died, or the app raised
            self._lost(message)
            code = messages.LOCAL_FAILURE
        return Message(Error(code, messages.REFUSALS[code]), reply_to=message)

    def _simulate(self, app: ClientApp, sites: int, threads: int) -> None:
        """What the other thread does: Flower's simulation, until it is told to end."""
        from flwr.simulation import run_simulation  # noqa: PLC0415 - needs the extra

        server = ServerApp()

        @server.main()
        def hand_over(grid: Grid, context: Context) -> None:
            self._handed.append(grid)
            self._ended.wait()

        try:
            run_simulation(
                server,
                app,
                num_supernodes=sites,
                backend_config={"client_resources": {"num_cpus": threads, "num_gpus": 0.0}},
            )
        except Exception as error:
            self._failure.append(error)

    def _grid(self, sites: int) -> Grid:
        """Flower's, once all of its nodes are there."""
        deadline = time.monotonic() + START_S
        while not self._handed or len([*self._handed[0].get_node_ids()]) < sites:
            self._wait(deadline)
        return self._handed[0]

    def _partitions(self, sites: int) -> list[int]:
        """Flower's id of the node of each site, as the nodes themselves say."""
        outgoing = [
            Message(RecordDict(), node, MessageType.QUERY) for node in self._flower.get_node_ids()
        ]
        waiting, nodes = {*self._flower.push_messages(outgoing)}, dict[int, int]()
        deadline = time.monotonic() + START_S
        while waiting:
            for reply in self._flower.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    raise FederationError(f"engine=ray: a site cannot be opened: {reply.error}")
                facts = reply.content[PARTITION]
                assert isinstance(facts, ConfigRecord)
                nodes[int(str(facts[PARTITION]))] = reply.metadata.src_node_id
            if waiting:
                self._wait(deadline)
        return [nodes[partition] for partition in range(sites)]

    def _wait(self, deadline: float = float("inf")) -> None:
        """A moment. Raises: FederationError if the simulation has ended, or it is too late."""
        if not self._thread.is_alive():
            reason = f": {self._failure[0]}" if self._failure else ""
            raise FederationError(f"engine=ray: Flower's simulation has ended{reason}")
        if time.monotonic() >= deadline:
            raise FederationError(f"engine=ray: Ray was not ready within {START_S:g} s")
        time.sleep(POLL_S)


def _start_ray(workers: int, sites: Sites) -> None:
    """Starts Ray here, or joins the cluster that RAY_ADDRESS names."""
    import ray  # noqa: PLC0415 - an extra

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    joins = "RAY_ADDRESS" in os.environ
    path = os.pathsep.join(sys.path)
    carried = {"PYTHONPATH": path, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}
    logging.getLogger("flwr").setLevel(logging.ERROR)  # it says that run_simulation is deprecated
    try:
        ray.init(
            num_cpus=None if joins else workers,
            include_dashboard=None if joins else False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": carried},
        )
    except Exception as error:
        raise FederationError(f"engine=ray: Ray does not start: {error}") from error
    machines = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if len(machines) > 1 and sites.books is not None:
        raise ConfigError(
            "engine=ray: the sites' books are one file, which several machines cannot write safely;"
            " run private simulations on one machine, or give privacy=none"
        )


def _stored(sites: Sites) -> Any:
    """A reference to the sites in Ray's object store."""
    import ray  # noqa: PLC0415 - an extra

    return ray.put(packed(sites))


def packed(sites: Sites) -> bytes:
    """The sites for another process of ours, wherever it is: texts in spools go with them."""
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(sites)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Of our own objects, for our own processes; a spool goes with what is in it."""

    def reducer_override(self, value: object) -> Any:
        """See pickle."""
        if isinstance(value, Spool):
            return _spool_of, (value.content(), value.kind)
        return NotImplemented


def _spool_of(content: bytes, kind: Kind) -> Spool:
    handle = os.memfd_create("coterie", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(handle), "wb") as file:
        file.write(content)
    return Spool(handle, kind)


def _app_of(reference: Any, threads: int) -> ClientApp:
    """What Flower pickles with every message: small, and without a record."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _opened(reference, threads)(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _opened(reference, threads)(message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        _opened(reference, threads)
        facts = ConfigRecord({PARTITION: int(context.node_config["partition-id"])})
        return Message(RecordDict({PARTITION: facts}), reply_to=message)

    return app


@cache
def _opened(reference: Any, threads: int) -> ClientApp:
    """The ClientApp of all sites, in a process of Ray's, which opens the books itself."""
    import ray  # noqa: PLC0415 - an extra

    torch.set_num_threads(threads)
    keep_freed_memory()
    sites = pickle.loads(ray.get(reference))  # noqa: S301 - what `_stored` of this run wrote
    assert isinstance(sites, Sites)
    return sites.app(None if sites.books is None else Store(sites.books))
