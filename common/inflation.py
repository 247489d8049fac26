"""Inflation: a message of the wire from its parts, whoever sent them."""

from collections.abc import Mapping

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from common.errors import VerificationError


def inflated(root: str, parts: Mapping[str, bytes]) -> Message:
    """The message of which `root` is the id, from its parts by their ids.

    Raises: VerificationError if it is none, whatever Flower's parsers raise on a stranger's bytes.
    """
    try:
        message = inflate_object_from_contents(root, dict(parts))
    except Exception as error:
        raise VerificationError("what came is no message") from error
    if not isinstance(message, Message):
        raise VerificationError("what came is no message")
    return message
