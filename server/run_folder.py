"""How far the run of a folder is, by what is there; whoever only looks imports no model."""

import re
import shlex
from pathlib import Path

from common.composition import sweep_index
from server.record import FILE

CONFIG, CHECKPOINTS, REPORT = "config.yaml", "checkpoints", "report.json"
"""What a run folder holds from before the first round, after each, and at the end."""
PATTERN = "round-*.safetensors"
"""What checkpoints are called."""


def has_begun(run_dir: Path) -> bool:
    """Whether a run may have asked a site for anything: before, it leaves its first state."""
    return any((run_dir / CHECKPOINTS).glob(PATTERN)) or (run_dir / FILE).exists()


def is_finished(run_dir: Path) -> bool:
    """Whether a run has left all that it leaves: its report is the last."""
    return (run_dir / REPORT).is_file()


def how_to_go_on(run_dir: Path, command: str = "simulate") -> str:
    """What to type after an interruption. Args: command: the one that began the run."""
    if not has_begun(run_dir):
        return "interrupted before the first round; nothing was charged, and nothing is left"
    if sweep_index() is not None:
        return "interrupted; go on by the same command with run_dir=PATH and resume=auto"
    plain = re.fullmatch(r"[\w./~-]+", str(run_dir))
    setting = f"run_dir={run_dir}" if plain else f"run_dir='{run_dir}'"
    return f"interrupted; go on by: coterie {command} resume=auto {shlex.quote(setting)}"
