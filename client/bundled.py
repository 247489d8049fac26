"""The ClientApp of the bundle: it answers nothing.

What runs beside private data is what a site has installed, `coterie node`, and never what a
coordinator sends. A stock SuperNode that loads this bundle is told so.
"""

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from common.messages import AGAINST_POLICY, REFUSALS

app = ClientApp()


@app.train()
def train(message: Message, _: Context) -> Message:
    """Refuses, whatever was asked."""
    return Message(Error(AGAINST_POLICY, REFUSALS[AGAINST_POLICY]), reply_to=message)
