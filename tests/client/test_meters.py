"""The meters: silent at whatever is sound, and loud, by name, at each fault.

Everything is drawn from seeded generators, so a verdict here is the same every time.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from client import meters
from client.meters import Meters, NoiseMeter, SamplerMeter
from common.errors import PrivacyRefusedError
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness
from common.privacy.sampling import poisson_sample

STD, DIVISOR = 2.5, 37.0
HEAD = ((2, 32), (2,))
"""Shapes of the smallest thing anyone trains: 66 coordinates."""
ADAPTERS = ((8, 32), (32, 8), (8, 32), (32, 8), *HEAD)
LARGE = ((300, 300), (300,))
"""More than one chunk."""


def normal(draw, shape):
    return torch.from_numpy(draw.standard_normal(shape).astype(np.float32))


def noise_steps(meter, steps, draw, shapes, *, noise=None, total=0.0):
    """Steps of clipped sums of length about `total` a coordinate; `noise(step, shape)` if odd."""
    noise = noise or (lambda step, shape: normal(draw, shape))
    for step in range(steps):
        for shape in shapes:
            clipped = total * normal(draw, shape)
            released = (clipped + STD * noise(step, shape)) / DIVISOR
            meter.read(clipped.flatten(), released.flatten())
        meter.close_step()


def samples(steps, draw, records, rate):
    for _ in range(steps):
        yield np.flatnonzero(draw.random(records) < rate)


def sampler_of(rate):
    return SamplerMeter(rate, dither=Randomness.seeded("dither", str(rate)))


def read_all(meter, drawn, records):
    for sample in drawn:
        meter.read(sample, units=records)


# Silence.

SITES = (0, 1, 2, 5, 42, 300, 5000)
RATES = (0.001, 0.01, 0.1, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("records", SITES)
@pytest.mark.parametrize("rate", RATES)
def test_sound_coins_never_alarm(records, rate):
    """Sites of nobody, of one record, of thousands; whole histories of rounds."""
    draw = np.random.default_rng([records, int(1000 * rate)])
    for _ in range(5):
        meter = sampler_of(rate)
        read_all(meter, samples(60, draw, records, rate), records)
        assert abs(meter.deviation) < 6


@pytest.mark.parametrize("shapes", [((1,),), ((3,),), HEAD, ADAPTERS], ids=str)
@pytest.mark.parametrize("total", [0.0, 1.0, 1000.0])
def test_sound_noise_never_alarms(shapes, total):
    """Whatever the sums are, up to hundreds of times the noise."""
    draw = np.random.default_rng(len(shapes))
    for _ in range(5):
        meter = NoiseMeter(STD, DIVISOR)
        noise_steps(meter, 100, draw, shapes, total=total)
        assert abs(meter.deviation) < 6


def test_sound_noise_of_many_coordinates_never_alarms():
    """Float32 sums over millions of values have a bias; it must not add up over steps."""
    draw, meter = np.random.default_rng(0), NoiseMeter(STD, DIVISOR)
    noise_steps(meter, 3, draw, ((2000, 1500),), total=3.0)
    assert abs(meter.deviation) < 4
    assert abs(meter.ratio - 1) < 2e-3


def test_measured_energy_is_that_of_float64_to_a_hundredth_of_its_spread():
    values = normal(np.random.default_rng(1), (5_000_000,))
    meter = NoiseMeter(1.0, 1.0)
    meter.read(torch.zeros_like(values), values)
    meter.close_step()
    exact = float(values.double().square().mean().sqrt())
    spread = (2 * len(values)) ** -0.5  # of the ratio
    assert abs(meter.ratio - exact) < 0.01 * spread


def alarms(monkeypatch, odds, deviations, drive):
    """Of 400 sound histories, how many alarm at these odds, by check."""
    monkeypatch.setattr(meters, "ODDS", odds)
    monkeypatch.setattr(meters, "DEVIATIONS", deviations)
    found = {}
    for trial in range(400):
        try:
            drive(np.random.default_rng([7, trial]))
        except PrivacyRefusedError as error:
            check = str(error).split(":")[0]
            found[check] = found.get(check, 0) + 1
    return found


@pytest.mark.parametrize(
    ("records", "rate"), [(1, 0.5), (3, 0.1), (42, 0.5), (300, 0.01), (500, 0.9)]
)
def test_alarms_at_sound_coins_are_as_rare_as_stated(monkeypatch, records, rate):
    """At odds of 1e-3 a reading, in place of 1e-8: five steps are at most fourteen two-sided
    readings and one bet, so at most 2.9 % of the histories; 27 of 400 would be such a rate once in
    5e4 tries.
    """

    def drive(draw):
        read_all(
            SamplerMeter(rate, dither=Randomness(draw.bytes(32))),
            samples(5, draw, records, rate),
            records,
        )

    found = alarms(monkeypatch, 1e-3, 3.09, drive)
    assert sum(found.values()) < 27


@pytest.mark.parametrize("shapes", [HEAD, ADAPTERS], ids=str)
def test_alarms_at_sound_noise_are_as_rare_as_stated(monkeypatch, shapes):
    """At odds of 1e-3: two steps are at most nine two-sided readings; see above."""
    found = alarms(
        monkeypatch,
        1e-3,
        3.09,
        lambda draw: noise_steps(NoiseMeter(STD, DIVISOR), 2, draw, shapes),
    )
    assert sum(found.values()) < 27


# Alarms: each fault by its name, within a stated number of steps, each time.


def off_where(shape_without):
    return lambda draw: lambda step, shape: (shape != shape_without) * normal(draw, shape)


def constant(draw):
    return lambda step, shape: normal(draw, (1,)).expand(shape)


def same_every_step(draw):
    return lambda step, shape: normal(np.random.default_rng(len(shape)), shape)


def same_for_every_parameter(draw):
    return lambda step, shape: normal(np.random.default_rng(step), shape)


def smoothed(draw):
    """Of the declared scale, but each coordinate takes half of its energy from the one before."""

    def noise(step, shape):
        white = normal(draw, (int(np.prod(shape)) + 1,))
        return ((white[1:] + white[:-1]) / 2**0.5).view(shape)

    return noise


def scaled(factor):
    return lambda draw: lambda step, shape: factor * normal(draw, shape)


@dataclass(frozen=True)
class NoiseFault:
    noise: Callable
    shapes: tuple
    steps: int
    check: str


NOISE_FAULTS = {
    "off": NoiseFault(scaled(0.0), HEAD, 1, "noise-scale"),
    "off, one coordinate": NoiseFault(scaled(0.0), ((1,),), 3, "noise-scale"),
    "off, smallest parameter": NoiseFault(off_where((2,)), ADAPTERS, 1, "noise-scale"),
    "off, one matrix": NoiseFault(off_where((300, 300)), LARGE, 1, "noise-scale"),
    "x0.9, adapters": NoiseFault(scaled(0.9), ADAPTERS, 8, "noise-scale"),
    "x0.9, head": NoiseFault(scaled(0.9), HEAD, 150, "noise-scale"),
    "x0.9, many": NoiseFault(scaled(0.9), LARGE, 1, "noise-scale"),
    "x0.99, many": NoiseFault(scaled(0.99), LARGE, 10, "noise-scale"),
    "x1.1, adapters": NoiseFault(scaled(1.1), ADAPTERS, 8, "noise-scale"),
    "not a number": NoiseFault(scaled(float("nan")), HEAD, 1, "noise-scale"),
    "same for all coordinates": NoiseFault(constant, HEAD, 20, "noise-scale"),
    "smoothed": NoiseFault(smoothed, ADAPTERS, 1, "noise-correlation"),
    "smoothed, many": NoiseFault(smoothed, LARGE, 1, "noise-correlation"),
    "same every step": NoiseFault(same_every_step, ((2, 385),), 2, "noise-reuse"),
    "same every step, many": NoiseFault(same_every_step, LARGE, 2, "noise-reuse"),
    "same for every parameter": NoiseFault(
        same_for_every_parameter, ((16, 16), (16, 16)), 1, "noise-reuse"
    ),
}


@pytest.mark.parametrize("name", NOISE_FAULTS)
@pytest.mark.parametrize("seed", range(5))
def test_a_fault_of_the_noise_alarms_by_its_name(name, seed):
    fault, draw = NOISE_FAULTS[name], np.random.default_rng(seed)
    meter, noise = NoiseMeter(STD, DIVISOR), fault.noise(draw)
    with pytest.raises(PrivacyRefusedError, match=f"^{fault.check}: "):
        noise_steps(meter, fault.steps, draw, fault.shapes, noise=noise, total=3.0)


def test_a_realised_divisor_alarms_as_noise_of_another_scale():
    """The release is then not what the mechanism declares, whoever is drawn."""
    draw, meter = np.random.default_rng(0), NoiseMeter(STD, DIVISOR)
    total = normal(draw, (1000,))
    meter.read(total, (total + STD * normal(draw, (1000,))) / (DIVISOR * 0.8))
    with pytest.raises(PrivacyRefusedError, match=r"^noise-scale: "):
        meter.close_step()


@pytest.mark.parametrize("shapes", [HEAD, LARGE], ids=str)
def test_a_mechanism_without_noise_alarms(shapes):
    draw, meter = np.random.default_rng(0), NoiseMeter(0.0, DIVISOR)
    with pytest.raises(PrivacyRefusedError, match=r"^noise-scale: "):
        noise_steps(meter, 1, draw, shapes, noise=lambda step, shape: torch.zeros(shape))


def poisson(factor):
    return lambda draw, records, rate: samples(1000, draw, records, factor * rate)


def fixed_size(draw, records, rate):
    """Uniform batches of the expected size, drawn anew each step."""
    while True:
        yield draw.choice(records, round(records * rate), replace=False)


class EvenCoins:
    """Dither that could not fall flatter: by itself as rare as noise that is too small."""

    def uniform(self, count):
        return np.full(count, 0.5)


def test_where_all_are_in_each_step_there_is_nothing_to_alarm_for_but_who_is_missing():
    meter = SamplerMeter(1.0, dither=EvenCoins())
    for _ in range(50):
        meter.read(np.arange(40), units=40)
    with pytest.raises(PrivacyRefusedError, match="sampler-rate"):
        meter.read(np.arange(39), units=40)


def epochs(draw, records, rate):
    """What a shuffling loader gives: each record once before any comes again."""
    size = round(records * rate)
    while True:
        order = draw.permutation(records)
        yield from (order[at : at + size] for at in range(0, records - size + 1, size))


def same_batch(draw, records, rate):
    return itertools.repeat(np.flatnonzero(draw.random(records) < rate))


def with_replacement(draw, records, rate):
    """A record that is drawn twice counts twice: twice the sensitivity."""
    while True:
        yield np.sort(draw.integers(records, size=draw.binomial(records, rate)))


def never_empty(draw, records, rate):
    """Draws again where nobody was drawn, as Opacus's `rand_on_empty` makes somebody up."""
    return (sample for sample in samples(10**6, draw, records, rate) if len(sample))


def everybody_or_nobody(draw, records, rate):
    while True:
        yield np.arange(records if draw.random() < rate else 0)


def in_pairs(draw, records, rate):
    """One coin for two records."""
    while True:
        yield np.flatnonzero(np.repeat(draw.random(records // 2) < rate, 2))


@dataclass(frozen=True)
class SamplerFault:
    sampler: Callable
    records: int
    rate: float
    steps: int
    check: str


SAMPLER_FAULTS = {
    "rate x1.2": SamplerFault(poisson(1.2), 300, 0.5, 12, "sampler-(rate|dispersion)"),
    "rate x0.8": SamplerFault(poisson(0.8), 42, 0.5, 80, "sampler-(rate|dispersion)"),
    "rate x1.2, rare": SamplerFault(poisson(1.2), 5000, 0.01, 90, "sampler-(rate|dispersion)"),
    "rate x2, tiny site": SamplerFault(poisson(2.0), 5, 0.1, 400, "sampler-(rate|dispersion)"),
    "fixed size": SamplerFault(fixed_size, 300, 0.5, 7, "sampler-(dispersion|passes)"),
    "fixed size, small site": SamplerFault(fixed_size, 42, 0.5, 10, "sampler-(dispersion|passes)"),
    "fixed size, tiny site": SamplerFault(fixed_size, 10, 0.5, 18, "sampler-(dispersion|passes)"),
    "fixed size, rare": SamplerFault(fixed_size, 5000, 0.01, 8, "sampler-(dispersion|passes)"),
    "in pairs": SamplerFault(in_pairs, 300, 0.5, 500, "sampler-dispersion"),
    "shuffled epochs": SamplerFault(epochs, 300, 0.5, 2, "sampler-overlap"),
    "shuffled epochs, small site": SamplerFault(epochs, 42, 0.5, 2, "sampler-(overlap|passes)"),
    "shuffled epochs, one in ten": SamplerFault(epochs, 300, 0.1, 4, "sampler-passes"),
    "shuffled epochs, one in thirty": SamplerFault(epochs, 1780, 0.036, 4, "sampler-passes"),
    "shuffled epochs, one at a time": SamplerFault(epochs, 30, 1 / 30, 17, "sampler-passes"),
    "shuffled epochs, rare": SamplerFault(epochs, 5000, 0.1, 2, "sampler-overlap"),
    "the same batch": SamplerFault(same_batch, 300, 0.5, 2, "sampler-overlap"),
    "the same batch, rare": SamplerFault(same_batch, 5000, 0.01, 2, "sampler-overlap"),
    "with replacement": SamplerFault(with_replacement, 300, 0.5, 1, "sampler-repeat"),
    "never empty": SamplerFault(never_empty, 30, 1 / 30, 200, "sampler-(rate|dispersion)"),
    "everybody or nobody": SamplerFault(everybody_or_nobody, 42, 0.5, 1, "sampler-rate"),
}


@pytest.mark.parametrize("name", SAMPLER_FAULTS)
@pytest.mark.parametrize("seed", range(5))
def test_a_fault_of_the_sampler_alarms_by_its_name(name, seed):
    fault, draw = SAMPLER_FAULTS[name], np.random.default_rng(seed)
    drawn = itertools.islice(fault.sampler(draw, fault.records, fault.rate), fault.steps)
    with pytest.raises(PrivacyRefusedError, match=f"^{fault.check}: "):
        read_all(sampler_of(fault.rate), drawn, fault.records)


# Sums and counts.

MECHANISM = Mechanism(1.0, 0.5, 0.5, 10)


def sums_of(*tensors):
    return {torch.nn.Parameter(torch.zeros_like(tensor)): tensor for tensor in tensors}


@pytest.mark.parametrize("records", [1, 7])
def test_a_sum_longer_than_its_records_allow_alarms(records):
    longest = records * MECHANISM.clip_norm
    meter = Meters(MECHANISM)
    meter.check_sum(
        sums_of(torch.tensor([0.6 * longest]), torch.tensor([0.8 * longest])),
        records=records,
        units=records,
    )
    for total in (1.001 * longest, float("nan"), float("inf")):
        with pytest.raises(PrivacyRefusedError, match=r"^clip-bound: "):
            meter.check_sum(sums_of(torch.tensor([total])), records=records, units=records)


def test_a_sum_of_nobody_is_zero():
    meter = Meters(MECHANISM)
    meter.check_sum(sums_of(torch.zeros(3)), records=0, units=0)
    with pytest.raises(PrivacyRefusedError, match=r"^clip-bound: "):
        meter.check_sum(sums_of(torch.tensor([1e-6])), records=0, units=0)


def one_step(meter, draw, *, drawn=True, noised=True):
    if drawn:
        meter.sampler.read(poisson_sample(10, sample_rate=0.5, coins=draw), units=10)
    if noised:
        noise = torch.from_numpy(draw.normal(300)) * MECHANISM.noise_std
        meter.noise.read(torch.zeros(300), (noise / MECHANISM.divisor).float())
        meter.noise.close_step()


@pytest.mark.parametrize("missing", ["drawn", "noised"])
def test_a_round_of_too_few_steps_alarms(missing):
    meter, draw = Meters(MECHANISM), Randomness.seeded(missing)
    meter.open_round()
    one_step(meter, draw)
    one_step(meter, draw, **{missing: False})
    with pytest.raises(PrivacyRefusedError, match=r"^step-count: "):
        meter.close_round(2)


def test_a_round_that_failed_midway_is_not_held_against_the_next():
    meter, draw = Meters(MECHANISM), Randomness.seeded("failed")
    meter.open_round()
    one_step(meter, draw, noised=False)  # an error between sum and noise, say
    meter.open_round()
    one_step(meter, draw)
    assert meter.close_round(1).steps == 1


def test_measurements_are_over_all_rounds():
    meter, draw = Meters(MECHANISM), Randomness.seeded("rounds")
    for done in (3, 6):
        meter.open_round()
        for _ in range(3):
            one_step(meter, draw)
        assert meter.close_round(3).steps == done


@pytest.mark.parametrize("faulty", [0.1, 0.5, 3.0])
def test_an_alarm_tells_its_check_and_nothing_measured(faulty):
    """The text may reach a log: no size, no norm, no number of records is in it."""
    draw = np.random.default_rng(0)
    with pytest.raises(PrivacyRefusedError) as alarm:
        noise_steps(NoiseMeter(STD, DIVISOR), 9, draw, LARGE, noise=scaled(faulty)(draw))
    assert str(alarm.value) == "noise-scale: the step did not do what its mechanism declares"


# What is read of large parameters.

SIZES = (3, 8192, 8193, 200_000, 1, 65_536)


def windows_of(steps):
    meter, draw = NoiseMeter(STD, DIVISOR), np.random.default_rng(0)
    for _ in range(steps):
        yield meter.windows(SIZES)
        noise_steps(meter, 1, draw, HEAD)


def test_small_parameters_are_read_whole_and_each_large_one_in_every_step():
    for windows in windows_of(20):
        read = np.zeros(sum(SIZES), dtype=int)
        for window in windows:
            read[window] += 1
        assert read.max() == 1
        by_parameter = np.split(read, np.cumsum(SIZES)[:-1])
        for size, part in zip(SIZES, by_parameter, strict=True):
            assert part.sum() >= (size if size <= 8192 else 1)


def test_every_coordinate_has_its_turn_and_two_steps_read_the_same():
    steps, read = list(windows_of(16)), np.zeros(sum(SIZES), dtype=int)
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert first == second
        for window in first:
            read[window] += 1
    assert read.min() >= 1
    assert len({str(windows) for windows in steps}) == 8


def test_a_faulty_piece_among_pieces_read_together_alarms():
    draw, meter = np.random.default_rng(0), NoiseMeter(STD, DIVISOR)
    noise = STD * normal(draw, (70_000,))
    noise[60_000:60_004] = 0.0
    meter.read(torch.zeros(70_000), noise / DIVISOR, [60_000, 4, 9996])
    with pytest.raises(PrivacyRefusedError, match=r"^noise-scale: "):
        meter.close_step()
