"""What the audits and the always-on measurements show, and how often they are wrong.

    python -m benchmarks.audits --json FILE [--trials N] [--only validity power alarms]

`validity`: on mechanisms whose epsilon is known, how often a bound exceeds it. `power`: the real
private step on a small Transformer, sound and with one fault each. `alarms`: after how many steps
the meters stop a fault, and how often they stop a sound step. Faults are the rows of
`tests/client/test_mutations.py`: changes of the real code.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from scipy import special, stats
from torch import nn

from benchmarks.tiny import make_job
from client import meters
from client.audit import audit_mechanism
from client.clipping.engines import ClippingEngine, EngineName
from client.private_step import ParameterGroup, private_steps, rehearse_chance, sgd
from common.composition import CONF
from common.config import Config, from_composed, register_schemas
from common.errors import PrivacyRefusedError
from common.privacy.lower_bounds import (
    INDEPENDENT,
    ONE_RUN,
    bounds_of,
    one_run_bound,
)
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness
from tests.client.test_audit import FAULTS
from tests.client.test_mutations import MUTATIONS, SKIPPED, fixed_size, noise, sampler, shuffled
from tests.common.privacy.games import DELTA, EPSILONS, game

ODDS = 0.05
REPEATED = 20
"""Audits of the sound step, and times that each fault is tried."""
FEW_STEPS = 10
"""Steps within which noise that is a tenth too small must be found."""
PATIENCE = 60
"""Steps that a fault may go on."""


def validity(trials: int) -> dict[str, Any]:
    """Shares of bounds above the truth, under the exact Gaussian and randomised response."""
    rows = []
    for epsilon in EPSILONS:
        for m in (1000, 5000):
            draw = np.random.default_rng(int(epsilon) * 10_000 + m)
            for by in (INDEPENDENT, ONE_RUN):
                found = []
                for _ in range(trials):
                    scores, present = game(epsilon, m * 5 // 4, draw)
                    found.append(bounds_of(scores, present, delta=DELTA, by=by))
                bounds = np.array([each.lower_bound for each in found])
                rows.append(
                    {
                        "epsilon": epsilon,
                        "m": m,
                        "by": "+".join(by),
                        "trials": trials,
                        "median": float(np.median(bounds)),
                        "max": float(bounds.max()),
                        "above": float((bounds > epsilon).mean()),
                        "allowed": ODDS + 3 * math.sqrt(ODDS * (1 - ODDS) / trials),
                        "ceiling": float(np.median([each.ceiling for each in found])),
                    }
                )
    return {"gaussian": rows, "randomised_response": [_response(1.0, 1000), _response(3.0, 1000)]}


def _response(epsilon: float, m: int) -> dict[str, float]:
    """The exact rate at which the truth is rejected where each answer is right by its own coin."""
    right = 1 / (1 + math.exp(-epsilon))
    rejected = next(
        v
        for v in range(int(m * right), m + 1)
        if one_run_bound(m, m, v, delta=0.0, significance=ODDS) > epsilon
    )
    return {"epsilon": epsilon, "m": m, "rejected": float(stats.binom.sf(rejected - 1, m, right))}


def power(config: Config) -> list[dict[str, Any]]:
    """The audit of the mechanism, of the sound step and of each fault."""
    rows = []
    for name, fault in {"sound": None, **FAULTS}.items():
        for epsilon in (1.0, 8.0):
            asked = replace(config, privacy=replace(config.privacy, epsilon=epsilon))
            bounds, verdicts, seconds = [], Counter[str](), []
            for _ in range(REPEATED):
                with pytest.MonkeyPatch.context() as patch:
                    if fault is not None:
                        fault(patch)
                    began = time.perf_counter()
                    found = audit_mechanism(asked).audit
                    seconds.append(time.perf_counter() - began)
                bounds.append(found.bounds.lower_bound)
                verdicts[found.verdict] += 1
            rows.append(
                {
                    "step": name,
                    "claimed": epsilon,
                    "runs": REPEATED,
                    "falsified": verdicts["FALSIFIED"],
                    "median": float(np.median(bounds)),
                    "min": min(bounds),
                    "max": max(bounds),
                    "ceiling": found.bounds.ceiling,
                    "m": found.bounds.m,
                    "seconds": float(np.median(seconds)),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


class Nothing(ClippingEngine):
    """Parameters that no record moves: what is left of a step is coins, noise and meters."""

    name = EngineName.loop

    def __init__(self, size: int) -> None:
        super().__init__(nn.ParameterList([nn.Parameter(torch.zeros(size))]))

    def add_clipped(self, loss_of: Any, piece: Any, clip_norm: float, sums: Any) -> torch.Tensor:
        """Adds nothing."""
        return torch.zeros(len(piece))


SIZES = {
    "main job": (14_213, 299, Mechanism(2.9222, 1.0, 0.5, 299)),
    "tiny": (1_088, 60, Mechanism(2.0, 1.0, 0.5, 42)),
    "tenth": (14_213, 300, Mechanism(2.0, 1.0, 0.1, 300)),
    "rare": (14_213, 30, Mechanism(1.0, 1.0, 1 / 30, 30)),
}
"""Parameters, records and mechanism; of `rare` every third step draws nobody."""


def whole_passes() -> Callable[..., NDArray[np.int64]]:
    """As `shuffled`, with the few that are left at the end of a pass as a batch of their own."""
    draw, waiting = np.random.default_rng(0), list[int]()

    def sample(records: int, *, sample_rate: float, coins: Randomness) -> NDArray[np.int64]:
        size = round(records * sample_rate)
        if not waiting:
            waiting.extend(draw.permutation(records).tolist())
        taken = np.sort(np.array(waiting[:size], dtype=np.int64))
        del waiting[:size]
        return taken

    return sample


STOPPED: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "noise x0.9": ("main job", noise(lambda draw, stream, count: 0.9 * draw(stream, count))),
    "noise x0.9, tiny": ("tiny", noise(lambda draw, stream, count: 0.9 * draw(stream, count))),
    "noise x0.99": ("main job", noise(lambda draw, stream, count: 0.99 * draw(stream, count))),
    "noise used twice": ("main job", MUTATIONS["noise used twice"].apply),
    "batches of one size": ("main job", sampler(fixed_size)),
    "shuffled, remainders kept": ("main job", sampler(whole_passes)),
    "shuffled, remainders left out": ("main job", sampler(shuffled)),
    "shuffled, rate 1/10": ("tenth", sampler(shuffled)),
    "shuffled, rate 1/30": ("rare", sampler(shuffled)),
    "empty samples skipped": ("rare", SKIPPED),
}


def walk(size: str, steps: int, mine: meters.Meters | None = None) -> str:
    """Steps as a round takes them, one a round; returns the first alarm, or nothing."""
    parameters, records, mechanism = SIZES[size]
    engine, mine = Nothing(parameters), mine or meters.Meters(mechanism)
    groups = [ParameterGroup(tuple(engine.parameters), 1e-9)]
    for step in range(1, steps + 1):
        try:
            private_steps(
                engine,
                sgd(groups),
                lambda at: torch.zeros(len(at)),
                mechanism=mechanism,
                randomness=Randomness.from_entropy(),
                records=records,
                steps=1,
                physical_batch=max(16, records),
                meters=mine,
            )
        except PrivacyRefusedError as alarm:
            return f"{str(alarm).partition(':')[0]} {step}"
    return ""


def alarms(trials: int) -> dict[str, Any]:
    """Which meter stops which fault, after how many steps; and sound steps it stops."""
    rows = []
    for name, (size, fault) in STOPPED.items():
        with pytest.MonkeyPatch.context() as patch:
            found = []
            for _ in range(trials):
                fault(patch)
                found.append(walk(size, PATIENCE))
                patch.undo()
        checks = Counter(each.partition(" ")[0] or "missed" for each in found)
        steps = [int(each.split()[1]) for each in found if each]
        rows.append(
            {
                "fault": name,
                "at": size,
                "trials": trials,
                "checks": dict(checks),
                "steps": {
                    "median": float(np.median(steps)) if steps else None,
                    "most": max(steps, default=None),
                },
                "within_ten": sum(step <= FEW_STEPS for step in steps) / trials,
                "before_the_first": rehearsed(SIZES[size][2].sample_rate, fault, trials),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return {
        "faults": rows,
        "sound": [false_alarms(size, 50 * trials) for size in ("main job", "tiny")],
    }


def rehearsed(rate: float, fault: Callable[[pytest.MonkeyPatch], None], trials: int) -> float:
    """The share of times that the rehearsal before a run finds it."""
    found = 0
    for _ in range(trials):
        with pytest.MonkeyPatch.context() as patch:
            fault(patch)
            try:
                rehearse_chance(rate)
            except PrivacyRefusedError:
                found += 1
    return found / trials


def false_alarms(size: str, steps: int) -> dict[str, Any]:
    """Sound steps at odds of 1e-3 in place of 1e-8, as the real ones are too rare to be counted:
    that the tails are what they should be is all that can be seen.
    """
    asked = 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meters, "ODDS", asked)
        patch.setattr(meters, "DEVIATIONS", float(-special.ndtri(asked)))
        stopped, done = Counter[str](), 0
        while done < steps:  # two steps each, so that every check has been made and none is summed
            found = walk(size, 2)
            done += 2
            if found:
                stopped[found.partition(" ")[0]] += 1
    return {
        "at": size,
        "steps": done,
        "odds": asked,
        "stopped": dict(stopped),
        "share_of_steps": sum(stopped.values()) / done,
        "bound": expected_share(asked),
        "bound_at_real_odds": expected_share(meters.ODDS),
    }


def expected_share(odds: float) -> float:
    """At most so many sound steps alarm: two tails of nine judgements, and one bet.

    Energy of the step, of all steps, of pieces; neighbours, pieces, the step before; rate,
    dispersion, overlap.
    """
    return (9 * 2 + 1) * odds


def small_config(folder: Path) -> Config:
    """A BERT of two blocks, with LoRA and a head."""
    make_job(folder / "job", [], rounds=1)  # for its model
    settings = (
        *("data=toy", "data.labels=[sport,money]", f"model.name={folder / 'job' / 'model'}"),
        *("task.max_tokens=12", "privacy.delta=1e-3", "engine.threads=1"),
    )
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_composed(compose("simulate", [*settings]))


def main() -> None:
    """Runs what was asked for and writes it down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trials", type=int, default=300)
    names = ("validity", "power", "alarms")
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "validity" in asked.only:
            found["validity"] = validity(asked.trials)
        if "power" in asked.only:
            found["power"] = power(small_config(Path(folder)))
        if "alarms" in asked.only:
            found["alarms"] = alarms(asked.trials)
    text = json.dumps(found, indent=1)
    print(text)
    if asked.json:
        asked.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
