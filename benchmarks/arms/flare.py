"""NVIDIA FLARE's simulator, with as many client processes as there are sites."""

import os
import sys
from pathlib import Path

from nvflare.job_config.api import FedJob

from benchmarks.arms.flare_parts import Averaging, Trainer
from benchmarks.arms.pace import Case


def main() -> None:
    """Hands the turns to a controller in FLARE's own server."""
    folder, case = Path(sys.argv[1]), Case.read(sys.argv[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    job = FedJob("arm", min_clients=case.sites)
    job.to_server(Averaging(folder=str(folder), sites=case.sites, values=case.values))
    job.to_clients(Trainer(values=case.values), tasks=["train"])
    job.simulator_run(
        str(folder / "workspace"), n_clients=case.sites, threads=case.workers, log_config="concise"
    )


if __name__ == "__main__":
    main()
