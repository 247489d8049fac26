"""Composes `conf/` with Hydra, once, and hands a frozen `Config` to a job.

A job is a real `@hydra.main` application: `-m` sweeps, `--cfg job`, `--help` and completion
work. What Hydra and OmegaConf say of a mistake is turned into one line of ours.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


def run_job(job: Callable[[Config], None], invocation: Invocation) -> None:
    """Runs `job` on the composed configuration; on each one of a `-m` sweep.

    Raises: ConfigError for an unknown key, a wrong type, a missing value or a broken rule.
    """
    _check_groups(invocation)
    register_schemas()
    refused: list[CoterieError | OSError] = []

    def application(composed: DictConfig) -> None:
        # Kept from Hydra, which would print a line of its own; the rest of a sweep is not run.
        if not refused:
            try:
                job(from_composed(composed))
            except (CoterieError, OSError) as error:
                refused.append(error)

    entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name="simulate")
    with _hydra_environment(invocation):
        try:
            entry(application)()
        except (HydraException, OmegaConfBaseException) as error:
            cause = error.__cause__ or error.__context__
            raise ConfigError(explain(f"{error}\n{cause or ''}")) from error
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


def explain(message: str) -> str:
    r"""One line with name, rule and remedy from what Hydra prints in several.

    >>> explain("Could not override 'privacy.epsilom'.\nKey 'epsilom' is not in struct")
    'privacy.epsilom: no such setting; did you mean privacy.epsilon?'
    """
    for pattern, phrase in _PHRASES:
        found = re.search(pattern, message, re.DOTALL)
        if found:
            return phrase(found)
    return " ".join(message.split())


def _check_groups(invocation: Invocation) -> None:
    """Refuses a group set to nothing, of which Hydra complains without naming it."""
    for argument in invocation.arguments:
        group, _, option = argument.partition("=")
        if option in ("", "null") and group and (CONF / group).is_dir():
            raise ConfigError(_group_fault(group, option))


def _unknown_setting(found: re.Match[str]) -> str:
    near = difflib.get_close_matches(found[1], list(field_names()), n=1)
    remedy = f"did you mean {near[0]}?" if near else "`coterie simulate --cfg job` shows them all"
    return f"{found[1]}: no such setting; {remedy}"


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


_PHRASES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"Could not override '([^']+)'.*(?:not in|append)", _unknown_setting),
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


@contextmanager
def _hydra_environment(invocation: Invocation) -> Iterator[None]:
    """Gives Hydra its own argv, and makes it raise instead of printing and exiting."""
    saved_argv, saved_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # Hydra's parser takes flags before overrides, or after, but not between.
    arguments = sorted(invocation.arguments, key=lambda word: word not in ("-m", "--multirun"))
    sys.argv = [f"coterie {invocation.command}", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = saved_argv
        if saved_full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_full
