"""Where a deployed run stands: one small file in its run folder, replaced whole at each event.

It is for people who watch, and nothing goes on from it: that is what checkpoints are for.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from common.durable import write_atomic
from common.errors import CoterieError, VerificationError
from server.record import RoundLine

FILE = "standing.json"


class State(StrEnum):
    """What a run is doing."""

    waiting = "waiting"
    """For its sites to come."""
    running = "running"
    finished = "finished"
    failed = "failed"


@dataclass(frozen=True)
class Fault:
    """Why a run failed."""

    code: int
    """Exit code of its class in `common.errors`."""
    kind: str
    message: str


@dataclass(frozen=True)
class Standing:
    """One moment of a run."""

    flower_run: int
    """Flower's number of this attempt; another one after a run was taken up again."""
    state: State = State.waiting
    rounds: int = 0
    """Of the whole run."""
    round: int = 0
    """The last one that is over."""
    heard: tuple[str, ...] = ()
    """Sites that answered in the round under way."""
    here: Mapping[int, str] = field(default_factory=dict)
    """Sites that were there when the run last looked for them: Flower's numbers, and names."""
    began_after: int = 0
    """The round after which this attempt began."""
    began_at: float = 0.0
    """Seconds since 1970, as the other times."""
    updated_at: float = 0.0
    round_ended_at: float = 0.0
    """When `round` was over; 0 before this attempt's first."""
    fault: Fault | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen in this attempt."""
        return self.state in (State.finished, State.failed)

    @property
    def remaining_s(self) -> float | None:
        """Seconds that the rounds to come take, if each takes as long as those of this attempt."""
        done = self.round - self.began_after
        if self.state is not State.running or done < 1:
            return None
        return (self.round_ended_at - self.began_at) / done * (self.rounds - self.round)


@dataclass
class Standings:
    """The standing of a run while it goes on; every change is on disk when its method returns."""

    run_dir: Path
    now: Standing = field()

    def waiting(self, here: Mapping[int, str]) -> None:
        """These sites have come."""
        if self.now.state is State.waiting and here != self.now.here:
            self._write(here=dict(here))

    def resumed(self, number: int) -> None:
        """The run goes on after this round."""
        self._write(round=number, began_after=number)

    def heard(self, site: str) -> None:
        """A site answered."""
        self._write(state=State.running, heard=(*self.now.heard, site))

    def over(self, line: RoundLine) -> None:
        """A round is over."""
        self._write(
            state=State.running, round=line.round, heard=(), round_ended_at=round(time.time(), 3)
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Writes the first standing, and how it ends; an error goes on upwards. Of one that is
        stopped from outside nothing more is written: the lock of its folder tells.
        """
        self._write(began_at=round(time.time(), 3))
        try:
            yield
        except Exception as error:
            code = error.exit_code if isinstance(error, CoterieError) else 1
            # Of an error that is none of ours the text may be anything: the log has it.
            text = str(error) if isinstance(error, CoterieError | OSError) else "see its log"
            self._write(state=State.failed, fault=Fault(code, type(error).__name__, text))
            raise
        self._write(state=State.finished)

    def _write(self, **changes: Any) -> None:
        self.now = replace(self.now, **changes, updated_at=round(time.time(), 3))
        write_atomic(self.run_dir / FILE, json.dumps(asdict(self.now), allow_nan=False) + "\n")


def read_standing(run_dir: Path) -> Standing | None:
    """The standing of a run, or None before it has one. Raises: VerificationError if malformed."""
    path = run_dir / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        fault = values.pop("fault")
        return Standing(
            state=State(values.pop("state")),
            heard=tuple(values.pop("heard")),
            here={int(node): str(name) for node, name in values.pop("here").items()},
            fault=Fault(**fault) if fault else None,
            **values,
        )
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VerificationError(f"{path}: malformed") from error
