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
from common.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"


def run_job(job: Callable[[Config], None], invocation: Invocation) -> None:
    """Runs `job` on the composed configuration; on each one of a `-m` sweep.

    Raises: ConfigError for an unknown key, a wrong type, a missing value or a broken rule.
    """
    register_schemas()

    def application(composed: DictConfig) -> None:
        job(from_composed(composed))

    entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name="simulate")
    with _hydra_environment(invocation):
        try:
            entry(application)()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(str(error))) from error


def sweep_index() -> int | None:
    """Number of this job within a `-m` sweep, or None outside one."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None
    return int(HydraConfig.get().job.num)


def explain(message: str) -> str:
    """One line with name, rule and remedy from what Hydra prints in several.

    >>> explain("Could not override 'privacy.epsilom'.\\nKey 'epsilom' is not in struct")
    'privacy.epsilom: no such setting; did you mean privacy.epsilon?'
    """
    unknown = re.search(r"Could not override '([^']+)'", message)
    if unknown and ("not in struct" in message or "Key '" in message):
        return f"{unknown[1]}: no such setting{_suggestion(unknown[1])}"
    value = re.search(r"Value '(.*?)' of type '\w+' could not be converted to (\w+)", message)
    choice = re.search(r"Invalid value '(.*?)', expected one of \[(.*?)\]", message)
    key = re.search(r"full_key: (\S+)", message)
    if value and key:
        return f"{key[1]}={value[1]}: must be {_a(value[2])}"
    if choice and key:
        return f"{key[1]}={choice[1]}: must be one of {choice[2]}"
    option = re.search(r"Could not find '([^/']+)/([^']+)'", message)
    if option:
        known = sorted(path.stem for path in (CONF / option[1]).glob("*.yaml"))
        return f"{option[1]}={option[2]}: must be one of {', '.join(known)}"
    return " ".join(message.split())


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name, list(field_names()), n=1)
    return f"; did you mean {near[0]}?" if near else "; `coterie simulate --cfg job` shows them all"


def _a(kind: str) -> str:
    words = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}
    return words.get(kind, kind)


@contextmanager
def _hydra_environment(invocation: Invocation) -> Iterator[None]:
    """Gives Hydra its own argv, and makes it raise instead of printing and exiting."""
    saved_argv, saved_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"coterie {invocation.command}", *invocation.arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = saved_argv
        if saved_full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_full
