"""A row's bits alone and among others: found where a call can be cut to one row, not claimed where it cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from pyrosome.testing.row_alone import NotCut, cut, same_alone

X, W = torch.randn(5, 8), torch.randn(3, 8)


class Turn(NamedTuple):
    cos: torch.Tensor
    sign: int


def product(x, w):
    return x @ w.t()


def by_mean(x, w):
    return (x - 1e-6 * x.mean()) @ w.t()  # near, and not of the row alone


def test_a_row_that_depends_on_others_is_found():
    def alone(x, w):
        return torch.cat([product(x[i : i + 1], w) for i in range(len(x))])

    assert same_alone(alone, product, 5, (X, W), {}) is True
    assert same_alone(by_mean, product, 5, (X, W), {}) is False
    assert same_alone(by_mean, product, 5, (X, W), {}, allowed=1e-3) is True


def test_only_the_last_row_may_differ():
    def spoiling(x, w):
        y = torch.cat([product(x[i : i + 1], w) for i in range(len(x))])
        if len(y) > 1:
            y[-1] *= 1 + 1e-6
        return y

    assert same_alone(spoiling, product, 5, (X, W), {}) is False


@pytest.mark.parametrize(
    ("definition", "rows", "arguments"),
    [
        (product, 1, (X[:1], W)),
        (product, 3, (X[:3], W)),  # the weight has as many rows
        (lambda x, at: x[at.sum()], 5, (X, torch.tensor([0, 0]))),  # an index that is not cut
        (lambda x, layout: x, 5, (X, ((0, 5),))),
        (lambda x: None, 5, (X,)),
        (lambda x: x.sum(0, keepdim=True), 5, (X,)),
        (lambda x: x - x.mean(), 5, (X,)),  # the definition itself is of all rows
        (lambda x, i: x[i], 5, (X, 4)),
    ],
)
def test_what_cannot_be_cut_is_not_judged(definition, rows, arguments):
    assert same_alone(definition, definition, rows, arguments, {}) is None


def test_tensors_of_so_many_rows_are_cut_wherever_they_are():
    stored = SimpleNamespace(data=torch.ones(5))
    x, (turn, (one, two)), held, none = cut((X, (Turn(X, 1), [X, W]), stored, None), 5, 3)
    for row in (x, turn.cos, one):
        assert torch.equal(row, X[3:4])
    assert two is W and held is stored and none is None and isinstance(turn, Turn) and turn.sign == 1
    assert torch.equal(cut({"a": torch.arange(5)}, 5, 2)["a"], torch.tensor([2]))
    with pytest.raises(NotCut):
        cut((torch.arange(4),), 5, 0)
    with pytest.raises(NotCut):
        cut((X, ((0, 5),)), 5, 0)
