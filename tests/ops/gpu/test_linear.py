"""Products by Triton equal their definitions, for every way a weight is stored and every number of tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyrosome.ops import gpu
from pyrosome.ops.linear import grouped_linear, linear, linears, scaled
from pyrosome.ops.linear import triton as made
from pyrosome.ops.linear.products import MOST, MOST_SUMS, code_products, value_products
from pyrosome.ops.rms_norm import rms_norm
from pyrosome.quant import FORMATS, QuantTensor, round_activation, unchanged
from pyrosome.quant.tiles import tile
from pyrosome.testing import ahead
from tests.ops.gpu.held import CAPABILITIES, DEVICE, kernels, rms, same_bits

PLAIN = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
CAPABILITY = CAPABILITIES[-1]
# FP8 is multiplied in another way where there are no instructions for it; nothing else asks what there is.
STORED = [(CAPABILITY, name) for name in ("fp8", "fp4", "bf16", "f32", "f16")] + [(CAPABILITIES[0], "fp8")]
STORED = list(dict.fromkeys(STORED))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(name: str, N: int, K: int, seed: int = 1):
    """A weight on DEVICE whose blocks have scales of their own."""
    weight = drawn(N, K, seed=seed) * torch.exp2(torch.arange(N)[:, None] // 32 % 7 + torch.arange(K) // 32 % 5)
    if name in FORMATS:
        return QuantTensor(name, *FORMATS[name].quantize(weight)).to(DEVICE)
    return weight.to(PLAIN[name]).to(DEVICE)


def exactly(x, weight, prepare=unchanged):
    """The definition in float64, of inputs rounded in float32 where they are."""
    wide = weight.dequantize(torch.float64) if isinstance(weight, QuantTensor) else weight.double()
    return linear.definition(prepare(x).double(), wide)


def near(found, wanted, *, by_codes=False) -> bool:
    """Equal but for the order of sums.  Matrix units of a device cut off what their sums cannot hold, a last bit with
    each instruction; Hopper's keep 14 bits or so of 128 products of codes.
    """
    return rms(found, wanted) < (3e-7 if DEVICE.type == "cpu" else 1e-3 if by_codes else 3e-6)


def are_codes(name, prepare) -> bool:
    """Whether such a product may be one of codes."""
    return name == "fp8" and prepare is round_activation


def agree(found, wanted) -> bool:
    """To the bit on a device.  The interpreter multiplies by numpy, whose sums depend on the shapes of tiles."""
    return same_bits(found, wanted) if DEVICE.type == "cuda" else rms(found, wanted) < 1e-6


@pytest.mark.parametrize(("capability", "name"), STORED)
@pytest.mark.parametrize("prepare", [unchanged, round_activation])
@pytest.mark.parametrize(("M", "N", "K"), [(2, 144, 128), (18, 70, 300)])
def test_each_way_a_weight_is_stored(capability, name, prepare, M, N, K):
    x, weight = drawn(M, K).to(DEVICE), stored(name, N, K)
    with kernels(linear, capability):
        assert linear.chosen(x, weight) == "triton"
        found = linear(x, weight, prepare)
    assert found.dtype == torch.float32
    assert near(found, exactly(x, weight, prepare), by_codes=are_codes(name, prepare))
    if prepare is round_activation:
        assert rms(found, exactly(x, weight)) > 1e-3


@pytest.mark.parametrize(
    ("capability", "name", "prepare"),
    [
        (CAPABILITIES[0], "fp8", round_activation),
        (CAPABILITY, "fp8", round_activation),
        (CAPABILITY, "fp8", unchanged),
        (CAPABILITY, "f32", unchanged),
    ],
)
def test_every_variant_has_the_same_sums(capability, name, prepare):
    x, weight = drawn(17, 256).to(DEVICE), stored(name, 66, 256)
    assert made.segments(66, 256) == 2
    kinds = {
        "code_products": made.CODE_VARIANTS,
        "value_products": made.VALUE_VARIANTS,
        "float_products": made.FLOAT_VARIANTS,
    }
    found = []
    with kernels(linear, capability), gpu.forced(**dict.fromkeys(kinds, "few")):
        found.append(linear(x, weight, prepare))
        # Which of the kernels it is: the one whose variant counts.
        target = gpu.target(x.device)
        need = made._need(made._stored(weight, 256), prepare, target)
        kind = "code_products" if need.form == "columns" else f"{'float' if need.kind == 'f32' else 'value'}_products"
        for variant in kinds[kind]:
            with gpu.forced(**{kind: variant}):
                found.append(linear(x, weight, prepare))
    assert all(agree(other, found[0]) for other in found)
    assert near(found[0], exactly(x, weight, prepare), by_codes=are_codes(name, prepare))


@pytest.mark.parametrize(("name", "prepare"), [("fp8", round_activation), ("bf16", unchanged), ("f32", unchanged)])
def test_a_token_has_the_same_bits_alone_and_among_many(name, prepare, monkeypatch):
    """Few tokens leave segments to be added by a second kernel; many have theirs added at once."""
    x, weight = drawn(70, 512).to(DEVICE), stored(name, 66, 512)
    monkeypatch.setattr(made, "_MOST_SPLIT", 64)
    monkeypatch.setattr(made, "segments", lambda N, K: 2)  # each of two blocks
    with kernels(linear, CAPABILITY):
        together = linear(x, weight, prepare)
        for count in (1, 17):
            assert agree(linear(x[5 : 5 + count], weight, prepare), together[5 : 5 + count])
    assert near(together, exactly(x, weight, prepare), by_codes=are_codes(name, prepare))


@pytest.mark.parametrize("M", [1, 70])
@pytest.mark.parametrize(("name", "prepare"), [("fp8", round_activation), ("bf16", unchanged), ("f32", unchanged)])
def test_each_segment_is_summed_before_it_is_added(name, prepare, M, monkeypatch):
    """Blocks of 0, 1, 2^30 and -2^30: summed one after the other they would lose the 1."""
    x, weight = torch.zeros(M, 512), torch.zeros(16, 512)
    for block, value in enumerate((0.0, 1.0, 2.0**15, -(2.0**15))):
        x[:, 128 * block], weight[:, 128 * block] = abs(value), value
    held = QuantTensor(name, *FORMATS[name].quantize(weight)) if name in FORMATS else weight.to(PLAIN[name])
    monkeypatch.setattr(made, "_MOST_SPLIT", 64)
    monkeypatch.setattr(made, "segments", lambda N, K: 2)
    with kernels(linear, CAPABILITY):
        assert linear(x.to(DEVICE), held.to(DEVICE), prepare).unique().tolist() == [1.0]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_several_weights_of_all_kinds_behind_a_norm(capability):
    sizes = [("fp8", 130), ("bf16", 64), ("fp8", 40), ("fp4", 33), ("f32", 20), ("bf16", 7), ("fp8", 256)]
    weights = [(stored(n, N, 256, seed=i), unchanged) for i, (n, N) in enumerate(sizes)]
    weights = [
        (w, round_activation if isinstance(w, QuantTensor) and i != 2 else p) for i, (w, p) in enumerate(weights)
    ]
    x, norm = drawn(2, 256).to(DEVICE), drawn(256, seed=9).to(DEVICE)
    with kernels(linears, capability), kernels(rms_norm, capability), kernels(linear, capability):
        assert linears.chosen(x, weights) == "triton"
        found = linears(x, weights, norm, 1e-6)
        normed = rms_norm(x, norm, 1e-6)
        for out, (weight, prepare) in zip(found, weights, strict=True):
            assert out.is_contiguous()
            # On a device the norms of two kernels may differ by a last bit, and turn a rounding.
            assert DEVICE.type == "cuda" or agree(out, linear(normed, weight, prepare))
            assert rms(out, exactly(normed, weight, prepare)) < (1e-2 if DEVICE.type == "cuda" else 3e-7)


def test_more_weights_than_a_launch_has_room_for():
    assert MOST_SUMS > MOST
    weights = [(stored("bf16", 5 + 60 * (i % 3), 256, seed=i), unchanged) for i in range(MOST_SUMS + 1)]
    x = drawn(1, 256).to(DEVICE)
    with kernels(linears, CAPABILITY), kernels(linear, CAPABILITY):
        for out, (weight, _) in zip(linears(x, weights), weights, strict=True):
            assert same_bits(out, linear(x, weight))


@pytest.mark.parametrize("M", [1, 130])
def test_programs_of_many_tokens_find_their_tiles(M):
    """More tiles of tokens than stand side by side, and weights of different heights."""
    weights = [(stored("fp8", N, 40, seed=N), round_activation) for N in (66, 10)]
    x = drawn(M, 40).to(DEVICE)
    with kernels(linears, CAPABILITIES[-1]), gpu.forced(code_products="few", value_products="few"):
        for out, (weight, prepare) in zip(linears(x, weights), weights, strict=True):
            assert near(out, exactly(x, weight, prepare), by_codes=True)


def test_what_an_attention_layer_reads_costs_four_launches():
    """One for the rows, one for weights of a kind, one for the segments of all of them."""
    weights = [(stored("fp8", N, 256), round_activation) for N in (48, 32)]
    weights += [(stored("bf16", N, 256), unchanged) for N in (16, 16, 64)]
    meta = [(w.to("meta"), prepare) for w, prepare in weights]
    with gpu.tracing(90) as launches:
        made.linears(torch.empty(1, 256, device="meta"), meta)
    assert [x.kernel.__name__.strip("_") for x in launches] == ["rows", "code_products", "value_products", "sums"]


@pytest.mark.parametrize("M", [1, 64, 4096])
@pytest.mark.parametrize("prepare", [unchanged, round_activation])
def test_shapes_do_not_make_a_kernel_compile_again(M, prepare):
    def launched(*sizes):
        with gpu.tracing(90) as launches:
            weights = [(stored("fp8", N, 256).to("meta"), prepare) for N in sizes]
            made.linears(torch.empty(M, 256, device="meta"), weights)
        return {ahead.key_of(launch) for launch in launches}

    assert launched(128) == launched(256, 16) == launched(144, 32, 48, 16)


@pytest.mark.parametrize(("capability", "name"), STORED)
@pytest.mark.parametrize(("T", "G", "N", "K"), [(1, 2, 128, 256), (3, 3, 50, 100)])
def test_groups_have_inputs_of_their_own(capability, name, T, G, N, K):
    x, weight = drawn(T, G, K).to(DEVICE), stored(name, G * N, K)
    with kernels(grouped_linear, capability):
        assert grouped_linear.chosen(x, weight) == "triton"
        found = grouped_linear(x, weight)
        wide = weight.dequantize(torch.float64) if isinstance(weight, QuantTensor) else weight.double()
        assert near(found, grouped_linear.definition(x.double(), wide))
        x[:, G - 1] = 7.0
        assert same_bits(grouped_linear(x, weight)[:, : G - 1], found[:, : G - 1])


def test_inputs_that_bfloat16_holds_skip_what_is_zero_and_have_the_same_bits():
    x, weight = drawn(20, 1, 64).bfloat16().float().to(DEVICE), stored("fp8", 60, 64)
    with kernels(grouped_linear, CAPABILITY):
        for variant in ("few-long", "many"):
            mixed = x.clone()
            mixed[5] += 1e-4  # its neighbours in the tile are multiplied in full now
            with gpu.forced(value_products=variant):
                shallow = grouped_linear(x, weight)
                deep = grouped_linear(mixed, weight)
            assert same_bits(shallow[6:], deep[6:])
            assert same_bits(shallow[:5], deep[:5])
            assert near(deep, grouped_linear.definition(mixed.double(), weight.dequantize(torch.float64)))
        with gpu.forced(value_products="some"):
            assert agree(grouped_linear(x, weight), shallow)


def test_another_rounding_is_applied_as_it_is():
    def halved(x):
        return (x * 2).round() / 2

    x, norm = drawn(3, 64).to(DEVICE), torch.ones(64, device=DEVICE)
    weights = [(stored("fp8", 20, 64), halved), (stored("fp8", 9, 64), round_activation)]
    with kernels(linears, CAPABILITY), kernels(linear, CAPABILITY), kernels(rms_norm, CAPABILITY):
        assert near(linear(x, *weights[0]), exactly(x, *weights[0]))
        normed = rms_norm(x, norm, 1e-6)
        for out, pair in zip(linears(x, weights, norm, 1e-6), weights, strict=True):
            assert near(out, exactly(normed, *pair), by_codes=True)


def test_a_tiled_weight_is_read_as_it_was_stored():
    x, weight = drawn(3, 128).to(DEVICE), stored("fp8", 64, 128)
    tiled = tile(weight.to("cpu"))
    if DEVICE.type == "cpu":
        with kernels(linear, CAPABILITY):
            assert same_bits(linear(x, tiled, round_activation), linear(x, weight, round_activation))


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3)])
def test_leading_dims_and_nothing_at_all(lead):
    x = drawn(*lead, 40).to(DEVICE)
    with kernels(linear, CAPABILITY), kernels(linears, CAPABILITY), kernels(grouped_linear, CAPABILITY):
        for weight, prepare in itertools.product(
            (stored("fp8", 6, 40), stored("f32", 6, 40)), (unchanged, round_activation)
        ):
            out = linear(x, weight, prepare)
            assert out.shape == (*lead, 6)
            assert near(out, exactly(x, weight, prepare), by_codes=True) or not out.numel()
        norm = torch.ones(40, device=DEVICE)
        assert [o.shape for o in linears(x, [(stored("bf16", n, 40), unchanged) for n in (3, 0)], norm)] == [
            (*lead, 3),
            (*lead, 0),
        ]
        assert linears(x, []) == []
        assert (
            linear(drawn(*lead, 0).to(DEVICE), torch.empty(4, 0, device=DEVICE)).tolist()
            == torch.zeros(*lead, 4).tolist()
        )
        assert grouped_linear(x[..., None, :].reshape(-1, 1, 40)[:0], stored("bf16", 6, 40)).shape == (0, 1, 6)


def test_rows_and_weights_that_are_apart_in_memory():
    x, weight = drawn(12, 96).to(DEVICE), drawn(64, 20).to(DEVICE)
    with kernels(linear, CAPABILITY), kernels(grouped_linear, CAPABILITY):
        for rows in (x[::2, 10:74], x[1:, 1:65]):  # the second begins off 16 bytes
            for part, prepare in itertools.product((weight.t(), weight.t().bfloat16()), (unchanged, round_activation)):
                assert near(linear(rows, part, prepare), exactly(rows, part, prepare))
        odd = torch.zeros(1 + 20 * 64, dtype=torch.bfloat16, device=DEVICE)[1:].view(20, 64).copy_(weight.t())
        assert near(linear(x[:, :64], odd), exactly(x[:, :64], odd))
        turned = x.view(12, 2, 48).transpose(0, 1)
        part = stored("bf16", 24, 48)
        assert near(grouped_linear(turned, part), grouped_linear.definition(turned.double(), part.double()))


def test_what_does_not_fit_is_refused():
    x = drawn(2, 64).to(DEVICE)
    with kernels(linear, CAPABILITY), kernels(linears, CAPABILITY), kernels(grouped_linear, CAPABILITY):
        with pytest.raises(RuntimeError, match=r"rows of 64 .* \(8, 32\), and need one of \[N, 64\]"):
            linear(x, stored("fp8", 8, 32))
        with pytest.raises(RuntimeError, match=r"\(2, 8, 64\)"):
            linear(x, torch.zeros(2, 8, 64, device=DEVICE))
        with pytest.raises(RuntimeError, match=r"norm of \(32,\)"):
            linears(x, [(stored("fp8", 8, 64), unchanged)], torch.ones(32, device=DEVICE), 1e-6)
        with pytest.raises(RuntimeError, match=r"7 outputs .* 2 groups"):
            grouped_linear(x.view(1, 2, 64), stored("bf16", 7, 64))
        with pytest.raises(RuntimeError, match=r"rows of 64 .* \(8, 32\)"):
            grouped_linear(x.view(1, 2, 64), stored("bf16", 8, 32))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_is_no_number_stays_in_its_row(capability):
    x = drawn(3, 256).to(DEVICE)
    x[1, 200] = float("nan")
    with kernels(linear, capability):
        for name, prepare in itertools.product(("fp8", "fp4", "bf16", "f32"), (unchanged, round_activation)):
            found = linear(x, stored(name, 20, 256), prepare)
            assert found.isnan().any(1).tolist() == [False, True, False]
            assert found[1].isnan().all()
        x[1, 200] = float("inf")
        weight = stored("bf16", 20, 256)
        assert torch.equal(linear(x, weight)[1].sign(), weight[:, 200].float().sign())
        assert linear(x, weight)[1].isinf().all()
        lost = stored("fp8", 130, 256)
        lost.scale.view(torch.uint8)[1, 0] = 255
        for prepare in (unchanged, round_activation):
            found = linear(x[2:], lost, prepare)
            assert found[:, 128:].isnan().all()
            assert not found[:, :128].isnan().any()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_code_of_a_weight(capability):
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # which are no numbers
    scale = torch.tensor([[100], [140]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    fp8 = QuantTensor("fp8", codes.view(-1, 1).contiguous().view(torch.float8_e4m3fn), scale).to(DEVICE)
    every = torch.arange(256, dtype=torch.uint8).view(-1, 1).view(torch.int8)
    scales = torch.tensor([90, 120, 150, 127] * 64, dtype=torch.uint8).view(-1, 1).view(torch.float8_e8m0fnu)
    fp4 = QuantTensor("fp4", every, scales).to(DEVICE)
    with kernels(linear, capability):
        for weight, prepare in itertools.product((fp8, fp4), (unchanged, round_activation)):
            x = torch.eye(weight.shape[1], device=DEVICE)  # each input alone: an output is a weight
            assert torch.equal(linear(x, weight, prepare).t(), weight.dequantize())


@pytest.mark.parametrize(("rows", "tokens"), [(128, 1), (1, 80)])
@pytest.mark.parametrize("kernel", [code_products, value_products])
def test_offsets_that_need_64_bits(rows, tokens, kernel):
    """One program of a product of 2^25 inputs: the last rows lie 2^31 elements and more behind the first."""
    K = 1 << 25
    dtype = torch.uint8
    data, x = torch.empty(rows, K, dtype=dtype, device=DEVICE), torch.empty(tokens, K, dtype=dtype, device=DEVICE)
    if kernel is value_products:  # of codes, by inputs of which only so many bytes are touched
        x = torch.empty(tokens, K, dtype=torch.bfloat16, device=DEVICE)
    values = {"w": drawn(rows, 128), "x": drawn(tokens, 128)}
    w, given = (v.clamp(-2, 2).to(torch.float8_e4m3fn) for v in values.values())
    data[:, :128] = w.view(torch.uint8).to(DEVICE)
    y = torch.zeros(K // 128, tokens, rows, device=DEVICE)
    scale = torch.full((1, K // 128), 127, dtype=torch.uint8, device=DEVICE)
    others = MOST - 1
    sizes = {"BLOCK_N": 128, "BLOCK_M": 128}
    common = {"EVEN": rows % 16 == 0, "SPLIT": True, "UPCAST": DEVICE.type == "cpu"}
    numbers = (rows, *[0] * others, K // 128, *[1] * others, tokens, K)
    weights = [*[data.view(torch.float8_e4m3fn)] * MOST, *[scale] * MOST, *[y] * MOST]
    if kernel is code_products:
        x[:, :128] = given.view(torch.uint8).to(DEVICE)
        x_scale = torch.empty(K // 128, 128, device=DEVICE)
        x_scale[0] = 1.0
        x = x.view(torch.float8_e4m3fn)
        variant = gpu.Variant("one", sizes, warps=8, stages=2)
        gpu.launch(kernel, (1,), x, x_scale, *weights, *numbers, variant=variant, **common)
    else:
        x[:, :128] = given.float().bfloat16().to(DEVICE)
        variant = gpu.Variant("one", {**sizes, "SKIPS": 0}, warps=8, stages=2)
        gpu.launch(
            kernel, (1,), x, None, *weights, *numbers, 1, variant=variant, KIND="fp8", PARTS=1, IN_ORDER=True, **common,
        )  # fmt: skip
    assert near(y[0], given.double() @ w.double().t(), by_codes=True)


def test_scaled():
    for shape in ((0,), (1,), (3, 700), (2, 1025)):
        x = drawn(*shape).to(DEVICE)
        with kernels(scaled):
            assert scaled.chosen(x, 0.3) == "triton"
            assert same_bits(scaled(x, 0.3), x * 0.3)
            assert same_bits(scaled(x[..., ::2], -2), x[..., ::2] * -2)
