"""What a site costs where a thousand of them are small: together, one by one, and in a bare loop.

    python -m benchmarks.cohorts --json FILE [--quick] [--only NAME ...] [--models NAME ...]

CPU milliseconds a site and round, messages and aggregation included, medians over interleaved
rounds after a first one. The same work everywhere: a site holds 32 images of 8 x 8, and takes one
step over all of them. `bare` is the limit: one loop over the same training in plain torch, one
model, no messages, no charges, no checks. One thread.
"""

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from common.cli import importing

with importing():  # as the command does: no collection looks at what stays
    import numpy as np
    import torch
    from flwr.app import Context, RecordDict
    from hydra import compose, initialize_config_dir
    from torch import Tensor, nn
    from torch.nn import functional
    from transformers import PreTrainedModel, ViTConfig
    from transformers.modeling_outputs import BaseModelOutput

    from client.agreement import sites_together
    from client.cohort import Cohort
    from client.ledger import Store, Terms
    from client.site import Site
    from common import made_models
    from common.allocation import keep_freed_memory
    from common.composition import CONF
    from common.config import Config, PrivacyMode, from_composed, register_schemas, to_canonical
    from common.made_models import MADE, MadeModel
    from common.records import Records
    from common.tasks import build_model
    from server.app import CONFIG_KEY, Watch, server_app
    from server.plan import make_plan
    from simulations.grid import COORDINATOR_NODE_ID, RUN_ID, LocalGrid, ThisProcess

CLASSES, SIDE, RECORDS = 10, 8, 32
WIDTHS = {"2.4k": (32,), "75k": (512, 80)}
"""Of the hidden layers; with 64 inputs and 10 classes 2,410 and 75,130 floats."""
RATE = 0.1
"""Step size."""


class Perceptron(PreTrainedModel):
    """Layers of an MLP over pixels, as the encoder of a classifier: the benchmark's own."""

    config_class = ViTConfig
    main_input_name = "pixel_values"

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__(
            ViTConfig(hidden_size=widths[-1], image_size=SIDE, patch_size=SIDE, num_channels=1)
        )
        sizes = (SIDE * SIDE, *widths)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        """(B, 1, d): the last hidden layer, as one state."""
        x = pixel_values.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return BaseModelOutput(last_hidden_state=x[:, None])


MADE.update(
    (
        f"made/mlp-{name}",
        MadeModel(lambda widths=widths: Perceptron(widths), made_models._digits_processor),
    )
    for name, widths in WIDTHS.items()
)


@dataclass(frozen=True)
class Row:
    """One way to train a thousand small sites."""

    how: str
    """`bare`, `loop` or `together`."""
    model: str
    private: bool
    """Whether gradients are clipped, noise is added, and books are kept."""
    sites: int
    cpu_ms: float
    """CPU milliseconds a site and round, median."""
    least_ms: float
    most_ms: float
    rounds: int


def main() -> None:
    """Measures, prints a table and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write the rows to")
    parser.add_argument("--quick", action="store_true", help="a tenth of the sites")
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--only", nargs="*", help="ways, as `together bare`")
    parser.add_argument("--models", nargs="*", choices=WIDTHS, default=[*WIDTHS])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way, in turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    sites = options.sites // (10 if options.quick else 1)
    rows: list[Row] = []
    for model in options.models:
        for private in (False, True):
            found = measured(model, sites, options.repeats, options.only, private=private)
            rows += found
            content = {"machine": platform.processor(), "rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(content, indent=1) + "\n")


def measured(
    model: str, sites: int, repeats: int, only: list[str] | None, *, private: bool
) -> Iterator[Row]:
    """All ways in turns, so that a busy machine is busy for each of them."""
    config, images = config_of(model, sites, private=private), images_of(sites)
    ways: dict[str, Callable[[], list[float]]] = {
        "together": lambda: federated(config, images, 0),
        "loop": lambda: federated(config, images, 1),
    }
    if not private:
        ways["bare"] = lambda: bare(model, images)
    ways = {how: run for how, run in ways.items() if not only or how in only}
    taken: dict[str, list[float]] = {how: [] for how in ways}
    for _ in range(repeats):
        for how, run in ways.items():
            gc.collect()  # what the run before left behind is not at the expense of this one
            taken[how] += [1e3 * seconds / sites for seconds in run()]
    for how, each in taken.items():
        low, middle, high = min(each), statistics.median(each), max(each)
        print(
            f"{model:5} {'private' if private else 'plain':8} {how:9} {middle:8.3f} ms a site "
            f"({low:.3f} to {high:.3f})",
            flush=True,
        )
        yield Row(
            how, model, private, sites, *(round(x, 4) for x in (middle, low, high)), len(each)
        )


ROUNDS = 5
"""Of each run; neither the first, which prepares and rehearses, nor the last, which an evaluation
follows, is counted."""


def config_of(model: str, sites: int, *, private: bool) -> Config:
    """One step of every site over all its images, a round."""
    register_schemas()
    settings = [
        "task=image_classification", "data=digits", f"model.name=made/mlp-{model}", "tuning=full",
        f"federation.sites={sites}", f"federation.rounds={ROUNDS}", "federation.local_steps=1",
        f"data.declared_records={sites * RECORDS}", "evaluation.every=0", "engine.threads=1",
        f"tuning.head_learning_rate={RATE}", f"tuning.adapter_learning_rate={RATE}",
        "privacy.sample_rate=1", "privacy.delta=1e-3", f"privacy={'record' if private else 'none'}",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return make_plan(from_composed(compose("simulate", settings))).config


def images_of(sites: int) -> list[Records]:
    """Random images, all different."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(sites):
        pixels = draw.integers(0, 256, (RECORDS, SIDE, SIDE, 1), dtype=np.uint8)
        found.append(Records(tuple(pixels), draw.integers(0, CLASSES, RECORDS)))
    return found


def federated(config: Config, images: list[Records], together: int) -> list[float]:
    """CPU seconds of each round that counts, by the real apps; `together` 1: one by one."""
    config = replace(config, engine=replace(config.engine, together=together))
    stamps: list[float] = []
    watch = Watch(lambda *_: None, lambda _: stamps.append(time.process_time()), lambda _: None)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        config = replace(config, run_dir=name)
        names = config.federation.site_names
        ledgers = {}
        if config.privacy.mode is not PrivacyMode.none:
            store = stack.enter_context(Store.create(folder / "sites.db"))
            terms = Terms("images", config.privacy.epsilon, config.privacy.delta, "1" * 64)
            with store.together():
                ledgers = {each: store.open(each, terms) for each in names}
        labels = tuple(config.data.labels)
        opened = [
            Site(each, held, labels, ledgers.get(each))
            for each, held in zip(names, images, strict=True)
        ]
        cohort = Cohort(
            lambda context: opened[int(context.node_config["partition-id"])],
            most=sites_together(config, build_model(config)),
            allow_unprotected=True,
        )
        grid = LocalGrid(ThisProcess(cohort, len(names), cohort.size), names)
        values = {CONFIG_KEY: to_canonical(config)}
        context = Context(RUN_ID, COORDINATOR_NODE_ID, {}, RecordDict(), values)
        server_app(lambda _: images[0], watch)(grid, context)
    return [later - earlier for earlier, later in pairwise(stamps)][:-1]


def bare(model: str, images: list[Records]) -> list[float]:
    """CPU seconds of as many rounds of one loop: one model and optimiser, set and read in place,
    and a running sum.
    """
    sizes = (SIDE * SIDE, *WIDTHS[model], CLASSES)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    network = nn.Sequential(*layers[:-1])
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    held = [
        (
            torch.from_numpy(np.stack(each.contents)).float().flatten(1) / 127.5 - 1,
            torch.from_numpy(each.labels),
        )
        for each in images
    ]
    taken = []
    for _ in range(ROUNDS):
        started = time.process_time()
        start = [p.detach().clone() for p in parameters]
        total = [torch.zeros_like(p) for p in parameters]
        for pixels, labels in held:
            with torch.no_grad():
                for p, at in zip(parameters, start, strict=True):
                    p.copy_(at)
            optimizer.zero_grad()
            functional.cross_entropy(network(pixels), labels).backward()
            optimizer.step()
            with torch.no_grad():
                for p, into in zip(parameters, total, strict=True):
                    into.add_(p)
        with torch.no_grad():
            for p, into in zip(parameters, total, strict=True):
                p.copy_(into / len(held))
        taken.append(time.process_time() - started)
    return taken[1:-1]


if __name__ == "__main__":
    main()
