"""The native kernels: equal to their definitions, and a row's bits the same in any company, level and threads."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from pyrosome.cache.views import PagedRows, WindowRows
from pyrosome.dist import Mesh, tree_sum
from pyrosome.ops import native, toolchain
from pyrosome.ops.compress import Emit, compress, compressed_rows
from pyrosome.ops.experts import ExpertWeights, clamped_swiglu, routed_experts, shared_expert
from pyrosome.ops.hyper_connection import (
    hyper_connection_head,
    hyper_connection_in,
    hyper_connection_out,
    hyper_connection_turn,
)
from pyrosome.ops.index_topk import index_scores, index_topk
from pyrosome.ops.linear import grouped_linear, linear, linears, scaled
from pyrosome.ops.rms_norm import rms_norm
from pyrosome.ops.rope import index_rows, norm_rope, rope, rotation
from pyrosome.ops.route import affinity, route
from pyrosome.ops.rows import UnitedRows
from pyrosome.ops.seam import OPS, Place
from pyrosome.ops.sparse_attention import attention, finish_attention, sparse_attention
from pyrosome.ops.store import as_stored, store_rows
from pyrosome.quant import FORMATS, QuantTensor, round_activation, round_index, round_kv, unchanged
from pyrosome.quant.rows import FloatRows, FP4IndexRows, FP8KVRows
from tests.ops import test_index_native as indexer

try:
    native.library()
except OSError as error:
    pytest.skip(f"no native library here: {error}", allow_module_level=True)

SIZES = (1, 2, 3, 4, 5, 63, 64, 130)
LARGEST = max(SIZES)
LEVELS = toolchain.supported()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    native.library().pyrosome_set_grain(ctypes.c_int64(0))


def noise(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def integers(high, *shape, low=0, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def stored(name, *shape, seed=1):
    values = noise(*shape, seed=seed, scale=shape[-1] ** -0.5)
    if name in FORMATS:
        return QuantTensor(name, *FORMATS[name].quantize(values))
    return values.to({"f32": torch.float32, "bf16": torch.bfloat16}[name])


def bank(name, experts=5, inner=96, dim=160):
    w1, w3, w2 = (stored(name, experts, *s, seed=i) for i, s in enumerate([(inner, dim), (inner, dim), (dim, inner)]))
    prepare = round_activation if name in FORMATS else unchanged
    return ExpertWeights(w1, w3, w2, prepare)


def one_expert(name):
    def first(stack):
        return QuantTensor(stack.format, stack.data[0], stack.scale[0]) if isinstance(stack, QuantTensor) else stack[0]

    w1, w3, w2, prepare, *_ = bank(name, 1)
    return ExpertWeights(first(w1), first(w3), first(w2), prepare)


def held_by(mesh, weights):
    """What a rank has of a bank."""
    part = mesh.part(weights.total)
    index = torch.arange(part.start, part.stop)
    stacks = (w.index_select(index) if isinstance(w, QuantTensor) else w[index] for w in weights[:3])
    return ExpertWeights(*stacks, weights.prepare, part.start, weights.total)


WEIGHTS = ("f32", "bf16", "fp8", "fp4")
ROWS = noise(300, 80, seed=5)


class Source:
    """Rows as attention reads them; what an index of -1 points at must never count."""

    format, num_rows = "fp8", 300

    def read(self, index):
        return ROWS, index.clamp(min=0)


def attention_index(T):
    index = integers(300, T, 200, seed=2)
    return torch.where(torch.arange(200) < integers(200, T, 1, seed=3), index, -1)


def emits(T):
    end = torch.where(torch.arange(T) % 5 == 4, -1, torch.arange(T) * 4 + 3)
    return Emit(torch.arange(T) * 4 + 3, end, torch.zeros(T, dtype=torch.int64), integers(2, T))


ROW_FORMATS = {
    "f32": FloatRows("f32", torch.float32),
    "bf16": FloatRows("bf16", torch.bfloat16),
    "fp8": FP8KVRows(64, 32),
    "fp4": FP4IndexRows(96),
}

# Each case: an op, and its arguments for the first T rows.  The same rows come whatever T is.
CASES = {
    **{f"linear {w}": (linear, lambda T, w=w: (noise(LARGEST, 161 if w in ("f32", "bf16") else 160)[:T],
                                               stored(w, 75, 161 if w in ("f32", "bf16") else 160))) for w in WEIGHTS},
    **{f"grouped_linear {w}": (grouped_linear, lambda T, w=w: (noise(LARGEST, 3, 64)[:T], stored(w, 3 * 44, 64)))
       for w in WEIGHTS},
    **{f"routed_experts {w}": (routed_experts, lambda T, w=w: (
        noise(LARGEST, 160)[:T], bank(w), integers(5, LARGEST, 3, low=-1)[:T], noise(LARGEST, 3, seed=9)[:T], 1.5))
       for w in WEIGHTS},
    **{f"routed_experts of many outputs, {w}": (routed_experts, lambda T, w=w: (  # few rows take several tiles at once
        noise(LARGEST, 64)[:T], bank(w, inner=608, dim=64), integers(5, LARGEST, 3, low=-1)[:T],
        noise(LARGEST, 3, seed=9)[:T], 1.5)) for w in ("f32", "fp4")},
    "routed_experts of a rank": (routed_experts, lambda T: (
        noise(LARGEST, 160)[:T], held_by(Mesh(1, 2), bank("fp8", 11)), integers(11, LARGEST, 6, low=-1)[:T],
        noise(LARGEST, 6, seed=9)[:T], 1.5)),
    **{f"shared_expert {w}": (shared_expert, lambda T, w=w: (
        noise(LARGEST, 160)[:T], one_expert(w), 1.5, noise(LARGEST, 160, seed=3)[:T])) for w in WEIGHTS},
    **{f"linear rounded {w}": (linear, lambda T, w=w: (
        noise(LARGEST, 160)[:T], stored(w, 75, 160), round_activation)) for w in FORMATS},
    **{f"linear tiled {w}": (linear, lambda T, w=w: (
        noise(LARGEST, 160)[:T], native.tiled(stored(w, 75, 160)), round_activation)) for w in FORMATS},
    "linears": (linears, lambda T: (noise(LARGEST, 160)[:T], [
        (stored("fp8", 75, 160), round_activation), (stored("bf16", 33, 160), unchanged),
        (stored("fp4", 130, 160), round_activation), (stored("f32", 4, 160), unchanged)])),
    "clamped_swiglu": (clamped_swiglu, lambda T: (noise(LARGEST, 7, scale=4)[:T], noise(LARGEST, 7, seed=1)[:T], 1.5)),
    "hyper_connection_in": (hyper_connection_in, lambda T: (
        noise(LARGEST, 4, 33)[:T], noise(24, 132, seed=1, scale=0.1), noise(24, seed=2), noise(3, seed=3),
        1e-6, 1e-6, 20)),
    "hyper_connection_out": (hyper_connection_out, lambda T: (
        noise(LARGEST, 4, 33)[:T], noise(LARGEST, 33, seed=1)[:T], noise(LARGEST, 4, seed=2)[:T],
        noise(LARGEST, 4, 4, seed=3)[:T])),
    "hyper_connection_head": (hyper_connection_head, lambda T: (
        noise(LARGEST, 4, 33)[:T], noise(4, 132, seed=1, scale=0.1), noise(4, seed=2), noise(1, seed=3), 1e-6, 1e-6)),
    "index_scores": (index_scores, lambda T: (
        noise(LARGEST, 6, 32)[:T], noise(301, 32, seed=1), noise(LARGEST, 6, seed=2)[:T])),
    "rotation": (rotation, lambda T: (noise(9).abs(), (torch.arange(LARGEST) * 7919 - 1)[:T])),
    "rope": (rope, lambda T: (noise(LARGEST, 3, 34)[:T], rotation(noise(9), torch.arange(LARGEST))[:T])),
    "rope back": (rope, lambda T: (noise(LARGEST, 34)[:T], rotation(noise(9), torch.arange(LARGEST))[:T], True)),
    "hyper_connection_in, norm": (hyper_connection_in, lambda T: (
        noise(LARGEST, 4, 33)[:T], noise(24, 132, seed=1, scale=0.1), noise(24, seed=2), noise(3, seed=3),
        1e-6, 1e-6, 20, noise(33, seed=4))),
    "hyper_connection_turn": (hyper_connection_turn, lambda T: (
        noise(LARGEST, 4, 33)[:T], noise(LARGEST, 33, seed=1)[:T], noise(LARGEST, 4, seed=2)[:T],
        noise(LARGEST, 4, 4, seed=3)[:T], noise(24, 132, seed=1, scale=0.1), noise(24, seed=2), noise(3, seed=3),
        1e-6, 1e-6, 20, noise(33, seed=4))),
    "linears, norm": (linears, lambda T: (
        noise(LARGEST, 160)[:T], [(stored("fp8", 75, 160), round_activation), (stored("bf16", 33, 160), unchanged)],
        noise(160, seed=6), 1e-6)),
    "scaled": (scaled, lambda T: (noise(LARGEST, 37)[:T], 0.37)),
    "rms_norm": (rms_norm, lambda T: (noise(LARGEST, 3, 37)[:T], noise(37, seed=1), 1e-6)),
    "norm_rope": (norm_rope, lambda T: (
        noise(LARGEST, 3, 82)[:T], None, rotation(noise(9), torch.arange(LARGEST))[:T], 1e-6)),
    "norm_rope rounded": (norm_rope, lambda T: (
        noise(LARGEST, 82)[:T], noise(82, seed=1), rotation(noise(9), torch.arange(LARGEST))[:T], 1e-6, round_kv)),
    "index_rows": (index_rows, lambda T: (
        noise(LARGEST, 3, 64)[:T], rotation(noise(9), torch.arange(LARGEST))[:T], round_index)),
    "index_rows of keys": (index_rows, lambda T: (noise(LARGEST, 64)[:T], None)),
    "index_rows, narrow": (index_rows, lambda T: (noise(LARGEST, 3, 8)[:T], None)),
    "route": (route, lambda T: (
        noise(LARGEST, 40)[:T], noise(11, 40, seed=1), noise(11, seed=2), 4, 1.5, (torch.arange(LARGEST) % 7 - 1)[:T])),
    "route given": (route, lambda T: (
        noise(LARGEST, 40)[:T], noise(11, 40, seed=1), integers(11, LARGEST, 4)[:T], 4, 1.5, torch.arange(T))),
    "route given, of many": (route, lambda T: (
        noise(LARGEST, 40)[:T], noise(37, 40, seed=1), integers(37, LARGEST, 4)[:T], 4, 1.5, torch.arange(T))),
    "compressed_rows": (compressed_rows, lambda T: (
        noise(4 * LARGEST, 160), noise(4 * LARGEST, 160, seed=1), noise(2, 8, 160, seed=2), noise(2, 8, 160, seed=3),
        noise(4, 160, seed=4), Emit(*(x[:T] for x in emits(LARGEST))), 8, noise(80, seed=5),
        rotation(noise(8), torch.arange(LARGEST))[:T], 1e-6, round_kv)),
    **{f"as_stored {n}": (as_stored, lambda T, f=f: (noise(LARGEST, 96)[:T], f)) for n, f in ROW_FORMATS.items()},
    "index_topk": (index_topk, lambda T: indexer.case(
        6, 64, 50, indexer.normal, spans=((0, LARGEST),), rows=300).first(T)),
    "affinity": (affinity, lambda T: (noise(LARGEST, 7, scale=9)[:T],)),
    "sparse_attention": (sparse_attention, lambda T: (
        noise(LARGEST, 6, 80)[:T], Source(), attention_index(LARGEST)[:T])),
    "finish_attention": (finish_attention, lambda T: (
        noise(6), rotation(noise(9), torch.arange(LARGEST))[:T],
        [(noise(LARGEST, 6, 80, seed=i)[:T], noise(LARGEST, 6, seed=7 + i)[:T]) for i in range(2)])),
    "compress HCA": (compress, lambda T: (
        noise(4 * LARGEST, 40), noise(4 * LARGEST, 40, seed=1), noise(2, 4, 40, seed=2), noise(2, 4, 40, seed=3),
        noise(4, 40, seed=4), Emit(*(x[:T] for x in emits(LARGEST))), 4)),
    "compress CSA": (compress, lambda T: (
        noise(4 * LARGEST, 80), noise(4 * LARGEST, 80, seed=1), noise(2, 8, 80, seed=2), noise(2, 8, 80, seed=3),
        noise(4, 80, seed=4), Emit(*(x[:T] for x in emits(LARGEST))), 8)),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


def outputs(case, T, run=None):
    op, arguments = CASES[case]
    given = arguments(T)
    assert op.chosen(*given) == "cpu"
    out = (run or op)(*given)
    return [torch.view_as_real(x) if x.is_complex() else x for x in (out if isinstance(out, (tuple, list)) else (out,))]


@each_case
def test_a_kernel_is_its_definition(case):
    for T in (1, LARGEST):
        for ours, theirs in zip(outputs(case, T), outputs(case, T, CASES[case][0].definition), strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@each_case
def test_a_row_has_the_same_bits_in_any_company(case):
    whole = outputs(case, LARGEST)
    for T in SIZES:
        for part, all_rows in zip(outputs(case, T), whole, strict=True):
            assert torch.equal(part, all_rows[:T]), f"{T} rows"


@each_case
def test_every_level_has_the_same_bits(case):
    found = []
    for level in LEVELS:
        with native.use_level(level):
            assert native.level() == level
            found.append(outputs(case, 67))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


@each_case
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(case, threads, monkeypatch):
    alone = outputs(case, LARGEST)
    monkeypatch.setattr(native, "threads", lambda: threads)
    native.library().pyrosome_set_grain(ctypes.c_int64(1))  # or such small calls would stay on one thread
    assert all(torch.equal(x, y) for x, y in zip(outputs(case, LARGEST), alone, strict=True))


def test_every_kernel_has_a_case():
    import pyrosome.model.mtp  # noqa: F401  # every op of the network registers itself

    with_kernel = {op.name for op in OPS.values() if any(k.name == "cpu" for k in op.kernels)}
    elsewhere = {"attention", "store_rows"}  # below: one has a tolerance of its own, the other gives nothing back
    assert with_kernel == {op.name for op, _ in CASES.values()} | elsewhere


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_rows_are_stored_to_the_byte_as_the_definition_does(name):
    row_format, place = ROW_FORMATS[name], torch.tensor([5, 0, 9, 2, 7, 7])
    rows = noise(6, 96, scale=3.0)
    rows[1] = 0
    rows[2, :40] *= 1e-6
    rows[5] = rows[4]  # a place that takes two rows that are alike
    for level in LEVELS:
        with native.use_level(level):
            ours, theirs = ([x.new_zeros(11, x.shape[1]) for x in row_format.encode(rows)] for _ in range(2))
            assert store_rows.chosen(rows, tuple(ours)) == "cpu"
            store_rows(rows, tuple(ours), row_format, place)
            store_rows.definition(rows, tuple(theirs), row_format, place)
            for x, y in zip(ours, theirs, strict=True):
                assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
            assert torch.equal(as_stored(rows, row_format), as_stored.definition(rows, row_format))


def narrow_rows(T, heads, width, rope, chosen, rows, name):
    """Arguments of `attention` over a window and pages in a narrow format, with holes in both indices."""
    row_format = FP8KVRows(width - rope, rope) if name == "fp8" else FloatRows("bf16", torch.bfloat16)
    num_pages = -(-rows // 64)
    planes = tuple(row_format.encode(noise((num_pages + 1) * 64, width, seed=3)))
    pages = PagedRows(planes, row_format, torch.arange(num_pages).flip(0)[None] + 1, SmallStep(T, 4 * rows), 4)
    ring = tuple(x.unflatten(0, (3, 16)) for x in row_format.encode(noise(48, width, seed=4)))
    window = WindowRows(ring, row_format, torch.tensor([2]), row_format.round_trip(noise(T, width, seed=5)))
    far = attention_index(LARGEST)[:T, :chosen] % rows
    far = torch.where(attention_index(LARGEST)[:T, :chosen] < 0, -1, far)
    near = integers(17, T, 16, low=-1, seed=6)
    return (noise(LARGEST, heads, width)[:T], [(window, torch.where(near == 0, -1, near)), (pages, far)],
            noise(heads, seed=7), rotation(noise(rope // 2), torch.arange(LARGEST))[:T])  # fmt: skip


class SmallStep:
    def __init__(self, T, context):
        self.span_T, self.context = torch.zeros(T, dtype=torch.int64), context


NARROW_CASES = {
    "8 heads, fp8": (8, 96, 32, 150, 190, "fp8"),
    "70 heads, bf16": (70, 80, 16, 77, 100, "bf16"),
    "64 heads, fp8": (64, 512, 64, 200, 300, "fp8"),
    "3 heads, bf16": (3, 34, 2, 200, 300, "bf16"),
}


@pytest.mark.parametrize("case", NARROW_CASES)
def test_attention_over_narrow_rows(case, monkeypatch):
    """Against its definition, which rounds queries and weights too; the same bits alone, at every level, by threads."""
    args = narrow_rows(9, *NARROW_CASES[case])
    assert attention.chosen(*args) == "cpu"
    ours, theirs = attention(*args), attention.definition(*args)
    assert (ours - theirs).norm() / theirs.norm() < 3e-3  # weights are rounded after another maximum
    q, parts, sink, turn = args
    for t in (1, 4):
        fewer = [(source, index[:t]) for source, index in parts]
        assert torch.equal(attention(q[:t], fewer, sink, turn[:t]), ours[:t])
    for level in LEVELS:
        with native.use_level(level):
            assert torch.equal(attention(*args), ours), level
    for threads in (2, 3, 20):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        native.library().pyrosome_set_grain(ctypes.c_int64(1))
        assert torch.equal(attention(*args), ours)


def test_attention_that_reads_no_row_is_zero_and_a_nan_row_shows():
    q, parts, sink, turn = narrow_rows(3, *NARROW_CASES["8 heads, fp8"])
    nothing = [(source, torch.full_like(index, -1)) for source, index in parts]
    assert not attention(q, nothing, sink, turn).any()
    parts[0][0].fresh_TC[1] = float("nan")
    index = torch.full((3, 4), -1)
    index[2, 3] = 17 + 1
    out = attention(q, [(parts[0][0], index)], sink, turn)
    assert out[2].isnan().all() and not out[:2].any()


@pytest.mark.parametrize("name", ["fp8", "fp4"])
def test_every_code_is_widened_exactly(name):
    """A product with the identity is the weight: all 256 bytes, under scales from the least to the largest usable."""
    size = 256
    data = torch.arange(256, dtype=torch.uint8).repeat(size, 1)
    if name == "fp8":
        data[:, 127], data[:, 255] = 0, 0  # the NaN codes
        scale = torch.tensor([[1, 127], [200, 100]], dtype=torch.uint8)
        weight = QuantTensor("fp8", data.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu))
    else:
        scale = integers(240, size, 512 // 32, low=10).to(torch.uint8)
        weight = QuantTensor("fp4", data.view(torch.int8), scale.view(torch.float8_e8m0fnu))
    widened = linear(torch.eye(weight.shape[1]), weight).t()
    assert torch.equal(widened, weight.dequantize())


def test_a_nan_code_or_scale_poisons_its_output_and_no_other():
    data = torch.zeros(3, 64, dtype=torch.uint8)
    data[1, 5] = 127
    weight = QuantTensor("fp8", data.view(torch.float8_e4m3fn), torch.full((1, 1), 127, dtype=torch.uint8))
    out = linear(torch.ones(2, 64), weight)
    assert out[:, 1].isnan().all() and not out[:, [0, 2]].isnan().any()


def test_rows_nobody_asked_for_may_hold_anything():
    ring, fresh = noise(1, 9, 80), noise(3, 80, seed=1)
    source = UnitedRows(ring, fresh)
    index = torch.tensor([[1, 3, -1], [2, -1, -1], [-1, -1, -1]])
    before = sparse_attention(noise(3, 6, 80), source, index)
    source.rows_NC[4:] = float("nan")
    after = sparse_attention(noise(3, 6, 80), source, index)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not before[0][2].any() and torch.equal(before[1][2], torch.full((6,), float("-inf")))


def test_where_no_kernel_runs_the_reason_is_told():
    place = Place("cpu", (0, 0), "", False)
    assert native.why_not(place) == ""
    assert "cuda" in native.why_not(place._replace(device="cuda"))
    assert "float64" in native.why_not(place._replace(dtype="float64"))
    assert "int4" in native.why_not(place._replace(format="int4"))
    assert linear.chosen(torch.ones(1, 2, dtype=torch.float64), torch.ones(2, 2)) == "torch"


def in_a_process(code, **env):
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


USE = (
    "import torch\nfrom pyrosome.ops.linear import linear\nfrom pyrosome.ops import native\n"
    "with torch.no_grad(): y = linear(torch.ones(2, 3), torch.ones(4, 3))\nassert y.eq(3).all()\n"
)


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_can_be_asked_for(level):
    done = in_a_process(USE + "print(native.level())", PYROSOME_CPU=level)
    assert done.stdout.strip() == level, done.stderr


def test_without_a_compiler_the_definitions_run_and_say_so(tmp_path):
    code = USE + "print(linear.chosen(torch.ones(2), torch.ones(2)))"
    done = in_a_process("import torch\ntorch.set_grad_enabled(False)\n" + code,
                        CXX=str(tmp_path / "nothing"), XDG_CACHE_HOME=str(tmp_path))  # fmt: skip
    assert done.stdout.strip() == "torch" and "did not load" in done.stderr
    asked = in_a_process(USE, CXX=str(tmp_path / "nothing"), XDG_CACHE_HOME=str(tmp_path), PYROSOME_OPS="linear:cpu")
    assert asked.returncode and "cannot run" in asked.stderr


def test_the_library_is_built_once_for_one_set_of_sources(tmp_path):
    where = {"XDG_CACHE_HOME": str(tmp_path)}
    assert in_a_process(USE, **where).returncode == 0
    (built,) = (tmp_path / "pyrosome" / "native").glob("*/libpyrosome-*.so")
    stamp = built.stat().st_mtime_ns
    assert in_a_process(USE, **where).returncode == 0
    assert built.stat().st_mtime_ns == stamp
    assert len(list((tmp_path / "pyrosome" / "native").rglob("*.so"))) == 1  # and no part is left behind


def test_an_expert_there_is_not_is_refused():
    with pytest.raises(IndexError, match="expert 5 of 5"):
        routed_experts(noise(2, 160), bank("f32"), torch.tensor([[0, 1], [5, 0]]), torch.ones(2, 2), 1.5)


@pytest.mark.parametrize("part", [[5, 0], [0, 5]])
def test_a_rank_refuses_an_expert_that_no_rank_has(part):
    weights = held_by(Mesh(1, 2), bank("f32"))
    with pytest.raises(IndexError, match="expert 5 of 5"):
        routed_experts(noise(1, 160), weights, torch.tensor([part]), torch.ones(1, 2), 1.5)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("num_experts", [3, 8, 21])
def test_experts_are_added_as_a_tree_whoever_holds_them(name, num_experts):
    """Each pair computed alone, then added in ascending order in each of 8 virtual shards, and those as a tree."""
    T, K = 19, 7
    x, weights, weight = noise(T, 160), bank(name, num_experts), noise(T, K, seed=9)
    expert = integers(num_experts, T, K, low=-1, seed=4)
    expert[0] = -1  # a token of nobody
    shards = torch.zeros(8, T, 160)
    for k in range(K):
        e, rank = expert.sort(dim=1, stable=True)
        alone = routed_experts(x, weights, e[:, k : k + 1], weight.gather(1, rank)[:, k : k + 1], 1.5)
        for t in range(T):
            if e[t, k] >= 0:
                shards[e[t, k] * 8 // num_experts, t] += alone[t]
    wanted = tree_sum(shards)
    for size in (1, 2, 4, 8):
        banks = [held_by(Mesh(rank, size), weights) for rank in range(size)]
        parts = torch.stack([routed_experts(x, b, expert, weight, 1.5) for b in banks])
        assert torch.equal(tree_sum(parts).view(torch.int32), wanted.view(torch.int32)), f"{size} ranks"
        assert not torch.signbit(parts[parts == 0]).any()


@pytest.mark.parametrize("run", [routed_experts, routed_experts.definition], ids=["kernel", "definition"])
def test_a_sum_of_experts_is_never_minus_zero(run):
    """Products that underflow from below make a row of -0: beside a rank without a share, and alone, it becomes 0."""
    weights = ExpertWeights(torch.ones(8, 16, 4), torch.ones(8, 16, 4), torch.full((8, 4, 16), -1e-30), unchanged)
    assert torch.signbit(linear(torch.full((1, 16), 1e-30), weights.w2[0])).all()
    out = run(torch.ones(1, 4), weights, torch.tensor([[3]]), torch.full((1, 1), 1e-30), 1.5)
    assert not out.any() and not torch.signbit(out).any()


def test_rows_of_a_wrong_width_are_refused():
    with pytest.raises(RuntimeError, match="rows of 3"):
        linear(torch.ones(2, 3), torch.ones(4, 8))


def test_more_streams_than_the_kernel_holds_run_by_the_definition():
    args = (noise(3, 9, 8), noise(99, 72, scale=0.1), noise(99), noise(3), 1e-6, 1e-6, 3)
    for ours, theirs in zip(hyper_connection_in(*args), hyper_connection_in.definition(*args), strict=True):
        assert torch.equal(ours, theirs)


def test_a_forked_child_has_threads_of_its_own():
    code = (
        "import os, torch\nfrom pyrosome.ops import native\nfrom pyrosome.ops.linear import linear\n"
        "native.threads = lambda: 2\nx, w = torch.ones(64, 64), torch.ones(512, 64)\n"
        "with torch.no_grad():\n"
        "    linear(x, w)\n"
        "    child = os.fork()\n"
        "    assert linear(x, w).eq(64).all()\n"
        "    if child == 0: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
