import dataclasses
import math

import pytest

from common.config import PrivacyMode
from common.errors import ConfigError
from common.privacy.accounting import Event
from common.privacy.mechanism import Mechanism, mechanism_of, round_event


def changed(config, section, **changes):
    inner = dataclasses.replace(getattr(config, section), **changes)
    return dataclasses.replace(config, **{section: inner})


@pytest.fixture
def mechanism():
    return Mechanism(noise_multiplier=2.0, clip_norm=0.5, sample_rate=0.25, declared_records=42.0)


def test_noise_is_in_units_of_the_clip_bound(mechanism):
    assert mechanism.noise_std == 2.0 * 0.5


def test_divisor_is_the_expected_batch_size(mechanism):
    """The realised batch size is private, and dividing by it would also bend the sensitivity."""
    assert mechanism.divisor == 0.25 * 42


def test_event_prices_the_rate_and_noise_that_are_used(mechanism):
    assert mechanism.event(7) == Event(noise_multiplier=2.0, sample_rate=0.25, steps=7)


def test_clip_norm_changes_the_noise_and_not_the_price(mechanism):
    wider = dataclasses.replace(mechanism, clip_norm=5.0)
    assert wider.noise_std == 10 * mechanism.noise_std
    assert wider.event(7) == mechanism.event(7)


def test_a_mechanism_is_frozen(mechanism):
    for field in dataclasses.fields(Mechanism):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(mechanism, field.name, 1.0)


def test_the_config_decides_every_part(tiny_config):
    config = changed(tiny_config, "privacy", clip_norm=0.5, sample_rate=0.125)
    mechanism = mechanism_of(config)
    assert mechanism == Mechanism(
        noise_multiplier=2.0, clip_norm=0.5, sample_rate=0.125, declared_records=84 / 2
    )
    assert round_event(config) == mechanism.event(config.federation.local_steps)
    assert round_event(config) == Event(2.0, 0.125, 2)


def test_declared_records_are_shared_among_the_sites(tiny_config):
    config = changed(tiny_config, "federation", sites=4)
    assert mechanism_of(config).declared_records == 21
    assert mechanism_of(config).divisor == tiny_config.privacy.sample_rate * 21


@pytest.mark.parametrize("sigma", [None, 0.0, -1.0, math.nan, math.inf])
def test_a_noise_that_is_not_solved_is_refused(tiny_config, sigma):
    config = changed(tiny_config, "privacy", noise_multiplier=sigma)
    for ask in (mechanism_of, round_event):
        with pytest.raises(ConfigError, match=r"^privacy\.noise_multiplier="):
            ask(config)


def test_a_mechanism_without_declared_records_can_be_priced_and_takes_no_step(tiny_config):
    unknown = mechanism_of(changed(tiny_config, "data", declared_records=None))
    assert unknown.event(3) == mechanism_of(tiny_config).event(3)
    with pytest.raises(ConfigError, match=r"^data\.declared_records"):
        _ = unknown.divisor


@pytest.mark.parametrize("sigma", [None, 2.0])
def test_without_privacy_there_is_no_noise_and_the_price_says_so(tiny_config, sigma):
    config = changed(tiny_config, "privacy", mode=PrivacyMode.none, noise_multiplier=sigma)
    assert mechanism_of(config).noise_std == 0
    assert round_event(config).noise_multiplier == 0


@pytest.mark.parametrize("most", [1, 2, 7])
def test_noise_covers_all_records_of_a_person_at_an_unchanged_price(mechanism, most):
    """k in noise, in sensitivity, and in neither price nor divisor."""
    persons = dataclasses.replace(mechanism, max_records_per_person=most)
    assert persons.sensitivity == most * mechanism.clip_norm
    assert persons.noise_std == 2.0 * most * 0.5
    assert persons.event(7) == mechanism.event(7)
    assert persons.divisor == mechanism.divisor


def test_the_config_decides_whether_persons_are_drawn(tiny_config, person_config):
    assert mechanism_of(tiny_config).max_records_per_person is None
    assert mechanism_of(person_config).max_records_per_person == 3
    assert mechanism_of(person_config).noise_std == 3 * mechanism_of(tiny_config).noise_std
    for most in (None, 0):
        loose = changed(person_config, "privacy", max_records_per_person=most)
        with pytest.raises(ConfigError, match=r"^privacy\.max_records_per_person="):
            mechanism_of(loose)
    none = changed(person_config, "privacy", mode=PrivacyMode.none)
    assert mechanism_of(none).max_records_per_person is None
