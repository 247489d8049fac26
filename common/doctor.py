"""`coterie doctor`: what a deployment needs, looked at before it is needed, on either side.

A check looks at one thing and changes nothing. All of them are made, whatever the others found;
each fault has its own words, its remedy and the exit code of its class in `common/errors.py`, and
the worst of these is the command's.

Who looks is found by the entry-point group `coterie.doctors`, a function `(Invocation, Visit) ->
None` for each side: so neither side imports the other.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table

from common.cli import Invocation, emit_json
from common.errors import (
    ConfigError,
    CoterieError,
    FederationError,
    PrivacyRefusedError,
    VerificationError,
)

GROUP, JSON = "coterie.doctors", "--json"
HELP = """coterie doctor node [--offline] [--gpu] [--head SEQ:HASH] SETTING ... [-- RUN SETTING ...]
coterie doctor coordinator [--offline] [--gpu] SETTING ...

Looks at what a node, or whoever submits runs, needs: versions, ports, certificates and their
dates, clock, keys, disk, model, records, books, and whether the coming run is within the site's
policy and cap. Changes nothing. SETTINGs are those of `coterie node`, or of `coterie submit`.

  --offline   looks at this machine alone, and calls nobody
  --gpu       a GPU that torch can use is needed
  --head      the head of the site's ledger in the last report: finds a ledger that is older
  --          what follows are settings of the coming run, as the coordinator will submit it

Exit code: 0 all is well, else that of the worst fault: 2 a setting or file, 3 privacy, 4 nobody
there or too few, 5 something is not what it claims to be.

Example: coterie doctor node --config-dir conf.d +site=ward-1 -- privacy.epsilon=3"""
_ENTRIES = 12
"""Characters that a column needs at least."""


class Verdict(StrEnum):
    """What a check came to."""

    well = "well"
    doubtful = "doubtful"
    """It will do, and somebody should know."""
    faulty = "FAULTY"
    open = "not checked"


class DoubtError(Exception):
    """Raised by a check that found what will do: "what was found; what to do about it"."""


class OpenError(Exception):
    """Raised by a check that could not be made, with the reason."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""
    code: int = 0
    """Exit code of the fault's class; 0 if there is none."""

    def as_object(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "check": self.check,
            "verdict": self.verdict.value.lower(),
            "found": self.found,
            "remedy": self.remedy,
            "code": self.code,
        }


@dataclass(frozen=True)
class Check:
    """One thing to look at."""

    name: str
    look: Callable[[], str]
    """Says what is well. Raises: CoterieError, OSError for a fault; DoubtError; OpenError."""
    remedy: str
    """Where a fault names none of its own after a semicolon."""
    calls: bool = False
    """Whether it needs somebody at another machine."""


@dataclass(frozen=True)
class Visit:
    """What the doctor was asked."""

    offline: bool = False
    gpu: bool = False
    head: str = ""
    run: tuple[str, ...] | None = None
    """Settings of the coming run; None if none was told."""
    console: Console = field(default_factory=lambda: Console(markup=False))


def doctor(invocation: Invocation) -> None:
    """Look at what a deployment needs, on either side, and say what is wrong and what to do."""
    sides = {point.name: point for point in metadata.entry_points(group=GROUP)}
    side, *words = invocation.arguments or ("",)
    before_run = words[: words.index("--")] if "--" in words else words
    if {"-h", "--help"} & {side, *before_run}:
        print(HELP)
        return
    if side not in sides:
        known = " or ".join(f"coterie doctor {name}" for name in sorted(sides, reverse=True))
        raise ConfigError(f"doctor {side}".rstrip() + f": whom shall it look at? {known}")
    visit, settings = _asked(words)
    told = replace(
        invocation, arguments=tuple(settings), json=invocation.json or JSON in words
    )  # whoever adds it to the end of a line means it of the whole line
    sides[side].load()(told, visit)


def _asked(words: Sequence[str]) -> tuple[Visit, list[str]]:
    """The doctor's own options, and the settings that are left."""
    end = words.index("--") if "--" in words else len(words)
    run = tuple(each for each in words[end + 1 :] if each != JSON) if end < len(words) else None
    settings, head, own = [], "", {"--offline": False, "--gpu": False}
    left = iter(words[:end])
    for word in left:
        if word in own:
            own[word] = True
        elif word == "--head":
            head = next(left, "")
        elif word.startswith("--head="):
            head = word.partition("=")[2]
        else:
            settings.append(word)
    return Visit(own["--offline"], own["--gpu"], head, run), settings


def examine(checks: Iterable[Check], *, offline: bool = False) -> list[Finding]:
    """Makes every check, whatever the others found."""
    return [
        Finding(each.name, Verdict.open, "calls another machine, and --offline calls nobody")
        if offline and each.calls
        else _finding(each)
        for each in checks
    ]


def _finding(check: Check) -> Finding:
    try:
        return Finding(check.name, Verdict.well, check.look())
    except DoubtError as doubt:
        return Finding(check.name, Verdict.doubtful, *_split(str(doubt), check.remedy))
    except OpenError as reason:
        return Finding(check.name, Verdict.open, str(reason))
    except CoterieError as error:
        found, remedy = _split(str(error), check.remedy)
        return Finding(check.name, Verdict.faulty, found, remedy, error.exit_code)
    except OSError as error:
        found = f"{error.filename or 'a file'}: {error.strerror or type(error).__name__}"
        code = ConfigError.exit_code
        return Finding(check.name, Verdict.faulty, found, check.remedy, code)
    except Exception as error:  # what a library says of strange bytes may repeat them
        found = f"the check itself broke ({type(error).__name__})"
        return Finding(check.name, Verdict.faulty, found, check.remedy, CoterieError.exit_code)


def _split(text: str, otherwise: str) -> tuple[str, str]:
    """What was found, and what to do: our errors put a semicolon between the two."""
    found, _, remedy = text.partition("; ")
    return found, remedy or otherwise


def conclude(side: str, findings: Sequence[Finding], invocation: Invocation, visit: Visit) -> None:
    """Prints the table, or hands the findings to `--json`.

    Raises: the error of the worst fault's class, naming all that is faulty.
    """
    faulty = [each for each in findings if each.verdict is Verdict.faulty]
    answer = {
        "side": side,
        "ok": not faulty,
        "checks": [finding.as_object() for finding in findings],
    }
    if not invocation.json:
        visit.console.print(_table(side, findings))
        visit.console.print(_counted(findings), highlight=False)
    elif not faulty:
        emit_json(answer)
    if faulty:
        error = _error_of(max(each.code for each in faulty))(
            f"{len(faulty)} of {len(findings)} checks found a fault: "
            f"{', '.join(each.check for each in faulty)}"
        )
        error.details = answer
        raise error


def _error_of(code: int) -> type[CoterieError]:
    kinds = (ConfigError, PrivacyRefusedError, FederationError, VerificationError)
    return {kind.exit_code: kind for kind in kinds}.get(code, CoterieError)


def _table(side: str, findings: Sequence[Finding]) -> Table:
    table = Table(title=f"Doctor: {side}", title_justify="left")
    table.add_column("check", min_width=_ENTRIES)
    table.add_column("verdict", no_wrap=True)
    table.add_column("found", ratio=3, overflow="fold")
    table.add_column("what to do", ratio=2, overflow="fold")
    table.add_column("code", justify="right")
    for each in findings:
        code = str(each.code) if each.code else ""
        table.add_row(each.check, each.verdict.value, each.found, each.remedy, code)
    return table


def _counted(findings: Sequence[Finding]) -> str:
    numbers = {kind: sum(each.verdict is kind for each in findings) for kind in Verdict}
    return ", ".join(f"{number} {kind.value}" for kind, number in numbers.items() if number)
