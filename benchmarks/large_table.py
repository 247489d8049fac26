"""What a table costs in memory and time: a run on gigabytes beside the same run on a small file.

    python -m benchmarks.large_table [--gigabytes 2] [--json FILE] [--folder FOLDER]

Writes a made CSV of about a kilobyte a row, has `coterie simulate` train MiniLM on it (2 sites, 1
round, about 32 records a step, nothing cached in either run), and reads the memory of its process,
and of any it starts, from /proc every few milliseconds. `RssAnon` is what the process needs;
`RssFile` are pages of mapped files, which the system drops where memory is short. All files are
removed in the end; the folder, by default that for temporary files, needs twice the size of the
table, and its ledgers.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

GIGABYTE, MEGABYTE = 10**9, 10**6
SMALL = 2 * MEGABYTE
"""Bytes of the file that the large one is held against."""
ROWS_PER_STEP = 32
TICK_S = 0.02
PHASES = {
    "reading": ("common.data", "read_file"),
    "dropping repeats": ("common.data", "_deduplicate"),
    "splitting": ("common.data", "_places"),
    "apart from public": ("common.data", "_apart"),
    "dealing": ("simulations.run", "deal"),
    "committing": ("simulations.run", "commit_to"),
    "ledgers": ("simulations.run", "_ledgers"),
    "training": ("client.train", "Trainer.train"),
}
"""What is timed, by the function that does it; `ledgers` holds `committing`."""


def main() -> None:
    """Prints a table, and writes it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tuning", default="lora")
    parser.add_argument("override", nargs="*", help="settings of the run, as of coterie simulate")
    options = parser.parse_args()
    settings = [f"tuning={options.tuning}", *options.override]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sizes = {"small": SMALL, "large": round(options.gigabytes * GIGABYTE)}
        runs = {name: measured(Path(folder), size, settings) for name, size in sizes.items()}
    extra = {
        kind: round(runs["large"]["peak_mb"][kind] - runs["small"]["peak_mb"][kind], 1)
        for kind in ("anonymous", "file", "whole")
    }
    answer = {"gigabytes": options.gigabytes, "runs": runs, "extra_mb": extra}
    show(answer)
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2))


def measured(folder: Path, size: int, settings: list[str]) -> dict[str, Any]:
    """One run on a table of `size` bytes: peaks of memory, and phases."""
    table, public, phases = folder / "table.csv", folder / "public.csv", folder / "phases.json"
    rows = write_table(table, size, seed=1)
    write_table(public, MEGABYTE // 20, seed=2)
    command = [
        *(sys.executable, "-m", "benchmarks.large_table_run", str(phases)),
        "data=csv",
        f"data.path={table}",
        f"data.test_path={public}",
        "data.labels=[sport,money]",
        "data.validation_fraction=0",
        "federation.sites=2",
        "federation.rounds=1",
        "federation.local_steps=2",
        "engine.cache_mb=0",
        f"privacy.sample_rate={min(1.0, 2 * ROWS_PER_STEP / rows)}",
        f"privacy.delta={0.1 / rows}",
        f"run_dir={folder / f'run-{size}'}",
        "--json",
        *settings,
    ]
    environment = {**os.environ, "TMPDIR": str(folder)}
    started = time.monotonic()
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    samples = sampled(run)
    wall, (out, _) = time.monotonic() - started, run.communicate()
    if run.returncode:
        raise SystemExit(f"the run failed with {run.returncode}")
    table.unlink()
    noted = json.loads(phases.read_text())
    return {
        "rows": rows,
        "bytes": size,
        "wall_s": round(wall, 1),
        "cpu_s": noted["cpu_s"],
        "epsilon": json.loads(out)["privacy"]["epsilon"],
        "processes": len({process for process, *_ in samples}),
        "peak_mb": peaks(samples),
        "phases": {
            name: {
                "wall_s": round(sum(span["end"] - span["start"] for span in spans), 1),
                "cpu_s": round(sum(span["cpu_s"] for span in spans), 1),
                **peaks([s for s in samples if any(inside(s[1], span) for span in spans)]),
            }
            for name, spans in noted["phases"].items()
        },
    }


def sampled(run: "subprocess.Popen[str]") -> list[tuple[int, float, float, float]]:
    """Of the run and of what it starts, until it ends: process, time, anonymous and file MB."""
    samples = []
    while run.poll() is None:
        for process in (run.pid, *children(run.pid)):
            if (memory := memory_of(process)) is not None:
                samples.append((process, time.monotonic(), *memory))
        time.sleep(TICK_S)
    return samples


def children(process: int) -> list[int]:
    """What it started, and they."""
    try:
        told = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [each for child in map(int, told) for each in (child, *children(child))]


def memory_of(process: int) -> tuple[float, float] | None:
    """Anonymous and mapped resident MB; shared memory counts as anonymous. None: it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    held = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    if not held:
        return None
    kilobytes = {name: int(value) for name, value in held.items()}
    return (kilobytes["RssAnon"] + kilobytes["RssShmem"]) / 1024, kilobytes["RssFile"] / 1024


def inside(moment: float, span: dict[str, float]) -> bool:
    """Whether a sample is of a phase."""
    return span["start"] <= moment <= span["end"]


def peaks(samples: list[tuple[int, float, float, float]]) -> dict[str, float]:
    """The largest of each kind, in the process that had most."""
    return {
        "anonymous": round(max((s[2] for s in samples), default=0.0), 1),
        "file": round(max((s[3] for s in samples), default=0.0), 1),
        "whole": round(max((s[2] + s[3] for s in samples), default=0.0), 1),
    }


def write_table(path: Path, size: int, *, seed: int) -> int:
    """A CSV of at least `size` bytes; returns its rows. Texts differ, and have commas."""
    draw = random.Random(seed)  # noqa: S311 - made texts, no secret
    letters = "etaoinshrdlucmf"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(4000)]
    said = [", ".join(" ".join(draw.choices(words, k=8)) for _ in range(5)) for _ in range(4000)]
    written, rows = 0, 0
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        while written < size:
            label = ("sport", "money")[rows % 2]
            text = " ".join(draw.choices(said, k=4))
            written += file.write(f'"{seed} {rows} {text}",{label}\n')
            rows += 1
    return rows


def show(answer: dict[str, Any]) -> None:
    """The same for people."""
    for name, run in answer["runs"].items():
        size, processes = run["bytes"] / GIGABYTE, run["processes"]
        print(
            f"{name}: {run['rows']:,} rows, {size:.3f} GB, {processes} process(es), "
            f"{run['wall_s']} s, {run['cpu_s']} CPU s"
        )
        print(f"  {'peak':18} {_memory(run['peak_mb'])}")
        for phase, found in run["phases"].items():
            times = f"{found['wall_s']:7.1f} s {found['cpu_s']:7.1f} CPU s"
            print(f"  {phase:18} {_memory(found)} {times}")
    print(f"extra: {_memory(answer['extra_mb'])}")


def _memory(found: dict[str, float]) -> str:
    return (
        f"anonymous {found['anonymous']:8.1f} MB, file {found['file']:8.1f} MB, "
        f"together {found['whole']:8.1f} MB"
    )


def timed(function: Callable[..., Any], spans: list[dict[str, float]]) -> Callable[..., Any]:
    """The same function, whose calls are noted."""

    @wraps(function)
    def noting(*args: Any, **named: Any) -> Any:
        start, cpu = time.monotonic(), time.process_time()
        try:
            return function(*args, **named)
        finally:
            used = time.process_time() - cpu
            spans.append({"start": start, "end": time.monotonic(), "cpu_s": used})

    return noting


if __name__ == "__main__":
    main()
