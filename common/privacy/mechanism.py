"""The subsampled Gaussian mechanism: one object, so that its parts cannot disagree."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.config import Config, NoiseSource, PrivacyMode
from common.errors import ConfigError
from common.privacy.accounting import Event

if TYPE_CHECKING:
    from common.privacy.noise import Randomness

NOT_PRIVATE = "NOT PRIVATE"
"""The stamp of a run that protects nothing."""
_COUNTING = " count"


@dataclass(frozen=True)
class Mechanism:
    """Sampler rate, clip bound, noise scale, divisor and accounting event of a private step.

    One step draws each record with probability `sample_rate`, clips its gradient to
    `clip_norm`, sums, adds N(0, noise_std^2) to every coordinate and divides by the constant
    `divisor`. It costs `event(1)` under add-or-remove-one-record.
    Source: Abadi et al. (2016), arXiv:1607.00133.

    With `max_records_per_person` it draws persons, each with all of their records, and costs
    the same `event(1)` under add-or-remove-one-person: whoever is drawn moves the sum by at most
    `sensitivity`, to which the noise is scaled. Source: sampling of whole users, McMahan et al.
    (2018), arXiv:1710.06963; clipped records of at most k a user, Charles et al. (2024),
    arXiv:2407.07737 (there records are drawn, here users); decision 0010.

    >>> one = Mechanism(2.0, 0.5, 0.1, 100)
    >>> four = Mechanism(2.0, 0.5, 0.1, 100, max_records_per_person=4)
    >>> one.noise_std, four.noise_std, one.event(3) == four.event(3), four.divisor
    (1.0, 4.0, True, 10.0)
    """

    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    declared_records: float | None
    """Public constant: records per site, by declaration. Not the site's true number. None while
    a plan is priced before it is known; such a mechanism cannot take a step.
    """
    max_records_per_person: int | None = None
    """k, where persons are drawn; None where each record is drawn by itself."""

    @property
    def sensitivity(self) -> float:
        """How far one record, or one person, moves the clipped sum at most: C, or k C."""
        return self.clip_norm * (self.max_records_per_person or 1)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the clipped sum, in parameter units."""
        return self.noise_multiplier * self.sensitivity

    @property
    def divisor(self) -> float:
        """Expected batch size q * N_declared, in records; never the realised one, which is private.

        Raises: ConfigError if N is not declared.
        """
        if self.declared_records is None:
            raise ConfigError(
                "data.declared_records: not known; give it, or let a simulation count"
            )
        return self.sample_rate * self.declared_records

    def event(self, steps: int) -> Event:
        """What `steps` steps cost."""
        return Event(self.noise_multiplier, self.sample_rate, steps)


def mechanism_of(config: Config) -> Mechanism:
    """The mechanism a config asks for; without privacy, one that adds no noise.

    Raises: ConfigError if sigma is not resolved, or persons are protected without a bound k.
    """
    records = config.data.declared_records
    return Mechanism(
        noise_multiplier=_sigma(config),
        clip_norm=config.privacy.clip_norm,
        sample_rate=config.privacy.sample_rate,
        declared_records=None if records is None else records / config.federation.sites,
        max_records_per_person=_most_per_person(config),
    )


def round_event(config: Config) -> Event:
    """What one round costs a site. Raises: ConfigError if sigma is not resolved."""
    return mechanism_of(config).event(config.federation.local_steps)


def count_event(config: Config) -> Event | None:
    """What counting correct answers once costs a site: every record it may use is looked at."""
    sigma = config.privacy.count_noise
    if sigma is None or config.privacy.mode is PrivacyMode.none:
        return None
    return Event(sigma, 1.0, 1)


def is_private(config: Config) -> bool:
    """Whether the run protects records, or persons, at all."""
    none = config.privacy.mode is PrivacyMode.none
    return not none and config.privacy.noise is NoiseSource.entropy


def count_std(config: Config) -> float:
    """Standard deviation of the noise on a count: one record changes it by one at most, one
    person by as many as a site uses of them. Zero where nothing is counted.
    """
    charge = count_event(config)
    return charge.noise_multiplier * (_most_per_person(config) or 1) if charge else 0.0


def noisy_count(count: int, std: float, randomness: "Randomness") -> float:
    """`count` plus Gaussian noise, rounded to a whole number: with `count_std` what `count_event`
    pays for.

    Rounding afterwards hides what a float's low bits could tell, and costs nothing.
    """
    (noise,) = randomness.normal(1, std)
    return float(round(count + noise))


def counting(run_id: str) -> str:
    """The name under which a ledger holds the count of a run."""
    return f"{run_id}{_COUNTING}"


def is_counting(run_id: str) -> bool:
    """Whether a ledger could take this name for that of a count."""
    return run_id.endswith(_COUNTING)


def run_events(config: Config) -> tuple[Event, ...]:
    """All that a run may charge a site: its rounds and spares, and the count at its end.

    Raises: ConfigError if sigma is not resolved.
    """
    count = count_event(config)
    rounds = mechanism_of(config).event(config.charged_steps)
    return (rounds,) if count is None else (rounds, count)


def _most_per_person(config: Config) -> int | None:
    if config.privacy.mode is not PrivacyMode.person:
        return None
    most = config.privacy.max_records_per_person
    if most is None or most < 1:
        raise ConfigError(f"privacy.max_records_per_person={most}: must be at least 1")
    return most


def _sigma(config: Config) -> float:
    if config.privacy.mode is PrivacyMode.none:
        return 0.0
    sigma = config.privacy.noise_multiplier
    if sigma is None or not math.isfinite(sigma) or sigma <= 0:
        raise ConfigError(f"privacy.noise_multiplier={sigma}: not solved; plan the run first")
    return sigma
