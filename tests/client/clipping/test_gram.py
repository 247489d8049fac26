"""Half of a symmetric product says all of it, however it is cut."""

import pytest
import torch

from client.clipping import gram
from client.clipping.gram import Gram, panel_widths

RECORDS, WIDTH = 3, 7


def whole(rows):
    return rows.double() @ rows.double().mT


@pytest.mark.parametrize("rows", range(1, 600, 7))
def test_panels_cover_all_columns_and_none_is_empty(rows):
    widths = panel_widths(rows)
    assert sum(widths) == rows
    assert min(widths) > 0
    assert max(widths) < 2 * gram.WIDEST


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 33, 48, 49, 64, 65, 97, 128, 129, 197, 300])
def test_the_meeting_of_two_is_that_of_their_whole_matrices(rows):
    torch.manual_seed(rows)
    one, two, more = (torch.randn(RECORDS, rows, WIDTH) for _ in range(3))
    left, right = Gram.of(one), Gram.of(two)
    left.add(more)
    expected = (whole(one) + whole(more)) * whole(two)
    found, diagonal = left.meet(right)
    assert torch.allclose(found.double(), expected.sum((1, 2)), rtol=1e-6)
    assert torch.allclose(diagonal.double(), expected.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 33, 65, 128])
@pytest.mark.parametrize("padding", [None, 2])
def test_one_hot_rows_meet_where_ids_are_equal(rows, padding):
    torch.manual_seed(rows)
    ids, other = torch.randint(0, 5, (2, RECORDS, rows))
    held = torch.randn(RECORDS, rows, WIDTH)
    expected = torch.zeros(RECORDS, rows, rows, dtype=torch.float64)
    meets = Gram.of_one_hot(ids, padding)
    meets.add_all(Gram.of_one_hot(other, padding))
    for looked in (ids, other):
        hot = torch.nn.functional.one_hot(looked, 5).double()
        if padding is not None:
            hot[:, :, padding] = 0
        expected += hot @ hot.mT
    found, diagonal = meets.meet(Gram.of(held))
    expected *= whole(held)
    assert torch.allclose(found.double(), expected.sum((1, 2)), rtol=1e-6, atol=1e-5)
    assert torch.allclose(diagonal.double(), expected.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-6)


def test_rows_that_lie_apart_in_memory_are_taken_as_they_are():
    torch.manual_seed(0)
    heads = torch.randn(RECORDS, WIDTH, 65)
    found, _ = Gram.of(heads.mT).meet(Gram.of(heads.mT.contiguous()))
    assert torch.allclose(found.double(), whole(heads.mT).square().sum((1, 2)), rtol=1e-6)
