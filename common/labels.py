"""Labels: what stands in a column of class names, as an index into `data.labels`.

Each value is read by itself: what one record's label becomes depends on no other record.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError

_WHOLE = re.compile(r"(-?\d+)\.0+")
"""A whole number as pandas writes it, where another row of the column had none."""


def labels_of(
    column: Sequence[Any], labels: Sequence[str], where: str, rows: Sequence[int]
) -> NDArray[np.int64]:
    """(N,) index of each label: as it stands, else with blanks around it or in other case, else
    a whole number with a point as one without.

    Args: labels: `data.labels`; rows: (N,) number of each row, for messages.
    Raises: ConfigError naming the row whose label is missing, or none of them.

    >>> labels_of(["spam", " Ham ", "SPAM"], ["ham", "spam"], "f.csv", [1, 2, 3]).tolist()
    [1, 0, 1]
    >>> labels_of([1, "0", 1.0, "1.0"], ["0", "1"], "f.csv", [1, 2, 3, 4]).tolist()
    [1, 0, 1, 1]
    """
    exact = {label: at for at, label in enumerate(labels)}
    folded = {_folded(label): at for at, label in enumerate(labels)}
    if len(folded) < len(labels):  # two of them differ in nothing else
        folded = {}
    found = []
    for value, row in zip(column, rows, strict=True):
        name = _name(value)
        whole = _WHOLE.fullmatch(name.strip())
        at = exact.get(name, folded.get(_folded(name)))
        if at is None and whole:
            at = exact.get(whole[1])
        if at is None:
            fault = "a label that is not one of data.labels" if name.strip() else "no label"
            raise ConfigError(f"{where}: row {row} has {fault}")
        found.append(at)
    return np.array(found, dtype=np.int64)


def _name(value: Any) -> str:
    """What stands there as text: nothing if it is missing."""
    if isinstance(value, float) and value != value:  # noqa: PLR0124 - NaN, as pandas fills gaps
        return ""
    return value if isinstance(value, str) else "" if value is None else str(value)


def _folded(name: str) -> str:
    return name.strip().casefold()
