"""`coterie status`, `stop` and `logs`: a submitted run, as whoever waits for it sees it."""

from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.cli import Invocation, emit_json, run_typer
from common.errors import (
    ConfigError,
    CoterieError,
    FederationError,
    PrivacyRefusedError,
    VerificationError,
)
from common.privacy.accounting import shown
from server.control import FINISHED, STOPPED
from server.occupation import is_occupied
from server.record import FILE as LINES
from server.record import RoundLine, whole_lines
from server.run_folder import how_to_go_on
from server.standing import Fault, Standing, State, read_standing
from server.submission import Submission, read_submission

POLL_S = 0.5
"""Between two looks at the run folder."""
ASK_S = 20.0
"""Between two questions to the SuperLink, where the run folder tells nothing new."""
_CLASSES: tuple[type[CoterieError], ...] = (
    ConfigError,
    PrivacyRefusedError,
    FederationError,
    VerificationError,
)

RunDir = Annotated[Path, typer.Argument(help="Folder of a submitted run.")]


def follow(run_dir: Path, submission: Submission, console: Console) -> None:
    """Prints each round as it ends, and returns when the run has finished.

    Raises: CoterieError as the ServerApp met it, or FederationError if it died; KeyboardInterrupt
    with how to follow the run, which goes on.
    """
    shown_rounds, sites, asked_at = len(_lines(run_dir, submission)), "", monotonic()
    try:
        while True:
            now = _standing(run_dir, submission)
            lines = _lines(run_dir, submission) if now else []
            for line in lines[shown_rounds:]:
                console.print(_line_text(line, now), highlight=False)
            if len(lines) > shown_rounds:
                shown_rounds, asked_at = len(lines), monotonic()
            if now and now.state is State.waiting and ", ".join(sorted(now.here.values())) != sites:
                sites = ", ".join(sorted(now.here.values()))
                console.print(f"sites that are there: {sites or 'none'}", highlight=False)
            if now and now.is_over:
                _end(now)
                return
            if monotonic() - asked_at > ASK_S:
                asked_at = monotonic()
                _check_alive(run_dir, submission)
            sleep(POLL_S)
    except KeyboardInterrupt as stop_:
        raise KeyboardInterrupt(
            f"no longer followed; the run goes on. See it by: coterie status {run_dir}; end it "
            f"by: coterie stop {run_dir}"
        ) from stop_


def status(invocation: Invocation) -> None:
    """How far a submitted run is: rounds, sites, epsilon, time left."""

    def status(run: RunDir) -> None:
        """How far a submitted run is: rounds, sites, epsilon, time left."""
        answer = status_object(run)
        if invocation.json:
            emit_json(answer)
        else:
            _show(answer, Console(markup=False))

    run_typer(status, invocation)


def stop(invocation: Invocation) -> None:
    """End a submitted run; what it did stays, and it can be taken up again."""

    def stop(run: RunDir) -> None:
        """End a submitted run; what it did stays, and it can be taken up again."""
        submission = read_submission(run)
        submission.link.stop(submission.flower_run)
        text = f"stopped; {how_to_go_on(run.resolve(), 'submit')}"
        if invocation.json:
            emit_json({"flower_run": str(submission.flower_run), "stopped": True})
        else:
            Console(markup=False).print(text, highlight=False)

    run_typer(stop, invocation)


def logs(invocation: Invocation) -> None:
    """Print what the ServerApp of a submitted run has logged so far."""

    def logs(run: RunDir) -> None:
        """Print what the ServerApp of a submitted run has logged so far."""
        submission = read_submission(run)
        text = submission.link.log(submission.flower_run)
        if invocation.json:
            emit_json({"log": text})
        else:
            Console(markup=False, soft_wrap=True).print(text, highlight=False, end="")

    run_typer(logs, invocation)


def status_object(run_dir: Path) -> dict[str, Any]:
    """The `--json` form of a status. What a site shares of its ledger, as its policy allows, is
    in what it answered; a SuperLink that cannot be reached is said so, and the rest is told.
    """
    submission = read_submission(run_dir)
    now = read_standing(run_dir)
    try:
        lines = whole_lines(run_dir)
    except OSError:
        lines = []
    answer: dict[str, Any] = {"run_dir": str(run_dir.resolve())}
    answer |= {"flower_run": str(submission.flower_run)}  # a number JSON readers may round
    try:
        answer["superlink"] = submission.link.status(submission.flower_run)
        names = now.here if now else {}
        nodes = submission.link.nodes().items()
        answer["nodes"] = {names.get(node, f"node-{node}"): state for node, state in nodes}
    except FederationError as error:
        answer["superlink"] = f"unreachable: {error}"
    answer["state"] = _state(run_dir, now, submission, answer["superlink"])
    if now is not None:
        answer |= {"round": now.round, "rounds": now.rounds, "heard": [*now.heard]}
        if now.remaining_s is not None and answer["state"] == State.running:
            answer["remaining_s"] = round(now.remaining_s, 1)
        if now.fault:
            answer["fault"] = {"code": now.fault.code, "message": now.fault.message}
    if lines:
        answer["epsilon"] = lines[-1].epsilon
        answer["evaluation"] = next((x.metrics for x in reversed(lines) if x.metrics), {})
        answer["sites"] = _sites(lines)
    return answer


def _state(run_dir: Path, now: Standing | None, submission: Submission, link: str) -> str:
    """What the run says of itself, unless its SuperLink, or the lock of its folder, knows better:
    what was killed says nothing.
    """
    if now is None or now.flower_run != submission.flower_run:
        return "interrupted" if link.startswith(FINISHED) else "starting"
    if not now.is_over and (link.startswith(FINISHED) or not is_occupied(run_dir)):
        return "interrupted"
    return now.state.value


def _sites(lines: list[RoundLine]) -> list[dict[str, Any]]:
    """Of each site that was asked: how often it answered, and what it last said of its ledger."""
    sites: dict[str, dict[str, Any]] = {}
    for line in lines:
        for name in dict.fromkeys(line.asked):
            site = sites.setdefault(name, {"name": name, "rounds": 0, "refused": 0})
            site["refused" if name in line.refused else "rounds"] += 1
            if name in line.books:
                books = line.books[name]
                site |= {"epsilon": books["spent"], "cap": books["cap"], "head": books["head"]}
    return [sites[name] for name in sorted(sites)]


def _show(answer: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False)
    rows = {
        "state": f"{answer['state']} (Flower's run {answer['flower_run']}: {answer['superlink']})",
        "nodes": ", ".join(f"{name} {state}" for name, state in answer.get("nodes", {}).items()),
        "round": f"{answer['round']} of {answer['rounds']}" if "round" in answer else "",
        "answered in this round": ", ".join(answer.get("heard", [])),
        "epsilon": shown(answer["epsilon"]) if "epsilon" in answer else "",
        "measured": ", ".join(f"{k} {v:.4f}" for k, v in answer.get("evaluation", {}).items()),
        "time left": _duration(answer.get("remaining_s")),
        "fault": answer.get("fault", {}).get("message", ""),
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, text)
    console.print(table)
    if "sites" in answer:
        sites = Table("site", "rounds", "refused or silent", "epsilon", "cap")
        for site in answer["sites"]:
            told = [shown(site[key]) if key in site else "" for key in ("epsilon", "cap")]
            sites.add_row(site["name"], str(site["rounds"]), str(site["refused"]), *told)
        console.print(sites)


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else f"about {timedelta(seconds=round(seconds))}"


def _standing(run_dir: Path, submission: Submission) -> Standing | None:
    """Of this attempt; an earlier one's does not count."""
    now = read_standing(run_dir)
    return now if now is not None and now.flower_run == submission.flower_run else None


def _lines(run_dir: Path, submission: Submission) -> list[RoundLine]:
    return whole_lines(run_dir) if (run_dir / LINES).exists() else []


def _line_text(line: RoundLine, now: Standing | None) -> str:
    refused = "".join(f"; {name}: {why}" for name, why in line.refused.items())
    return line.text(now.rounds if now else "?") + refused


def _end(now: Standing) -> None:
    """Raises: what the ServerApp met."""
    if now.fault is not None:
        raise _error_of(now.fault)


def _error_of(fault: Fault) -> CoterieError:
    kinds = {kind.exit_code: kind for kind in _CLASSES}
    return kinds.get(fault.code, FederationError)(fault.message)


def _check_alive(run_dir: Path, submission: Submission) -> None:
    """Raises: FederationError if nothing will write into the run folder any more."""
    try:
        told = submission.link.status(submission.flower_run)
    except FederationError as error:
        if is_occupied(run_dir):  # the ServerApp is there, and may outlive its SuperLink
            return
        raise FederationError(f"{error}; {how_to_go_on(run_dir, 'submit')}") from error
    if told.startswith(FINISHED) and not is_occupied(run_dir):
        now = _standing(run_dir, submission)
        if now is not None and now.is_over:
            return
        if told.endswith(STOPPED):
            raise FederationError(f"the run was stopped; {how_to_go_on(run_dir, 'submit')}")
        raise FederationError(
            f"the run ended without a word ({told}); coterie logs {run_dir} may say why; "
            f"{how_to_go_on(run_dir, 'submit')}"
        )
