"""`coterie simulate`: the main job, both sides on one machine."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from time import monotonic

import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from client.agreement import sites_together
from client.app import MakeTrainer
from client.commitment import commit_to
from client.ledger import Ledger, Store, Terms
from client.persons import usable
from client.train import Trainer
from common.allocation import keep_freed_memory, return_freed_memory
from common.cli import Invocation, emit_json
from common.composition import run_job
from common.config import (
    Config,
    EngineName,
    PrivacyMode,
    Resume,
    Split,
    check_delta,
    to_canonical,
)
from common.data import Reading, Splits, check_files, load_splits
from common.device import device_of
from common.errors import ConfigError, PrivacyRefusedError
from common.intake import ReadsRows
from common.keys import generate_key
from common.messages import read_instruction
from common.privacy.chain import public_hex
from common.privacy.mechanism import NOT_PRIVATE, counting, is_private
from common.progress import Told
from common.records import Records
from common.tasks import TASKS, build_model, reader_of
from server.app import CONFIG_KEY, Sections, Watch, server_app
from server.groups import check_groups
from server.interrupted import as_begun, occupied, run_dir_of
from server.plan import (
    epsilon_of,
    estimate_seconds,
    make_plan,
    not_private_reason,
    show_plan,
    size_of,
)
from server.record import RoundLine
from server.report import read_report, show_report
from server.run_folder import has_begun, is_finished
from server.schedule import draw_schedule
from simulations.answer import partition_of
from simulations.arrivals import Arrivals
from simulations.cluster import OnRay, check_installed
from simulations.faults import FaultyGrid, faults_section, may_crash
from simulations.finished import Finished
from simulations.grid import COORDINATOR_NODE_ID, RUN_ID, LocalGrid, ThisProcess
from simulations.left_out import show_summary, summary, write_summary
from simulations.nursery import nursery
from simulations.partition import deal
from simulations.sites import Sites
from simulations.workers import Workers, threads_of, workers_of

PATIENCE_S = 2.0
"""Seconds of work before a bar says how far it is."""
DECLARATION_TOLERANCE = 0.1
"""Share by which the counted records of a simulation may differ from the declared ones."""


def simulate(invocation: Invocation) -> None:
    """Fine-tune one model across simulated sites, privately; the main job."""
    finished: list[Finished] = []

    def job(config: Config) -> None:
        console = Console(stderr=invocation.json, markup=False)
        run_dir = run_simulation(config, console)
        content, _ = read_report(run_dir)
        finished.append(Finished(replace(config, run_dir=str(run_dir)), content))
        if invocation.json:
            emit_json(content)
        else:
            show_report(content, run_dir, console)

    run_job(job, invocation)
    if len(finished) > 1:
        _close_sweep(finished, invocation)


def _close_sweep(finished: list[Finished], invocation: Invocation) -> None:
    """What several runs say together, as far as it is their own; and who says the rest."""
    folder, console = Path(finished[0].config.run_dir).parent, Console(markup=False)
    together = summary(finished)
    if together is not None:
        write_summary(folder, together)
    if invocation.json:
        if together is not None:
            emit_json({"leave_one_site_out": together})
        return
    if together is not None:
        show_summary(together, console)
    console.print(f"All runs together: coterie sweep-report {folder}", highlight=False)


def run_simulation(config: Config, console: Console, make: MakeTrainer = Trainer) -> Path:
    """Runs one federation from plan to report; returns the run folder.

    Args: make: what trains at its sites.

    Guarantee: a refused configuration leaves no file behind; a run that was interrupted once it
    had begun can be resumed, and leaves nothing behind before.
    Raises: CoterieError of any kind; KeyboardInterrupt, which says how to go on.
    """
    check_installed(config.engine)
    run_dir = run_dir_of(config)
    config = as_begun(replace(config, run_dir=str(run_dir)))
    if config.is_deployed:
        raise ConfigError("engine=superlink: its sites are elsewhere; give it to coterie submit")
    _configure_process(config)
    device_of(config.engine.device)  # one that is not there is said at once
    if config.resume is Resume.auto and is_finished(run_dir):
        console.print(f"{run_dir}: is finished already; nothing was run", highlight=False)
        return run_dir
    with occupied(run_dir):
        _run(config, run_dir, console, make)
    return run_dir


def _run(config: Config, run_dir: Path, console: Console, make: MakeTrainer) -> None:
    # The plan comes before the first record is read; what needs the records is checked after.
    check_files(config.data)
    run_plan = make_plan(config)
    _check_ledger(run_plan.config)
    model, task = build_model(config), TASKS[config.task.name]
    processor = task.load_processor(config.model)
    show_plan(run_plan, size_of(model), estimate_seconds(config, model), console)
    read = reader_of(config.task.name, processor)
    return_freed_memory()  # arrays over all records come and go here, and not while training
    with _telling(console) as told:
        splits = load_splits(config.data, task.toy_examples, read, told)
    console.print(
        f"{len(splits.train)} private training records{_of_persons(config, splits.train)}; public: "
        f"{len(splits.validation)} validation, {len(splits.holdout)} hold-out; {splits.duplicates} "
        f"repeated {'files' if callable(read) else 'texts'} dropped{_of_rows(splits, read)}",
        highlight=False,
    )
    _check_any(config, splits, read)
    sites = deal(splits.train, config.federation, seed=config.seed)
    config = _resolve(run_plan.config, splits, sites)
    records = dict(zip(config.federation.site_names, sites, strict=True))
    # It has no site object, no ledger and no node: nothing of it can train.
    left_out = records.pop(config.federation.leave_out, None)
    if left_out is not None:
        console.print(
            f"{config.federation.leave_out} is left out, with {len(left_out)} of the training "
            f"records: it does not train, and what is measured on them is {NOT_PRIVATE}",
            highlight=False,
        )
    store = _store(config, run_dir)
    with store or nullcontext():
        ledgers = _ledgers(store, config, records, console) if store else {}
        keep_freed_memory()
        books = store.path if store else None
        opened = Sites(
            records,
            tuple(config.data.labels),
            config.node,
            books,
            1 if may_crash(config.faults) else sites_together(config, model),
            config.faults,
            config.engine.device,
            make,
        )
        with _grid(config, opened, store, ledgers) as grid, _progress(config, console) as watch:
            app = server_app(lambda _: _public(config, splits), watch, left_out, _sections(config))
            app(_on_the_way(grid, config), _server_context(config))


def _on_the_way(grid: Grid, config: Config) -> Grid:
    """The grid, with what befalls messages on it, and who comes first where that matters."""
    if config.faults.active:
        grid = FaultyGrid(grid, config)
    return Arrivals(grid, config) if config.federation.enough < 1 else grid


def _grid(
    config: Config, sites: Sites, store: Store | None, ledgers: dict[str, Ledger]
) -> LocalGrid:
    """What carries the messages of a run: to this process, or to its workers."""
    names = [*sites.records]
    workers = workers_of(config.engine, len(names))
    if workers == 1 and config.engine.name is EngineName.local:
        cohort = sites.answer(store)
        return LocalGrid(ThisProcess(cohort, len(names), cohort.size), names)

    def lost(message: Message) -> bool:
        ledger = ledgers.get(names[partition_of(message)])
        if ledger is None:
            return False
        run_id = read_instruction(message).run_id
        return ledger.lose_unfinished(run_id, counting(run_id))

    if config.engine.name is EngineName.ray:
        return LocalGrid(OnRay(sites, config.engine, lost), names)
    crew = Workers(
        sites.answer_of_worker,
        workers=workers,
        threads=threads_of(config.engine, workers),
        # Steps are as many at each site: what differs is the number of records drawn in one.
        work=[len(usable(held, config.privacy)) for held in sites.records.values()],
        lost=lost,
        together=sites.size,
    )
    return LocalGrid(crew, names)


def _resolve(config: Config, splits: Splits, sites: list[Records]) -> Config:
    """Fills in the number of records, and applies the rules that need it.

    Raises: ConfigError if the declaration is far off, or was counted and is no longer true, delta
    is too large for the largest site, or the public split is empty.
    """
    used = [len(usable(site, config.privacy)) for site in sites]
    counted, declared = sum(used), config.data.declared_records
    before = config.data.records_counted and declared is not None
    if before and counted != declared:
        raise ConfigError(
            f"data: the training split has {counted} records that runs may use, and had {declared} "
            "when the run began; put the data back, or choose another run_dir"
        )
    if declared is not None and abs(counted - declared) > DECLARATION_TOLERANCE * declared:
        raise ConfigError(
            f"data.declared_records={declared}: the training split has {counted} that runs may "
            "use; correct it, or set it to null to have a simulation count"
        )
    check_delta(config.privacy.delta, max(used), "the largest site")
    if not len(_public(config, splits)):
        raise ConfigError(
            f"evaluation.split={config.evaluation.split.name}: has no records; raise "
            f"data.{config.evaluation.split.name}_fraction or give data.test_path"
        )
    check_groups(config.data.group_column, _public(config, splits).groups)
    known = replace(
        config.data,
        declared_records=declared or counted,
        records_counted=before or declared is None,
    )
    return replace(config, data=known)


def _check_any(config: Config, splits: Splits, read: Reading | None) -> None:
    """Raises: ConfigError if nothing is left to train on, with what became of the rows."""
    if not len(splits.train) and config.data.path:
        public = len(splits.validation) + len(splits.holdout)
        raise ConfigError(
            f"data.path={config.data.path}: leaves no record to train on: {public} are public, "
            f"{splits.duplicates} repeat others or public ones{_of_rows(splits, read)}"
        )


def _of_rows(splits: Splits, read: Reading | None) -> str:
    """How many rows had no text, and the like: private, and only a simulation tells it."""
    told = splits.tally.told(read if isinstance(read, ReadsRows) else None)
    return "".join(f", {each}" for each in told)


def _of_persons(config: Config, records: Records) -> str:
    """Of how many persons the records are, where persons are protected."""
    if records.persons is None or config.privacy.mode is not PrivacyMode.person:
        return ""
    most = config.privacy.max_records_per_person
    return f" of {len(set(records.persons))} persons, at most {most} of each used"


def _check_ledger(config: Config) -> None:
    """Books that last take private runs only: others would release records without limit.

    Raises: PrivacyRefusedError; ConfigError if there are no such books, or of another unit only.
    """
    if not config.ledger:
        return
    if not is_private(config):
        raise PrivacyRefusedError(
            f"ledger={config.ledger}: {not_private_reason(config)}; books that last take "
            "private runs only"
        )
    with Store(Path(config.ledger).expanduser()) as store:
        for name in store.sites():
            if (unit := store.ledger(name).books.unit) != config.privacy.unit:
                raise ConfigError(
                    f"privacy.mode={config.privacy.mode.name}: must be {unit}, the unit of "
                    f"{config.ledger}#{name}; give privacy={unit}, or other books"
                )


def _store(config: Config, run_dir: Path) -> Store | None:
    """Where the sites' ledgers are: `ledger=PATH`, or a new file in the run folder.

    None without privacy, as there is nothing to charge. A run that is resumed goes on in its own.
    """
    if config.ledger:
        return Store(Path(config.ledger).expanduser())
    if config.privacy.mode is PrivacyMode.none:
        return None
    path = run_dir / "ledgers" / "sites.db"
    return Store(path) if has_begun(run_dir) else Store.create(path)


def _ledgers(
    store: Store, config: Config, sites: dict[str, Records], console: Console
) -> dict[str, Ledger]:
    """The ledger of each site, bound to its records; new ones where the run made the file.

    Raises: ConfigError if a file that lasts holds no ledger of a site, or knows a record of one
    site as another's; or if a run is resumed on other records.
    """
    secret = store.secret
    unit = config.privacy.unit
    with _telling(console) as told:
        commitments = {
            name: commit_to(records, secret, unit=unit, told=told)
            for name, records in sites.items()
        }
    with store.together():
        begun = has_begun(Path(config.run_dir))
        if config.ledger or begun:
            ledgers = {name: store.ledger(name) for name in sites}
            for name, ledger in ledgers.items():
                if begun and ledger.books.genesis["dataset_root"] != commitments[name].root:
                    raise ConfigError(
                        f"data: {name} has other records than when the run began; put the data "
                        "back, or choose another run_dir"
                    )
                if config.privacy.delta < ledger.books.delta:
                    raise ConfigError(
                        f"privacy.delta={config.privacy.delta:g}: must be at least "
                        f"{ledger.books.delta:g}, that of {config.ledger}#{name}"
                    )
                ledger.bind(commitments[name])
            return ledgers
        officer = public_hex(generate_key(store.path.with_name("officer.key")))
        source, delta = config.data.source.name, config.privacy.delta
        return {
            name: store.open(
                name, Terms(source, epsilon_of(config, name), delta, officer, unit), commitment
            )
            for name, commitment in commitments.items()
        }


def _sections(config: Config) -> Sections:
    """What a report says beside what a coordinator knows: what went wrong on purpose."""
    return lambda lines: {"faults": faults_section(config, lines)} if config.faults.active else {}


def _public(config: Config, splits: Splits) -> Records:
    return splits.holdout if config.evaluation.split is Split.holdout else splits.validation


def _server_context(config: Config) -> Context:
    return Context(
        run_id=RUN_ID,
        node_id=COORDINATOR_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config={CONFIG_KEY: to_canonical(config)},
    )


def _configure_process(config: Config) -> None:
    """Threads, memory, and quiet libraries: what they report at INFO is in our own table."""
    workers = workers_of(config.engine, config.federation.training_sites)
    if workers > 1 and config.engine.name is EngineName.local:
        nursery()  # imports while this process reads records
    keep_freed_memory()
    torch.set_num_threads(config.engine.threads or len(os.sched_getaffinity(0)))
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("flwr").setLevel(logging.WARNING)


@contextmanager
def _telling(console: Console) -> Iterator[Told]:
    """A live bar on a terminal for what takes longer than `PATIENCE_S`; nothing elsewhere."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task, since = progress.add_task("", total=1.0), monotonic()

    def told(what: str, share: float) -> None:
        progress.update(task, completed=share, description=what)
        if monotonic() - since > PATIENCE_S:
            progress.start()

    try:
        yield told
    finally:
        progress.stop()


@contextmanager
def _progress(config: Config, console: Console) -> Iterator[Watch]:
    """A live bar on a terminal, a line per round elsewhere."""
    total = draw_schedule(config).questions
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = progress.add_task("preparing", total=total)
    rounds, last = config.federation.rounds, {"found": ""}

    def on_reply(number: int, site: str) -> None:
        text = f"round {number}/{rounds} {site}{last['found']}"
        progress.update(task, advance=1, description=text)

    def on_round(line: RoundLine) -> None:
        last["found"] = line.found()
        progress.update(task, description=line.text(rounds))
        if not console.is_terminal:
            console.print(line.text(rounds), highlight=False)

    def on_resume(number: int) -> None:
        progress.update(task, completed=number * config.federation.training_sites)
        console.print(f"resumed after round {number} of {rounds}", highlight=False)

    with progress:
        yield Watch(on_reply, on_round, on_resume)
