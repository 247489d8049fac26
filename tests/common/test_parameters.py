import numpy as np
import pytest
import torch
from torch import nn

from common.errors import VerificationError
from common.parameters import Layout, check_vector, flatten, load


def small_model():
    """Eight trainable values among frozen ones."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    model[1].requires_grad_(requires_grad=False)
    model[0].bias.requires_grad_(requires_grad=False)
    return model


def test_vector_then_model_then_vector():
    model = small_model()
    vector = np.arange(8, dtype=np.float32) / 7
    load(model, vector)
    assert np.array_equal(flatten(model), vector)
    assert flatten(model).dtype == np.float32


def test_model_then_vector_then_model():
    model, other = small_model(), small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load(other, flatten(model))
    trained = {"0.weight", "2.weight"}
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]) == (name in trained)
    load(model, flatten(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_order_is_that_of_the_layout():
    model = small_model()
    assert Layout.of(model).names == ("0.weight", "2.weight")
    assert Layout.of(model).shapes == ((2, 3), (1, 2))
    assert Layout.of(model).size == 8
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(6.0).view(2, 3))
        model[2].weight.copy_(torch.tensor([[6.0, 7.0]]))
    assert flatten(model).tolist() == list(range(8))


def test_the_vector_is_a_copy():
    model = small_model()
    vector = flatten(model)
    vector += 1
    assert not np.array_equal(flatten(model), vector)
    load(model, vector)
    vector += 1
    assert not np.array_equal(flatten(model), vector)


BROKEN = {
    "one short": np.zeros(7, np.float32),
    "one long": np.zeros(9, np.float32),
    "empty": np.zeros(0, np.float32),
    "scalar": np.zeros((), np.float32),
    "two axes": np.zeros((8, 1), np.float32),
    "float64": np.zeros(8),
    "float16": np.zeros(8, np.float16),
    "int": np.zeros(8, np.int32),
    "NaN": np.array([0] * 7 + [np.nan], np.float32),
    "infinite": np.array([0] * 7 + [np.inf], np.float32),
}


@pytest.mark.parametrize("vector", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_vector_is_refused_and_changes_nothing(vector):
    model = small_model()
    before = flatten(model)
    with pytest.raises(VerificationError, match=r"^parameters: "):
        load(model, vector)
    assert np.array_equal(flatten(model), before)
    with pytest.raises(VerificationError, match=r"^parameters: "):
        check_vector(vector, Layout.of(model))


def test_digest_changes_with_name_and_with_shape_and_with_order():
    layout = Layout(("a", "b"), ((2, 3), (4,)))
    digests = {
        layout.digest,
        Layout(("a", "c"), ((2, 3), (4,))).digest,
        Layout(("a", "b"), ((3, 2), (4,))).digest,
        Layout(("a", "b"), ((6,), (4,))).digest,
        Layout(("b", "a"), ((4,), (2, 3))).digest,
        Layout(("a",), ((2, 3),)).digest,
    }
    assert len(digests) == 6
    assert Layout(("a", "b"), ((2, 3), (4,))).digest == layout.digest


def test_digest_does_not_depend_on_values():
    assert Layout.of(small_model()).digest == Layout.of(small_model()).digest


@pytest.mark.parametrize("value", [1.01e4, -1e10, 3e38])
def test_parameters_as_no_model_has_are_refused(value):
    """A coordinator could choose them so that rounding tells of records."""
    layout = Layout(("weight",), ((3,),))
    vector = np.array([0.5, value, -1.0], dtype=np.float32)
    with pytest.raises(VerificationError, match="larger than 10000"):
        check_vector(vector, layout)
    check_vector(np.array([1e4, -1e4, 0.0], dtype=np.float32), layout)
