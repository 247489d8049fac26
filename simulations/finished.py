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
from common.privacy.mechanism import count_event, is_private
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
    charge a record's one site. Between others it may have moved: what covers every site of one
    deal adds up with that of the others.
    """
    if not all(is_private(run.config) for run in finished):
        return math.inf
    delta = max(run.config.privacy.delta for run in finished)
    dealt: dict[str, list[Finished]] = {}
    for run in finished:
        dealt.setdefault(_deal(run.config), []).append(run)
    charged = [_charged(runs) for runs in dealt.values()]
    if len(charged) == 1:
        price = max(epsilon_pld(events, delta) for events in charged[0])
    else:
        price = epsilon_pld([e for sites in charged for e in _covering(sites)], delta)
    told = max(float(run.report["privacy"]["bound"]) for run in finished)  # of lasting books
    return max(price, told)


def _deal(config: Config) -> str:
    """What decides which records a site has."""
    values = json.loads(to_canonical(config))
    data, federation = values["data"], values["federation"]
    read = {name: value for name, value in data.items() if name not in COUNTED}
    return digest([values["seed"], read, [federation[name] for name in DEALING]])


def _charged(runs: Sequence[Finished]) -> set[tuple[Event, ...]]:
    """What runs on the same deal charged their sites; equal ones once."""
    charged: dict[str, list[Event]] = {}
    for run in runs:
        mechanism, count = run.report["privacy"]["mechanism"], count_event(run.config)
        for site in run.report["sites"]:
            # A site on terms of its own has its own sigma.
            own = {name: site[name] for name in ("noise_multiplier", "steps") if name in site}
            steps = Event(**{**mechanism, **own})
            charged.setdefault(site["name"], []).extend([steps, *([count] if count else [])])
    return {coalesce(events) for events in charged.values()}


def _covering(sites: set[tuple[Event, ...]]) -> list[Event]:
    """Of each mechanism as many steps as any site had: every site's charges are among them.

    Which of several sites is the worst can turn when more is composed on top: the one with the
    larger epsilon alone need not be it.
    """
    most: dict[tuple[float, float], int] = {}
    for event in (event for events in sites for event in events):
        key = event.noise_multiplier, event.sample_rate
        most[key] = max(most.get(key, 0), event.steps)
    return [Event(sigma, rate, steps) for (sigma, rate), steps in most.items()]
