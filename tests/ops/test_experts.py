"""Routed experts against one expert and one token at a time, in float64."""

import math

import pytest
import torch

import pyrosome.ops.experts as module
from pyrosome.dist import Mesh, tree_sum
from pyrosome.ops.experts import ExpertWeights, clamped_swiglu, routed_experts, shared_expert
from pyrosome.quant import FORMATS, QuantTensor, round_activation, simulate_fp8, unchanged

D, I, LIMIT = 6, 5, 0.7  # noqa: E741  a limit that many activations exceed


def same(x):
    return x


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bank(num_experts, dtype=torch.float32, prepare=same, dim=D, inner=I):
    shapes = (inner, dim), (inner, dim), (dim, inner)
    return ExpertWeights(*(draw(num_experts, *s, dtype=dtype, seed=i + 1) for i, s in enumerate(shapes)), prepare)


def routing(T, K, num_experts, seed=0, absent=0.2):
    """Different experts for each token, a share of them absent, and their weights."""
    g = torch.Generator().manual_seed(seed)
    expert = torch.stack([torch.randperm(num_experts, generator=g)[:K] for _ in range(T)])
    expert[torch.rand(T, K, generator=g) < absent] = -1
    return expert, torch.rand(T, K, generator=g)


def one_by_one(x, weights, expert, weight, limit=LIMIT, prepare=same):
    """[T, D] float64: W2 (weight x silu(min(W1 x, limit)) x clamp(W3 x)), summed over each token's experts."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    w1, w3, w2 = (w.double() for w in weights[:3])
    for t in range(len(x)):
        row = prepare(x[t].double())
        for e, share in zip(expert[t].tolist(), weight[t].tolist(), strict=True):
            if e < 0:
                continue
            h = []
            for gate, up in zip((w1[e] @ row).tolist(), (w3[e] @ row).tolist(), strict=True):
                a, b = min(gate, limit), max(-limit, min(up, limit))
                h.append(a / (1 + math.exp(-a)) * b * share)
            out[t] += w2[e] @ prepare(torch.tensor(h, dtype=torch.float64))
    return out


def assert_one_by_one(x, weights, expert, weight, tolerance=1e-5):
    expected = one_by_one(x, weights, expert, weight)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = routed_experts(x, weights, expert, weight, LIMIT)
        assert out.shape == x.shape
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("T", [1, 2, 3, 7, 30])
@pytest.mark.parametrize(("num_experts", "K"), [(1, 1), (2, 2), (4, 2), (16, 3)])
def test_against_one_expert_at_a_time(T, num_experts, K):
    assert_one_by_one(draw(T, D), bank(num_experts), *routing(T, K, num_experts))


@pytest.mark.parametrize("max_rows", [1, 2, 3, 256])
@pytest.mark.parametrize("elements", [1, 3 * D * I * 2, 1 << 21])
def test_any_size_of_tile_gives_the_same(monkeypatch, max_rows, elements):
    monkeypatch.setattr(module, "MAX_TILE_ROWS", max_rows)
    monkeypatch.setattr(module, "TILE_ELEMENTS", elements)
    assert_one_by_one(draw(25, D), bank(4), *routing(25, 3, 4))


@pytest.mark.parametrize("max_rows", [1, 4, 256])
@pytest.mark.parametrize("only", [0, 2, 3])
def test_all_tokens_to_one_expert(monkeypatch, max_rows, only):
    monkeypatch.setattr(module, "MAX_TILE_ROWS", max_rows)
    for T in (3, 4, 5, 16, 17):
        assert_one_by_one(draw(T, D), bank(4), torch.full((T, 1), only), draw(T, 1))


def test_every_load_of_three_experts():
    """Loads around each multiple of a tile, padding included."""
    x, weights = draw(8, D), bank(3)
    for first in range(9):
        for second in range(9 - first):
            for third in range(9 - first - second):
                chosen = [0] * first + [1] * second + [2] * third
                expert = torch.tensor(chosen + [-1] * (8 - len(chosen)))[torch.arange(8) * 3 % 8, None]
                with torch.no_grad():
                    out = routed_experts(x, weights, expert, torch.ones(8, 1), LIMIT)
                assert not out[expert[:, 0] < 0].any()
                every = expert_alone(x, weights)
                real = expert[:, 0] >= 0
                torch.testing.assert_close(out[real], every[real.nonzero()[:, 0], expert[real, 0]])


def expert_alone(x, weights):
    """[T, E, D]: every token through every expert."""
    gate, up = (torch.einsum("td,eid->tei", x, w) for w in weights[:2])
    h = gate.clamp(max=LIMIT) * torch.sigmoid(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
    return torch.einsum("tei,edi->ted", h, weights[2])


@pytest.mark.parametrize("T", [1, 40])
def test_a_step_of_padding_gives_zeros(T):
    out = routed_experts(draw(T, D), bank(4), torch.full((T, 2), -1), draw(T, 2), LIMIT)
    assert torch.equal(out, torch.zeros(T, D))


@pytest.mark.parametrize("T", [2, 40])
def test_poison_in_padding_does_not_spread(T):
    """Padding tokens, the weights beside absent experts and the experts nobody asked for may hold anything."""
    x, weights, (expert, weight) = draw(T, D), bank(8), routing(T, 2, 6)
    expert[0] = -1
    clean = one_by_one(x, weights, expert, weight)
    x[0] = float("nan")
    weight[expert < 0] = float("nan")
    for w in weights[:3]:
        w[6:] = float("nan")
    with torch.no_grad():
        out = routed_experts(x, weights, expert, weight, LIMIT)
    torch.testing.assert_close(out.double(), clean, rtol=1e-5, atol=1e-5)


def test_an_expert_named_twice_counts_twice():
    x, weights = draw(2, D), bank(3)
    twice = routed_experts(x, weights, torch.tensor([[1, 1]] * 2), torch.full((2, 2), 0.25), LIMIT)
    once = routed_experts(x, weights, torch.tensor([[1]] * 2), torch.full((2, 1), 0.25), LIMIT)
    torch.testing.assert_close(twice, 2 * once)


def test_no_tokens():
    empty = torch.zeros(0, 2, dtype=torch.int64)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert routed_experts(draw(0, D), bank(3), empty, torch.zeros(0, 2), LIMIT).shape == (0, D)


def test_the_gate_is_clamped_from_above_only():
    gate, up = torch.tensor([-30.0, -12.0, -5.0, 0.0, 12.0]), torch.ones(5)
    expected = [v / (1 + math.exp(-v)) for v in (-30.0, -12.0, -5.0, 0.0, 10.0)]
    assert clamped_swiglu(gate, up, 10.0).tolist() == pytest.approx(expected, rel=1e-6)
    ups = torch.tensor([-12.0, -10.0, 3.0, 10.0, 12.0])
    assert clamped_swiglu(torch.ones(5), ups, 10.0).tolist() == pytest.approx(
        [v / (1 + math.exp(-1)) for v in (-10.0, -10.0, 3.0, 10.0, 10.0)], rel=1e-6
    )


@pytest.mark.parametrize("T", [1, 24])
def test_the_weight_multiplies_before_w2_and_before_its_input_is_prepared(T):
    """A spy rounds coarsely, so that weighting before and after it differ."""
    seen = []

    def spy(x):
        seen.append(x)
        return (x * 8).round() / 8

    x, weights, (expert, weight) = draw(T, D), bank(4, prepare=spy), routing(T, 2, 4, absent=0.0)
    with torch.no_grad():
        out = routed_experts(x, weights, expert, weight, LIMIT)
    assert seen[0] is x
    rounded = (x.double() * 8).round() / 8
    wanted = []
    for t in range(T):
        for e, share in zip(expert[t].tolist(), weight[t].tolist(), strict=True):
            gate, up = (w[e].double() @ rounded[t] for w in weights[:2])
            wanted.append(clamped_swiglu(gate, up, LIMIT) * share)
    given = torch.cat([h.flatten(0, -2) for h in seen[1:]]).double()
    given = given[given.abs().sum(1) > 0]
    assert len(given) == len(wanted)
    for h in wanted:
        assert (given - h).abs().amax(1).min() < 1e-6
    inside = one_by_one(x, weights, expert, weight, prepare=lambda x: (x * 8).round() / 8)
    torch.testing.assert_close(out.double(), inside, rtol=1e-4, atol=1e-4)
    alone = torch.stack([routed_experts(x, weights, expert[:, k : k + 1], torch.ones(T, 1), LIMIT) for k in range(2)])
    outside = (weight.t()[..., None] * alone).sum(0)
    assert (outside - out).abs().max() > 1e-2


def one_expert_per_token_at_a_time(x, weights, expert, weight, run):
    """[T, D]: pairs computed without company, added in ascending order in 8 virtual shards, and those as a tree."""
    shards, token = torch.zeros(8, *x.shape), torch.arange(len(x))
    expert, order = expert.sort(dim=1, stable=True)
    for e, share in zip(expert.t(), weight.gather(1, order).t(), strict=True):
        alone = run(x, weights, e[:, None], share[:, None], LIMIT)
        shards[e.clamp(min=0) * 8 // weights.total, token] += alone
    return tree_sum(shards)


@pytest.mark.parametrize("tile", [1, 1 << 21])
@pytest.mark.parametrize(("num_experts", "K"), [(64, 40), (5, 4), (8, 8)])
def test_a_tokens_experts_are_added_as_a_tree_of_eight_shards(monkeypatch, num_experts, K, tile):
    """At width one a product has one term, so the library cannot order it otherwise: the sum alone is left."""
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    x, weights = draw(60, 1), bank(num_experts, dim=1, inner=1)
    expert, weight = routing(60, K, num_experts)
    shuffle = torch.rand(60, K, generator=torch.Generator().manual_seed(1)).argsort(1)
    with torch.no_grad():
        run = routed_experts.definition
        out = run(x, weights, expert, weight, LIMIT)
        assert torch.equal(out, one_expert_per_token_at_a_time(x, weights, expert, weight, run))
        assert torch.equal(out, run(x, weights, expert.gather(1, shuffle), weight.gather(1, shuffle), LIMIT))


def held_by(mesh, weights):
    part = mesh.part(weights.w1.shape[0])
    rows = slice(part.start, part.stop)
    return ExpertWeights(*(w[rows] for w in weights[:3]), weights.prepare, part.start, weights.w1.shape[0])


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_experts", [5, 16])
@pytest.mark.parametrize("T", [1, 3, 40])
def test_parts_of_a_bank_add_up_to_the_whole(size, num_experts, T):
    x, weights, (expert, weight) = draw(T, D), bank(num_experts), routing(T, 4, num_experts)
    banks = [held_by(Mesh(rank, size), weights) for rank in range(size)]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            parts = torch.stack([routed_experts(x, b, expert, weight, LIMIT) for b in banks])
            for rank, b in enumerate(banks):
                mine = torch.where((expert >= b.first) & (expert < b.first + len(b.w1)), expert, -1)
                torch.testing.assert_close(
                    parts[rank].double(), one_by_one(x, weights, mine, weight), rtol=1e-5, atol=1e-5
                )
            whole = one_by_one(x, weights, expert, weight)
            torch.testing.assert_close(tree_sum(parts).double(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [5, 6])
@pytest.mark.parametrize("T", [1, 30])
def test_the_definition_refuses_an_expert_there_is_not(bad, T):
    weights, expert = held_by(Mesh(1, 2), bank(5)), torch.full((T, 2), bad)
    with pytest.raises((IndexError, RuntimeError)):
        routed_experts.definition(draw(T, D), weights, expert, torch.ones(T, 2), LIMIT)


def stored(name, weights, prepare):
    return ExpertWeights(*(QuantTensor(name, *FORMATS[name].quantize(w)) for w in weights[:3]), prepare)


@pytest.mark.parametrize("name", ["fp8", "fp4"])
@pytest.mark.parametrize("prepare", [same, lambda x: simulate_fp8(x, 128)], ids=["exact", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 20])
def test_stored_experts_are_their_own_exact_values(name, prepare, dtype, T):
    packed = stored(name, bank(4, dim=64, inner=32), prepare)
    plain = ExpertWeights(*(w.dequantize() for w in packed[:3]), prepare)
    x, (expert, weight) = draw(T, 64, dtype=dtype), routing(T, 2, 4)
    out = routed_experts.definition(x, packed, expert, weight, LIMIT)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(out, routed_experts.definition(x, plain, expert, weight, LIMIT))
    assert out.abs().any() or (expert < 0).all()


@pytest.mark.parametrize("T", [1, 20])
@torch.inference_mode()
def test_unpacked_experts_are_given_the_rounded_inputs_that_their_format_asked_for(T):
    packed = stored("fp8", bank(4, dim=256, inner=128), round_activation)
    plain = ExpertWeights(*(w.dequantize() for w in packed[:3]), round_activation)
    x, (expert, weight) = draw(T, 256), routing(T, 2, 4, absent=0.0)
    wanted = routed_experts.definition(x, packed, expert, weight, LIMIT)
    out = routed_experts(x, plain, expert, weight, LIMIT)
    apart = (routed_experts(x, plain._replace(prepare=unchanged), expert, weight, LIMIT) - wanted).abs().max()
    assert (out - wanted).abs().max() < apart / 10  # where sums in another order round to a neighbour, a little
    one = ExpertWeights(*(w[0] for w in plain[:3]), round_activation)
    wanted = shared_expert.definition(x, one, LIMIT)
    apart = (shared_expert(x, one._replace(prepare=unchanged), LIMIT) - wanted).abs().max()
    assert (shared_expert(x, one, LIMIT) - wanted).abs().max() < apart / 10


def test_float64_stays_float64_in_value_too():
    assert_one_by_one(draw(9, D, dtype=torch.float64), bank(3, torch.float64), *routing(9, 2, 3), tolerance=1e-12)
    assert routed_experts(draw(1, D, dtype=torch.float64), bank(3), *routing(1, 2, 3), LIMIT).dtype == torch.float64


@pytest.mark.parametrize("T", [1, 6])
def test_gradients(T):
    weights, (expert, weight) = bank(2, torch.float64, dim=3, inner=2), routing(T, 2, 2, absent=0.3)
    inputs = [draw(T, 3, dtype=torch.float64), *weights[:3], weight.double()]
    for x in inputs:
        x.requires_grad_(True)

    def run(x, w1, w3, w2, share):
        return routed_experts(x, ExpertWeights(w1, w3, w2, same), expert, share, 3.0)

    assert torch.autograd.gradcheck(run, inputs)


def test_gradients_of_a_step_of_padding_are_zero():
    x, weights, weight = draw(5, D).requires_grad_(), bank(2), torch.ones(5, 2, requires_grad=True)
    routed_experts(x, weights, torch.full((5, 2), -1), weight, LIMIT).sum().backward()
    assert not x.grad.any()
    assert not weight.grad.any()
