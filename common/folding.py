"""Folding: over a network a small vector travels within the facts of its message.

Flower makes objects of a message, six where it holds a vector and facts, and each object is a
request each way, of 15 ms of its SuperLink's processor whatever it holds. Folded, they are three.
A large vector stays apart: there Flower sends once what several messages have in common.
"""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SType

from common.frames import header_of
from common.messages import FACTS, VECTOR

MOST_BYTES = 64 << 10
"""Of a vector that is folded: of LoRA as a rule, of a whole model never."""
PLACES = {"float32": "vector-float32", "uint8": "vector-uint8"}
"""Under which name a vector of a type stands among the facts, header and all."""


def folded(content: RecordDict) -> RecordDict:
    """The same content with its vector in its facts; as it is, if it has none, or a large one."""
    arrays, facts = content.get(VECTOR), content.get(FACTS)
    if not isinstance(arrays, ArrayRecord) or not isinstance(facts, ConfigRecord):
        return content
    if content.keys() != {VECTOR, FACTS} or arrays.keys() != {VECTOR}:
        return content
    array = arrays[VECTOR]
    if array.dtype not in PLACES or len(array.data) > MOST_BYTES:
        return content
    within = facts.copy()
    within[PLACES[array.dtype]] = array.data
    return RecordDict({FACTS: within})


def unfold(message: Message) -> bool:
    """Puts the vector of a folded message back in its place; whether it was folded.

    What is folded in no way of ours stays as it came, and whoever reads it refuses it.
    """
    facts = None if message.has_error() else message.content.get(FACTS)
    if not isinstance(facts, ConfigRecord) or len(message.content) != 1:
        return False
    rest = facts.copy()
    found = {dtype: rest.pop(name) for dtype, name in PLACES.items() if name in facts}
    if len(found) != 1:
        return False
    dtype, data = found.popitem()
    if not isinstance(data, bytes) or len(data) > MOST_BYTES:
        return False
    # The header is read by whoever reads the vector, as that of any other.
    count = max(len(data) - len(header_of(0)), 0) // np.dtype(dtype).itemsize
    array = Array(dtype, (count,), SType.NUMPY, data)
    message.content = RecordDict({VECTOR: ArrayRecord({VECTOR: array}), FACTS: rest})
    return True
