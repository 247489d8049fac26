"""Which hyperparameters: runs of the main job judged on the public validation split.

    python benchmarks/selection.py FOLDER [--threads 2]

Writes one run folder per row and seed (a finished one is not run again) and FOLDER/table.md.
The hold-out is never looked at here.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
HEAD = ["tuning=head"]
NONE = ["privacy=none"]
ROWS: dict[str, list[str]] = {
    "LoRA r=8 on the top block, q=0.5, 10x2 steps, lr 2.5/0.4, T=128": [],
    "adapter lr 0.1": ["tuning.adapter_learning_rate=0.1"],
    "adapter lr 0.8": ["tuning.adapter_learning_rate=0.8"],
    "15x1 steps, lr 5/0.2 (the earlier default)": [
        "federation.rounds=15",
        "federation.local_steps=1",
        "tuning.head_learning_rate=5",
        "tuning.adapter_learning_rate=0.2",
    ],
    "head alone": HEAD,
    "no privacy": NONE,
    "head alone, no privacy": [*HEAD, *NONE],
}
"""Settings that differ from the default, by row."""


def main() -> None:
    """Runs what is missing and writes the table after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", default="", help="regular expression: rows to run")
    options = parser.parse_args()
    for seed in options.seeds:
        for name, overrides in ROWS.items():
            if not re.search(options.only, name):
                continue
            run_dir = _run_dir(options.folder, name, seed)
            if not (run_dir / "report.json").exists():
                _run(run_dir, overrides, seed, options.threads)
            (options.folder / "table.md").write_text(_table(options.folder, options.seeds))


def _run(run_dir: Path, overrides: list[str], seed: int, threads: int) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from common.cli import main; sys.exit(main())",
        "simulate",
        *overrides,
        f"seed={seed}",
        f"run_dir={run_dir}",
        f"engine.threads={threads}",
        "evaluation.split=validation",
    ]
    subprocess.run(command, check=True)


def _run_dir(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}"


def _table(folder: Path, seeds: list[int]) -> str:
    lines = [
        "| what differs | epsilon | validation accuracy, by seed | mean | seconds |",
        "|---|---|---|---|---|",
    ]
    for name in ROWS:
        paths = [_run_dir(folder, name, seed) / "report.json" for seed in seeds]
        reports = [json.loads(path.read_text()) for path in paths if path.exists()]
        if reports:
            scores = [report["evaluation"]["accuracy"] for report in reports]
            epsilon = reports[0]["privacy"]["epsilon"]["pld"]
            shown = epsilon if isinstance(epsilon, str) else f"{epsilon:.2f}"
            seconds = statistics.median(report["timing"]["total_s"] for report in reports)
            listed = ", ".join(f"{score:.4f}" for score in scores)
            lines.append(
                f"| {name} | {shown} | {listed} | {statistics.mean(scores):.4f} | {seconds:.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
