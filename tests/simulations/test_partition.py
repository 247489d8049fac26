"""A deal gives every record to one site, and the same ones for the same seed."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from common.config import Partition
from common.errors import ConfigError
from common.records import Records
from simulations.partition import deal


@pytest.fixture
def federation(tiny_config):
    def changed(**settings):
        return replace(tiny_config.federation, **settings)

    return changed


def records_of(count, classes=4):
    texts = tuple(f"text {index}" for index in range(count))
    return Records(texts, np.arange(count, dtype=np.int64) % classes)


RECORDS = records_of(203)
DEALT = [partition for partition in Partition if partition is not Partition.natural]
"""Those that choose who gets what; a natural deal has its own tests below."""
SETTINGS = [
    {"partition": Partition.iid, "sites": 5},
    {"partition": Partition.iid, "sites": 1},
    {"partition": Partition.dirichlet, "sites": 5, "dirichlet_alpha": 1.0},
    {"partition": Partition.quantity, "sites": 4},
    {"partition": Partition.pathological, "sites": 6, "classes_per_site": 2},
]
NAMES = ["iid", "iid of one", "dirichlet", "quantity", "pathological"]


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_every_record_is_dealt_once_with_its_label(settings, federation):
    sites = deal(RECORDS, federation(**settings), seed=0)
    assert len(sites) == settings["sites"]
    dealt = [
        pair for site in sites for pair in zip(site.contents, site.labels.tolist(), strict=True)
    ]
    assert Counter(dealt) == Counter(zip(RECORDS.contents, RECORDS.labels.tolist(), strict=True))


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_same_seed_deals_the_same_and_another_seed_deals_otherwise(settings, federation):
    first, again, other = (
        [site.contents for site in deal(RECORDS, federation(**settings), seed=seed)]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_another_seed_gives_a_site_other_records_and_not_only_another_order(federation):
    first, other = (deal(RECORDS, federation(sites=5), seed=seed)[0].contents for seed in (0, 1))
    assert set(first) != set(other)


@pytest.mark.parametrize("sites", [1, 2, 5, 7, 203])
def test_sizes_of_an_iid_deal_differ_by_at_most_one(sites, federation):
    sizes = [len(site) for site in deal(RECORDS, federation(sites=sites), seed=3)]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == 203


def skew(alpha, federation):
    """Mean total variation between a site's labels and everybody's, over a few seeds."""
    overall = np.bincount(RECORDS.labels, minlength=4) / len(RECORDS)
    settings = federation(partition=Partition.dirichlet, sites=4, dirichlet_alpha=alpha)
    distances = [
        np.abs(np.bincount(site.labels, minlength=4) / len(site) - overall).sum() / 2
        for seed in range(5)
        for site in deal(RECORDS, settings, seed=seed)
    ]
    return np.mean(distances)


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
def test_small_alpha_skews_labels_and_large_alpha_does_not(federation):
    small, large = skew(0.1, federation), skew(100.0, federation)
    assert small > 0.4
    assert large < 0.15


@pytest.mark.parametrize("partition", DEALT)
def test_more_sites_than_records_are_refused(partition, federation):
    settings = federation(partition=partition, sites=5)
    with pytest.raises(ConfigError, match=r"federation\.sites=5: must be at most 4"):
        deal(records_of(4), settings, seed=0)


def impossible(federation):
    """Ten sites, two classes, nearly everything to one site of each."""
    return federation(partition=Partition.dirichlet, sites=10, dirichlet_alpha=0.001)


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
def test_impossible_dirichlet_deal_is_refused(federation):
    with pytest.raises(ConfigError, match=r"federation\.dirichlet_alpha=0\.001: no deal gives"):
        deal(records_of(40, classes=2), impossible(federation), seed=0)


def test_refusal_is_the_only_thing_said(federation):
    """The partitioner's own warnings, one per attempt, would bury the one line of ours."""
    with pytest.raises(ConfigError):
        deal(records_of(40, classes=2), impossible(federation), seed=0)


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
def test_no_site_of_a_skewed_deal_is_empty(federation):
    settings = federation(partition=Partition.dirichlet, sites=4, dirichlet_alpha=0.2)
    assert all(len(site) for site in deal(RECORDS, settings, seed=0))


# Persons.

owned = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=60)


def records_of_persons(pairs):
    texts = tuple(f"text {n}" for n in range(len(pairs)))
    labels = np.array([label for _, label in pairs], dtype=np.int64)
    return Records(texts, labels, tuple(f"person {person}" for person, _ in pairs))


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
@pytest.mark.parametrize("partition", DEALT)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=owned, seed=st.integers(0, 50), sites=st.integers(1, 4))
def test_a_person_is_at_one_site_with_all_records(partition, federation, pairs, seed, sites):
    records = records_of_persons(pairs)
    assume(len(set(records.persons)) >= sites)
    terms = federation(partition=partition, sites=sites, dirichlet_alpha=10.0)
    try:
        dealt = deal(records, terms, seed=seed)
    except ConfigError:
        assert partition is not Partition.iid  # no such deal; an even one there always is
        return
    persons = [set(site.persons) for site in dealt]
    assert sum(map(len, persons)) == len(set(records.persons))
    assert all(persons)
    everything = [row for site in dealt for row in rows_of(site)]
    assert Counter(everything) == Counter(rows_of(records))
    again = deal(records, terms, seed=seed)
    assert [rows_of(site) for site in again] == [rows_of(site) for site in dealt]


def rows_of(site):
    return list(zip(site.contents, site.labels.tolist(), site.persons, strict=True))


def test_sizes_of_an_iid_deal_of_persons_differ_by_at_most_one_person(federation):
    records = records_of_persons([(n % 41, 0) for n in range(203)])
    sizes = [len(set(site.persons)) for site in deal(records, federation(sites=5), seed=3)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
def test_persons_are_skewed_by_their_most_frequent_label(federation):
    """Each has three records of one label and one of another."""
    labels = [(person, (person + odd) % 4) for person in range(80) for odd in (0, 0, 0, 1)]
    records = records_of_persons(labels)
    skew = {}
    for alpha in (0.1, 100.0):
        dealt = deal(
            records,
            federation(partition=Partition.dirichlet, sites=3, dirichlet_alpha=alpha),
            seed=1,
        )
        shares = [np.bincount(site.labels, minlength=4) / len(site) for site in dealt]
        skew[alpha] = float(np.mean([np.abs(share - 0.25).sum() for share in shares]))
    assert skew[0.1] > 2 * skew[100.0]


def test_more_sites_than_persons_are_refused(federation):
    records = records_of_persons([(n % 3, 0) for n in range(50)])
    with pytest.raises(
        ConfigError, match=r"federation\.sites=4: must be at most 3, the number of "
    ):
        deal(records, federation(sites=4), seed=0)


def test_persons_make_no_difference_where_each_has_one_record_but_to_the_order(federation):
    """The same deal: persons are numbered by their ids, records by their place."""
    texts = tuple(f"text {index:03d}" for index in range(203))
    labels = np.arange(203) % 4
    plain = deal(Records(texts, labels), federation(sites=5), seed=7)
    owned_by_one = deal(Records(texts, labels, texts), federation(sites=5), seed=7)
    assert [sorted(site.contents) for site in plain] == [sorted(s.contents) for s in owned_by_one]


def test_under_quantity_skew_the_nth_site_has_n_times_as_many(federation):
    sites = deal(records_of(200), federation(partition=Partition.quantity, sites=4), seed=0)
    assert [len(site) for site in sites] == [20, 40, 60, 80]


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_a_pathological_deal_gives_each_site_so_many_classes_and_loses_none(classes, federation):
    config = federation(partition=Partition.pathological, sites=6, classes_per_site=classes)
    sites = deal(RECORDS, config, seed=3)
    held = [set(site.labels.tolist()) for site in sites]
    assert {len(each) for each in held} == {classes}
    assert set.union(*held) == {0, 1, 2, 3}
    assert sum(map(len, sites)) == len(RECORDS)


def at_home(homes, persons=None):
    return replace(records_of(len(homes)), homes=tuple(homes), persons=persons)


def test_a_natural_deal_gives_each_site_its_own(federation):
    config = federation(partition=Partition.natural, sites=3)
    records = at_home(["west", "east", "north", "east", "west", "west"])
    sites = deal(records, config, seed=0)
    assert [set(site.homes) for site in sites] == [{"east"}, {"north"}, {"west"}]
    assert [len(site) for site in sites] == [2, 1, 3]


NATURAL = {
    "give data.site_column": records_of(6),
    "federation.sites=3: must be 2": at_home(["a", "b", "a"]),
    "a person has records at two sites": at_home(
        ["a", "b", "c", "a"], persons=("p", "q", "p", "r")
    ),
}


@pytest.mark.parametrize("message", NATURAL)
def test_what_cannot_be_dealt_naturally_is_refused(message, federation):
    with pytest.raises(ConfigError, match=message):
        deal(NATURAL[message], federation(partition=Partition.natural, sites=3), seed=0)


def test_more_classes_than_there_are_is_one_line(federation):
    config = federation(partition=Partition.pathological, sites=3, classes_per_site=9)
    with pytest.raises(ConfigError, match=r"federation\.classes_per_site=9") as refused:
        deal(RECORDS, config, seed=0)
    assert "\n" not in str(refused.value)


def test_nothing_to_deal_is_said_in_words(federation):
    """A file with a header and no row."""
    with pytest.raises(ConfigError, match="the training split has no records to deal; give data"):
        deal(records_of(0), federation(), seed=0)
