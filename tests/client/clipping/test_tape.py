"""Norms that are taken in the backward pass rest on hints; what they miss is taken afterwards."""

import pytest
import torch
from torch import nn

from client.clipping.tape import Habits, MatrixUse, Tape

RECORDS, ROWS, WIDTH = 3, 5, 70
"""Wide enough for a gradient to be described by its rows, and not kept."""


def drawn():
    return torch.randn(RECORDS, ROWS, WIDTH)


@pytest.mark.parametrize("again", [False, True])
def test_a_weight_that_comes_again_is_not_priced_by_the_norm_that_was_taken_early(again):
    """Two matrices of one input are taken together; one of them may be used once more."""
    torch.manual_seed(0)
    query, key = (nn.Parameter(torch.empty(WIDTH, WIDTH)) for _ in range(2))
    shared, other, g_query, g_key, g_again = (drawn() for _ in range(5))
    tape = Tape(RECORDS, Habits(frozenset({query, key}), {}, frozenset({query, key})))
    tape.file_matrix(MatrixUse(query, shared, g_query, transposed=False))
    tape.file_matrix(MatrixUse(key, shared, g_key, transposed=False))
    of_key = g_key.double().mT @ shared.double()
    if again:
        tape.file_matrix(MatrixUse(key, other, g_again, transposed=False))
        of_key += g_again.double().mT @ other.double()
    tape.settle([query, key])
    of_query = g_query.double().mT @ shared.double()
    expected = of_query.square().sum((1, 2)) + of_key.square().sum((1, 2))
    assert torch.allclose(tape.squared_norms().double(), expected, rtol=1e-6)
