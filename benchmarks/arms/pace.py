"""Pace: how an arm is told to take its turn, and what it says. Two named pipes, JSON lines."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GO, SAID = "go", "said"
"""Names of the two pipes in an arm's folder."""
WEIGHTS = "weights.npy"

Shown = Callable[[], NDArray[np.float32]]
"""What gives the global parameters, when they are to be shown: not while time is taken."""


LARGE = 22_354_944
"""Floats of a model of MiniLM's shapes: 90 MB."""


@dataclass(frozen=True)
class Case:
    """What every arm is asked for."""

    work: str
    """`echo`: sites send back what they were sent; `mlp`: sites train."""
    sites: int
    values: int
    """Floats in a message, each way."""
    workers: int = 1
    """Processes that answer for sites, where the arm has such."""
    mode: str = "looped"
    """`vectorised`: sites train in one computation, where the arm can."""

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """What an echo is of: one array, those of LoRA on six blocks, or those of a MiniLM."""
        made = np.random.default_rng(0)
        return {
            f"array-{number}": made.standard_normal(shape, dtype=np.float32)
            for number, shape in enumerate(_shapes(self.values))
        }

    def text(self) -> str:
        """As `read` takes it."""
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> "Case":
        """What `text` wrote."""
        return Case(**json.loads(text))


class Pace:
    """An arm's end. It says when the first site has answered, and waits to be told of each turn."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._said = (folder / SAID).open("w", buffering=1)
        self._go = (folder / GO).open()
        self._answered = False

    @staticmethod
    def of_command_line() -> "tuple[Pace, Case]":
        """What a process that was started as an arm is to do."""
        return Pace(Path(sys.argv[1])), Case.read(sys.argv[2])

    def answered(self) -> None:
        """A site has answered; told of the first one."""
        if not self._answered:
            self._answered = True
            self.say(event="reply")

    def turns(self) -> Iterator[int]:
        """Rounds to run in each turn, until the end. Between turns it shows what it has."""
        for line in self._go:
            word, *facts = line.split()
            if word == "end":
                return
            if word == "show":
                np.save(self._folder / WEIGHTS, self._vector())
                self.say(event="shown")
            else:
                yield int(facts[0])

    def say(self, **facts: Any) -> None:
        """One line."""
        print(json.dumps(facts), file=self._said, flush=True)

    def end_turn(self, round_s: float, vector: Shown) -> None:
        """Args: round_s: wall seconds of one round; vector: the global parameters after it."""
        self._vector = vector
        self.say(event="turn", round_s=round_s)

    def run(self, one_round: Callable[[], Shown]) -> None:
        """Takes all turns."""
        for rounds in self.turns():
            started = time.perf_counter()
            for _ in range(rounds):
                vector = one_round()
            self.end_turn((time.perf_counter() - started) / rounds, vector)


def _shapes(values: int) -> list[tuple[int, ...]]:
    if values == LARGE:
        blocks = [(384, 384)] * 24 + [(1536, 384)] * 12 + [(384,)] * 60
        return [(30522, 384), (512, 384), *blocks]
    pieces = 24 if values >= 1000 else 1  # noqa: PLR2004 - LoRA's pairs
    return [(values // pieces,)] * pieces
