"""Meters that are always on: was the declared noise added, were the declared coins tossed?

They are told once what was declared, look at what each step then did (at all of a small
parameter, at windows of a large one), and alarm where a sound
step would about once in a hundred million readings. A self-check of the site, no proof to others.
Alarms depend on noise and coins, and not on records; `clip-bound`, which looks at a sum of records,
goes off only if an engine breaks its own guarantee. Statistical tests of DP code: Kifer et al.
(2020), arXiv:2002.04049.

| check | alarms at |
|---|---|
| `noise-scale` | too little noise, too much, none, in one piece or all; another divisor |
| `noise-correlation` | coordinates of one step that depend on each other |
| `noise-reuse` | the noise of the step before, or of the piece before |
| `sampler-rate` | too many records, or persons, drawn, too few |
| `sampler-dispersion` | batches whose sizes vary too little, or too much, where chance decides |
| `sampler-overlap` | steps that avoid, or repeat, those drawn in the step before |
| `sampler-passes` | batches of one size, or passes in which nobody comes twice: shuffling |
| `sampler-repeat` | a record, or person, twice in one step |
| `step-count` | a step, an empty one for example, that drew or released nothing |
| `clip-bound` | a sum longer than its clipped gradients, or its persons, can make it |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy import special
from torch import Tensor, nn

from client.measurements import Measurements
from client.passes import Passes
from common.errors import PrivacyRefusedError
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness

ODDS = 1e-8
"""An alarm goes off where a sound step would this rarely, in either direction."""
DEVIATIONS = 5.7
"""The same for a Gaussian, in standard deviations."""
ENOUGH = 200
"""Values a correlation is judged on, at least; fewer have longer tails than a Gaussian."""
REMEMBERED = 4096
"""Coordinates of a step's, or a piece's, noise that are kept, to see noise used twice."""
BLOCK, WINDOW = 1 << 16, 1 << 13
"""Of every so many coordinates of a parameter, so many are read in one step. Of 23 million
parameters that is 2.8 million: noise off by half a percent alarms."""
SLACK = 1e-4
"""Relative rounding allowed on a clipped sum."""


class AlarmError(PrivacyRefusedError):
    """A measurement says that a step did not do what its mechanism declares."""


Residual = NDArray[np.float64]
"""(n,) released values, times the divisor, less the clipped sum, in declared deviations."""
NEVER = 1e-16
"""Odds below which all outcomes count as equally unlikely: a normal quantile stays finite."""


class Meters:
    """The meters of one site, told once what `mechanism` declares; they see all its rounds."""

    def __init__(self, mechanism: Mechanism) -> None:
        # Not from noise_std: noise that does not fit what is charged for it alarms, too.
        charged = mechanism.event(1).noise_multiplier * mechanism.sensitivity
        self.noise = NoiseMeter(charged, mechanism.divisor)
        self.sampler = SamplerMeter(mechanism.sample_rate)
        self._clip_norm, self._sensitivity = mechanism.clip_norm, mechanism.sensitivity
        self._drawn = self._noised = 0

    def open_round(self) -> None:
        """Before the first step of a round."""
        self._drawn, self._noised = self.sampler.steps, self.noise.steps

    def check_sum(self, sums: dict[nn.Parameter, Tensor], *, records: int, units: int) -> None:
        """A sum of B clipped gradients is no longer than B times the clip bound, and one of
        `units` persons no longer than so many times what the noise is scaled to.

        Of one record this is the bound itself. Unclipped gradients that point apart can hide in
        a longer sum, so `Trainer.rehearse` takes a step on one made record far beyond the bound.
        Raises: PrivacyRefusedError naming `clip-bound`.
        """
        bound = min(records * self._clip_norm, units * self._sensitivity)
        norm = nn.utils.get_total_norm(list(sums.values()))
        if not float(norm) <= bound * (1 + SLACK):  # NaN alarms too
            _alarm("clip-bound")

    def close_round(self, steps: int) -> Measurements:
        """After the last of `steps` steps. Raises: PrivacyRefusedError naming `step-count`."""
        drawn, noised = self.sampler.steps - self._drawn, self.noise.steps - self._noised
        if not drawn == noised == steps:
            _alarm("step-count")
        return Measurements(
            steps=self.noise.steps,
            round_steps=noised,
            noise_ratio=self.noise.ratio,
            noise_deviation=self.noise.deviation,
            coin_deviation=self.sampler.deviation,
        )


class NoiseMeter:
    """Compares what was released with the clipped sum: the residual must be N(0, noise_std^2).

    Raises, from `close_step`: PrivacyRefusedError naming `noise-scale`, `noise-correlation` or
    `noise-reuse`; see the module.
    """

    def __init__(self, noise_std: float, divisor: float) -> None:
        self._noise_std, self._divisor = noise_std, divisor
        self.steps = 0
        """Steps closed."""
        self._energy, self._count = 0.0, 0
        self._step = _Residuals()
        self._last: NDArray[np.float32] = np.zeros(0, np.float32)
        """First coordinates of the step before, as short as they do: each site of a process has
        its own."""

    def windows(self, sizes: Sequence[int]) -> list[slice]:
        """What to read of parameters of these sizes, laid end to end: all of a small one.

        Two steps read the same, to see noise used twice; the next two read elsewhere.
        """
        found, offset = [], 0
        for size in sizes:
            for block in range(offset, offset + size, BLOCK):
                end = min(block + BLOCK, offset + size)
                turns = math.ceil((end - block) / WINDOW)
                start = block + self.steps // 2 % turns * WINDOW
                found.append(slice(start, min(start + WINDOW, end)))
            offset += size
        return found

    def read(self, total: Tensor, released: Tensor, lengths: Sequence[int] | None = None) -> None:
        """Coordinates of a clipped sum, and the same noised and divided: (n,) each.

        Args: lengths: of the pieces that are judged each by itself; by default one.
        """
        std = self._noise_std or 1.0
        scaled = released.cpu().double().mul_(self._divisor / std)
        residual = scaled.sub_(total.cpu().double(), alpha=1.0 / std).numpy()
        for piece in np.split(residual, np.cumsum(lengths)[:-1]) if lengths else [residual]:
            self._step.add(piece)

    def close_step(self) -> None:
        """Judges the step, and all steps so far."""
        step, last = self._step, self._last
        self._step, self._last = _Residuals(), step.first.astype(np.float32)
        energy, count = sum(step.energies), sum(step.counts)
        self._energy, self._count = self._energy + energy, self._count + count
        _judge_energy(energy, count)
        _judge_energy(self._energy, self._count)
        for energy, count in zip(step.energies, step.counts, strict=True):
            _judge_energy(energy, count, odds=ODDS / len(step.counts))
        _judge_correlation("noise-correlation", step.lag, step.lag_pairs)
        _judge_correlation("noise-reuse", step.again, step.again_pairs)
        _judge_correlation("noise-reuse", *_inner(step.first, last))
        self.steps += 1

    @property
    def ratio(self) -> float:
        """Measured over declared standard deviation; 1 before any step."""
        return math.sqrt(self._energy / self._count) if self._count else 1.0

    @property
    def deviation(self) -> float:
        """Of the energy from declared, in standard deviations."""
        return _chi_square_deviation(self._energy, self._count)


@dataclass
class _Residuals:
    """What is left of one step's release without its clipped sum, in declared units."""

    energies: list[float] = field(default_factory=list)
    """Sum of squares of each piece."""
    counts: list[int] = field(default_factory=list)
    """Coordinates of each piece."""
    lag: float = 0.0
    """Inner product of neighbouring coordinates."""
    lag_pairs: int = 0
    again: float = 0.0
    """Inner product of pieces that follow each other."""
    again_pairs: int = 0
    first: Residual = field(default_factory=lambda: np.zeros(0))
    """The first coordinates, at most `REMEMBERED`."""
    _before: Residual = field(default_factory=lambda: np.zeros(0))

    def add(self, piece: Residual) -> None:
        """Residuals (n,) of one piece."""
        start = piece[:REMEMBERED]
        again, pairs = _inner(start, self._before)
        self.energies.append(float(np.dot(piece, piece)))
        self.counts.append(len(piece))
        self.lag += float(np.dot(piece[1:], piece[:-1]))
        self.lag_pairs += len(piece) - 1
        self.again, self.again_pairs = self.again + again, self.again_pairs + pairs
        if len(self.first) < REMEMBERED:
            self.first = np.concatenate([self.first, start])[:REMEMBERED]
        self._before = start


class SamplerMeter:
    """Were records, or persons, drawn independently, each with probability q? Over all steps.

    Batches of a fixed size vary too little, those of a shuffled pass never meet: both alarm,
    after some steps. What is remembered (sizes, samples) is private and stays here.
    Args: dither: coins that spread a size over the odds of that size, see `_read_dispersion`.
    Raises, from `read`: PrivacyRefusedError naming `sampler-rate`, `sampler-dispersion`,
    `sampler-overlap`, `sampler-passes` or `sampler-repeat`; see the module.
    """

    def __init__(self, sample_rate: float, *, dither: Randomness | None = None) -> None:
        self._rate, self._overlap = _Coins(sample_rate), _Coins(sample_rate)
        self._sample_rate, self._dither = sample_rate, dither or Randomness.from_entropy()
        self.steps = 0
        """Samples read."""
        self._spread = 0.0
        self._last: NDArray[np.int64] | None = None
        self._passes = Passes(sample_rate)

    def read(self, sample: NDArray[np.int64], *, units: int) -> None:
        """The indices of those drawn in one step, out of `units` records or persons."""
        self.steps += 1
        if len(np.unique(sample)) != len(sample):
            _alarm("sampler-repeat")
        self._rate.toss(units, len(sample))
        self._rate.judge("sampler-rate")
        if self._sample_rate < 1:  # else a size has no chance in it, and the dither alone is judged
            self._read_dispersion(len(sample), units)
        if self._last is not None:
            common = len(np.intersect1d(sample, self._last, assume_unique=True))
            self._overlap.toss(len(self._last), common)
            self._overlap.judge("sampler-overlap")
        self._last = sample
        self._passes.read(sample, units=units)
        if not self._passes.odds >= ODDS:
            _alarm("sampler-passes")

    def _read_dispersion(self, drawn: int, units: int) -> None:
        """A size becomes a standard Gaussian, exactly and for any number of records or persons.

        Source: randomised probability integral transform, Dunn & Smyth (1996),
        doi:10.1080/10618600.1996.10474708.
        """
        below = special.bdtr(drawn - 1, units, self._sample_rate) if drawn else 0.0
        at_most = special.bdtr(drawn, units, self._sample_rate)
        odds = below + (at_most - below) * float(self._dither.uniform(1)[0])
        self._spread += special.ndtri(np.clip(odds, NEVER, 1 - NEVER)) ** 2
        _judge(
            "sampler-dispersion",
            special.chdtr(self.steps, self._spread),
            special.chdtrc(self.steps, self._spread),
        )

    @property
    def deviation(self) -> float:
        """Of the number of those drawn from declared, in standard deviations."""
        return self._rate.deviation


class _Coins:
    """Coins of one rate, tossed and fallen, summed over steps."""

    def __init__(self, rate: float) -> None:
        self._rate, self._tossed, self._fallen = rate, 0, 0

    def toss(self, tossed: int, fallen: int) -> None:
        self._tossed += tossed
        self._fallen += fallen

    def judge(self, check: str) -> None:
        """Exact binomial tails."""
        tossed, fallen = self._tossed, self._fallen
        at_least = special.bdtrc(fallen - 1, tossed, self._rate) if fallen else 1.0
        _judge(check, special.bdtr(fallen, tossed, self._rate), at_least)

    @property
    def deviation(self) -> float:
        mean = self._tossed * self._rate
        variance = mean * (1 - self._rate)
        return (self._fallen - mean) / math.sqrt(variance) if variance else 0.0


def _chi_square_deviation(energy: float, count: int) -> float:
    """A chi-square of `count` degrees in standard deviations (Wilson & Hilferty 1931)."""
    if count == 0:
        return 0.0
    spread = 2.0 / (9.0 * count)
    return (math.cbrt(energy / count) - (1 - spread)) / math.sqrt(spread)


def _inner(left: Residual, right: Residual | NDArray[np.float32]) -> tuple[float, int]:
    """Inner product of the coordinates both have, and how many they are."""
    pairs = min(len(left), len(right))
    return float(np.dot(left[:pairs], right[:pairs])), pairs


def _judge(check: str, at_most: float, at_least: float, *, odds: float | None = None) -> None:
    """`at_most`, `at_least`: odds of a value this low, this high."""
    if not min(at_most, at_least) >= (ODDS if odds is None else odds):  # NaN alarms too
        _alarm(check)


def _judge_energy(energy: float, count: int, *, odds: float | None = None) -> None:
    """`energy`: sum of squares of `count` values that should be independent N(0, 1)."""
    at_most, at_least = special.chdtr(count, energy), special.chdtrc(count, energy)
    _judge("noise-scale", at_most, at_least, odds=odds)


def _judge_correlation(check: str, inner: float, count: int) -> None:
    """`inner`: the inner product of `count` pairs of what should be independent N(0, 1)."""
    if count >= ENOUGH and not abs(inner) <= DEVIATIONS * math.sqrt(count):
        _alarm(check)


def _alarm(check: str) -> NoReturn:
    """The same text whatever was measured: what a step did is private where it did wrong."""
    raise AlarmError(f"{check}: the step did not do what its mechanism declares")
