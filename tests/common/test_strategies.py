"""Options of a strategy: those it has must be given, the others left out, and numbers suffice."""

import pytest

from common.errors import ConfigError

REFUSED = {
    "momentum=1": ("fedavgm", "must be at least 0 and below 1"),
    "momentum=-0.1": ("fedavgm", "must be at least 0 and below 1"),
    "server_learning_rate=0": ("fedavgm", "must be a finite number above 0"),
    "server_learning_rate=inf": ("fedadam", "must be a finite number above 0"),
    "server_learning_rate=null": ("fedadam", "must be a finite number above 0"),
    "beta_1=1": ("fedadam", "must be at least 0 and below 1"),
    "beta_2=nan": ("fedyogi", "must be at least 0 and below 1"),
    "tau=0": ("fedadagrad", "must be a finite number above 0"),
    "proximal_mu=0": ("fedprox", "must be a finite number above 0; 0 is strategy=fedavg"),
    "trim_fraction=0.5": ("fedtrimmedavg", "must be above 0 and below 0.5"),
    "trim_fraction=0": ("fedtrimmedavg", "must be above 0 and below 0.5"),
    "faulty_sites=0": ("krum", "must be at least 1"),
    "selected_sites=0": ("multikrum", "must be at least 1"),
    "beta_1=0.9": ("fedadagrad", "must be left out with strategy=fedadagrad"),
    "momentum=0.9": ("fedavg", "must be left out with strategy=fedavg"),
    "selected_sites=2": ("krum", "must be left out with strategy=krum"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_is_wrong_or_needless_is_one_line(option, compose_config):
    strategy, rule = REFUSED[option]
    with pytest.raises(ConfigError) as refused:
        compose_config(f"strategy={strategy}", f"strategy.{option}")
    assert str(refused.value).startswith(f"strategy.{option.split('=')[0]}=")
    assert rule in str(refused.value)
    assert "\n" not in str(refused.value)
    assert ";" not in str(refused.value).replace("; 0 is", "")


IMPOSSIBLE = {
    "a median of two": (["strategy=fedmedian", "federation.sites=2"], "must have 3 updates"),
    "nobody is trimmed": (["strategy=fedtrimmedavg", "federation.sites=4"], "must have 5 updates"),
    "krum of four": (["strategy=krum", "federation.sites=4"], "must have 5 updates"),
    "two faulty of six": (
        ["strategy=krum", "strategy.faulty_sites=2", "federation.sites=6"],
        "must have 7 updates in every round, to tolerate 2 of them being anything",
    ),
    "too many selected": (["strategy=multikrum", "strategy.selected_sites=3"], "must have 6"),
    "a quorum below": (["strategy=krum", "federation.quorum=0.8"], "promise 4"),
    "a site left out": (["strategy=krum", "federation.leave_out=site-2"], "promise 4"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_more_faults_than_the_federation_can_tolerate_are_refused(case, compose_config):
    overrides, message = IMPOSSIBLE[case]
    with pytest.raises(ConfigError) as refused:
        compose_config(*overrides)
    assert str(refused.value).startswith("strategy=")
    assert message in str(refused.value)


TOLERATED = [
    ("fedavg", 5, 0),
    ("fedmedian", 5, 2),
    ("fedmedian", 6, 2),
    ("fedtrimmedavg", 5, 1),
    ("fedtrimmedavg", 9, 1),
    ("fedtrimmedavg", 10, 2),
    ("krum", 5, 1),
    ("multikrum", 9, 1),
]


@pytest.mark.parametrize(("name", "sites", "tolerated"), TOLERATED)
def test_what_is_tolerated_of_how_many(name, sites, tolerated, compose_config):
    strategy = compose_config(f"strategy={name}", f"federation.sites={sites}").strategy
    assert strategy.tolerated(sites) == tolerated
    assert strategy.tolerated(strategy.fewest_updates) >= min(tolerated, 1)


@pytest.mark.parametrize("fraction", [0.01, 0.07, 0.1, 0.29, 1 / 3, 0.49])
def test_the_fewest_updates_are_the_first_of_which_any_is_trimmed(fraction, compose_config):
    sites = [f"strategy.trim_fraction={fraction}", "federation.sites=200"]
    strategy = compose_config("strategy=fedtrimmedavg", *sites).strategy
    assert strategy.tolerated(strategy.fewest_updates) >= 1
    assert strategy.tolerated(strategy.fewest_updates - 1) == 0


def test_what_is_wrong_with_the_federation_is_said_once(compose_config):
    with pytest.raises(ConfigError, match=r"^federation\.sites=0: must be between 1 and 100,000$"):
        compose_config("strategy=krum", "federation.sites=0")
