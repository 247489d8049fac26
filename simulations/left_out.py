"""Leave one site out: what a sweep over left-out sites says together, and what it costs."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config import config_hash
from common.durable import write_atomic
from common.privacy.accounting import number, shown
from common.privacy.mechanism import NOT_PRIVATE
from common.tasks import TASKS
from server.left_out import UNPROTECTED
from simulations.finished import Finished, price_together

FILE = "leave_one_site_out.json"


def summary(finished: Sequence[Finished]) -> dict[str, Any] | None:
    """What several runs that each left a site out say together; None where they are not several.

    Runs that differ in more than the site stand apart in `runs`. `epsilon` is of one record in
    everything that sites sent in the whole sweep, runs that left no site out included, at the
    largest of their deltas; the metrics on the left-out sites are bounded by none.
    """
    alike: dict[str, list[Finished]] = {}
    for run in finished:
        whole = replace(run.config.federation, leave_out="")
        alike.setdefault(config_hash(replace(run.config, federation=whole)), []).append(run)
    without = [[run for run in runs if run.config.federation.leave_out] for runs in alike.values()]
    if max(map(len, without), default=0) < 2:  # noqa: PLR2004 - of one there is no spread
        return None
    return {
        "runs": [_of_alike(runs) for runs in without if runs],
        "epsilon": number(price_together(finished)),
        "delta": max(run.config.privacy.delta for run in finished),
        "private": False,
        "reason": UNPROTECTED,
    }


def write_summary(folder: Path, content: dict[str, Any]) -> None:
    """Keeps a summary beside the folders of its runs, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / FILE, text + "\n")


def show_summary(content: dict[str, Any], console: Console) -> None:
    """Prints mean, spread and worst site, and what holds of all the models together."""
    for runs in content["runs"]:
        console.print(f"Left-out sites ({NOT_PRIVATE}), seed {runs['seed']}", highlight=False)
        table = Table()
        for column in ("site", "records", runs["metric"]):
            table.add_column(column, justify="left" if column == "site" else "right")
        for site in runs["sites"]:
            table.add_row(site["site"], str(site["records"]), f"{site['value']:.4f}")
        console.print(table)
        spread = "" if runs["spread"] is None else f", standard deviation {runs['spread']:.4f}"
        console.print(
            f"{runs['metric']}: mean {runs['mean']:.4f}{spread} over {len(runs['sites'])} sites; "
            f"worst {runs['worst']}",
            highlight=False,
        )
    console.print(
        "Each of these trained on the records of all sites but one: against whoever sees what all "
        f"runs of the sweep sent, one record has epsilon {shown(content['epsilon'])} (delta "
        f"{content['delta']:g}). The numbers above were {content['reason']}.",
        highlight=False,
    )


def _of_alike(runs: list[Finished]) -> dict[str, Any]:
    task = TASKS[runs[0].config.task.name]
    metric = next(iter(runs[0].report["evaluation_left_out"]["metrics"]))
    sites = [
        {
            "site": found["site"],
            "records": found["records"],
            "value": found["metrics"][metric],
            "run_id": run.report["run_id"],
        }
        for run in runs
        for found in [run.report["evaluation_left_out"]]
    ]
    values = [site["value"] for site in sites]
    worst = max(values) if task.LOWER_IS_BETTER else min(values)
    return {
        "seed": runs[0].config.seed,
        "metric": metric,
        "mean": round(fmean(values), 4),
        "spread": round(stdev(values), 4) if len(values) > 1 else None,
        "worst": sites[values.index(worst)]["site"],
        "sites": sites,
    }
