"""`route` and `affinity` by Triton: the definition's experts, its weights to float32's last bits, token by token."""

from __future__ import annotations

import pytest
import torch

from pyrosome.ops import gpu
from pyrosome.ops.route import affinity, choose_experts, expert_weights, route
from pyrosome.ops.route.triton import SEGMENT, VARIANTS
from tests.ops.gpu.held import CAPABILITIES, DEVICE, kernels, rms, same_bits

NAN, INF = float("nan"), float("inf")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def grid(*shape, seed=0):
    """Multiples of a quarter: they add exactly in any order, and tie often."""
    return (torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)) / 4).to(DEVICE)


def example(T, D, E, K, dtype=torch.bfloat16, by_id=False, make=draw):
    gate = (make(E, D, seed=1) / (D**0.5 if make is draw else 1)).to(dtype)
    choice = make(E, seed=2) / 4
    if by_id:
        choice = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:K] for t in range(T)])
        choice = choice.to(DEVICE)
    position = torch.arange(T, device=DEVICE) * 7 - (torch.arange(T, device=DEVICE) % 5 == 3) * 1_000_000
    return make(T, D), gate, choice, K, 1.5, position


def run(*args, capability=90, **variants):
    with kernels(route, capability), gpu.forced(**variants):
        assert route.chosen(*args) == "triton"
        return route(*args)


def agree(found, wanted):
    return torch.equal(found[0].cpu(), wanted[0].cpu()) and rms(found[1], wanted[1]) < 2e-6


def alike(found, wanted):
    """The same bits; in the interpreter products are numpy's, whose order of sums follows the tile and the column."""
    return same_bits(found, wanted) if DEVICE.type == "cuda" else rms(found, wanted) < 1e-6


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("T", "D", "E", "K"),
    [(1, 300, 256, 6), (5, 64, 7, 3), (17, 33, 130, 6), (3, 1, 1, 1), (4, 70, 7, 7), (1, 257, 2, 1)],
)
def test_it_equals_the_definition(T, D, E, K, dtype, by_id):
    args = example(T, D, E, K, dtype, by_id)
    found = run(*args)
    assert agree(found, route.definition(*args))
    assert (found[0].dtype, found[1].dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [draw, grid])
def test_every_variant_and_ties(capability, variant, make):
    """Of the grid's products every order of sums gives the same bits, and many experts tie."""
    args = example(5, 2 * SEGMENT + 40, 70, 6, make=make)
    assert agree(run(*args, capability=capability, route_products=variant), route.definition(*args))


def test_ties_of_whole_rows_go_to_the_lowest_experts():
    x, _, _, K, scale, position = example(6, 16, 40, 6)
    for bias in (torch.zeros(40), torch.tensor([0.0, -0.0] * 20)):
        args = x, torch.zeros(40, 16, device=DEVICE), bias.to(DEVICE), K, scale, position.abs()
        assert run(*args)[0].tolist() == [[0, 1, 2, 3, 4, 5]] * 6


def test_a_token_is_the_same_in_every_variant_and_alone():
    """By id, so that every expert's score counts; a choice by score is made of the same bits."""
    T, args = 66, example(66, 2 * SEGMENT + 9, 8, 8, torch.float32, by_id=True)
    x, gate, choice, K, scale, position = args
    whole = {name: run(*args, route_products=name) for name in VARIANTS}
    for name in VARIANTS:
        assert alike(whole[name][1], whole["few"][1])
        for t in (0, T - 1):
            here = slice(t, t + 1)
            alone = run(x[here], gate, choice[here], K, scale, position[here], route_products=name)
            assert alike(alone[1], whole[name][1][here])
    assert same_bits(whole["some"][1], whole["many"][1])  # one tile's shape: pieces are added as one program adds them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_tokens_lose_nothing_to_bfloat16_products(dtype):
    """Logits of magnitude 1e-3 that are sums of products near 1: a rounded token would show."""
    x, gate, bias, K, scale, position = example(4, 64, 8, 8, dtype)
    x[:, 32:], gate[:, 32:] = -x[:, :32] * (1 + 2.0**-12), gate[:, :32]
    found, wanted = run(x, gate, bias, K, scale, position), route.definition(x, gate, bias, K, scale, position)
    assert agree(found, wanted)
    rounded = route.definition(x.bfloat16().float(), gate, bias, K, scale, position)
    assert rms(rounded[1], wanted[1]) > 1e-5


def test_padding_visits_nobody():
    args = example(9, 16, 12, 3)
    expert, weight = run(*args)
    padding = args[-1] < 0
    assert padding.tolist() == [i % 5 == 3 for i in range(9)]
    assert (expert[padding] == -1).all() and (expert[~padding] >= 0).all()
    torch.testing.assert_close(weight.sum(1), torch.full((9,), 1.5, device=DEVICE))


@pytest.mark.parametrize("by_id", [False, True])
def test_no_tokens(by_id):
    x, gate, bias, K, scale, position = example(0, 8, 5, 2)
    choice = position.new_empty(0, K) if by_id else bias
    args = x, gate, choice, K, scale, position
    expert, weight = run(*args)
    assert (expert.shape, weight.shape, expert.dtype) == ((0, 2), (0, 2), torch.int64)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_what_is_no_number_stays_in_its_token(value, dtype, stored):
    x, gate, bias, K, scale, position = example(3, 16, 12, 3, stored)
    gate = gate.to(dtype)
    clean = run(x, gate, bias, K, scale, position)
    x[1, 4] = value
    found, wanted = run(x, gate, bias, K, scale, position), route.definition(x, gate, bias, K, scale, position)
    assert torch.equal(found[1].isnan(), wanted[1].isnan())
    assert torch.equal(found[0][::2], clean[0][::2]) and same_bits(found[1][::2], clean[1][::2])
    assert value != INF or torch.equal(found[0], wanted[0])


def test_a_bias_that_is_no_number_chooses_as_the_definition_does():
    x, gate, bias, K, scale, position = example(4, 16, 12, 4)
    bias[:4] = torch.tensor([NAN, -INF, INF, -NAN])
    assert agree(run(x, gate, bias, K, scale, position), route.definition(x, gate, bias, K, scale, position))


def test_affinities():
    special = [0.0, -0.0, 1e-3, -1e-3, 19.5, 20.5, 1e4, -20.0, -80.0, -150.0, 3e38, INF, -INF, NAN, 1e-40]
    x = torch.cat([torch.tensor(special), torch.linspace(-85, 30, 3000)]).to(DEVICE)
    with kernels(affinity):
        for logits in (x, x[:2500].view(50, 50).t(), x[1:8], x[:0], x[:1024]):
            assert affinity.chosen(logits) == "triton"
            found = affinity(logits)
            torch.testing.assert_close(
                found, affinity.definition(logits), rtol=1e-6, atol=1e-30, equal_nan=True
            )  # a result below 1e-30 may be a flushed zero


def test_tensors_that_are_not_contiguous_or_not_aligned():
    x, gate, bias, K, scale, position = example(3, 24, 12, 3)
    wanted = run(x, gate, bias, K, scale, position)
    spread = torch.stack([gate, gate], -1)[..., 0], torch.stack([bias, bias], 1)[:, 0]
    found = run(x.t().contiguous().t(), spread[0], spread[1], K, scale, torch.stack([position, position], 1)[:, 0])
    assert torch.equal(found[0], wanted[0]) and same_bits(found[1], wanted[1])
    shifted = [torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape) for v in (x, gate, bias, position)]
    found = run(*shifted[:3], K, scale, shifted[3])
    assert torch.equal(found[0], wanted[0]) and same_bits(found[1], wanted[1])


def test_experts_that_are_none_are_not_read():
    x, gate, _, K, scale, position = example(2, 24, 12, 3)
    choice = torch.tensor([[3, -1, 5], [12, 1 << 40, 0]], device=DEVICE)
    expert, weight = run(x, gate, choice, K, scale, position)
    assert expert.tolist() == choice.tolist()
    assert (weight == 0).tolist() == [[False, True, False], [True, True, False]]


def test_shapes_that_do_not_go_together_are_told():
    x, gate, bias, K, scale, position = example(3, 24, 12, 3)
    for wrong, what in (
        ((x, gate[:, 1:], bias, K, scale, position), "rows of 24 were given to a gate of 23"),
        ((x, gate, bias[:5], K, scale, position), r"\(5,\)"),
        ((x, gate, bias, 13, scale, position), "13 of 12 experts"),
        ((x, gate, bias, K, scale, position[:2]), r"\(2,\) positions"),
        ((x, gate, torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), K, scale, position), r"need \(3, 3\)"),
    ):
        with pytest.raises(RuntimeError, match=what):
            run(*wrong)


def test_the_kernel_s_weights_are_those_of_the_chosen_scores():
    args = example(5, 32, 12, 3, torch.float32)
    with kernels(affinity):
        score = affinity(args[0] @ args[1].t())
    expert = choose_experts(score, args[2], 3)
    assert rms(run(*args)[1], expert_weights(score, expert, 1.5)) < 2e-6
