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
        """Rounds to run in each turn, until the end; after a turn, `said` tells how it went."""
        for line in self._go:
            word, *facts = line.split()
            if word == "end":
                return
            yield int(facts[0])

    def say(self, **facts: Any) -> None:
        """One line."""
        print(json.dumps(facts), file=self._said, flush=True)

    def end_turn(self, round_s: float, vector: NDArray[np.float32]) -> None:
        """Args: round_s: wall seconds of one round; vector: the global parameters after it."""
        np.save(self._folder / WEIGHTS, vector)
        self.say(event="turn", round_s=round_s)

    def run(self, one_round: Callable[[], NDArray[np.float32]]) -> None:
        """Takes all turns; `one_round` returns the global parameters."""
        for rounds in self.turns():
            started = time.perf_counter()
            for _ in range(rounds):
                vector = one_round()
            self.end_turn((time.perf_counter() - started) / rounds, vector)
