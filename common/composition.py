"""Composes `conf/` with Hydra, once, and hands a frozen `Config` to a job.

A job is a real `@hydra.main` application: `-m` sweeps, `--cfg job`, `--help` and completion
work. What Hydra and OmegaConf say of a mistake is turned into one line of ours.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from common.cli import Invocation
from common.config import Config, field_names, from_composed, register_schemas
from common.errors import ConfigError, CoterieError

CONF = Path(__file__).resolve().parent.parent / "conf"
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Schema(Generic[Settings]):
    """What a command is configured by."""

    start: str
    """The file of `conf/` that it starts from, without its ending; also a command that shows it."""
    register: Callable[[], None]
    """Makes its schema known to Hydra."""
    read: Callable[[DictConfig], Settings]
    """Turns what was composed into what a job takes, or says what is wrong with it."""
    names: Callable[[], Iterable[str]]
    """Every dotted name of a setting."""


RUN = Schema("simulate", register_schemas, from_composed, field_names)
"""Of whatever concerns a run."""


def run_job(job: Callable[[Config], None], invocation: Invocation) -> None:
    """Runs `job` on the composed configuration of a run; see `run_with`."""
    run_with(RUN, job, invocation)


def run_with(
    schema: Schema[Settings], job: Callable[[Settings], None], invocation: Invocation
) -> None:
    """Runs `job` on the composed configuration; on each one of a `-m` sweep.

    Raises: ConfigError for an unknown key, a wrong type, a missing value or a broken rule.
    """
    _check_groups(invocation)
    schema.register()
    refused: list[CoterieError | OSError] = []
    here = os.getpid()

    def application(composed: DictConfig) -> None:
        if os.getpid() != here:  # a launcher's own process: what it raises comes back to Hydra
            schema.register()
            job(schema.read(composed))
        # Kept from Hydra, which would print a line of its own; the rest of a sweep is not run.
        elif not refused:
            try:
                job(schema.read(composed))
            except (CoterieError, OSError) as error:
                refused.append(error)

    entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name=schema.start)
    with _hydra_environment(invocation):
        try:
            entry(application)()
        except (HydraException, OmegaConfBaseException) as error:
            cause = error.__cause__ or error.__context__
            said = f"{error}\n{cause or ''}"
            raise ConfigError(explain(said, schema.names(), schema.start)) from error
    if refused:
        raise refused[0]


def sweep_index() -> int | None:
    """Number of this job within a `-m` sweep, or None outside one."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None
    return int(HydraConfig.get().job.num)


def given_settings() -> frozenset[str] | None:
    """Names of what the command line of this job sets; None outside of one."""
    if not HydraConfig.initialized():
        return None
    return frozenset(
        each.partition("=")[0].lstrip("+~") for each in HydraConfig.get().overrides.task
    )


def explain(message: str, names: Iterable[str] | None = None, command: str = "simulate") -> str:
    r"""One line with name, rule and remedy from what Hydra prints in several.

    Args: names: of the settings there are, those of a run if left out; command: which shows them.

    >>> explain("Could not override 'privacy.epsilom'.\nKey 'epsilom' is not in struct")
    'privacy.epsilom: no such setting; did you mean privacy.epsilon?'
    """
    unknown = re.search(_UNKNOWN, message, re.DOTALL)
    if unknown:
        return _unknown_setting(unknown[1], [*(names or field_names())], command)
    for pattern, phrase in _PHRASES:
        found = re.search(pattern, message, re.DOTALL)
        if found:
            return phrase(found)
    return " ".join(message.split())


def _check_groups(invocation: Invocation) -> None:
    """Refuses a group set to nothing, of which Hydra complains without naming it."""
    for argument in invocation.arguments:
        group, equals, option = argument.partition("=")
        if equals and option in ("", "null") and group and (CONF / group).is_dir():
            raise ConfigError(_group_fault(group, option))


def _unknown_setting(name: str, names: list[str], command: str) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"`coterie {command} --cfg job` shows them all"
    return f"{name}: no such setting; {remedy}"


def _wrong_type(found: re.Match[str]) -> str:
    words = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}
    return f"{found[3]}={found[1]}: must be {words.get(found[2], found[2])}"


def _wrong_choice(found: re.Match[str]) -> str:
    return f"{found[3]}={found[1]}: must be one of {found[2]}"


def _wrong_group(found: re.Match[str]) -> str:
    return _group_fault(found[1], found[2])


def _group_fault(group: str, option: str) -> str:
    known = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    return f"{group}={option}: must be one of {', '.join(known)}"


def _unreadable(found: re.Match[str]) -> str:
    reason = " ".join(found[1].split())
    return f"an argument cannot be read ({reason}): write NAME=VALUE, quoted for your shell"


def _wrong_otherwise(found: re.Match[str]) -> str:
    return f"{found[2]}: {found[1]}"


_UNKNOWN = r"Could not override '([^']+)'.*(?:not in|append)"
"""What Hydra says of a setting that is none."""
_PHRASES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"Value '(.*?)' of type '\w+' could not be converted to (\w+).*full_key: (\S+)",
        _wrong_type,
    ),
    (r"Invalid value '(.*?)', expected one of \[(.*?)\].*full_key: (\S+)", _wrong_choice),
    (r"Could not find '([^/']+)/([^']+)'", _wrong_group),
    (r"^(.*?)\nSee .*override_grammar", _unreadable),
    (r"\n\s*([^\n]*?)\.?\n\s*full_key: (\S+)", _wrong_otherwise),
)
"""What Hydra and OmegaConf say, and what it means to a person. First match wins."""


def in_order(arguments: Iterable[str]) -> list[str]:
    """Settings first, and flags after them: Hydra's parser takes no flag between two settings.

    >>> in_order(["a=1", "--config-dir", "conf.d", "+site=one", "-m"])
    ['a=1', '+site=one', '--config-dir', 'conf.d', '-m']
    """
    settings: list[str] = []
    flags: list[str] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            settings.append(word)
            continue
        flags.append(word)
        if word in _VALUED:
            flags.extend(islice(words, 1))
    return [*settings, *flags]


_VALUED = {
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"),
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun"),
}
"""Flags of Hydra that a value follows."""


@contextmanager
def _hydra_environment(invocation: Invocation) -> Iterator[None]:
    """Gives Hydra its own argv, and makes it raise instead of printing and exiting."""
    saved_argv, saved_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"coterie {invocation.command}", *in_order(invocation.arguments)]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = saved_argv
        if saved_full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_full
