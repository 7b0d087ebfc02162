"""Who gets a token, and with what weight, against the formulas written out."""

import math

import pytest
import torch

from pyrosome.ops.route import choose_experts, expert_weights, route_scores


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def grid(*shape, levels, seed=0):
    """Multiples of a quarter: they add exactly, and tie often."""
    return torch.randint(-levels, levels + 1, shape, generator=torch.Generator().manual_seed(seed)) / 4


def affinity(logit):
    return math.sqrt(max(logit, 0.0) + math.log1p(math.exp(-abs(logit))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_the_root_of_the_softplus(dtype):
    x, gate = draw(5, 4, dtype=dtype), 3 * draw(7, 4, seed=1)
    score = route_scores(x, gate)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for t in range(5):
        for e in range(7):
            logit = math.fsum(a * b for a, b in zip(x[t].tolist(), gate[e].tolist(), strict=True))
            assert score[t, e].item() == pytest.approx(affinity(logit), rel=1e-5)


@pytest.mark.parametrize("logit", [0.0, 1e-3, 19.5, 20.5, 1e4, -20.0, -80.0])
def test_scores_of_large_and_small_logits(logit):
    score = route_scores(torch.tensor([[1.0]]), torch.tensor([[logit]]))
    assert score.item() == pytest.approx(affinity(logit), rel=1e-5)


def brute_force(score, bias, k):
    chosen = []
    for row in score.tolist():
        total = [s + b for s, b in zip(row, bias.tolist(), strict=True)]
        chosen.append(sorted(sorted(range(len(total)), key=lambda e: (-total[e], e))[:k]))
    return chosen


@pytest.mark.parametrize("levels", [0, 1, 4])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (7, 3), (7, 7), (256, 6)])
def test_ties_go_to_the_lowest_expert(levels, num_experts, k):
    score, bias = grid(40, num_experts, levels=levels), grid(num_experts, levels=levels, seed=1)
    chosen = choose_experts(score, bias, k)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == brute_force(score, bias, k)


def test_equal_sums_of_different_scores_are_a_tie():
    score, bias = torch.tensor([[0.5, 1.0, 0.25, 2.0]]), torch.tensor([0.75, 0.25, 1.0, -0.75])
    assert [choose_experts(score, bias, k).tolist() for k in (1, 2, 3)] == [[[0]], [[0, 1]], [[0, 1, 2]]]


def test_zeros_of_either_sign_are_a_tie():
    score = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    assert choose_experts(score, torch.tensor([-0.0, 0.0, -0.0, 0.0]), 3).tolist() == [[0, 1, 2]]


def test_the_bias_chooses_but_does_not_weigh():
    score, bias = torch.tensor([[4.0, 1.0, 3.0]]), torch.tensor([-10.0, 10.0, 0.0])
    chosen = choose_experts(score, bias, 2)
    assert chosen.tolist() == [[1, 2]]
    torch.testing.assert_close(expert_weights(score, chosen, 1.5), torch.tensor([[0.375, 1.125]]))


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.5])
def test_weights_are_shares_of_the_chosen_scores(scale):
    score = route_scores(draw(6, 4), draw(8, 4, seed=1))
    chosen = torch.tensor([[7, 0, 3]] * 6)  # a hash layer's table comes in any order
    weight = expert_weights(score, chosen, scale)
    torch.testing.assert_close(weight.sum(1), torch.full((6,), scale))
    for t in range(6):
        total = math.fsum(score[t, e].item() for e in (7, 0, 3))
        expected = [score[t, e].item() / total * scale for e in (7, 0, 3)]
        assert weight[t].tolist() == pytest.approx(expected, rel=1e-6)


def test_no_tokens():
    score = route_scores(draw(0, 4), draw(5, 4))
    chosen = choose_experts(score, torch.zeros(5), 2)
    assert score.shape == (0, 5)
    assert chosen.shape == expert_weights(score, chosen, 1.0).shape == (0, 2)


def test_gradients_reach_scores_through_the_weights_and_never_the_bias():
    x, gate = draw(3, 4, dtype=torch.float64).requires_grad_(), draw(5, 4, dtype=torch.float64, seed=1).requires_grad_()
    bias = torch.zeros(5, requires_grad=True)
    chosen = choose_experts(route_scores(x, gate), bias, 2)
    assert not chosen.requires_grad
    assert torch.autograd.gradcheck(lambda x, gate: expert_weights(route_scores(x, gate), chosen, 1.5), (x, gate))
    assert torch.autograd.gradcheck(route_scores, (x, gate))
