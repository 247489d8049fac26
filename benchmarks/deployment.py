"""What a round costs beside the sites' work: a real SuperLink over TLS, and nodes that do nothing.

    python -m benchmarks.deployment --json F
    python -m benchmarks.deployment --payload head --rounds 20

Nodes are `coterie node` but for one thing: their ClientApp sends back what it was sent. Payloads
are those of the pretrained MiniLM: `head` (8 kB) and `full` (91 MB of float32 each way and node).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.processes import resident_mb
from simulations.deployment import LABELS, Deployment, deal

PAYLOADS = {"head": "tuning=head", "full": "tuning=full"}
ECHO = (
    *(sys.executable, "-c"),
    "import sys; from benchmarks.deployment_node import main; sys.exit(main())",
)


def main() -> None:
    """Measures each payload and prints a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--payload", choices=PAYLOADS, action="append")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    results = [
        measured(payload, options.rounds, options.sites) for payload in options.payload or PAYLOADS
    ]
    for result in results:
        print(result)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def measured(payload: str, rounds: int, sites: int) -> dict[str, Any]:
    """Seconds of the rounds after the first, from the end of one to the end of the next."""
    folder = Path(tempfile.mkdtemp(prefix="coterie-bench-"))
    with Deployment(folder, [f"site-{n}" for n in range(1, sites + 1)]) as deployment:
        public, declared = deal(folder, deployment.sites)
        deployment.start_superlink()
        deployment.enrol_all(cap=8.0, delta=1e-4, dataset="bbc-news")
        for site in deployment.sites:
            labels = f"data.labels=[{','.join(LABELS)}]"
            deployment.start_node(site, labels, "poll_s=0.1", command=ECHO)
        deployment.wait_for_nodes()
        run_dir = folder / "run"
        started = time.monotonic()
        code = deployment.submit(
            run_dir,
            *("data=csv", f"data.test_path={public}", f"data.labels=[{','.join(LABELS)}]"),
            *(f"data.declared_records={declared}", f"federation.sites={sites}"),
            *(f"federation.rounds={rounds}", "evaluation.every=0", "privacy=none"),
            *(PAYLOADS[payload], "federation.round_timeout_s=300"),
        )
        assert code == 0, folder
        total_s = time.monotonic() - started
        superlink = deployment.superlink
        assert superlink is not None
        memory = resident_mb(superlink.process.pid)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    ends = [line["elapsed_s"] for line in lines]
    whole = [after - before for before, after in pairwise(ends)]
    asked = [line["sites_s"] for line in lines[1:]]
    return {
        "payload": payload,
        "mb_each_way": lines[0]["bytes_up"] / sites / 1e6,
        "sites": sites,
        "rounds": rounds,
        "round_s": round(statistics.median(whole), 3),
        "round_s_worst": round(max(whole), 3),
        "of_it_until_the_last_reply_s": round(statistics.median(asked), 3),
        "whole_command_s": round(total_s, 1),
        "superlink_mb": round(memory),
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()
