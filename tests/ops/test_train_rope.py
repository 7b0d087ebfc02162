"""Rotation with gradients: the kernels against the definitions, and these against finite differences."""

import pytest
import torch

from pyrosome.ops import native
from pyrosome.ops.rope import index_rows, norm_rope, rope
from pyrosome.quant import round_index, round_kv, unchanged
from tests.ops.gradients import assert_as_defined, draw, turns

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no native library")
shapes = pytest.mark.parametrize("shape", [(0, 2, 16), (1, 16), (5, 38), (7, 3, 24), (6, 4, 128)])


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: request.param)


def test_the_kernels_are_chosen():
    for op in (rope, norm_rope, index_rows):
        assert op.chosen(torch.zeros(1, 16)) == "cpu-train"
        assert op.chosen(torch.zeros(1, 16, dtype=torch.float64)) == "torch"


@shapes
@pytest.mark.parametrize("inverse", [False, True])
def test_rope(shape, inverse):
    x = draw(*shape)
    assert_as_defined([rope], lambda: rope(x, turns(shape[0], 4), inverse), [x])


@shapes
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rounds", [unchanged, round_kv])
def test_norm_rope(shape, weighted, rounds, threads):
    x, weight = draw(*shape), draw(shape[-1], seed=1)
    assert_as_defined(
        [norm_rope, rope],
        lambda: norm_rope(x, weight if weighted else None, turns(shape[0], 4), 1e-3, rounds),
        [x, weight],
    )


def test_only_what_wants_a_gradient_gets_one():
    x, weight = draw(5, 24), draw(24, seed=1)
    assert_as_defined([norm_rope, rope], lambda: norm_rope(x.detach(), weight, turns(5, 4), 1e-6), [weight])
    assert_as_defined([norm_rope, rope], lambda: norm_rope(x, weight.detach(), turns(5, 4), 1e-6), [x])
    assert not norm_rope(x.detach(), None, turns(5, 4), 1e-6).requires_grad


def test_a_view_and_an_expanded_gradient():
    x = draw(6, 64)
    assert_as_defined(
        [norm_rope, rope], lambda: norm_rope(x[:, 8:40].unflatten(1, (2, 16)), None, turns(6, 4), 1e-6), [x]
    )
    assert_as_defined([rope], lambda: rope(x, turns(6, 4)).sum(0)[None].expand(3, -1), [x])


def test_another_rounding_runs_by_the_definition():
    x = draw(5, 24)
    assert_as_defined([norm_rope, rope], lambda: norm_rope(x, None, turns(5, 4), 1e-6, lambda y: 2 * y), [x])


@pytest.mark.parametrize("shape", [(0, 2, 16), (3, 8), (5, 2, 32), (4, 3, 64)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rounds", [unchanged, round_index])
def test_index_rows(shape, turned, rounds):
    x = draw(*shape)
    turn = turns(shape[0], 4) if turned else None
    # A rounding may fall to the other side of a tie, so that values agree only without it.
    assert_as_defined([index_rows, rope], lambda: index_rows(x, turn), [x])
    (found,), (expected,) = (
        torch.autograd.grad(index_rows(x, turn, r), x, torch.ones(shape)) for r in (rounds, unchanged)
    )
    assert torch.equal(found, expected)


def test_the_definitions_by_finite_differences():
    x = draw(3, 2, 16).detach().double().requires_grad_()
    weight, turn = draw(16, seed=1).detach().double().requires_grad_(), turns(3, 4, torch.complex128)
    assert torch.autograd.gradcheck(lambda a, b: norm_rope(a, b, turn, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda a: rope(a, turn, True), (x,))
    assert torch.autograd.gradcheck(lambda a: index_rows(a, turn), (x,))
