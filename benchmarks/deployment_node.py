"""`coterie node` whose ClientApp does nothing: it sends back the parameters it was sent, moved by
a little of its own, so that no part of two answers is the same.
"""

import sys
from unittest import mock

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common import messages
from common.cli import main as coterie
from common.coding import encoded
from common.config import Coding
from common.privacy.mechanism import round_event
from common.privacy.noise import Randomness


def echo(*_: object, **__: object) -> ClientApp:
    """In the place of `client.app.client_app`."""
    app = ClientApp()

    @app.train()
    def train(message: Message, _: Context) -> Message:
        asked = messages.read_instruction(message)
        coding = asked.config.federation.coding
        coins = Randomness.from_entropy()
        moved = asked.vector + np.float32(1e-4 + 9e-4 * coins.uniform(1)[0])
        update = messages.Update(
            asked.run_id,
            asked.round,
            asked.layout_digest,
            round_event(asked.config),
            moved,
            coded=None if coding is Coding.float32 else encoded(moved, asked.vector, coding, coins),
        )
        return Message(messages.pack_update(update), reply_to=message)

    return app


def main() -> int:
    """As `coterie node ARGUMENTS`."""
    with mock.patch("client.service.client_app", echo):
        return coterie(["node", *sys.argv[1:]])
