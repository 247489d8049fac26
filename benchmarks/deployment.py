"""What a round costs beside the sites' work: a real SuperLink over TLS, and nodes that do nothing.

    python -m benchmarks.deployment --json F
    python -m benchmarks.deployment --payload 85mb --rounds 8 --coding int8

Nodes are `coterie node` but for one thing: their ClientApp sends back what it was sent, moved a
little, and no two alike: Flower keeps parts by their hashes, and equal ones would travel once.
Payloads are the pretrained MiniLM's `head` (3 kB) and `full` (90 MB of float32 each way and node),
and `85mb`: exactly that many, of a model of the same shape with fewer words. Updates are coded as
nodes code them; `mb_up` is of the coded ones.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import BertConfig

from benchmarks.faults import Follower, serverapps, wait
from benchmarks.processes import own_cpu_s, resident_mb
from benchmarks.tiny import PUBLIC, SHARE, WORDS, rows, save_model, write
from common.config import Coding
from simulations.deployment import Deployment

PATIENCE_S = 3600.0
EXACT = "85mb"
VOCABULARY = 27_092
"""Of a model whose trainable parameters are 85.00 MB of float32: 21,250,181."""
PAYLOADS = ("head", "full", EXACT)
ECHO = (
    *(sys.executable, "-c"),
    "import sys; from benchmarks.deployment_node import main; sys.exit(main())",
)


def main() -> None:
    """Measures each payload and prints a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--payload", choices=PAYLOADS, action="append")
    parser.add_argument("--rounds", type=int, default=6, help="at least 3")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--coding", choices=[each.name for each in Coding], default="float32")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    results = [
        measured(payload, options.rounds, options.sites, options.coding)
        for payload in options.payload or ("head", EXACT)
    ]
    for result in results:
        print(json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def measured(payload: str, rounds: int, sites: int, coding: str) -> dict[str, Any]:
    """Seconds of the rounds between the first and the last, which is measured on public records,
    from the end of one to the end of the next, and the processor's seconds of each process in them.
    """
    folder, load = Path(tempfile.mkdtemp(prefix="coterie-bench-")), os.getloadavg()[0]
    with Deployment(folder, [f"site-{n}" for n in range(1, sites + 1)]) as deployment:
        public, declared = _deal(folder, deployment)
        deployment.start_superlink()
        deployment.enrol_all(cap=8.0, delta=1e-4, dataset="tiny")
        labels = f"data.labels=[{','.join(WORDS)}]"
        for site in deployment.sites:
            deployment.start_node(site, labels, command=ECHO)
        deployment.wait_for_nodes()
        run = Follower(
            *(deployment, "run", "data=csv", f"data.test_path={public}", labels),
            *(f"data.declared_records={declared}", f"federation.sites={sites}"),
            *(f"federation.rounds={rounds}", "evaluation.every=0", "privacy=none"),
            *(*_trained(payload, folder), "federation.round_timeout_s=300"),
            f"federation.coding={coding}",
        )
        _wait_for(run, 1)
        first = _processors(deployment)
        _wait_for(run, rounds - 1)
        last = _processors(deployment)
        superlink = deployment.superlink
        assert superlink is not None
        memory = resident_mb(superlink.process.pid)
        assert run.end() == 0, run.said
        lines = run.lines
    whole = [after.elapsed_s - before.elapsed_s for before, after in pairwise(lines[:-1])]
    return {
        "payload": payload,
        "coding": coding,
        "mb_up": round(lines[0].bytes_up / sites / 1e6, 3),
        "sites": sites,
        "rounds": rounds,
        "round_s": round(statistics.median(whole), 3),
        "round_s_worst": round(max(whole), 3),
        "round_s_each": [round(each, 2) for each in whole],
        "of_it_until_the_last_reply_s": round(
            statistics.median(line.sites_s for line in lines[1:-1]), 3
        ),
        "processor_s_a_round": {
            name: round((last[name] - first[name]) / (rounds - 2), 3)
            for name in first
            if name in last
        },
        "whole_command_s": round(run.seconds, 1),
        "superlink_and_serverapp_mb": round(memory),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
    }


def _wait_for(run: Follower, rounds: int) -> None:
    """Returns once so many rounds are over, or the run is."""

    def is_over() -> bool:
        return len(run.lines) >= rounds or run.process.poll() is not None

    wait(is_over, f"round {rounds}", PATIENCE_S)


def _deal(folder: Path, deployment: Deployment) -> tuple[Path, int]:
    """A few records, as nobody trains: the public file, and the number of private ones."""
    sites, public = deployment.sites, folder / "public.csv"
    held = rows(PUBLIC + SHARE * len(sites))
    write(public, held[:PUBLIC])
    for place, site in enumerate(sites):
        write(site.records, held[PUBLIC + place :: len(sites)])
    return public, SHARE * len(sites)


def _trained(payload: str, folder: Path) -> tuple[str, ...]:
    """The settings of a run whose sites send this payload."""
    if payload != EXACT:
        return (f"tuning={payload}",)
    save_model(folder / "model", _shape(VOCABULARY))
    return ("tuning=full", f"model.name={folder / 'model'}")


def _shape(words: int) -> BertConfig:
    """That of MiniLM-L6."""
    return BertConfig(
        vocab_size=words,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )


def _processors(deployment: Deployment) -> Mapping[str, float]:
    """Seconds of processor that each process took so far."""
    assert deployment.superlink is not None
    processes = {name: node.process.pid for name, node in deployment.nodes.items()}
    processes["superlink"] = deployment.superlink.process.pid
    for pid in serverapps(deployment):
        processes["serverapp"] = pid
    return {name: own_cpu_s(pid) for name, pid in processes.items()}


if __name__ == "__main__":
    main()
