"""Experts with gradients: the training version against the definition, and this against finite differences."""

import pytest
import torch

from pyrosome.ops import native
from pyrosome.ops.experts import ExpertWeights, routed_experts, shared_expert
from pyrosome.quant import round_activation, unchanged
from tests.ops.gradients import assert_as_defined, draw, results

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no native library")
LIMIT = 0.7  # a limit that many activations exceed


def bank(E, D, I, prepare=unchanged, **which):  # noqa: E741
    w1, w3, w2 = draw(E, I, D, seed=1), draw(E, I, D, seed=2), draw(E, D, I, seed=3)
    return ExpertWeights(w1, w3, w2, prepare, **which)


def routing(T, K, E, absent=0.2):
    """Different experts for each token, a share of them absent, and their weights."""
    g = torch.Generator().manual_seed(4)
    expert = torch.rand(T, E, generator=g).argsort(1)[:, :K]
    return expert.masked_fill(torch.rand(T, K, generator=g) < absent, -1), torch.rand(
        T, K, generator=g
    ).requires_grad_()


@pytest.mark.parametrize(
    ("T", "K", "E", "D", "I"), [(37, 2, 5, 24, 20), (64, 3, 8, 32, 16), (1, 1, 4, 7, 5), (9, 4, 4, 16, 33)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_routed_experts(T, K, E, D, I, threads, monkeypatch):  # noqa: E741
    monkeypatch.setattr(native, "threads", lambda: threads)
    x, weights, (expert, weight) = draw(T, D), bank(E, D, I), routing(T, K, E)
    assert_as_defined(
        [routed_experts], lambda: routed_experts(x, weights, expert, weight, LIMIT), [x, *weights[:3], weight]
    )


def test_nobody_at_all_and_no_tokens():
    weights = bank(4, 16, 8)
    for T in (0, 3):
        x, (expert, weight) = draw(T, 16), routing(T, 2, 4, absent=1.0)
        out = routed_experts(x, weights, expert, weight, LIMIT)
        assert out.shape == (T, 16)
        assert not out.any()
        assert all(not g.any() for g in torch.autograd.grad(out.sum(), [x, *weights[:3], weight]))


def test_an_expert_nobody_chose_has_gradient_zero():
    x, weights, weight = draw(6, 16), bank(4, 16, 8), draw(6, 2, seed=5)
    expert = torch.tensor([[0, 3]]).expand(6, 2)
    found = results(
        "cpu-train", [routed_experts], lambda: routed_experts(x, weights, expert, weight, LIMIT), weights[:3]
    )
    assert all(not g[1:3].any() and g[0].any() and g[3].any() for g in found[1:])


def test_a_bank_that_holds_a_run_of_the_experts():
    x, weights, (expert, weight) = draw(20, 16), bank(3, 16, 8, first=2, num_in_layer=8), routing(20, 3, 8)
    assert_as_defined(
        [routed_experts], lambda: routed_experts(x, weights, expert, weight, LIMIT), [x, *weights[:3], weight]
    )


def test_rounding_passes_gradients_on():
    x, weights, (expert, weight) = draw(40, 128), bank(4, 128, 32, round_activation), routing(40, 2, 4)
    leaves = [x, *weights[:3], weight]
    run = lambda: routed_experts(x, weights, expert, weight, LIMIT)  # noqa: E731
    # A sum in another order now and then rounds to the next code.
    assert_as_defined([routed_experts], run, leaves, relative=2e-2)
    exact = weights._replace(prepare=unchanged)
    unrounded = results("torch", [routed_experts], lambda: routed_experts(x, exact, expert, weight, LIMIT), leaves)
    found = results("cpu-train", [routed_experts], run, leaves)
    assert not any(torch.equal(a, b) for a, b in zip(found, unrounded, strict=True))


def test_only_what_wants_a_gradient_gets_one():
    x, weights, (expert, weight) = draw(12, 16), bank(4, 16, 8), routing(12, 2, 4)
    all_leaves = [x, *weights[:3], weight]
    for i in range(5):
        a, w1, w3, w2, b = [v if j == i else v.detach() for j, v in enumerate(all_leaves)]
        given = ExpertWeights(w1, w3, w2, unchanged)
        assert_as_defined(
            [routed_experts],
            lambda a=a, b=b, given=given: routed_experts(a, given, expert, b, LIMIT),
            [all_leaves[i]],
        )


def test_weights_in_bfloat16_run_by_the_definition():
    x, weights, (expert, weight) = draw(12, 16), bank(4, 16, 8), routing(12, 2, 4)
    narrow = weights._replace(w3=weights.w3.bfloat16())
    assert_as_defined([routed_experts], lambda: routed_experts(x, narrow, expert, weight, LIMIT), [x, weights.w1])


@pytest.mark.parametrize(("T", "D", "I"), [(0, 16, 8), (1, 7, 5), (33, 24, 20)])
@pytest.mark.parametrize("added", [False, True])
def test_shared_expert(T, D, I, added):  # noqa: E741
    x, onto = draw(T, D), draw(T, D, seed=6)
    w1, w3, w2 = draw(I, D, seed=1), draw(I, D, seed=2), draw(D, I, seed=3)
    weights = ExpertWeights(w1, w3, w2, unchanged)
    leaves = [x, w1, w3, w2, onto] if added else [x, w1, w3, w2]
    assert_as_defined([shared_expert], lambda: shared_expert(x, weights, LIMIT, onto if added else None), leaves)


def test_the_definitions_by_finite_differences():
    x, (expert, weight) = draw(7, 6).detach().double().requires_grad_(), routing(7, 2, 3)
    leaves = [w.detach().double().requires_grad_() for w in bank(3, 6, 4)[:3]]
    weight = weight.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, p, q, r, b: routed_experts(a, ExpertWeights(p, q, r, unchanged), expert, b, LIMIT),
        (x, *leaves, weight),
    )
    one = [w[0].detach().requires_grad_() for w in leaves]
    assert torch.autograd.gradcheck(
        lambda a, p, q, r: shared_expert(a, ExpertWeights(p, q, r, unchanged), LIMIT), (x, *one)
    )


def test_under_autocast_products_are_bfloat16_and_results_float32():
    """Near the float32 answer, gradients too; what the library's own passes read is float32 throughout."""
    g = torch.Generator().manual_seed(11)
    made = {}
    for on in (False, True):
        w1, w3, w2 = (torch.randn(4, *s, generator=g.manual_seed(3)) * 0.2 for s in ((32, 48), (32, 48), (48, 32)))
        x = torch.randn(40, 48, generator=g.manual_seed(5))
        leaves = [t.requires_grad_(True) for t in (w1, w3, w2, x)]
        expert = torch.randint(0, 4, (40, 2), generator=g.manual_seed(6))
        weight = torch.rand(40, 2, generator=g.manual_seed(7))
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = routed_experts(x, ExpertWeights(w1, w3, w2, unchanged), expert, weight, 10.0)
        out.square().sum().backward()
        made[on] = [out.detach(), *(leaf.grad for leaf in leaves)]
    for exact, rough in zip(made[False], made[True], strict=True):
        assert rough.dtype == torch.float32
        error = (rough - exact).norm() / exact.norm()
        assert 0 < error < 0.02
