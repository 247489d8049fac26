import inspect
import re

import pytest

from common import errors, prefix
from common.errors import CoterieError

DOCUMENTED = {
    name: int(code) for name, code in re.findall(r"(\w+Error)\s+(\d)\b", inspect.getdoc(errors))
}
DEFINED = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, Exception)
}


def subclasses(base):
    return {base}.union(*(subclasses(child) for child in base.__subclasses__()))


def test_the_documented_tree_is_the_whole_tree():
    assert len(DOCUMENTED) == 5
    assert set(DEFINED) == set(DOCUMENTED)


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_exit_code_is_the_documented_one(name):
    assert DEFINED[name].exit_code == DOCUMENTED[name]
    assert issubclass(DEFINED[name], CoterieError)


def test_codes_are_distinct_and_never_success():
    assert len(set(DOCUMENTED.values())) == len(DOCUMENTED)
    assert 0 not in DOCUMENTED.values()


def test_every_error_defined_elsewhere_has_a_documented_code():
    everywhere = subclasses(CoterieError)
    assert prefix.NoPrefixError in everywhere
    assert {error.exit_code for error in everywhere} == set(DOCUMENTED.values())


def test_an_error_says_exactly_its_text():
    assert str(errors.ConfigError("privacy.epsilon=-1: must be above 0")) == (
        "privacy.epsilon=-1: must be above 0"
    )
