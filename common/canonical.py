"""One byte string for one value: what is hashed, compared and sent."""

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> str:
    """Serialises `value` to the only JSON text it has here.

    Guarantee: equal values give equal text; keys sorted, no spaces, no NaN or infinity.
    Raises: ValueError for a non-finite float, TypeError for what JSON cannot hold.
    Source: the idea of RFC 8785, restricted to what Coterie writes.

    >>> canonical_json({"b": 1, "a": [1.5, "é"]})
    '{"a":[1.5,"é"],"b":1}'
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex.

    >>> digest([])
    '4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945'
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
