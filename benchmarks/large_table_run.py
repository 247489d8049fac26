"""The run that `benchmarks.large_table` measures: `coterie simulate` with its phases timed.

python -m benchmarks.large_table_run PHASES NAME=VALUE ...
"""

import importlib
import json
import sys
import time
from functools import reduce
from pathlib import Path

from benchmarks.large_table import PHASES, timed
from common.cli import main as coterie


def main() -> None:
    """Runs it, and writes what was noted to the file PHASES."""
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in PHASES}
    for name, (module, function) in PHASES.items():
        *owners, last = function.split(".")
        owner = reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, last, timed(getattr(owner, last), phases[name]))
    code = coterie(["simulate", *sys.argv[2:]])
    noted = {"phases": phases, "cpu_s": round(time.process_time(), 1)}
    Path(sys.argv[1]).write_text(json.dumps(noted))
    sys.exit(code)


if __name__ == "__main__":
    main()
