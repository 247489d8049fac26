"""What is recorded of each round: a line of `metrics.jsonl`."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from common.durable import write_atomic
from common.errors import VerificationError

if TYPE_CHECKING:  # torch would come with it, and who only reads lines needs none
    from common.messages import SiteBooks

FILE = "metrics.jsonl"


class SiteLine(TypedDict):
    """A site's ledger after a round, as plain values."""

    head: str
    cap: float
    spent: float
    charged: list[list[float]]
    """[sigma, q, steps] of each distinct event ever charged."""


@dataclass(frozen=True)
class RoundLine:
    """One line of `metrics.jsonl`."""

    round: int
    metrics: dict[str, float]
    """On public records; empty after a round that was not measured."""
    epsilon: float | str
    """Of the site that was charged most, or "inf"."""
    asked: tuple[str, ...]
    refused: dict[str, str]
    bytes_down: int
    bytes_up: int
    sites_s: float
    private: bool
    books: dict[str, SiteLine] = field(default_factory=dict)
    """What each site that answered says of its ledger."""
    elapsed_s: float = 0.0
    """Seconds since the run began, without what an interruption lost."""
    epsilons: dict[str, float | str] = field(default_factory=dict)
    """Of each site that was asked so far, where sites are on different terms."""
    late: tuple[str, ...] = ()
    """Sites whose updates came after their round had closed, since the line before."""

    @cached_property
    def times_asked(self) -> Counter[str]:
        """How often each site was asked: its spare rounds, too."""
        return Counter(self.asked)

    def found(self) -> str:
        """For people: the task's first metric, if it was measured, and the epsilon."""
        from common.privacy.accounting import shown  # noqa: PLC0415 - the accountants come with it

        measured = "".join(f"  {name} {value:.4f}" for name, value in [*self.metrics.items()][:1])
        return f"{measured}  epsilon {shown(self.epsilon)}"

    def text(self, rounds: int | str) -> str:
        """The same, and which round of so many it was."""
        return f"round {self.round}/{rounds}{self.found()}"


def append_line(run_dir: Path, line: RoundLine) -> None:
    """Adds one whole line and syncs it, so that a crash loses at most the round under way."""
    with (run_dir / FILE).open("a", encoding="utf-8") as file:
        file.write(_text(line))
        file.flush()
        os.fsync(file.fileno())


def read_lines(run_dir: Path) -> list[RoundLine]:
    """The lines of a run. Raises: OSError, ValueError or TypeError if they are none of ours."""
    text = (run_dir / FILE).read_text(encoding="utf-8")
    return [_parsed(line) for line in text.splitlines()]


def whole_lines(run_dir: Path) -> list[RoundLine]:
    """The lines of a run that was interrupted, without one that was cut off.

    Raises: VerificationError if another line is malformed, or they are not rounds 1 to n.
    """
    path = run_dir / FILE
    raw = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines = []
    for number, text in enumerate(raw[:-1], start=1):  # what follows the last newline is cut off
        try:
            lines.append(_parsed(text.decode()))
        except (ValueError, TypeError) as error:
            if number == len(raw) - 1:
                break
            raise VerificationError(f"{path}: line {number} is malformed") from error
        if lines[-1].round != number:
            raise VerificationError(f"{path}: line {number} is not of round {number}")
    return lines


def write_lines(run_dir: Path, lines: list[RoundLine]) -> None:
    """Replaces all lines of a run."""
    write_atomic(run_dir / FILE, "".join(map(_text, lines)))


def _parsed(text: str) -> RoundLine:
    line = RoundLine(**json.loads(text))
    return replace(line, asked=tuple(line.asked), late=tuple(line.late))


def _text(line: RoundLine) -> str:
    return json.dumps(asdict(line), ensure_ascii=False, allow_nan=False) + "\n"


def site_lines(books: "Mapping[str, SiteBooks]") -> dict[str, SiteLine]:
    """What sites said of their ledgers, by name, as plain values."""
    return {
        name: SiteLine(
            head=str(each.head),
            cap=each.cap,
            spent=each.spent,
            charged=[[e.noise_multiplier, e.sample_rate, e.steps] for e in each.charged],
        )
        for name, each in books.items()
    }
