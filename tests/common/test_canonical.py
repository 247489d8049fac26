import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.canonical import canonical_json, digest

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12
)


@given(VALUES)
def test_value_and_text_round_trip_both_ways(value):
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(), SCALARS))
def test_order_of_keys_does_not_matter(value):
    reordered = dict(reversed(list(value.items())))
    assert canonical_json(reordered) == canonical_json(value)
    assert digest(reordered) == digest(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_json_has_no_name_for_is_refused(value):
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json({"a": [value]})


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object()])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(TypeError):
        canonical_json([value])


def test_digest_is_sha256_of_the_utf8_text():
    assert digest({"b": "é", "a": 1}) == hashlib.sha256('{"a":1,"b":"é"}'.encode()).hexdigest()


def test_different_values_have_different_digests():
    values = [None, 0, 1, "1", [], {}, [1], {"a": 1}, {"a": 2}, {"b": 1}, [[1], 2], [1, [2]]]
    assert len({digest(value) for value in values}) == len(values)
