"""Experts by Triton equal their definitions, wherever they lie, whatever else is in the call."""

from __future__ import annotations

import functools

import pytest
import torch
import triton.language as tl

from pyrosome.ops import experts as module
from pyrosome.ops import gpu
from pyrosome.ops.experts import ExpertWeights, clamped_swiglu, products, routed_experts, shared_expert
from pyrosome.ops.experts.addresses import addresses_of
from pyrosome.ops.experts.sorted_pairs import sorted_pairs
from pyrosome.ops.experts.triton import _ROW, VARIANTS, routed_at, segments
from pyrosome.ops.experts.triton import TILINGS as TILINGS_OF
from pyrosome.ops.experts.weight_tiles import block_scale, weight_tile
from pyrosome.ops.experts.word_order import ordered_rows
from pyrosome.quant import FORMATS, QuantTensor, round_activation, unchanged
from tests.ops.gpu.held import CAPABILITIES, DEVICE, kernels, rms, same_bits

LIMIT = 2.0  # a limit that many activations exceed
KINDS = ("fp4", "fp8", "bf16", "f32", "f16")
FLOATS = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
# In the interpreter those for little shared memory are the same as others: it knows no stages.
SAME = ["32-short", "64-split-short", "16-wide"] if DEVICE.type == "cpu" else []
TILINGS = [name for name in VARIANTS if name not in ("plain", "16-narrow", *SAME)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(kind, w):
    if kind in FLOATS:
        return w.to(DEVICE, FLOATS[kind])
    return QuantTensor(kind, *FORMATS[kind].quantize(w)).to(DEVICE)


def bank(kind, E, D, I, prepare=round_activation, **which):  # noqa: E741
    shapes = (I, D), (I, D), (D, I)
    return ExpertWeights(*(stored(kind, uneven(E, *s, seed=i + 1)) for i, s in enumerate(shapes)), prepare, **which)


def uneven(E, N, K, seed):
    """Weights whose blocks and groups have scales of their own."""
    size = torch.randint(-5, 0, (E, -(-N // 8), -(-K // 8)), generator=torch.Generator().manual_seed(seed))
    size[:, 16:] += 3
    size[..., 16:] += 2
    return draw(E, N, K, seed=seed) * size.exp2().repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :N, :K]


def one(weights, e=0):
    """Expert `e` of a bank, alone."""

    def pick(w):
        return QuantTensor(w.format, w.data[e], w.scale[e]) if isinstance(w, QuantTensor) else w[e]

    return ExpertWeights(*(pick(w) for w in weights[:3]), weights.prepare)


def routing(T, K, E, absent=0.2, seed=0):
    """Different experts for each token, a share of them absent, and their weights."""
    g = torch.Generator().manual_seed(seed)
    expert = torch.rand(T, E, generator=g).argsort(1)[:, :K]
    expert = expert.masked_fill(torch.rand(T, K, generator=g) < absent, -1)
    return expert.to(DEVICE), torch.rand(T, K, generator=g).to(DEVICE)


def alike(found, wanted, tolerance=1e-6):
    return found.shape == wanted.shape and found.dtype == wanted.dtype and rms(found, wanted) < tolerance


def same(found, wanted):
    """To the bit on a device.  The interpreter's products are numpy's, whose bits are of the shapes of tiles."""
    return alike(found, wanted) if DEVICE.type == "cpu" else same_bits(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prepare", [round_activation, unchanged])
@pytest.mark.parametrize("T", [1, 8])
def test_routed_experts_of_every_kind(kind, prepare, T):
    """Each pair a tile of its own, and pairs sorted; shapes that end inside of blocks and groups."""
    x, weights, (expert, weight) = draw(T, 136).to(DEVICE), bank(kind, 4, 136, 72, prepare), routing(T, 3, 4)
    with kernels(routed_experts):
        assert routed_experts.chosen(x, weights) == "triton"
        found = routed_experts(x, weights, expert, weight, LIMIT)
    assert alike(found, routed_experts.definition(x, weights, expert, weight, LIMIT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prepare", [round_activation, unchanged])
def test_shared_expert_of_every_kind(kind, prepare):
    x, expert = draw(3, 520).to(DEVICE), one(bank(kind, 1, 520, 72, prepare))
    with kernels(shared_expert):
        found = shared_expert(x, expert, LIMIT)
    assert alike(found, shared_expert.definition(x, expert, LIMIT))


@pytest.mark.parametrize("T", [1, 19])
def test_shared_expert_is_added_to_what_there_is(T):
    x, expert, onto = draw(T, 72).to(DEVICE), one(bank("fp8", 1, 72, 40)), draw(T, 144).to(DEVICE)[:, ::2]
    with kernels(shared_expert):
        found = shared_expert(x, expert, LIMIT, onto)
    assert alike(found, shared_expert.definition(x, expert, LIMIT, onto))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("T", "E"), [(18, 1), (70, 1), (14, 2)])
def test_tiles_of_the_size_that_a_load_asks_for(T, E, capability):
    x, weights, (expert, weight) = draw(T, 32).to(DEVICE), bank("fp4", E, 32, 24), routing(T, 1, E)
    with kernels(routed_experts, capability):
        found = routed_experts(x, weights, expert, weight, LIMIT)
    assert alike(found, routed_experts.definition(x, weights, expert, weight, LIMIT))


@functools.cache
def by_tiling(name):
    """Sizes that fit blocks of 256 inputs, and experts whose inputs of one product are cut into segments."""
    x, weights, (expert, weight) = draw(8, 256).to(DEVICE), bank("fp4", 2, 256, 256), routing(8, 2, 2, absent=0.1)
    y, z = draw(17, 520, seed=7).to(DEVICE), draw(17, 24, seed=8).to(DEVICE)
    wide, deep = one(bank("fp8", 1, 520, 24)), one(bank("fp8", 1, 24, 520))
    assert (segments(addresses_of(wide[:3])), segments(addresses_of(deep[:3]))) == ((2, 1), (1, 2))
    with kernels(routed_experts), kernels(shared_expert), gpu.forced(routed_experts=name, shared_expert=name):
        found = (
            routed_experts(x, weights, expert, weight, LIMIT),
            shared_expert(y, wide, LIMIT),
            shared_expert(z, deep, LIMIT, z),
        )
    wanted = (
        routed_experts.definition(x, weights, expert, weight, LIMIT),
        shared_expert.definition(y, wide, LIMIT),
        shared_expert.definition(z, deep, LIMIT, z),
    )
    assert all(map(alike, found, wanted))
    return found


@pytest.mark.parametrize("name", TILINGS)
def test_every_tiling_gives_the_same(name):
    for found, wanted in zip(by_tiling(name), by_tiling(TILINGS[0]), strict=True):
        assert same(found, wanted)


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_a_token_has_the_same_bits_whatever_is_beside_it(kind):
    T = 18
    x, weights, (expert, weight) = draw(T, 40).to(DEVICE), bank(kind, 2, 40, 24), routing(T, 1, 2)
    alone = one(weights)
    with kernels(routed_experts), kernels(shared_expert):
        together = routed_experts(x, weights, expert, weight, LIMIT), shared_expert(x, alone, LIMIT)
        for t in (0, 17):
            row = slice(t, t + 1)
            assert same(routed_experts(x[row], weights, expert[row], weight[row], LIMIT), together[0][row])
            assert same(shared_expert(x[row], alone, LIMIT), together[1][row])
        turned = routed_experts(x.flip(0), weights, expert.flip(0), weight.flip(0), LIMIT).flip(0)
    assert same(turned, together[0])


def test_what_w2_reads_is_rounded_behind_the_weight():
    """To the bit the definition's: one input makes every sum exact."""
    weights = bank("fp4", 2, 8, 256)
    x = torch.zeros(3, 8)
    x[:, 0] = torch.tensor([1.0, -2.0, 0.5])
    expert, weight = torch.tensor([[0], [1], [0]], device=DEVICE), draw(3, 1, seed=3).to(DEVICE)
    with kernels(routed_experts):
        found = routed_experts(x.to(DEVICE), weights, expert, weight, LIMIT)
    wanted = routed_experts.definition(x.to(DEVICE), weights, expert, weight, LIMIT)
    outside = weight * routed_experts.definition(x.to(DEVICE), weights, expert, torch.ones_like(weight), LIMIT)
    assert alike(found, wanted)
    assert rms(outside, wanted) > 1e-3


# --- where a token's rows are added


@pytest.mark.parametrize(("E", "total", "first", "K"), [(64, 64, 0, 40), (5, 5, 0, 4), (3, 8, 4, 8), (8, 16, 8, 6)])
def test_rows_are_added_to_the_bit_as_the_definition_adds_them(E, total, first, K):
    T, D = 5, 40
    rows = draw(T * K, D).to(DEVICE)
    g = torch.Generator().manual_seed(2)
    expert = torch.randint(-1, total, (T, K), generator=g).to(DEVICE)  # some of them twice
    out = torch.empty(T, D, device=DEVICE)
    gpu.launch(
        products.combine, (T, 1), rows, expert, out, first, E=E, TOTAL=total, K=K, D=D, BLOCK_E=gpu.pow2(K), BLOCK=64,
        variant=_ROW,
    )  # fmt: skip
    like = ExpertWeights(torch.empty(E, 1, 1, device=DEVICE), None, None, unchanged, first, total)
    place, rank = module.held(expert, like).sort(dim=1, stable=True)
    shard = (expert.clamp(min=0) * 8 // total).gather(1, rank)
    pair = torch.arange(T * K, device=DEVICE).view(T, K).gather(1, rank)
    row = torch.where(place >= 0, pair, T * K)
    assert same_bits(out, module._combine(torch.cat([rows, rows.new_zeros(1, D)]), row, shard))


@pytest.mark.parametrize("T", [2, 8])
def test_parts_of_a_bank_add_up_to_the_whole(T):
    whole = bank("fp4", 6, 64, 40)
    x, (expert, weight) = draw(T, 64).to(DEVICE), routing(T, 3, 6)
    parts = []
    with kernels(routed_experts):
        for first, last in ((0, 2), (2, 3), (3, 6)):
            held = [QuantTensor("fp4", w.data[first:last], w.scale[first:last]) for w in whole[:3]]
            part = ExpertWeights(*held, round_activation, first, 6)
            parts.append(routed_experts(x, part, expert, weight, LIMIT))
            assert alike(parts[-1], routed_experts.definition(x, part, expert, weight, LIMIT))
    assert alike(sum(parts), routed_experts.definition(x, whole, expert, weight, LIMIT))


def test_an_expert_named_twice_counts_twice():
    x, weights = draw(9, 64).to(DEVICE), bank("fp8", 3, 64, 40, unchanged)
    twice, share = torch.full((9, 2), 1, device=DEVICE), torch.full((9, 2), 0.25, device=DEVICE)
    with kernels(routed_experts):
        found = routed_experts(x, weights, twice, share, LIMIT)
        once = routed_experts(x, weights, twice[:, :1], share[:, :1], LIMIT)
    assert alike(found, 2 * once)


# --- how pairs are sorted


def brute(expert, first, E, rows):
    """(expert, pairs) of each tile."""
    tiles = []
    for e in range(E):
        pairs = [p for p, x in enumerate(expert) if x == e + first and x >= 0]
        tiles += [(e, pairs[i : i + rows]) for i in range(0, len(pairs), rows)]
    return tiles


@pytest.mark.parametrize("N", [1, 13, 127, 128, 129, 513, 1100])
@pytest.mark.parametrize(("E", "first", "rows"), [(1, 0, 16), (5, 2, 16), (40, 0, 32)])
def test_pairs_are_sorted_into_tiles_of_one_expert(N, E, first, rows):
    g = torch.Generator().manual_seed(N)
    expert = torch.randint(-1, E + 4, (N,), generator=g)
    expert[: N // 3] = first  # more than a tile's worth of one
    order, tile = (t.cpu() for t in sorted_pairs(expert.to(DEVICE), first, E, rows))
    found = [(e, order[begin:end].tolist()) for e, begin, end in tile.tolist() if end > begin]
    assert found == brute(expert.tolist(), first, E, rows)
    assert all(end == 0 for _, _, end in tile[len(found) :].tolist())


@pytest.mark.parametrize("load", [[0] * 40, [-1] * 40, [9] * 40, [*range(16), *range(16), 0, 0, 0, -1]])
def test_loads_of_one_of_none_and_of_all(load):
    order, tile = (t.cpu() for t in sorted_pairs(torch.tensor(load, device=DEVICE), 0, 16, 16))
    found = [(e, order[begin:end].tolist()) for e, begin, end in tile.tolist() if end > begin]
    assert found == brute(load, 0, 16, 16)


# --- weights in registers


@gpu.jit
def _values(
    data_ptr, scale_ptr, out_ptr, FORMAT: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, BYTES: tl.constexpr,
    SCALES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    scale = scale_ptr + e * SCALES
    value = weight_tile(data_ptr + e * BYTES, scale, 0, 0, ROWS, INPUTS, FORMAT, ROWS, INPUTS, UPCAST).to(tl.float32)
    if FORMAT == "fp8":
        value *= block_scale(scale, 0, 0, INPUTS, INPUTS)
    at = tl.arange(0, ROWS)[:, None] * INPUTS + tl.arange(0, INPUTS)[None, :]
    tl.store(out_ptr + e * ROWS * INPUTS + at, value)


def values(weight):
    """What kernels read of a stack [E, N, K] of powers of two."""
    E, N, K = weight.shape
    data, scale = weight.data.view(torch.uint8), weight.scale.view(torch.uint8)
    found = torch.empty(E, N, K, device=DEVICE)
    gpu.launch(
        _values, (E,), data, scale, found, FORMAT=weight.format, ROWS=N, INPUTS=K, BYTES=data[0].numel(),
        SCALES=scale[0].numel(), UPCAST=DEVICE.type == "cpu", variant=gpu.Variant("all", {}, warps=4, stages=1),
    )  # fmt: skip
    return found


def in_word_order(x, codes=8):
    """Input C q + C / 2 h + i of each 4 C at place 8 i + 2 q + h."""
    return x.unflatten(-1, (-1, 4, 2, codes // 2)).movedim(-1, -3).flatten(-4)


def test_every_fp4_code_under_every_scale():
    byte = torch.arange(256, dtype=torch.uint8)
    data = byte.view(1, 16, 16).expand(256, 16, 16).reshape(32, 128, 16).to(DEVICE)
    scale = byte.view(256, 1).expand(256, 16).reshape(32, 128, 1).to(DEVICE)
    weight = QuantTensor("fp4", data.view(torch.int8), scale.view(torch.float8_e8m0fnu))
    found, exact = values(weight), in_word_order(weight.dequantize())
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.nan_to_num(nan=7.0, posinf=torch.inf), exact.nan_to_num(nan=7.0, posinf=torch.inf))


def test_every_fp8_code_under_every_scale():
    byte = torch.arange(256, dtype=torch.uint8)
    # Each code at each place of a word, under a quarter of the scales.
    data = torch.stack([byte.roll(e % 4) for e in range(256)]).view(256, 2, 128).to(DEVICE)
    weight = QuantTensor(
        "fp8", data.view(torch.float8_e4m3fn), byte.view(256, 1, 1).to(DEVICE).view(torch.float8_e8m0fnu)
    )
    found, exact = values(weight), in_word_order(weight.dequantize(), 4)
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.nan_to_num(nan=7.0, posinf=torch.inf), exact.nan_to_num(nan=7.0, posinf=torch.inf))


@pytest.mark.parametrize(("K", "codes"), [(8, 8), (40, 4), (128, 4), (1032, 8)])
def test_rows_in_word_order(K, codes):
    x = draw(3, K) * 3
    x[1, 3] = torch.inf
    padded = torch.nn.functional.pad(x, (0, -K % 128))
    rounded = ordered_rows(x.to(DEVICE), codes, rounded=True).float().cpu()
    wanted = in_word_order(torch.nn.functional.pad(round_activation(x), (0, -K % 128)), codes)
    real = (
        in_word_order(torch.arange(padded.shape[1]), codes) < K
    )  # past the end of a group that is no number, anything
    assert torch.equal(rounded[:, real].nan_to_num(7.0), wanted[:, real].nan_to_num(7.0))
    assert torch.equal(rounded[[0, 2]], wanted[[0, 2]])
    parts = ordered_rows(x.to(DEVICE), codes, rounded=False).float().cpu()
    assert torch.equal(parts.double().sum(0), in_word_order(padded, codes).double())


# --- what else may be given


def test_poison_in_padding_does_not_spread():
    """Padding tokens, the weights beside absent experts and the experts nobody asked for may hold anything."""
    x, weights, (expert, weight) = draw(9, 64).to(DEVICE), bank("bf16", 8, 64, 40), routing(9, 2, 6)
    expert[0] = -1
    clean = routed_experts.definition(x, weights, expert, weight, LIMIT)
    x[0] = float("nan")
    weight[expert < 0] = float("nan")
    for w in weights[:3]:
        w[6:] = float("nan")
    with kernels(routed_experts):
        assert alike(routed_experts(x, weights, expert, weight, LIMIT), clean)
        assert alike(routed_experts(x[:4], weights, expert[:4], weight[:4], LIMIT), clean[:4])


@pytest.mark.parametrize("prepare", [round_activation, unchanged])
def test_no_number_in_a_row_is_none_in_its_result_alone(prepare):
    x, weights, (expert, weight) = draw(8, 64).to(DEVICE), bank("fp8", 4, 64, 40, prepare), routing(8, 2, 4, absent=0.0)
    x[3, 5], x[5, 1] = torch.nan, torch.inf
    with kernels(routed_experts):
        found = routed_experts(x, weights, expert, weight, LIMIT)
    wanted = routed_experts.definition(x, weights, expert, weight, LIMIT)
    assert found[3].isnan().all()
    assert torch.equal(found.isnan().any(1), wanted.isnan().any(1))
    fine = ~wanted.isnan().any(1)
    assert alike(found[fine], wanted[fine])


def test_experts_that_lie_apart():
    """A table points at them: in any order, in pieces of memory of their own."""
    weights, (expert, weight) = bank("fp4", 3, 64, 40), routing(8, 2, 3)
    apart = [(torch.empty(5000 * (e + 1), dtype=torch.uint8), one(weights, e)) for e in (2, 0, 1)]
    alone = {e: addresses_of(experts[:3]) for e, (_, experts) in zip((2, 0, 1), apart, strict=True)}
    table = torch.cat([alone[e].table_6E for e in range(3)], 1).contiguous()
    at = alone[0]._replace(table_6E=table, aligned=False)
    x = draw(8, 64).to(DEVICE)
    with kernels(routed_experts):
        found = routed_at(x, at, round_activation, expert, weight, LIMIT, 0, 3)
    assert alike(found, routed_experts.definition(x, weights, expert, weight, LIMIT))


def test_experts_further_apart_than_32_bits_count():
    stride = 3 << 30
    near = bank("fp4", 2, 64, 40)

    def far(w):
        room = torch.empty(stride + w.data[0].numel(), dtype=torch.int8, device=DEVICE)  # touched at both ends only
        data = room.as_strided(w.data.shape, (stride, w.data.shape[2], 1))
        return QuantTensor("fp4", data.copy_(w.data), w.scale)

    weights = ExpertWeights(far(near.w1), near.w3, near.w2, round_activation)
    x, expert, weight = draw(2, 64).to(DEVICE), torch.tensor([[1], [0]], device=DEVICE), torch.ones(2, 1, device=DEVICE)
    with kernels(routed_experts):
        found = routed_experts(x, weights, expert, weight, LIMIT)
    assert alike(found, routed_experts.definition(x, near, expert, weight, LIMIT))


def test_more_rows_than_32_bits_count_elements_of():
    N = (1 << 24) + 2  # of 128 channels; the last is the only one in a tile
    h = torch.empty(N, 128, dtype=torch.bfloat16, device=DEVICE)
    h[-1] = torch.arange(128.0) - 60
    weights, out = bank("bf16", 1, 16, 128, unchanged), torch.empty(N, 16, device=DEVICE)
    order, tile = torch.tensor([N - 1, 0]), torch.tensor([[0, 0, 1]])
    with kernels(routed_experts):
        gpu.launch(
            products.down, (1, 1), addresses_of(weights[:3]).table_6E, h, None, order.int().to(DEVICE),
            tile.int().to(DEVICE), None, out, None, N, 0, E=1, D=16, INNER=128, MODE="sorted",
            FORMAT="bf16", PARTS=1, SEGMENTS=1, ALIGN=1, UPCAST=DEVICE.type == "cpu",
            variant=TILINGS_OF["16-short"].down,
        )  # fmt: skip
    assert alike(out[-1], weights.w2[0].float() @ h[-1].float())


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_codes_may_begin_anywhere_and_their_experts_lie_anyhow(kind):
    """They are read by words, and copied where no word begins."""
    weights, (expert, weight), x = bank(kind, 3, 64, 40), routing(3, 2, 3), draw(3, 64).to(DEVICE)

    def moved(t, by, gap):
        room = torch.empty(t.shape[0], t[0].numel() + by + gap, dtype=torch.uint8, device=DEVICE)[:, by : -gap or None]
        return room.unflatten(1, t.shape[1:]).copy_(t.view(torch.uint8)).view(t.dtype)

    places = zip(weights[:3], (4, 1, 4), (0, 3, 1), strict=True)
    off = [QuantTensor(kind, moved(w.data, by, gap), w.scale) for w, by, gap in places]
    assert [w.data.data_ptr() % 4 for w in off] == [0, 1, 0]
    assert [bool((t % 4).any()) for t in addresses_of(off).table_6E[::2]] == [False] * 3
    with kernels(routed_experts):
        found = routed_experts(x, ExpertWeights(*off, round_activation), expert, weight, LIMIT)
    assert alike(found, routed_experts.definition(x, weights, expert, weight, LIMIT))


def test_anything_may_lie_apart_and_begin_anywhere():
    weights, (expert, weight) = bank("fp4", 3, 64, 40), routing(9, 2, 3)

    def moved(t, by):
        room = torch.empty(t.numel() + by, dtype=torch.uint8, device=DEVICE)[by:]
        return room.view(t.shape).copy_(t.view(torch.uint8)).view(t.dtype)

    off = [QuantTensor("fp4", moved(w.data, 1 + 4 * i), moved(w.scale, 1)) for i, w in enumerate(weights[:3])]
    assert not (addresses_of(off).table_6E[::2] % 4).any()  # where words may be read
    x = draw(9, 130).to(DEVICE)[:, 1:129:2]
    wide = torch.stack([expert, expert], 1)[:, 1], torch.stack([weight, weight], 2)[..., 0]
    with kernels(routed_experts):
        found = routed_experts(x, ExpertWeights(*off, round_activation), *wide, LIMIT)
    assert alike(found, routed_experts.definition(x, weights, expert, weight, LIMIT))
    turned = bank("f32", 2, 24, 16, unchanged)
    turned = turned._replace(w1=turned.w1.transpose(1, 2).contiguous().transpose(1, 2))
    with kernels(routed_experts):
        found = routed_experts(x[:, :24], turned, expert.clamp(max=1), weight, LIMIT)
    assert alike(found, routed_experts.definition(x[:, :24], turned, expert.clamp(max=1), weight, LIMIT))


def test_nobody_and_nothing():
    weights = bank("fp4", 3, 64, 40)
    with kernels(routed_experts), kernels(shared_expert):
        for T in (1, 9):
            none = torch.full((T, 2), -1, device=DEVICE)
            found = routed_experts(draw(T, 64).to(DEVICE), weights, none, torch.ones(T, 2, device=DEVICE), LIMIT)
            assert torch.equal(found.cpu(), torch.zeros(T, 64))
        empty = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), torch.zeros(0, 2, device=DEVICE)
        assert routed_experts(draw(0, 64).to(DEVICE), weights, *empty, LIMIT).shape == (0, 64)
        assert shared_expert(draw(0, 64).to(DEVICE), one(weights), LIMIT).shape == (0, 64)
        gone = ExpertWeights(*(w[:0] for w in bank("bf16", 1, 64, 40)[:3]), unchanged, 3, 4)
        found = routed_experts(draw(2, 64).to(DEVICE), gone, *routing(2, 2, 4), LIMIT)
        assert torch.equal(found.cpu(), torch.zeros(2, 64))


def test_shapes_that_do_not_fit_are_refused():
    weights, (expert, weight) = bank("fp4", 3, 64, 40), routing(2, 2, 3)
    x = draw(2, 64).to(DEVICE)
    with kernels(routed_experts), kernels(shared_expert):
        with pytest.raises(RuntimeError, match=r"rows \(2, 32\), choices .* experts of 64 inputs"):
            routed_experts(x[:, :32], weights, expert, weight, LIMIT)
        with pytest.raises(RuntimeError, match=r"weights \(2, 1\)"):
            routed_experts(x, weights, expert, weight[:, :1], LIMIT)
        with pytest.raises(RuntimeError, match=r"w1, w3 and w2 of \(3, 40, 64\), \(3, 40, 64\), \(3, 40, 64\)"):
            routed_experts(x, weights._replace(w2=weights.w1), expert, weight, LIMIT)
        with pytest.raises(RuntimeError, match=r"rows \(2, 63\)"):
            shared_expert(x[:, :63], one(weights), LIMIT)
        with pytest.raises(RuntimeError, match=r"added to \(1, 64\)"):
            shared_expert(x, one(weights), LIMIT, x[:1])


def test_what_no_kernel_reads_runs_by_the_definition():
    weights, (expert, weight) = bank("fp4", 3, 64, 40), routing(2, 2, 3)
    x = draw(2, 64).to(DEVICE)
    mixed = weights._replace(w2=bank("bf16", 3, 64, 40).w2)
    coarse = weights._replace(prepare=lambda x: (x * 4).round() / 4)
    odd, odd8 = bank("fp4", 3, 36, 10), bank("fp8", 3, 36, 10)  # whose rows are no whole words
    with kernels(routed_experts), kernels(shared_expert):
        for given, rows in ((mixed, x), (coarse, x), (odd, x[:, :36]), (odd8, x[:, :36])):
            wanted = routed_experts.definition(rows, given, expert, weight, LIMIT)
            assert torch.equal(routed_experts(rows, given, expert, weight, LIMIT), wanted)
            assert torch.equal(
                shared_expert(rows, one(given), LIMIT), shared_expert.definition(rows, one(given), LIMIT)
            )


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_nothing_is_read_back(capability):
    """On meta tensors there is nothing to read: every load is launched by its shape alone."""
    meta = torch.device("meta")
    data, scale = torch.empty(8, 40, 32, dtype=torch.int8), torch.empty(8, 40, 2, dtype=torch.float8_e8m0fnu)
    w = QuantTensor("fp4", data, scale).to(meta)
    w2 = QuantTensor("fp4", torch.empty(8, 64, 20, dtype=torch.int8), torch.empty(8, 64, 2, dtype=torch.uint8)).to(meta)
    weights = ExpertWeights(w, w, w2, round_activation)
    for T in (1, 10, 100, 1000):
        expert, weight = torch.empty(T, 2, dtype=torch.int64, device=meta), torch.empty(T, 2, device=meta)
        with gpu.tracing(capability) as launches:
            out = gpu.of(routed_experts)(torch.empty(T, 64, device=meta), weights, expert, weight, LIMIT)
        assert out.shape == (T, 64)
        names = [launch.kernel.__name__.strip("_") for launch in launches]
        sorting = [] if T == 1 else ["sort"] if T <= 100 else ["count", "sort"]
        joining = ["join"] if T <= 10 else []
        assert names == [*sorting, "ordered", "gate_up", *joining, "down", "combine"]


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("prepare", [round_activation, unchanged])
@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_most_memory_has_few_columns(kind, prepare, capability):
    """Rows of three parts, and weights that are no codes, do not fit beside as many columns as official weights do."""
    meta = torch.device("meta")
    dense = kind in FLOATS
    w = torch.empty(8, 64, 64, dtype=FLOATS.get(kind), device=meta) if dense else bank(kind, 8, 64, 64).w1.to(meta)
    columns = set()
    for T in (1, 10, 100, 1000, 10000):
        expert, weight = torch.empty(T, 2, dtype=torch.int64, device=meta), torch.empty(T, 2, device=meta)
        with gpu.tracing(capability) as launches:
            x = torch.empty(T, 64, device=meta)
            gpu.of(routed_experts)(x, ExpertWeights(w, w, w, prepare), expert, weight, LIMIT)
            gpu.of(shared_expert)(x, one(ExpertWeights(w, w, w, prepare)), LIMIT)
        columns |= {launch.variant.constants.get("BLOCK_T", 0) for launch in launches}
    assert (max(columns) > 16) == (prepare is round_activation and not dense)


def test_clamped_swiglu():
    gate, up = draw(3, 700).to(DEVICE) * 3, draw(3, 700, seed=1).to(DEVICE) * 3
    gate[0, :5] = torch.tensor([torch.nan, torch.inf, -50.0, 0.0, -200.0])
    up[1, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with kernels(clamped_swiglu):
        found = clamped_swiglu(gate, up, LIMIT)
        wanted = clamped_swiglu.definition(gate, up, LIMIT)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert alike(found.nan_to_num(), wanted.nan_to_num())
        apart = gate[1:, ::2], up[1:, 1::2]
        found = clamped_swiglu(*apart, LIMIT).nan_to_num()
        assert alike(found, clamped_swiglu.definition(*apart, LIMIT).nan_to_num())
        assert clamped_swiglu(gate[:0], up[:0], LIMIT).shape == (0, 700)
        broad = clamped_swiglu(gate[2:, :1], up[2:], LIMIT)
        assert torch.equal(broad, clamped_swiglu.definition(gate[2:, :1], up[2:], LIMIT))
