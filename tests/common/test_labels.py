"""Labels as people's files spell them: each is read by itself, and a fault names its row."""

import math

import pytest

from common.errors import ConfigError
from common.labels import labels_of

SECRET = "swordfish"


def read(column, labels=("ham", "spam")):
    return labels_of(column, labels, "mails.csv", range(1, len(column) + 1)).tolist()


SPELT = {
    "as they stand": (["ham", "spam"], ("ham", "spam")),
    "blanks around them": ([" ham", "spam \t"], ("ham", "spam")),
    "in other case": (["Ham", "SPAM "], ("ham", "spam")),
    "asked for in other case": (["ham", "spam"], ("HAM", "Spam")),
    "with blanks that are asked for": (["not spam", "spam"], ("not spam", "spam")),
    "numbers": ([0, 1], ("0", "1")),
    "digits": (["0", "1"], ("0", "1")),
    "numbers with a point, as pandas writes them beside a gap": (["0.0", "1.0"], ("0", "1")),
    "numbers with a point that are asked for": (["1.0", 2.0], ("1.0", "2.0")),
    "floats": ([0.0, 1.0], ("0", "1")),
    "negative numbers": ([-1, "1"], ("-1", "1")),
    "true and false": ([False, True], ("False", "True")),
    "true and false in other case": (["FALSE", "true"], ("false", "true")),
}


@pytest.mark.parametrize("spelt", SPELT)
def test_labels_are_read_as_people_spell_them(spelt):
    column, labels = SPELT[spelt]
    assert read(column, labels) == [0, 1]


def test_labels_that_differ_in_case_alone_are_told_apart():
    assert read(["us", "US"], ("US", "us")) == [1, 0]
    with pytest.raises(ConfigError, match=r"row 1 has a label that is not one of data.labels"):
        read(["Us"], ("US", "us"))


@pytest.mark.parametrize("nothing", ["", "  ", None, math.nan])
def test_a_missing_label_is_named_by_its_row(nothing):
    with pytest.raises(ConfigError, match=r"^mails\.csv: row 2 has no label$"):
        read(["ham", nothing, "spam"])


@pytest.mark.parametrize("other", [SECRET, "nan", 2, 0.5, ["ham"], "spam ham"])
def test_an_unknown_label_is_named_by_its_row_and_not_shown(other):
    with pytest.raises(ConfigError) as refused:
        read(["ham", other])
    assert str(refused.value) == "mails.csv: row 2 has a label that is not one of data.labels"
