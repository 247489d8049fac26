"""Metrics by group of public records: for whom does the model work worse?"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import ConfigError

FEWEST = 20
"""Records below which a group is shown, and compared with no other."""
MOST = 100
"""Groups of a report."""
SHARES = frozenset({"accuracy", "exact_match"})
"""Metrics that are a share of the records, of which an interval can be given."""
NORMAL_95 = 1.959963984540054
"""Quantile of the standard normal distribution for an interval of 95 percent."""

Measure = Callable[[list[int]], dict[str, float]]
"""Metrics of the records at some rows, the headline first."""


def by_group(
    column: str, groups: Sequence[str], measure: Measure, *, lower_is_better: bool
) -> dict[str, Any]:
    """The headline metric of each group, in order of name, and how far they lie apart.

    Guarantee: only groups of at least `FEWEST` records are compared; with fewer than two of these
    there is no worst one and no gap. Args: groups: (N,) name of each record's.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(groups):
        rows.setdefault(name, []).append(row)
    found = [_group(name, rows[name], measure) for name in sorted(rows)]
    compared = sorted((each for each in found if each["compared"]), key=lambda each: each["value"])
    if lower_is_better:
        compared.reverse()
    apart = len(compared) > 1
    return {
        "column": column,
        "metric": next(iter(measure([*range(len(groups))]))),
        "lower_is_better": lower_is_better,
        "fewest": FEWEST,
        "groups": found,
        "worst": compared[0]["group"] if apart else None,
        "best": compared[-1]["group"] if apart else None,
        "gap": round(abs(compared[-1]["value"] - compared[0]["value"]), 4) if apart else None,
    }


def check_groups(column: str, groups: Sequence[str] | None) -> None:
    """Refuses a column that names no groups but something of each record. Raises: ConfigError."""
    named = len(set(groups or ()))
    if named > MOST:
        raise ConfigError(
            f"data.group_column={column}: names {named} groups of public records, at most {MOST} "
            "make a table; give a column of fewer values"
        )


def wilson(share: float, records: int) -> tuple[float, float]:
    """The 95 percent interval of a share that was found in so many records.

    Unlike the normal approximation it stays in [0, 1], and is no point where all are right.
    Source: Wilson (1927), doi:10.1080/01621459.1927.10502953, without continuity correction.

    >>> [round(bound, 4) for bound in wilson(0.9, 50)], round(wilson(1.0, 10)[0], 4)
    ([0.7864, 0.9565], 0.7225)
    """
    z2 = NORMAL_95**2
    middle = share + z2 / (2 * records)
    spread = NORMAL_95 * math.sqrt(share * (1 - share) / records + z2 / (4 * records**2))
    whole = 1 + z2 / records
    return max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole)


def _group(name: str, rows: list[int], measure: Measure) -> dict[str, Any]:
    metric, value = next(iter(measure(rows).items()))
    interval = None
    if metric in SHARES:
        interval = [round(bound, 4) for bound in wilson(value, len(rows))]
    return {
        "group": name,
        "records": len(rows),
        "value": value,
        "interval": interval,
        "compared": len(rows) >= FEWEST,
    }
