"""What a site's meters say of its noise and coins.

It stays at the site. Whoever knows all records but one, and a release, can compute the noise for
either case, that record there or not; the exact energy of the true noise would tell which it is.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurements:
    """What a site's meters saw so far: noise residuals and coins only."""

    steps: int
    """Steps taken, empty ones included."""
    round_steps: int
    """Those of the last round."""
    noise_ratio: float
    """Measured over declared standard deviation of the noise; 1 when sound."""
    noise_deviation: float
    """How far the noise's energy is from declared, in standard deviations."""
    coin_deviation: float
    """How far the number of coins that fell is from declared, in standard deviations."""
