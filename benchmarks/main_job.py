"""The main job on the hold-out: private and not, over seeds, as whole processes.

    python benchmarks/main_job.py FOLDER
    python benchmarks/main_job.py --seeds 1 2 -- FOLDER engine.threads=1

Writes one run folder per mode and seed (a finished one is not run again) and FOLDER/table.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

MODES = {"epsilon 3": [], "no privacy": ["privacy=none"]}


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="settings of every run")
    options = parser.parse_args()
    rows = [
        _row(options.folder, mode, seed, options.overrides)
        for seed in options.seeds
        for mode in MODES
    ]
    table = _table(rows)
    (options.folder / "table.md").write_text(table)
    print(table)


def _row(folder: Path, mode: str, seed: int, overrides: list[str]) -> dict[str, object]:
    run_dir = folder / f"{mode.replace(' ', '-')}-{seed}"
    measured = run_dir.with_suffix(".json")
    if not measured.exists():
        command = [
            *(sys.executable, "-c", "import sys; from common.cli import main; sys.exit(main())"),
            *("simulate", f"seed={seed}", f"run_dir={run_dir}", *MODES[mode], *overrides),
        ]
        started = time.monotonic()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, f"{mode}, seed {seed}: failed"
        costs = {
            "wall_s": time.monotonic() - started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_mb": usage.ru_maxrss / 1024,
        }
        measured.write_text(json.dumps(costs))
    report = json.loads((run_dir / "report.json").read_text())
    return {
        "mode": mode,
        "seed": seed,
        "accuracy": report["evaluation"]["accuracy"],
        "macro_f1": report["evaluation"]["macro_f1"],
        "epsilon": report["privacy"]["epsilon"]["pld"],
        **json.loads(measured.read_text()),
    }


def _table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| run | seed | accuracy | macro-F1 | epsilon (PLD) | wall s | CPU s | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (str(row["mode"]), int(str(row["seed"])))):
        epsilon = row["epsilon"] if isinstance(row["epsilon"], str) else f"{row['epsilon']:.4f}"
        lines.append(
            f"| {row['mode']} | {row['seed']} | {row['accuracy']:.4f} | {row['macro_f1']:.4f} "
            f"| {epsilon} | {row['wall_s']:.0f} | {row['cpu_s']:.0f} | {row['peak_mb']:.0f} |"
        )
    for mode in MODES:
        scores = [float(str(row["accuracy"])) for row in rows if row["mode"] == mode]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        lines.append(
            f"| {mode} | mean of {len(scores)} | {statistics.mean(scores):.4f} "
            f"(sd {spread:.4f}) | | | | | |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
