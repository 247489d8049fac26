"""Who is asked when: public, balanced, known before the run, and no amplification of anything."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import share_of
from common.errors import ConfigError
from common.privacy.accounting import Event, epsilon_pld
from server.plan import make_plan, solved
from server.schedule import draw_schedule


def with_federation(config, **settings):
    return replace(config, federation=replace(config.federation, **settings))


@given(
    sites=st.integers(1, 40),
    rounds=st.integers(1, 25),
    participation=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_schedules_are_balanced_cover_everybody_and_are_the_same_again(
    tiny_config, sites, rounds, participation, seed
):
    config = with_federation(tiny_config, sites=sites, rounds=rounds, participation=participation)
    config = replace(config, seed=seed)
    schedule = draw_schedule(config)
    most, asked = share_of(sites, participation), Counter(config.federation.site_names)
    assert len(schedule.cohorts) == rounds
    for number, cohort in enumerate(schedule.cohorts, start=1):
        assert len(cohort) == len(set(cohort)) == most
        assert set(cohort) <= set(config.federation.site_names)
        asked.update(cohort)
        assert max(asked.values()) - min(asked.values()) <= 1
        if number * most >= sites:
            assert min(asked.values()) >= 2  # counted once before the first round
    assert sum(schedule.rounds_of.values()) == schedule.questions == rounds * most
    assert draw_schedule(config) == schedule


def test_another_seed_draws_another_schedule(tiny_config):
    config = with_federation(tiny_config, sites=20, rounds=5, participation=0.3)
    assert draw_schedule(config) != draw_schedule(replace(config, seed=1))


def test_a_site_that_is_left_out_is_never_asked(tiny_config):
    config = with_federation(tiny_config, sites=4, rounds=6, participation=0.5, leave_out="site-2")
    assert set(draw_schedule(config).rounds_of) == {"site-1", "site-3", "site-4"}


@pytest.fixture
def trace(tmp_path, tiny_config):
    """A config of four sites and six rounds, with a file of availability."""

    def made(text, **settings):
        path = tmp_path / "trace.csv"
        path.write_text(text)
        settings = {"sites": 4, "rounds": 6, "availability": str(path), **settings}
        return with_federation(tiny_config, **settings)

    return made


def test_a_round_asks_those_who_are_there_and_who_is_not_named_always_is(trace):
    config = trace("site,from,to\nsite-1,1,2\nsite-2,5,99\nsite-1,6,6\n")
    cohorts = draw_schedule(config).cohorts
    assert [set(cohort) - {"site-3", "site-4"} for cohort in cohorts] == [
        *({"site-1"}, {"site-1"}, set(), set(), {"site-2"}, {"site-1", "site-2"})
    ]
    assert all({"site-3", "site-4"} <= set(cohort) for cohort in cohorts)
    same = trace("site,round\nsite-1,1\nsite-1,2\nsite-2,5\nsite-2,6\n\nsite-1,6\n")
    assert draw_schedule(same).cohorts == cohorts


def test_among_those_who_are_there_the_least_asked_go_first(trace):
    config = trace("site,from,to\nsite-1,4,6\n", sites=2, participation=0.5)
    cohorts = draw_schedule(config).cohorts
    assert cohorts == (("site-2",),) * 3 + (("site-1",),) * 3


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("place,round\n", "its first line must be site,round or site,from,to"),
        ("", "its first line must be"),
        ("site,round\nsite-5,1\n", "line 2: site-5 is none of site-1 to site-4"),
        ("site,round\nsite-1,1\nsite-1\n", "line 3: must be a site and 1 whole number"),
        ("site,round\nsite-1,-1\n", "line 2: must be a site and 1 whole number"),
        ("site,from,to\nsite-1,2,1\n", "line 2: must be rounds from 1 on"),
        ("site,round\nsite-1,0\n", "line 2: must be rounds from 1 on"),
        ('site,round\n"site-1,1\n', "is no CSV file in UTF-8"),
        (
            "site,round\n" + "".join(f"site-{n},1\n" for n in range(1, 5)),
            "no site is there in round 2",
        ),
    ],
)
def test_a_trace_that_is_none_is_refused_by_its_line(text, fault, trace):
    with pytest.raises(ConfigError, match=fault) as error:
        draw_schedule(trace(text))
    assert "\n" not in str(error.value)
    assert "federation.availability=" in str(error.value)


def test_a_trace_that_is_not_there_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"availability=.*cannot be read"):
        make_plan(with_federation(tiny_config, availability="nowhere.csv"))


def test_a_trace_that_changed_since_the_plan_is_refused(trace):
    planned = solved(trace("site,round\nsite-1,1\n"))
    assert draw_schedule(planned).rounds_of["site-1"] == 1
    trace("site,round\nsite-1,1\nsite-1,2\n")
    with pytest.raises(ConfigError, match="is not the file that this run was planned with"):
        draw_schedule(planned)


# ---- what the schedule costs


def test_a_site_pays_for_its_own_rounds_in_full_and_nothing_is_amplified(tiny_config):
    """Half of the sites a round: five rounds of ten, by PLD, at the site's own sampling rate. A
    plan that took client sampling for amplification would ask for less noise than this.
    """
    config = with_federation(tiny_config, sites=4, rounds=10, participation=0.5)
    free = replace(config, privacy=replace(config.privacy, noise_multiplier=None, epsilon=3.0))
    plan = make_plan(free)
    steps = config.federation.local_steps
    for name, own in plan.sites.items():
        assert own.config.asked_rounds == plan.schedule.rounds_of[name] == 5
        assert own.event.sample_rate == config.privacy.sample_rate
        event = Event(own.event.noise_multiplier, config.privacy.sample_rate, 5 * steps)
        assert 0.98 * 3 <= epsilon_pld([event], config.privacy.delta) <= 3.0
    five = make_plan(with_federation(free, rounds=5, participation=1.0))
    assert five.event == plan.event  # not a bit less than if these five were the whole run
    less = Event(0.97 * plan.event.noise_multiplier, config.privacy.sample_rate, 5 * steps)
    assert epsilon_pld([less], config.privacy.delta) > 3.0


def test_terms_follow_each_sites_own_epsilon_and_rounds(trace):
    config = trace("site,from,to\nsite-1,1,3\n")
    privacy = replace(config.privacy, noise_multiplier=None, site_epsilons=[2.0, 8.0])
    plan = make_plan(replace(config, privacy=privacy))
    terms = {
        name: (own.config.privacy.epsilon, own.config.asked_rounds)
        for name, own in plan.sites.items()
    }
    assert terms == {
        **{"site-1": (2.0, 3), "site-2": (8.0, 6)},
        **{"site-3": (2.0, 6), "site-4": (8.0, 6)},
    }
    sigma = {name: own.event.noise_multiplier for name, own in plan.sites.items()}
    assert sigma["site-2"] == sigma["site-4"] < sigma["site-1"] < sigma["site-3"]
    assert all(0.97 * own.config.privacy.epsilon <= own.epsilon for own in plan.sites.values())
    assert all(own.epsilon <= own.config.privacy.epsilon for own in plan.sites.values())
    assert plan.epsilon == max(own.epsilon for own in plan.sites.values())
    assert plan.config.privacy.epsilon == 8.0
    assert plan.sites["site-2"] is plan.sites["site-4"]


def test_what_a_site_is_told_says_nothing_of_others(trace):
    config = trace("site,from,to\nsite-1,1,3\n")
    privacy = replace(config.privacy, noise_multiplier=None, site_epsilons=[2.0, 8.0])
    faults = replace(config.faults, dropout=0.5)
    for own in make_plan(replace(config, privacy=privacy, faults=faults)).sites.values():
        assert own.config.privacy.site_epsilons == []
        assert own.config.federation.availability == ""
        assert own.config.federation.availability_digest == ""
        assert not own.config.faults.active


def test_a_plan_of_what_a_plan_resolved_is_the_same_plan(trace):
    config = trace("site,from,to\nsite-1,1,3\n")
    privacy = replace(config.privacy, noise_multiplier=None, site_epsilons=[2.0, 8.0])
    plan = make_plan(replace(config, privacy=privacy))
    assert make_plan(plan.config) == plan


def test_sites_of_one_kind_in_all_rounds_are_told_what_the_run_says(tiny_config):
    plan = make_plan(tiny_config)
    assert plan.is_uniform
    assert {id(own.config) for own in plan.sites.values()} == {id(plan.worst.config)}
    assert plan.worst.config == plan.config


def test_a_site_that_is_never_there_has_no_terms(trace):
    plan = make_plan(trace("site,from,to\nsite-1,7,9\n"))
    assert set(plan.sites) == {"site-2", "site-3", "site-4"}
    assert not plan.is_uniform


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"participation": 0.0}, "federation.participation=0.0: must be above 0"),
        ({"participation": 1.5}, "federation.participation=1.5: must be above 0"),
        ({"availability_digest": "ab"}, "must be left out without"),
    ],
)
def test_impossible_participation_is_refused(compose_config, tiny_overrides, settings, fault):
    overrides = [f"federation.{name}={value}" for name, value in settings.items()]
    with pytest.raises(ConfigError, match=fault):
        compose_config(*tiny_overrides, *overrides)


def test_a_number_of_rounds_is_for_the_plan_to_set(tiny_config):
    with pytest.raises(ConfigError, match=r"asked_rounds=1: is set by the plan"):
        make_plan(with_federation(tiny_config, asked_rounds=1))


@pytest.mark.parametrize("epsilons", ["[1,0]", "[-1]", "[inf]", "[1,2,3]"])
def test_impossible_epsilons_of_sites_are_refused(compose_config, tiny_overrides, epsilons):
    with pytest.raises(ConfigError, match=r"privacy\.site_epsilons=.*must be"):
        compose_config(*tiny_overrides, f"privacy.site_epsilons={epsilons}")


def test_inverse_variance_weighs_by_public_noise_and_only_where_a_mean_is_taken(
    tiny_config, compose_config, tiny_overrides
):
    privacy = replace(tiny_config.privacy, noise_multiplier=None, site_epsilons=[2.0, 8.0])
    config = replace(with_federation(tiny_config, rounds=6), privacy=privacy)
    by_noise = type(config.federation.weighting).inverse_variance
    plan = make_plan(with_federation(config, weighting=by_noise))
    sigma = {name: own.event.noise_multiplier for name, own in plan.sites.items()}
    assert plan.weight_of("site-2") == 1.0
    assert plan.weight_of("site-1") == pytest.approx((sigma["site-2"] / sigma["site-1"]) ** 2)
    assert make_plan(config).weight_of("site-1") == 1.0
    robust = ["strategy=fedmedian", "federation.weighting=inverse_variance", "federation.sites=5"]
    with pytest.raises(ConfigError, match=r"weighting=inverse_variance: must be equal with"):
        compose_config(*tiny_overrides, *robust)
