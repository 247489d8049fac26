"""One measurement of `benchmarks.workers`, in this process; prints one JSON object.

python -m benchmarks.workers_run echo|loop|rounds|bare|books|settings [ARGUMENT ...]
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertModel, BertTokenizerFast

import simulations.run as simulation
from client.site import Site
from client.train import Trainer
from common.allocation import resident_pages
from common.cli import Invocation
from common.parameters import Vector
from common.tasks.text_classification import FILLING, TOPICS
from server.app import Watch
from simulations.answer import Answer
from simulations.nursery import _NURSERY
from simulations.sites import Sites

EIGHT = (
    *("federation.sites=8", "evaluation.every=0", "engine.threads=1"),
    "engine.together=1",  # as what is called by nobody but itself trains
)
WORK = {
    "digits": (*EIGHT, "+experiment=digits", "federation.local_steps=8"),
    "lora": EIGHT,
}
"""What eight sites of equal size train: a ViT whose matrices are so small that starting operations
is most of it, and the main job."""
WINDOW_S = 10.0
"""For which training alone is counted."""
WIDTH = 1204
"""Of a made model whose head of two classes has 2,410 parameters."""
Mark = dict[str, float]


class Echoing(Sites):
    """Sites whose training gives back what it got, in workers too."""

    def answer_of_worker(self) -> Answer:
        """See `Sites`."""
        echo_here()
        return super().answer_of_worker()


def echo_here() -> None:
    """In this process a site's training is a copy of what it was sent."""
    Trainer.train = lambda self, site, vector, *, round_number: (vector.copy(), None)  # type: ignore[method-assign, assignment, misc]


def echo(sites: str, workers: str) -> Mark:
    """What a site costs all processes together, without training."""
    echo_here()
    simulation.Sites = Echoing  # type: ignore[misc]
    marks = run(*toy(made_model(WIDTH), int(sites), 6, int(workers)), "tuning=head", "privacy=none")
    return {
        "cpu_ms_per_site": 1000 * statistics.median(steps(marks, "cpu_s")) / int(sites),
        "wall_ms_per_site": 1000 * statistics.median(steps(marks, "at")) / int(sites),
    }


def loop() -> Mark:
    """CPU seconds of a round through the engine, and of the training inside it."""
    spent, train = {"train_s": 0.0}, Trainer.train

    def timed(*given: Any, **named: Any) -> Any:
        started = time.process_time()
        try:
            return train(*given, **named)
        finally:
            spent["train_s"] += time.process_time() - started

    Trainer.train = timed  # type: ignore[method-assign]
    marks = run(
        *("federation.sites=10", "federation.rounds=4", "evaluation.every=0"),
        *("engine.threads=1", "engine.workers=1"),
        note=lambda: dict(spent),
    )
    # The first round prepares the records, too, and the last one is followed by an evaluation.
    whole, inside = sum(steps(marks, "cpu_s")[:-1]), sum(steps(marks, "train_s")[:-1])
    return {
        "rounds_cpu_s": whole,
        "train_cpu_s": inside,
        "overhead_percent": 100 * (whole - inside) / inside,
    }


def rounds(work: str, workers: str) -> Mark:
    """Seconds of a round of eight equal sites, which is almost all training."""
    marks = run(*WORK[work], "federation.rounds=5", f"engine.workers={workers}")
    return {"round_s": statistics.median(steps(marks, "at")[:-1])}


def bare(work: str, start_at: str) -> Mark:
    """Sites a second of the same training called by nobody but itself, from a moment on.

    Several processes that are told the same moment show what the machine gives them together.
    """
    found: Mark = {}
    train = Trainer.train

    def timed(trainer: Trainer, site: Site, vector: Vector, *, round_number: int) -> Any:
        def once() -> Any:
            return train(trainer, site, vector, round_number=round_number)

        if not found:
            once()
            time.sleep(max(0.0, float(start_at) - time.time()))
            started, trained = time.perf_counter(), 0
            while time.perf_counter() - started < WINDOW_S:
                once()
                trained += 1
            found["sites_per_s"] = trained / (time.perf_counter() - started)
        return once()

    Trainer.train = timed  # type: ignore[method-assign]
    run(*WORK[work], "federation.rounds=1", "engine.workers=1")
    return found


def books(sites: str, workers: str) -> Mark:
    """Twenty private rounds, and what the fifth and the last of them found."""
    marks = run(
        *toy(made_model(32), int(sites), 20, int(workers)),
        *("tuning=head", "privacy.delta=1e-3", "privacy.epsilon=8"),
        "evaluation.every=5",  # both rounds that are compared
    )
    spent, fifth, last = steps(marks, "at")[:-1], marks[4], marks[-1]
    return {
        "round_s": statistics.median(spent),
        "slowest_round_s": max(spent),
        "wall_ms_per_site": 1000 * statistics.median(spent) / int(sites),
        "cpu_ms_per_site": 1000 * statistics.median(steps(marks, "cpu_s")[:-1]) / int(sites),
        "rss_mb_fifth": fifth["rss_mb"],
        "rss_mb_last": last["rss_mb"],
        "handles_fifth": fifth["handles"],
        "handles_last": last["handles"],
    }


def settings(workers: str) -> list[str]:
    """A run of four sites on made texts."""
    return [*toy(made_model(32), 4, 2, int(workers)), "tuning=head", "privacy=none"]


def toy(model: str, sites: int, rounds: int, workers: int) -> list[str]:
    """Overrides of a run on made texts, two of them a site at least."""
    return [
        *("data=toy", f"data.toy_records={max(100, 3 * sites)}", f"model.name={model}"),
        *("task.max_tokens=12", f"federation.sites={sites}", f"federation.rounds={rounds}"),
        *("federation.local_steps=1", "evaluation.every=0"),
        *("engine.threads=1", f"engine.workers={workers}"),
    ]


def made_model(width: int) -> str:
    """A folder with a BERT of one block and random weights, made once for this machine."""
    folder = Path(tempfile.gettempdir()) / f"coterie-benchmark-bert-{width}-{os.getuid()}"
    if not folder.exists():
        folder.mkdir(mode=0o700)
        marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = [*marks, *FILLING, *(word for topic in TOPICS for word in topic)]
        (folder / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
        made = BertConfig(
            vocab_size=len(words),
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
        )
        BertModel(made).save_pretrained(folder)
    return str(folder)


def steps(marks: list[Mark], name: str) -> list[float]:
    """How much a figure grew from each round to the next."""
    return [after[name] - before[name] for before, after in pairwise(marks)]


def run(*overrides: str, note: Callable[[], Mark] = dict) -> list[Mark]:
    """A whole run; what was there after each round."""
    marks: list[Mark] = []

    def on_round(_: object) -> None:
        now = {"at": time.perf_counter(), "cpu_s": cpu_s(), "rss_mb": rss_mb()}
        marks.append({**now, "handles": len(os.listdir("/proc/self/fd")), **note()})

    @contextmanager
    def watching(*_: object) -> Iterator[Watch]:
        yield Watch(lambda *_: None, on_round, lambda _: None)

    simulation._progress = watching  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        invocation = Invocation("simulate", (*overrides, f"run_dir={folder}/run"), json=False)
        with redirect_stdout(nowhere):
            simulation.simulate(invocation)
    return marks


def cpu_s() -> float:
    """CPU seconds of this process and of its workers."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # of a process that has just ended
            fields = path.read_text().rpartition(") ")[2].split()
            if _NURSERY and int(fields[1]) == _NURSERY[0].pid:
                ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def rss_mb() -> float:
    """Resident memory of this process now."""
    return resident_pages() * resource.getpagesize() / 2**20


MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "echo": echo,
    "loop": loop,
    "rounds": rounds,
    "bare": bare,
    "books": books,
    "settings": settings,
}

if __name__ == "__main__":
    # Under its own name: what goes to workers is looked up there.
    from benchmarks import workers_run  # noqa: PLW0406

    print(json.dumps(workers_run.MEASUREMENTS[sys.argv[1]](*sys.argv[2:])))
