"""Groups are compared where there are records enough, by the metric that the task puts first."""

import math

import pytest

from common.errors import ConfigError
from server.groups import FEWEST, MOST, by_group, check_groups, wilson

SIZES = {"north": 40, "south": 25, "west": FEWEST, "few": FEWEST - 1}
SHARES = {"north": 0.9, "south": 0.6, "west": 0.8, "few": 0.0}
GROUPS = [name for name, size in SIZES.items() for _ in range(size)]


def measured(rows):
    """A metric that tells whose rows it was given: a row of another group would move it."""
    value = sum(SHARES[GROUPS[row]] for row in rows) / len(rows)
    return {"accuracy": round(value, 4), "other": 0.0}


def test_every_group_is_measured_on_its_own_records():
    found = by_group("region", GROUPS, measured, lower_is_better=False)
    assert {each["group"]: each["value"] for each in found["groups"]} == SHARES
    assert {each["group"]: each["records"] for each in found["groups"]} == SIZES
    assert (found["column"], found["metric"]) == ("region", "accuracy")


def test_the_worst_is_one_of_the_groups_that_are_large_enough():
    """`few` has nothing right, of 19 records: that may be chance, and is shown, not named."""
    found = by_group("region", GROUPS, measured, lower_is_better=False)
    assert (found["worst"], found["best"], found["gap"]) == ("south", "north", 0.3)
    assert [e["group"] for e in found["groups"] if not e["compared"]] == ["few"]


def test_where_lower_is_better_the_highest_is_the_worst():
    found = by_group("region", GROUPS, measured, lower_is_better=True)
    assert (found["worst"], found["best"], found["gap"]) == ("north", "south", 0.3)


def test_one_group_that_is_large_enough_is_not_the_worst_of_anything():
    found = by_group(
        "region",
        GROUPS[:40] + ["few"] * 3,
        lambda _: {"accuracy": 1.0, "b": 0.0},
        lower_is_better=False,
    )
    assert (found["worst"], found["best"], found["gap"]) == (None, None, None)


def test_only_shares_have_an_interval():
    shares = by_group("r", GROUPS, measured, lower_is_better=False)["groups"]
    others = by_group("r", GROUPS, lambda _: {"perplexity": 3.0}, lower_is_better=True)["groups"]
    assert all(each["interval"] for each in shares)
    assert not any(each["interval"] for each in others)


@pytest.mark.parametrize(("right", "records"), [(0, 5), (5, 5), (1, 30), (45, 50), (400, 415)])
def test_bounds_of_the_interval_are_where_a_score_test_begins_to_refuse(right, records):
    """By its definition: a share p is inside if |found - p| <= z sqrt(p (1 - p) / n)."""
    found, (low, high) = right / records, wilson(right / records, records)
    assert 0 <= low <= found <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            z = abs(found - bound) / math.sqrt(bound * (1 - bound) / records)
            assert z == pytest.approx(1.959964, abs=1e-5)


def test_a_column_of_ids_is_refused_in_one_line():
    check_groups("desk", [str(n) for n in range(MOST)])
    check_groups("", None)
    with pytest.raises(ConfigError, match=r"data\.group_column=desk: names 101 groups") as refused:
        check_groups("desk", [str(n) for n in range(MOST + 1)])
    assert "\n" not in str(refused.value)
