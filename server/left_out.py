"""How well the final model does at a site that did not train it: measured without protection.

A simulation alone can do this, of one's own records: see docs/decisions/0015-a-site-left-out.md.
"""

from typing import Any

from common.config import Config
from common.errors import ConfigError
from common.model import FineTuned
from common.parameters import Vector
from common.records import Records
from server.evaluate import Evaluator

UNPROTECTED = (
    "measured on private records of a site that did not train: nothing was charged for them and "
    "no noise was added, so epsilon says nothing about these numbers"
)
"""What every metric of a left-out site is stamped with."""


def check_left_out(config: Config, left_out: Records | None) -> None:
    """Refuses a coordinator that does not hold the left-out site's records. Raises: ConfigError."""
    if config.federation.leave_out and left_out is None:
        raise ConfigError(
            f"federation.leave_out={config.federation.leave_out}: is for simulations only, where "
            "one holds all sites' records; a site that shall not train is not asked to"
        )


def measure_left_out(
    config: Config, model: FineTuned, vector: Vector, left_out: Records | None
) -> dict[str, Any] | None:
    """The section of `report.json` on the left-out site; None where all sites trained."""
    if left_out is None:
        return None
    return {
        "site": config.federation.leave_out,
        "records": len(left_out),
        "metrics": Evaluator(config, model, left_out).measure(vector),
        "private": False,
        "reason": UNPROTECTED,
    }
