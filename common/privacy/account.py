"""`coterie account`: what a list of events costs."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from common.cli import Invocation, emit_json, run_typer
from common.errors import ConfigError
from common.privacy.accounting import (
    Epsilons,
    Event,
    check_agreement,
    epsilon_object,
    epsilons,
    shown,
)

KEYS = {"noise_multiplier", "sample_rate", "steps"}
MAX_WHOLE = 2**53
"""Above it a whole number has no exact float."""


def account(invocation: Invocation) -> None:
    """Price a list of events: the epsilon of a history, by three accountants."""

    def command(
        file: Annotated[
            str,
            typer.Argument(help="JSON list of {noise_multiplier, sample_rate, steps}; - is stdin"),
        ],
        delta: Annotated[float, typer.Option(help="The delta of (epsilon, delta).")],
    ) -> None:
        """Prices a history of private steps.

        FILE is a JSON list of objects with noise_multiplier, sample_rate and steps; - is stdin.

        Example: echo '[{"noise_multiplier":1,"sample_rate":0.02,"steps":100}]' |
        coterie account - --delta 1e-5
        """
        priced = epsilons(read_events(_read(file)), delta)
        check_agreement(priced)
        if invocation.json:
            emit_json({"epsilon": epsilon_object(priced), "delta": delta})
        else:
            print(_sentence(priced, delta))

    run_typer(command, invocation)


def read_events(text: str) -> list[Event]:
    """Parses the JSON of `coterie account`. Raises: ConfigError naming the entry at fault."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"events: not JSON ({error})") from error
    if not isinstance(entries, list):
        raise ConfigError("events: must be a JSON list of objects")
    return [_read_event(number, entry) for number, entry in enumerate(entries)]


def _read_event(position: int, entry: Any) -> Event:
    if not isinstance(entry, dict) or set(entry) != KEYS:
        raise ConfigError(
            f"events[{position}]: must have exactly the keys {', '.join(sorted(KEYS))}"
        )
    for key, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"events[{position}].{key}={value!r}: must be a number")
        if isinstance(value, int) and abs(value) > MAX_WHOLE:
            raise ConfigError(f"events[{position}].{key}=...: must be at most {MAX_WHOLE}")
    if not isinstance(entry["steps"], int):
        raise ConfigError(f"events[{position}].steps={entry['steps']}: must be a whole number")
    try:
        return Event(float(entry["noise_multiplier"]), float(entry["sample_rate"]), entry["steps"])
    except ConfigError as error:
        raise ConfigError(f"events[{position}].{error}") from error


def _read(file: str) -> str:
    if file == "-":
        return sys.stdin.read()
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{file}: cannot be read ({reason})") from error


def _sentence(priced: Epsilons, delta: float) -> str:
    prv = "unavailable" if priced.prv is None else shown(priced.prv)
    return (
        f"epsilon {shown(priced.pld)} at delta {delta:g} "
        f"(PLD, the headline; RDP {shown(priced.rdp)}, PRV {prv}; add or remove one record)"
    )
