"""Runs that are over: what each was asked for, what it reported, what all of them cost together."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.canonical import digest
from common.config import Config, from_yaml, to_canonical
from common.errors import ConfigError, VerificationError
from common.privacy.accounting import Event, coalesce, epsilon_pld
from common.privacy.mechanism import count_event
from server.plan import is_private
from server.report import read_report

DEALING = ("sites", "partition", "dirichlet_alpha", "classes_per_site")
"""Of `federation`, what decides which records a site has."""
COUNTED = ("declared_records", "records_counted")
"""Of `data`, what follows from the records."""


@dataclass(frozen=True)
class Finished:
    """A run that is over: what it was asked for, and its `report.json`."""

    config: Config
    report: dict[str, Any]


def read_finished(run_dir: Path) -> Finished:
    """Reads a finished run back. Raises: VerificationError if it is none, or none of ours."""
    report, _ = read_report(run_dir)
    try:
        config = from_yaml((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, ConfigError) as error:
        raise VerificationError(f"{run_dir}: its config.yaml is not one of ours") from error
    return Finished(config, report)


def price_together(finished: Sequence[Finished]) -> float:
    """Epsilon of all runs together, for one record at the site that they charged most.

    Guarantee: an upper bound, if the runs' settings were fixed before the first of them, as those
    of a sweep are, and the records did not change between them. Runs that deal records alike
    charge a record's one site; between others it may have moved, and their worst sites add up.
    """
    if not all(is_private(run.config) for run in finished):
        return math.inf
    delta = max(run.config.privacy.delta for run in finished)
    dealt: dict[str, list[Finished]] = {}
    for run in finished:
        dealt.setdefault(_deal(run.config), []).append(run)
    events = [event for runs in dealt.values() for event in _worst_charged(runs, delta)]
    told = max(float(run.report["privacy"]["bound"]) for run in finished)  # of lasting books
    return max(epsilon_pld(events, delta), told)


def _deal(config: Config) -> str:
    """What decides which records a site has."""
    values = json.loads(to_canonical(config))
    data, federation = values["data"], values["federation"]
    read = {name: value for name, value in data.items() if name not in COUNTED}
    return digest([values["seed"], read, [federation[name] for name in DEALING]])


def _worst_charged(runs: Sequence[Finished], delta: float) -> list[Event]:
    """What runs on the same deal charged the site that they charged most."""
    charged: dict[str, list[Event]] = {}
    for run in runs:
        mechanism, count = run.report["privacy"]["mechanism"], count_event(run.config)
        for site in run.report["sites"]:
            # A site on terms of its own has its own sigma.
            own = {name: site[name] for name in ("noise_multiplier", "steps") if name in site}
            steps = Event(**{**mechanism, **own})
            charged.setdefault(site["name"], []).extend([steps, *([count] if count else [])])
    distinct = {coalesce(events): events for events in charged.values()}
    return max(distinct.values(), key=lambda events: epsilon_pld(events, delta))
