"""`coterie monitor`: a coordinator's runs, as Prometheus, probes and logs of machines read them.

It reads run folders, as `coterie status` does, and nothing rests on it: it may be started and
stopped while runs go on, and what a run came to can still be read once its process has ended. What
is told of a site is what the site itself said of its ledger with its last answer, and no more.
"""

import json
import logging
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from common.cli import Invocation, run_typer
from common.errors import ConfigError, CoterieError
from common.exposition import (
    ADDRESS_RULE,
    Family,
    Health,
    Sample,
    health_at,
    is_listen_address,
    metrics_at,
)
from common.log_lines import LogForm, begin_log
from server.occupation import is_occupied
from server.record import FILE as LINES
from server.record import RoundLine, whole_lines
from server.standing import FILE as STANDING
from server.standing import Standing, State, read_standing

RUN, SUPERLINK = "run", "superlink"
"""Services of `grpc.health.v1`: whether the newest run goes on or has finished; whether the
SuperLink answers."""
LOOK_S, CALL_S = 2.0, 5.0
"""Between two looks; how long the SuperLink may take to answer."""
NEWEST = 20
"""Runs that are told of."""
INTERRUPTED = "interrupted"
STATES = (*(state.value for state in State), INTERRUPTED)

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)


@dataclass(frozen=True)
class Seen:
    """One run, at one look."""

    name: str
    """The path of its folder below the one that is watched."""
    state: str
    standing: Standing
    lines: tuple[RoundLine, ...]

    @property
    def epsilon(self) -> float:
        """Of the site that was charged most."""
        return float(self.lines[-1].epsilon) if self.lines else 0.0


def monitor(invocation: Invocation) -> None:
    """Tell Prometheus, and probes, how the runs in a folder do; until stopped."""

    def monitor(  # noqa: PLR0917 - options, which are given by name
        runs: Annotated[Path, typer.Argument(help="Folder of runs, or of one run.")],
        metrics: Annotated[
            str, typer.Option(help="Where Prometheus reads /metrics: PORT, or HOST:PORT.")
        ] = "",
        health: Annotated[
            str, typer.Option(help="Where grpc.health.v1 is answered: PORT, or HOST:PORT.")
        ] = "",
        superlink: Annotated[
            str, typer.Option(help="HOST:PORT of the SuperLink, for the service 'superlink'.")
        ] = "",
        ca: Annotated[str, typer.Option(help="Certificate of its authority.")] = "",
        log: Annotated[LogForm, typer.Option(help="A line of the log.")] = LogForm.text,
    ) -> None:
        """Tells Prometheus and probes how the runs in a folder do, until it is stopped.

        A PORT alone is of loopback. Both are in the clear: who reaches them reads them.

        Example: coterie monitor runs --metrics 9464 --health 9465
        """
        for name, value in (("--metrics", metrics), ("--health", health)):
            if not is_listen_address(value):
                raise ConfigError(f"{name}={value}: must be {ADDRESS_RULE}")
        if not metrics and not health:
            raise ConfigError("--metrics='', --health='': give one of them, as --metrics 9464")
        if bool(superlink) != bool(ca):
            raise ConfigError("--superlink, --ca: must be given together")
        begin_log(log)
        watched = Monitor(runs.expanduser().resolve(), superlink, ca)
        with (
            metrics_at("--metrics", metrics, watched.families),
            health_at("--health", health) as told,
        ):
            watched.watch(told)

    run_typer(monitor, invocation)


@dataclass
class Monitor:
    """A folder of runs, looked at again and again."""

    folder: Path
    superlink: str = ""
    ca: str = ""
    _told: dict[str, tuple[str, int]] = field(default_factory=dict)
    """State and round of each run, as the log has them."""

    def look(self) -> list[Seen]:
        """The newest runs, newest first. What cannot be read is passed over."""
        found = {path.parent for path in self._files(STANDING)}
        found |= {path.parent for path in self._files(LINES)}
        dated = sorted(((_changed(path), path) for path in found), reverse=True)
        seen = (self._seen(path) for _, path in dated[:NEWEST])
        return [each for each in seen if each is not None]

    def families(self) -> Iterator[Family]:
        """What a scrape is told."""
        runs = self.look()
        yield Family(
            "coterie_run_state",
            "1 for the state that a run is in.",
            ("run", "state"),
            tuple(
                Sample((run.name, state), float(state == run.state))
                for run in runs
                for state in STATES
            ),
        )
        yield _each("coterie_run_rounds", "Of the whole run.", runs, lambda r: r.standing.rounds)
        yield _each("coterie_run_round", "The last round that is over.", runs, _round)
        yield _each("coterie_run_updated_timestamp_seconds", "When it last moved.", runs, _updated)
        yield _each(
            "coterie_run_epsilon",
            "Of the site that was charged most in this run.",
            [run for run in runs if run.lines],
            lambda run: run.epsilon,
        )
        yield Family(
            "coterie_run_replies",
            "Of each site: updates that counted, and rounds that it refused or was silent in.",
            ("run", "site", "outcome"),
            tuple(sample for run in runs for sample in _replies(run)),
            counts=True,
        )
        yield Family(
            "coterie_run_bytes",
            "Of parameters, over the wire; down is to the sites.",
            ("run", "direction"),
            tuple(
                Sample((run.name, direction), float(sum(numbers)))
                for run in runs
                for direction, numbers in (
                    ("down", [line.bytes_down for line in run.lines]),
                    ("up", [line.bytes_up for line in run.lines]),
                )
            ),
            counts=True,
        )
        yield Family(
            "coterie_run_evaluation",
            "Of the model, on public records, when it was last measured.",
            ("run", "metric"),
            tuple(
                Sample((run.name, name), float(value))
                for run in runs
                for name, value in _measured(run).items()
            ),
        )
        yield _each(
            "coterie_run_round_seconds",
            "From sending the last round's instruction to its last reply.",
            [run for run in runs if run.lines],
            lambda run: run.lines[-1].sites_s,
        )
        for name, text in (
            ("spent", "Of a site's ledger over all runs, as it said with its last answer."),
            ("cap", "Of a site's ledger, as it said with its last answer."),
            ("remaining", "Up to the cap of a site's ledger."),
        ):
            samples = tuple(
                Sample((run.name, site), values[name])
                for run in runs
                for site, values in _books(run).items()
            )
            yield Family(f"coterie_site_epsilon_{name}", text, ("run", "site"), samples)

    def watch(self, health: Health) -> None:
        """Tells probes and the log what changes, until somebody stops this."""
        log.info("watching %s", self.folder)
        while True:
            runs = self.look()
            for run in reversed(runs):
                self._tell(run)
            failed = bool(runs) and runs[0].state in (State.failed, INTERRUPTED)
            health.tell(RUN, well=not failed)
            if self.superlink:
                health.tell(SUPERLINK, well=self._answers())
            time.sleep(LOOK_S)

    def _tell(self, run: Seen) -> None:
        now = (run.state, _round(run))
        if self._told.get(run.name) == now:
            return
        self._told[run.name] = now
        facts: dict[str, Any] = {"run": run.name, "state": run.state, "round": now[1]}
        if run.lines:
            facts |= {"epsilon": run.lines[-1].epsilon, **_measured(run)}
        rounds = run.standing.rounds or "?"
        log.info(
            "%s: %s, round %d of %s", *(run.name, run.state, now[1], rounds), extra={"facts": facts}
        )

    def _answers(self) -> bool:
        import httpx  # noqa: PLC0415 - only who watches a SuperLink

        try:
            trust = ssl.create_default_context(cafile=self.ca)
            url = f"https://{self.superlink}/health"
            return httpx.get(url, verify=trust, timeout=CALL_S).is_success
        except (httpx.TransportError, OSError):
            return False

    def _files(self, name: str) -> Iterator[Path]:
        """Of the folder, and of folders three below: runs/DATE/TIME."""
        patterns = (name, f"*/{name}", f"*/*/{name}", f"*/*/*/{name}")
        for pattern in patterns:
            with suppress(OSError):
                yield from islice(self.folder.glob(pattern), 10_000)

    def _seen(self, path: Path) -> Seen | None:
        try:
            standing = read_standing(path)
            lines = tuple(whole_lines(path))
        except (CoterieError, OSError):
            return None
        if standing is None:  # a simulation: its lines alone tell
            over = (path / "report.json").exists()
            seems = State.finished if over else State.running
            standing = Standing(0, seems, round=len(lines), rounds=_planned(path))
        state = standing.state.value
        if not standing.is_over and not is_occupied(path):
            state = INTERRUPTED
        name = str(path.relative_to(self.folder))
        return Seen(path.name if name == "." else name, state, standing, lines)


def _planned(path: Path) -> int:
    """Rounds of a simulation, once it is over."""
    try:
        return int(json.loads((path / "report.json").read_text(encoding="utf-8"))["rounds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _changed(path: Path) -> float:
    times = [0.0]
    for name in (STANDING, LINES):
        with suppress(OSError):
            times.append((path / name).stat().st_mtime)
    return max(times)


def _each(name: str, text: str, runs: list[Seen], value: Any) -> Family:
    samples = tuple(Sample((run.name,), float(value(run))) for run in runs)
    return Family(name, text, ("run",), samples)


def _round(run: Seen) -> int:
    return len(run.lines)


def _updated(run: Seen) -> float:
    return run.standing.updated_at


def _measured(run: Seen) -> dict[str, float]:
    """The last metrics that there are."""
    return next((line.metrics for line in reversed(run.lines) if line.metrics), {})


def _replies(run: Seen) -> Iterator[Sample]:
    counts: dict[tuple[str, str], int] = {}
    for line in run.lines:
        for site in dict.fromkeys(line.asked):
            for outcome in ("accepted", "refused"):
                counts.setdefault((site, outcome), 0)
            counts[site, "refused" if site in line.refused else "accepted"] += 1
    for (site, outcome), count in sorted(counts.items()):
        yield Sample((run.name, site, outcome), float(count))


def _books(run: Seen) -> dict[str, dict[str, float]]:
    """What each site last said of its ledger."""
    found: dict[str, dict[str, float]] = {}
    for line in run.lines:
        for site, books in line.books.items():
            spent, cap = float(books["spent"]), float(books["cap"])
            found[site] = {"spent": spent, "cap": cap, "remaining": max(0.0, cap - spent)}
    return found
