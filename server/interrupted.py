"""A run that was interrupted: who may go on with it, as what, and what is left before."""

import os
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from time import monotonic, sleep

from common.composition import given_settings, sweep_index
from common.config import Config, Resume
from common.errors import ConfigError
from server.cohort import POLL_S
from server.occupation import is_locked
from server.plan import solved
from server.resume import check_same, stored_config
from server.run_folder import CHECKPOINTS, CONFIG, has_begun, how_to_go_on

WORKERS, TRACKING = "engine.workers", "tracking"
ENOUGH = {"run_dir", "resume", WORKERS, TRACKING}
"""Settings that name a run, or only change how quick it is or who follows it; alone they ask for
all of its own."""
GLANCE_S = 0.3
"""How long somebody who only looks may have the lock of a folder."""
LEDGERS = "ledgers"
"""Where a run folder holds the sites' books."""


def run_dir_of(config: Config, beside: Set[str] = frozenset()) -> Path:
    """The folder of this run: as named, or of now; a job of a `-m` sweep has its own in it.

    Args: beside: names of files that may be there before a run is.
    Raises: ConfigError if it is taken, or a run is to go on and none is named.
    """
    if config.resume is Resume.auto and not config.run_dir:
        raise ConfigError("resume=auto: which run? give run_dir=PATH")
    index, path = sweep_index(), Path(config.run_dir or _of_now()).expanduser()
    if index is not None:
        path = path / f"job-{index}"
    if config.resume is Resume.off and is_taken(path, beside):
        raise ConfigError(
            f"run_dir={path}: is not an empty folder; choose another, or go on with the run in it "
            "by resume=auto"
        )
    return path


def is_taken(path: Path, beside: Set[str] = frozenset()) -> bool:
    """Whether there is more in a folder than files of these names; what is no folder, is."""
    if not path.is_dir():
        return path.exists()
    return any(each.name not in beside for each in path.iterdir())


@cache
def _of_now() -> str:
    """Where this process writes if it is not told: one folder for all jobs of a sweep."""
    return f"runs/{datetime.now().astimezone():%Y-%m-%d/%H-%M-%S}"


def as_begun(config: Config, beside: Set[str] = frozenset()) -> Config:
    """The resolved settings of the run in `run_dir`, where one is to go on; else `config`.

    How many processes answer, and who follows, need not be as before, where the command line
    says it.
    Args: beside: more settings, or groups of them, that say nothing of what the run computes.
    Raises: ConfigError if the folder holds no run, or the command line names other settings.
    """
    run_dir = Path(config.run_dir)
    if config.resume is Resume.off or not run_dir.exists() or not any(run_dir.iterdir()):
        return config
    stored, given = stored_config(run_dir), given_settings()
    if given is None or any(
        {name, name.split(".")[0]}.isdisjoint(ENOUGH | beside) for name in given
    ):
        check_same(solved(_filled(config, stored)), stored, run_dir)
        for name in ("ledger", "heads"):
            _check_same_file(name, getattr(config, name), getattr(stored, name))
    told = given is None or WORKERS in given
    workers = (config if told else stored).engine.workers
    engine = replace(stored.engine, workers=workers)
    follows_elsewhere = given is None or any(name.split(".")[0] == TRACKING for name in given)
    return replace(
        stored,
        run_dir=config.run_dir,
        resume=config.resume,
        engine=engine,
        superlink=config.superlink,
        tracking=config.tracking if follows_elsewhere else stored.tracking,
    )


@contextmanager
def occupied(run_dir: Path, *, patience_s: float = GLANCE_S) -> Iterator[None]:
    """Makes the folder of a run, and keeps other processes from writing into it.

    Guarantee: a run that ended before it had begun leaves the disk as it was.
    Args: patience_s: how long to wait for a process that is writing, and may be ending.
    Raises: ConfigError if another process is writing; KeyboardInterrupt with how to go on.
    """
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, run_dir, patience_s)
        try:
            _clear(run_dir)
            yield
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(how_to_go_on(run_dir)) from stop
        finally:
            _clear(run_dir)
    finally:
        os.close(handle)
        _remove_empty(made)


def _filled(config: Config, stored: Config) -> Config:
    """What a command line leaves open, as the run that began has it."""
    privacy, data = config.privacy, config.data
    if privacy.noise_multiplier is None:
        privacy = replace(privacy, noise_multiplier=stored.privacy.noise_multiplier)
    if data.declared_records is None:
        declared, counted = stored.data.declared_records, stored.data.records_counted
        data = replace(data, declared_records=declared, records_counted=counted)
    return replace(config, privacy=privacy, data=data)


def _check_same_file(name: str, given: str, begun: str) -> None:
    """Rounds of one run in two books would be in neither whole. Raises: ConfigError."""
    if _resolved(given) != _resolved(begun):
        raise ConfigError(f"{name}={given or repr(given)}: the run began with {begun or repr('')}")


def _resolved(path: str) -> Path | None:
    return Path(path).expanduser().resolve() if path else None


def _lock(handle: int, run_dir: Path, patience_s: float) -> None:
    """Held until the handle is closed, or the process ends, however it ends."""
    deadline = monotonic() + patience_s
    while not is_locked(handle):
        if monotonic() >= deadline:
            raise ConfigError(
                f"run_dir={run_dir}: another process is writing into it; wait for it, or stop it"
            )
        sleep(POLL_S)


def _clear(run_dir: Path) -> None:
    """Takes away what a run that never asked anything leaves: empty books, and its settings."""
    if has_begun(run_dir):
        return
    for folder in (run_dir / LEDGERS, run_dir / CHECKPOINTS):
        shutil.rmtree(folder, ignore_errors=True)
    for path in (run_dir / CONFIG, *run_dir.glob(f".{CONFIG}.*")):
        path.unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    """Innermost first, as far as they hold nothing."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
