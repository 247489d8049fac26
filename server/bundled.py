"""The ServerApp of the bundle that `coterie submit` hands to a SuperLink.

Beside the loop it keeps the run folder to itself, says where the run stands, and opens the public
records that the config names; private ones it has none of.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import common
import server
from common.allocation import keep_freed_memory
from common.config import Config, Resume, Split, config_hash, from_canonical
from common.data import load_public
from common.errors import ConfigError, VerificationError
from common.records import Records
from common.tasks import TASKS, reader_of
from server.app import CONFIG_KEY, Watch, server_app
from server.groups import check_groups
from server.interrupted import occupied
from server.record import RoundLine
from server.run_folder import has_begun
from server.standing import Standing, Standings
from server.wire import WireGrid

HASH_KEY = "config-hash"
"""Key of the config's hash in Flower's run config."""
PATIENCE_S = 60.0
"""How long to wait for another attempt at the same run that is ending: Flower notices a dead
parent, or a stopped run, within a heartbeat."""
PARENT_POLL_S, GRACE_S = 0.5, 10.0
"""Between two looks for the parent; and what an orphan may take to end by itself."""


def check_origin() -> None:
    """Raises: VerificationError if the packages are not of one bundle: an installed `common` beside
    a bundle's `server` would be another program than either.
    """
    roots = {Path(package.__file__ or "").resolve().parent.parent for package in (common, server)}
    if len(roots) != 1:
        raise VerificationError(
            f"the packages common and server come from {' and '.join(sorted(map(str, roots)))}"
        )


def read_config(context: Context) -> Config:
    """The config of a run. Raises: VerificationError if there is none, or of another hash."""
    text, told = (context.run_config.get(key) for key in (CONFIG_KEY, HASH_KEY))
    if not isinstance(text, str) or not text:
        raise VerificationError("run config: holds no configuration; start runs by coterie submit")
    config = from_canonical(text)
    if config_hash(config) != told:
        raise VerificationError("run config: config and config-hash disagree")
    if not config.is_deployed or not Path(config.run_dir).is_absolute():
        raise VerificationError("run config: not one that coterie submit makes")
    return config


def public_records(config: Config) -> Records:
    """The public split of the config. Raises: ConfigError if it is empty, or not as described."""
    task = TASKS[config.task.name]
    read = reader_of(config.task.name, task.load_processor(config.model))
    splits = load_public(config.data, task.toy_examples, read)
    held_out = config.evaluation.split is Split.holdout
    records = splits.holdout if held_out else splits.validation
    if not len(records):
        raise ConfigError(
            f"evaluation.split={config.evaluation.split.name}: has no records; give data.test_path"
        )
    check_groups(config.data.group_column, records.groups)
    return records


def _watch(config: Config, standings: Standings) -> Watch:
    """A line per round for the log, and the standing."""

    def on_round(line: RoundLine) -> None:
        standings.over(line)
        print(line.text(config.federation.rounds), flush=True)

    def on_resume(number: int) -> None:
        standings.resumed(number)
        print(f"resumed after round {number}", flush=True)

    return Watch(lambda _, site: standings.heard(site), on_round, on_resume)


@contextmanager
def ending_with_parent(grace_s: float = GRACE_S) -> Iterator[None]:
    """Ends this process once the one that started it is gone, whatever Flower does then.

    Flower interrupts an orphan, which first tries to tell a SuperLink that is gone, at times for
    ever; and whoever would go on with the run waits for this process. All on disk is whole.
    """
    parent, over = os.getppid(), threading.Event()

    def watch() -> None:
        while os.getppid() == parent:
            if over.wait(PARENT_POLL_S):
                return
        if not over.wait(grace_s):
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def bundled_app(public: Callable[[Config], Records] = public_records) -> ServerApp:
    """The ServerApp of a deployed run. Args: public: the records to evaluate on."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        check_origin()
        config = read_config(context)
        keep_freed_memory()
        torch.set_num_threads(config.engine.threads or len(os.sched_getaffinity(0)))
        run_dir = Path(config.run_dir)
        with ending_with_parent(), occupied(run_dir, patience_s=PATIENCE_S):
            now = Standing(context.run_id, rounds=config.federation.rounds)
            standings = Standings(run_dir, now)
            with standings.kept():
                _check_new(config, run_dir)
                watched = _watch(config, standings)
                inner = server_app(public, watched)
                told = replace(context, run_config={CONFIG_KEY: context.run_config[CONFIG_KEY]})
                inner(WireGrid(grid, standings.waiting), told)

    return app


def _check_new(config: Config, run_dir: Path) -> None:
    if config.resume is Resume.off and has_begun(run_dir):
        raise ConfigError(f"run_dir={run_dir}: holds a run already; go on with it by resume=auto")


app = bundled_app()
