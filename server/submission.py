"""What a run folder holds of how its run was submitted: what follows it, stops it, reads its log.

It is written by whoever submits, and nobody else; paths in it are of the coordinator's machine.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from common.durable import write_atomic
from common.errors import ConfigError, VerificationError
from server.control import Address, Link
from server.standing import FILE as STANDING

FILE = "superlink.json"
OURS = {FILE, STANDING}
"""What a run that never began may leave."""


@dataclass(frozen=True)
class Submission:
    """A run that was submitted."""

    address: Address
    flower_run: int
    """Flower's number of its last attempt."""

    @property
    def link(self) -> Link:
        """The SuperLink that it runs on."""
        return Link(self.address)


def write_submission(run_dir: Path, submission: Submission) -> None:
    """Replaces what was there of an earlier attempt."""
    values = {
        "address": submission.address.address,
        "ca": str(submission.address.ca),
        "flower_run": submission.flower_run,
    }
    write_atomic(run_dir / FILE, json.dumps(values) + "\n")


def read_submission(run_dir: Path) -> Submission:
    """Raises: ConfigError if no run was submitted from there; VerificationError if malformed."""
    path = run_dir / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Submission(
            Address(str(values["address"]), Path(values["ca"])), int(values["flower_run"])
        )
    except OSError as error:
        raise ConfigError(
            f"{run_dir}: no run was submitted into it, as it has no {FILE}; give its run_dir"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"{path}: malformed") from error
