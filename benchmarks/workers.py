"""The simulation engine: what messages cost, how soon the first reply is there, what workers gain.

    python -m benchmarks.workers sites|loop|first|speedup|books --json FILE

Each measurement runs in processes of its own, one after the other, and writes one JSON object a
line. CPU seconds are of the process named; wall times depend on what else the machine does, which
`load` says.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

QUIET = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
WIDTH = 1204
"""Of a made model whose head of two classes has 2,410 parameters."""


def main() -> None:
    """Runs one measurement, in new processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*MEASUREMENTS, "one"])
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "one":
        kind, *settings = arguments.settings
        print(json.dumps(ONE[kind](*settings)))
        return
    os.environ.update(QUIET)
    rows = [{"load": os.getloadavg()[0], **row} for row in MEASUREMENTS[arguments.what](arguments)]
    text = "\n".join(json.dumps(row) for row in rows)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


def apart(kind: str, *settings: object) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.workers", "one", kind, *map(str, settings)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def per_site(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """CPU of the whole path of a message, with training left out."""
    for workers in (1, 2):
        for sites in (100, 1000):
            found = [apart("echo", sites, workers) for _ in range(arguments.repeats)]
            yield {"what": "sites", "sites": sites, "workers": workers, **middle(found)}


def over_loop(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rounds of ten sites with LoRA, and the same calls of the trainer in a bare loop."""
    found = [apart("loop") for _ in range(arguments.repeats)]
    yield {"what": "loop", **middle(found)}


def first_reply(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """From the start of the command to the first reply of a site."""
    for workers in (1, 2):
        found = [apart("first", workers) for _ in range(arguments.repeats)]
        yield {"what": "first", "workers": workers, **middle(found)}
    found = [apart("imports") for _ in range(arguments.repeats)]
    yield {"what": "imports", **middle(found)}


def speed_up(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One worker's seconds over those of two, one thread each, turn about."""
    found = []
    for _ in range(arguments.repeats):
        one, two = (apart("rounds", workers)["round_s"] for workers in (1, 2))
        found.append({"one_s": one, "two_s": two, "speedup": one / two})
    yield {"what": "speedup", **middle(found)}


def with_books(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A thousand sites, twenty private rounds, each site's own ledger."""
    for sites, workers in ((500, 1), (1000, 1), (1000, 2)):
        yield {
            "what": "books",
            "sites": sites,
            "workers": workers,
            **apart("books", sites, workers),
        }


def middle(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure, and all of them."""
    medians = {name: round(statistics.median(each[name] for each in found), 4) for name in found[0]}
    return {**medians, "all": found}


def echo(sites: str, workers: str) -> dict[str, Any]:
    """Sites whose training gives back what it got: all that is left is the engine."""
    _without_training()
    rounds = 6
    model = made_model(WIDTH)
    marks = _run(*toy(model, int(sites), rounds, int(workers)), "tuning=head", "privacy=none")
    cpu = [
        after["cpu_s"] - before["cpu_s"]
        for before, after in zip(marks[:-2], marks[1:-1], strict=True)
    ]
    wall = [
        after["at"] - before["at"] for before, after in zip(marks[:-2], marks[1:-1], strict=True)
    ]
    return {
        "cpu_ms_per_site": 1000 * statistics.median(cpu) / int(sites),
        "wall_ms_per_site": 1000 * statistics.median(wall) / int(sites),
    }


def loop() -> dict[str, Any]:
    """CPU and wall seconds of rounds through the engine, and of the same training alone."""
    from client.train import Trainer

    spent = {"cpu": 0.0, "wall": 0.0}
    train = Trainer.train

    def timed(self: Trainer, *given: Any, **named: Any) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            return train(self, *given, **named)
        finally:
            spent["cpu"] += time.process_time() - cpu
            spent["wall"] += time.perf_counter() - wall

    Trainer.train = timed  # type: ignore[method-assign]
    settings = [
        *("federation.sites=10", "federation.rounds=3", "evaluation.every=0"),
        *("engine.threads=1", "engine.workers=1", "data=bbc_news"),
    ]
    at: list[dict[str, float]] = []
    marks = _run(*settings, mark=lambda: at.append(dict(spent)))
    # The first round also prepares the records, and the last is followed by the evaluation.
    whole, inside = marks[1]["cpu_s"] - marks[0]["cpu_s"], at[1]["cpu"] - at[0]["cpu"]
    return {
        "round_cpu_s": whole,
        "train_cpu_s": inside,
        "overhead_percent": 100 * (whole - inside) / inside,
        "round_s": marks[1]["at"] - marks[0]["at"],
    }


def first(workers: str) -> dict[str, Any]:
    """Seconds from the start of a new `coterie simulate` to its first reply."""
    code = (
        "import os, sys, time\n"
        "import benchmarks.workers as here\n"
        "here.stop_at_first_reply()\n"
        "from common.cli import Invocation\n"
        "from simulations.command import simulate\n"
        "simulate(Invocation('simulate', tuple(sys.argv[1:]), False))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = made_model(32)
        settings = [*toy(model, 4, 2, int(workers)), f"run_dir={folder}/run", "privacy=none"]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *settings], check=True, capture_output=True)
        return {"seconds": time.perf_counter() - started}


def stop_at_first_reply() -> None:
    """This process ends when its first reply of a site is there."""
    from server.exchange import Exchange

    replies = Exchange.replies

    def first_of(self: Exchange) -> Iterator[Any]:
        for _ in replies(self):
            os._exit(0)
        yield from ()

    Exchange.replies = first_of  # type: ignore[method-assign]


def imports() -> dict[str, Any]:
    """Seconds that importing the simulation takes alone."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import simulations.run"], check=True)
    return {"seconds": time.perf_counter() - started}


def rounds(workers: str) -> dict[str, Any]:
    """Seconds of a round of eight sites of equal size, which is almost all training."""
    settings = [
        *("+experiment=digits", "federation.sites=8", "federation.rounds=6", "evaluation.every=0"),
        *("federation.local_steps=8", "engine.threads=1", f"engine.workers={workers}"),
    ]
    marks = _run(*settings)
    spent = [
        after["at"] - before["at"] for before, after in zip(marks[:-2], marks[1:-1], strict=True)
    ]
    return {"round_s": statistics.median(spent)}


def books(sites: str, workers: str) -> dict[str, Any]:
    """Twenty private rounds, with what the fifth and the last of them found."""
    marks = _run(
        *toy(made_model(32), int(sites), 20, int(workers)),
        *("privacy.delta=1e-3", "privacy.epsilon=8", "privacy.sample_rate=1", "tuning=head"),
    )
    spent = [
        after["at"] - before["at"] for before, after in zip(marks[:-1], marks[1:], strict=True)
    ]
    fifth, last = marks[4], marks[-1]
    return {
        "round_s": statistics.median(spent),
        "slowest_s": max(spent),
        "ms_per_site": 1000 * statistics.median(spent) / int(sites),
        "last_over_fifth_rss": last["rss_mb"] / fifth["rss_mb"],
        "rss_mb": last["rss_mb"],
        "handles_fifth": fifth["handles"],
        "handles_last": last["handles"],
    }


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
    from tempfile import gettempdir

    from transformers import BertConfig, BertModel, BertTokenizerFast

    from common.tasks.text_classification import FILLING, TOPICS

    folder = Path(gettempdir()) / f"coterie-benchmark-bert-{width}-{os.getuid()}"
    if not folder.exists():
        folder.mkdir(mode=0o700)
        words = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *FILLING,
            *(w for t in TOPICS for w in t),
        ]
        (folder / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
        sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 4}
        made = BertConfig(
            vocab_size=len(words), intermediate_size=64, max_position_embeddings=32, **sizes
        )
        BertModel(made).save_pretrained(folder)
    return str(folder)


def _without_training() -> None:
    """In this process and in its workers a site's training is a copy of what it was sent."""
    import simulations.run
    from simulations.sites import Sites

    class Echoing(Sites):
        def answer_of_worker(self) -> Any:
            _echo_here()
            return super().answer_of_worker()

    Echoing.__module__, Echoing.__qualname__ = __name__, "Echoing"
    globals()["Echoing"] = Echoing
    simulations.run.Sites = Echoing  # type: ignore[misc]
    _echo_here()


def _echo_here() -> None:
    from client.train import Trainer

    Trainer.train = lambda self, site, vector, *, round_number: (vector.copy(), None)  # type: ignore[method-assign, assignment, misc]


def _run(*settings: str, mark: Callable[[], object] = lambda: None) -> list[dict[str, float]]:
    """A whole run; what was there after each round."""
    from rich.console import Console

    import simulations.run as simulation
    from common.cli import Invocation
    from server.app import Watch

    marks: list[dict[str, float]] = []

    def on_round(_: object) -> None:
        mark()
        marks.append(
            {
                "at": time.perf_counter(),
                "cpu_s": time.process_time(),
                "rss_mb": _rss_mb(),
                "handles": len(os.listdir("/proc/self/fd")),
            }
        )

    @contextmanager
    def watching(*_: object) -> Iterator[Watch]:
        yield Watch(lambda *_: None, on_round)

    simulation._progress = watching  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        invocation = Invocation("simulate", (*settings, f"run_dir={folder}/run"), json=True)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            simulation.simulate(invocation)
    return marks


def _rss_mb() -> float:
    """Of this process now; its peak where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * resource.getpagesize() / 2**20


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "sites": per_site,
    "loop": over_loop,
    "first": first_reply,
    "speedup": speed_up,
    "books": with_books,
}
ONE: dict[str, Callable[..., dict[str, Any]]] = {
    "echo": echo,
    "loop": loop,
    "first": first,
    "imports": imports,
    "rounds": rounds,
    "books": books,
}

if __name__ == "__main__":
    main()
