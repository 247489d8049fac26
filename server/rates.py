"""The step size of the head, from how much noise the run adds: many records allow larger steps.

The noise that a weight of the head has gathered at the end is in proportion to step size, clip
bound and sigma, and to one over the number of records. What a step size may be is thus known before
any record is read: nothing here looks at more than declared constants. Where sites differ in sigma,
or in rounds, the plan gives the sigma that would leave as much noise if all had it in every round.
"""

import math
from dataclasses import replace

from common.config import Config, HeadName, PrivacyMode, share_of
from common.privacy.mechanism import mechanism_of

MOST = 4.0
"""A step size is raised to so many times itself at most."""


def with_raised_rate(config: Config) -> Config:
    """Raises `tuning.head_learning_rate` until `tuning.head_noise` gathers; it is never lowered.

    Guarantee: a function of declared constants; what is raised is not raised again. Heads other
    than the normalised one of tasks with classes keep theirs, and so does a run whose number of
    records, or sigma, is not known yet.
    """
    tuning = config.tuning
    normalised = config.task.name.has_classes and config.model.head is HeadName.mean
    unknown = config.data.declared_records is None or config.privacy.noise_multiplier is None
    if not (tuning.head_noise and normalised) or unknown or tuning.raised:
        return config
    factor = min(MOST, tuning.head_noise / gathered_noise(config))
    if factor <= 1.0:
        return config
    rate = round(tuning.head_learning_rate * factor, 3)
    return replace(config, tuning=replace(tuning, head_learning_rate=rate, raised=True))


def gathered_noise(config: Config) -> float:
    """Standard deviation of the noise in a weight of the head after the last round, from means of
    as many updates as close one.

    Without privacy, what the same run by record would have: a baseline takes the same steps.
    """
    privacy, federation = config.privacy, config.federation
    if privacy.mode is PrivacyMode.none:
        config = replace(config, privacy=replace(privacy, mode=PrivacyMode.record))
    mechanism = mechanism_of(config)
    updates = share_of(federation.training_sites, federation.enough)
    per_step = mechanism.noise_std / mechanism.divisor / math.sqrt(updates)
    return config.tuning.head_learning_rate * per_step * math.sqrt(config.total_steps)
