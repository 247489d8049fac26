"""Several honest numbers for one run, each computed here a second way."""

import itertools
import math
from dataclasses import replace

import pytest

from common.errors import VerificationError
from common.privacy.accounting import (
    LIVE_INTERVAL,
    Epsilons,
    Event,
    check_agreement,
    epsilon_of_group,
    epsilon_pld,
    epsilons,
)
from server.guarantees import guarantees
from server.plan import make_plan
from server.record import RoundLine, SiteLine
from server.spending import Asked, rounds_asked, spendings

DELTA = 1e-3


def planned(config, **federation):
    return make_plan(replace(config, federation=replace(config.federation, **federation)))


@pytest.fixture(scope="module")
def plan(tiny_config):
    return planned(tiny_config, rounds=3, local_steps=1)


def line(number, asked, refused=(), books=None):
    reasons = dict.fromkeys(refused, "silent")
    return RoundLine(
        number, {"accuracy": 0.5}, 1.0, tuple(asked), reasons, 10, 5, 2.0, True, books or {}
    )


ALL = ("site-1", "site-2", "site-3")
LINES = [line(1, ALL), line(2, ALL, refused=["site-3"]), line(3, [*ALL, "site-3"])]


def rows_of(plan, lines):
    return guarantees(plan, lines, spendings(plan, rounds_asked(plan, lines)))


def test_against_everybody_it_is_the_site_that_was_charged_most(plan):
    first = rows_of(plan, LINES)[0]
    assert first["unit"] == "one record"
    four = Event(2.0, 0.5, 4)  # site-3 was asked twice in the last round
    assert first["epsilon"] == pytest.approx(epsilon_pld([four], DELTA), abs=1e-6)


def test_whoever_sees_models_alone_faces_the_noise_of_all_who_answered(plan):
    row = rows_of(plan, LINES)[1]
    noise = [2.0 * math.sqrt(sites) for sites in (3, 2, 3)]
    whole = epsilon_pld([Event(sigma, 0.5, 1) for sigma in noise], DELTA)
    assert row["epsilon"] == pytest.approx(whole, abs=0.01)
    assert row["epsilon"] >= whole - 1e-9
    assert "shows nobody a single update" in row["sentence"]
    assert row["epsilon"] < rows_of(plan, LINES)[0]["epsilon"] / 1.5


def test_with_several_local_steps_no_smaller_number_is_claimed(tiny_config):
    plan = planned(tiny_config, rounds=3, local_steps=2)
    row = rows_of(plan, LINES)[1]
    assert row["epsilon"] >= epsilon_pld([Event(2.0, 0.5, 6)], DELTA) - 1e-9
    assert "no smaller number" in row["sentence"]


def test_two_records_and_two_sites_cost_more_than_one(plan):
    one, _, two_records, two_sites = (row["epsilon"] for row in rows_of(plan, LINES))
    assert two_records == pytest.approx(epsilon_of_group([Event(2.0, 0.5, 4)], 2, DELTA))
    assert two_sites == pytest.approx(epsilon_pld([Event(2.0, 0.5, 7)], DELTA), abs=0.01)
    assert one < two_sites < two_records


def told(spent, *charged, cap=50.0):
    """A ledger that lasts, as its site tells of it."""
    return SiteLine(
        head="9:" + "a" * 64, cap=cap, spent=spent, charged=[[*each] for each in charged]
    )


def test_each_row_is_of_the_sites_that_are_dearest_in_it(plan):
    """The one with the highest bound, by a filter or by what it makes up, may hold the least."""
    books = {
        "site-1": told(40.0, [2.0, 0.5, 1.0]),
        "site-2": told(9.0, [2.0, 0.5, 9.0]),
        "site-3": told(39.0, [2.0, 0.5, 5.0]),
    }
    one, _, two_records, two_sites = (
        row["epsilon"] for row in rows_of(plan, [line(1, ALL, books=books)])
    )
    assert one == 40.0
    assert two_records >= epsilon_of_group([Event(2.0, 0.5, 9)], 2, DELTA)
    assert two_sites >= epsilon_pld([Event(2.0, 0.5, 9 + 5)], DELTA)


def test_any_two_sites_are_covered_whatever_each_was_charged(plan):
    histories = {
        "site-1": [[2.0, 0.5, 6.0], [1.0, 0.1, 2.0]],
        "site-2": [[2.0, 0.5, 5.0], [1.0, 0.1, 9.0]],
        "site-3": [[3.0, 0.2, 30.0]],
    }
    books = {name: told(5.0, *charged) for name, charged in histories.items()}
    row = rows_of(plan, [line(1, ALL, books=books)])[3]
    for pair in itertools.combinations(histories.values(), 2):
        both = [Event(sigma, q, int(steps)) for each in pair for sigma, q, steps in each]
        assert row["epsilon"] >= epsilon_pld(both, DELTA, LIVE_INTERVAL)


def test_a_filters_bound_goes_on_when_its_site_falls_silent(plan):
    """What it was asked since is in no bound that it told; its cap is above both."""
    dear, cheap = told(7.0, [2.0, 0.5, 3.0], cap=8.0), told(0.0, [2.0, 0.5, 3.0])
    books = {"site-1": dear, "site-2": cheap}
    lines = [line(1, ALL, books=books)]
    assert spendings(plan, rounds_asked(plan, lines))["site-1"].bound == 7.0
    lines.append(line(2, ALL, refused=ALL))
    spent = spendings(plan, rounds_asked(plan, lines))
    assert spent["site-1"].bound == 8.0
    assert spent["site-2"].bound == pytest.approx(epsilon_pld([Event(2.0, 0.5, 4)], DELTA))


def test_a_run_that_protects_nothing_claims_nothing(tiny_config):
    seeded = replace(
        tiny_config, privacy=replace(tiny_config.privacy, noise=type(tiny_config.privacy.noise)(
            "seeded"))
    )  # fmt: skip
    assert rows_of(make_plan(seeded), LINES) == []


def test_a_count_is_in_the_price_of_whoever_was_asked(plan):
    count = Event(5.0, 1.0, 1)
    asked = [*rounds_asked(plan, LINES[:1]), Asked(count, ("site-1",))]
    spent = spendings(plan, asked)
    alone = epsilon_pld([plan.event], DELTA)
    assert spent["site-2"].bound == pytest.approx(alone, abs=1e-6)
    both = epsilon_pld([plan.event, count], DELTA)
    assert spent["site-1"].bound == pytest.approx(both, abs=1e-6)


def test_a_told_history_on_which_the_accountants_disagree_costs_nobody_the_report(plan):
    """A site chooses what it tells; where epsilon is that small, PLD's grid is above RDP."""
    config = plan.config
    strict = replace(plan, config=replace(config, privacy=replace(config.privacy, delta=1e-4)))
    told = [[120.8071278730338, 0.0017286405275040225, 2761.0]]
    books = {"site-1": SiteLine(head="9:" + "a" * 64, cap=8.0, spent=0.0, charged=told)}
    spent = spendings(strict, rounds_asked(strict, [line(1, ALL, books=books)]))
    assert spent["site-1"].price == spent["site-2"].price
    idle = spendings(strict, [Asked(Event(1e6, 1e-6, 1), ("site-1",), books)])["site-1"]
    history = [Event(sigma, q, int(steps)) for sigma, q, steps in told]
    priced = epsilons(history, 1e-4)
    with pytest.raises(VerificationError, match="disagree"):
        check_agreement(priced)
    assert idle.price == Epsilons(priced.prv, priced.prv, None)  # the largest of them


def test_what_a_ledger_says_counts_where_it_is_more_and_never_where_it_is_less(plan):
    whole, part = [[2.0, 0.5, 9.0]], [[2.0, 0.5, 1.0]]
    for charged, steps in ((whole, 9), (part, 3)):
        books = {"site-1": SiteLine(head="9:" + "a" * 64, cap=8.0, spent=0.5, charged=charged)}
        lines = [*LINES[:2], line(3, ALL, books=books)]
        spent = spendings(plan, rounds_asked(plan, lines))["site-1"]
        assert spent.price.pld == pytest.approx(epsilon_pld([Event(2.0, 0.5, steps)], DELTA))
        assert spent.books == books["site-1"]


def test_by_person_every_row_is_about_persons(person_config):
    plan = planned(person_config, rounds=3, local_steps=1)
    rows = rows_of(plan, LINES)
    assert [row["unit"] for row in rows] == ["one person", "one person", "one person at two sites"]
    four = Event(2.0, 0.5, 4)  # the event of a run by record: k is in the noise
    assert rows[0]["epsilon"] == pytest.approx(epsilon_pld([four], DELTA), abs=1e-6)
    assert "is an assumption" in rows[-1]["sentence"]
    assert rows[-1]["epsilon"] > rows[0]["epsilon"]


def test_where_updates_are_compared_no_noise_of_others_is_claimed(plan):
    """Krum's new model is one site's update."""
    config = plan.config
    krum = replace(config.strategy, name=type(config.strategy.name).krum, faulty_sites=1)
    compared = replace(plan, config=replace(config, strategy=krum))
    row = rows_of(compared, LINES)[1]
    assert row["epsilon"] >= epsilon_pld([Event(2.0, 0.5, 3)], DELTA) - 1e-9
    assert "compared and not averaged" in row["sentence"]


@pytest.fixture(scope="module")
def mixed(tiny_config):
    """Three sites of epsilons 2, 8 and 2, one step a round."""
    privacy = replace(tiny_config.privacy, noise_multiplier=None, site_epsilons=[2.0, 8.0])
    return planned(replace(tiny_config, privacy=privacy), sites=3, rounds=3, local_steps=1)


@pytest.mark.parametrize("weighting", ["equal", "inverse_variance"])
def test_whoever_sees_models_faces_the_noise_of_all_as_the_mean_weighs_it(mixed, weighting):
    """Each site by itself, by the weights and sigmas of the mean: the row is none of them below."""
    federation = mixed.config.federation
    chosen = replace(federation, weighting=type(federation.weighting)[weighting])
    plan = replace(mixed, config=replace(mixed.config, federation=chosen))
    sigmas = {name: plan.of(name).event.noise_multiplier for name in ALL}
    weights = {name: s**-2 if weighting != "equal" else 1.0 for name, s in sigmas.items()}
    noise = math.sqrt(sum((weights[name] * sigmas[name]) ** 2 for name in ALL))
    lines = [line(1, ALL), line(2, ALL), line(3, ALL)]
    row = rows_of(plan, lines)[1]
    worst = max(epsilon_pld([Event(noise / w, 0.5, 3)], DELTA) for w in weights.values())
    assert row["epsilon"] == pytest.approx(worst, abs=0.01)
    assert row["epsilon"] >= worst - 1e-3


def test_any_two_sites_on_different_terms_are_priced_as_a_pair(mixed):
    lines = [line(1, ALL), line(2, ALL)]
    row = rows_of(mixed, lines)[3]
    events = {name: replace(mixed.of(name).event, steps=2) for name in ALL}
    worst = max(
        epsilon_pld([events[one], events[other]], DELTA, LIVE_INTERVAL)
        for one, other in itertools.combinations(ALL, 2)
    )
    assert row["epsilon"] == pytest.approx(worst, abs=1e-6)
