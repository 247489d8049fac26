"""`coterie submit`: one run, from its configuration to its report, on sites of their own.

It runs on the coordinator's machine, beside the SuperLink: the run folder is there, and the
control API should be reachable from nowhere else.
"""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from common.cli import Invocation, emit_json
from common.composition import run_job
from common.config import Config, Resume, SuperlinkConfig, config_hash, to_canonical
from common.data import check_files
from common.errors import ConfigError
from common.tasks import build_model
from server.app import CONFIG_KEY
from server.bundled import HASH_KEY
from server.control import Address, Link
from server.following import follow
from server.interrupted import as_begun, is_taken, run_dir_of
from server.occupation import is_occupied
from server.plan import make_plan, show_plan, size_of
from server.report import read_report, show_report
from server.run_folder import is_finished
from server.submission import FILE as SUBMITTED
from server.submission import OURS, Submission, read_submission, write_submission

ENGINE = "engine="


def submit(invocation: Invocation) -> None:
    """Fine-tune one model across sites on machines of their own; follow it to its report."""

    def job(config: Config) -> None:
        console = Console(stderr=invocation.json, markup=False)
        run_dir = submit_run(config, console)
        if config.superlink.detach and not is_finished(run_dir):
            console.print(f"started; coterie status {run_dir} says how far it is", highlight=False)
            if invocation.json:
                emit_json({"run_dir": str(run_dir)})
            return
        content, _ = read_report(run_dir)
        if invocation.json:
            emit_json(content)
        else:
            show_report(content, run_dir, console)

    if {*invocation.arguments} & {"-m", "--multirun"}:
        raise ConfigError("-m: sites are asked for one run at a time; submit without it")
    run_job(job, replace(invocation, arguments=_deployed(invocation.arguments)))


def submit_run(config: Config, console: Console) -> Path:
    """Starts one run, and returns its folder once it is over, or at once if so configured.

    Guarantee: a refused configuration starts nothing and leaves no file behind.
    Raises: CoterieError of any kind, as the ServerApp met it; KeyboardInterrupt, after which the
    run goes on.
    """
    run_dir = run_dir_of(config, OURS).resolve()
    address = _address(config.superlink, run_dir)
    config = _with_paths(config, run_dir)
    if config.resume is Resume.auto and is_taken(run_dir, OURS):
        config = as_begun(config, {"engine", "superlink"})
    if not config.is_deployed:
        raise ConfigError(
            f"engine={config.engine.name.name}: must be superlink, or left out, with coterie submit"
        )
    if config.resume is Resume.auto and is_finished(run_dir):
        console.print(f"{run_dir}: is finished already; nothing was run", highlight=False)
        return run_dir
    if is_occupied(run_dir):
        raise ConfigError(
            f"run_dir={run_dir}: its run goes on; coterie status {run_dir} says how far it is"
        )
    check_files(config.data)
    run_plan = make_plan(config)
    show_plan(run_plan, size_of(build_model(config)), None, console)
    # The plan's own config: sigma, once solved, is what a resumed run goes on with.
    told = replace(run_plan.config, superlink=SuperlinkConfig())
    run_config = {CONFIG_KEY: to_canonical(told), HASH_KEY: config_hash(told)}
    submission = Submission(address, Link(address).start(run_config))
    run_dir.mkdir(parents=True, exist_ok=True)
    write_submission(run_dir, submission)
    text = f"Flower's run {submission.flower_run}; everything is in {run_dir}"
    console.print(text, highlight=False)
    if not config.superlink.detach:
        follow(run_dir, submission, console)
    return run_dir


def _address(given: SuperlinkConfig, run_dir: Path) -> Address:
    """Of the SuperLink: where nothing is given, that which the run in this folder began on."""
    if given.ca or not (run_dir / SUBMITTED).exists():
        return Address.checked(given.address, given.ca)
    return read_submission(run_dir).address


def _with_paths(config: Config, run_dir: Path) -> Config:
    """Files by where they are: the ServerApp's working folder is another one."""
    data, federation, tracking = config.data, config.federation, config.tracking
    if tracking.uri and "://" not in tracking.uri:
        tracking = replace(tracking, uri=_absolute(tracking.uri))
    return replace(
        config,
        run_dir=str(run_dir),
        heads=_absolute(config.heads),
        data=replace(data, test_path=_absolute(data.test_path)),
        federation=replace(federation, availability=_absolute(federation.availability)),
        tracking=tracking,
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""


def _deployed(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """With the engine, where none is named."""
    if any(each.startswith(ENGINE) for each in arguments):
        return arguments
    return (*arguments, "engine=superlink")
