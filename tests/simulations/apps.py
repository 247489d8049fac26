"""What workers of tests answer with: made in the worker, and so importable there."""

import os
import signal
import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from common.privacy.noise import Randomness
from simulations.answer import one_by_one


def reply(message, *, arrays=None, **metrics):
    content = {"metrics": MetricRecord({"num-examples": 1.0, "pid": os.getpid(), **metrics})}
    if arrays is not None:
        content["arrays"] = ArrayRecord({"w": Array(arrays)})
    return Message(RecordDict(content), reply_to=message)


def partition(context):
    return int(context.node_config["partition-id"])


def trained_by(train):
    app = ClientApp()
    app.train()(train)
    app.evaluate()(lambda message, context: reply(message, mean=values_of(message).mean()))
    return one_by_one(app)


def values_of(message):
    return message.content["arrays"]["w"].numpy()


def adding():
    """Adds the partition's number to what it gets."""
    return trained_by(lambda m, c: reply(m, arrays=values_of(m) + partition(c)))


def counting():
    """Counts its calls in the context's state."""

    def train(message, context):
        known = context.state.get("calls", MetricRecord({"n": 0}))
        context.state["calls"] = MetricRecord({"n": known["n"] + 1})
        return reply(message, n=known["n"] + 1)

    return trained_by(train)


class Restless:
    """Has always more to do while it rests, and says how often it has."""

    def __init__(self):
        self.rests = 0
        self._answer = trained_by(lambda m, c: reply(m, rests=self.rests))

    def __call__(self, messages, contexts):
        return self._answer(messages, contexts)

    def rest(self):
        self.rests += 1
        time.sleep(0.01)
        return True


class Upset(Restless):
    """Fails when it rests."""

    def rest(self):
        super().rest()
        raise ValueError("a secret of the site")


def raising():
    def train(message, context):
        raise ValueError("a secret of the site")

    return trained_by(train)


def dying(folder, times=1):
    """The first site's worker is killed in the middle, so many times."""

    def train(message, context):
        deaths = [*folder.glob("death-*")]
        if partition(context) == 0 and len(deaths) < times:
            (folder / f"death-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return reply(message)

    return trained_by(train)


def hanging(folder):
    """The first site hangs the first time."""

    def train(message, context):
        if partition(context) == 0 and not (folder / "hung").exists():
            (folder / "hung").write_text(str(os.getpid()))
            time.sleep(600)
        return reply(message)

    return trained_by(train)


def slow(seconds):
    def train(message, context):
        time.sleep(seconds)
        return reply(message, at=time.time())

    return trained_by(train)


def drawing():
    """What the operating system gives this process."""
    return trained_by(
        lambda m, c: reply(m, arrays=Randomness.from_entropy().normal(4), draw=np.random.rand())
    )


def jobs():
    """Says of each site with how many others it was answered."""

    def answer(messages, contexts):
        assert [partition(c) for c in contexts] == [m.metadata.dst_node_id - 2 for m in messages]
        return [reply(m, together=len(messages)) for m in messages]

    return answer


def looking():
    """Says what it was given, as it is in the worker."""

    def train(message, context):
        array = message.content["arrays"]["w"]
        where = np.frombuffer(array.data, np.uint8).ctypes.data
        facts = ConfigRecord({"kind": type(array.data).__name__, "where": where})
        content = {"facts": facts, "arrays": message.content["arrays"]}
        return Message(RecordDict(content), reply_to=message)

    return trained_by(train)
