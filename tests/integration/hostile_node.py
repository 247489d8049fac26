"""A node whose ClientApp answers each round with another kind of nonsense: `coterie node` else."""

import sys
from dataclasses import replace
from unittest import mock

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body

from common import messages
from common.cli import main as coterie
from common.privacy.mechanism import round_event


class Garbled(ConfigRecord):
    """Whole on the wire, and no message once it is read."""

    def deflate(self):
        return add_header_to_object_body(b"\xff\xff\xff", self)


Garbled.__qualname__ = "ConfigRecord"


def of_shape(update):
    data = Array(np.zeros((2, 2), dtype=np.float64))
    content = messages.pack_update(update)
    return RecordDict({**content, messages.VECTOR: ArrayRecord({messages.VECTOR: data})})


def garbled(update):
    content = messages.pack_update(update)
    return RecordDict({**content, messages.FACTS: Garbled({"a": 1})})


def packed(**changes):
    return lambda update: messages.pack_update(
        replace(update, **{name: make(update) for name, make in changes.items()})
    )


KINDS = (
    packed(vector=lambda update: update.vector * np.float32("nan")),
    packed(vector=lambda update: update.vector[:-1]),
    packed(layout_digest=lambda _: "0" * 64),
    packed(round=lambda update: update.round + 1),
    packed(run_id=lambda _: "another"),
    of_shape,
    garbled,
    lambda _: RecordDict(),
)
"""By round, from the first."""


def hostile(*_, **__):
    app = ClientApp()

    @app.train()
    def train(message, _):
        asked = messages.read_instruction(message)
        charge = round_event(asked.config)
        honest = messages.Update(
            asked.run_id, asked.round, asked.layout_digest, charge, asked.vector
        )
        return Message(KINDS[asked.round - 1](honest), reply_to=message)

    return app


if __name__ == "__main__":
    with mock.patch("client.service.client_app", hostile):
        sys.exit(coterie(["node", *sys.argv[1:]]))
