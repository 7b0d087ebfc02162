"""The CPU's kernels one by one at V4-Flash's widths, beside what the machine can do.

    python -m bench.kernels [--quick] [--no-save] [--only NAME ...] [--overhead]
    python -m bench.kernels --device cuda ...    # a GPU's: bench.kernels_gpu, whose own --help there is

One thread; medians of its CPU time over calls whose weights and rows come from memory.  Products of one row are called
as a captured decode step calls them, without the way there (`--overhead` has that).  A row's ceilings (reading
memory, bfloat16 products by torch) are measured just before and just after it, in the same process.  Exit status 1
where a row misses its limit, or gives something else than its check says.
Shape letters: T or M tokens, N outputs or rows, K inputs, H heads, C channels, F frequencies.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyrosome
from bench import records, shapes
from bench.shapes import Ceilings, Size, copies, cpu_seconds, native_bytes, normal, pools, quantized
from pyrosome.cache.views import WindowRows
from pyrosome.ops import native
from pyrosome.ops.compress import Emit, compressed_rows
from pyrosome.ops.experts import ExpertWeights, routed_experts, shared_expert
from pyrosome.ops.hyper_connection import hyper_connection_turn
from pyrosome.ops.index_topk import index_topk
from pyrosome.ops.linear import grouped_linear, linear
from pyrosome.ops.rope import frequencies, norm_rope, rope, rotation
from pyrosome.ops.route import route
from pyrosome.ops.sparse_attention import attention
from pyrosome.quant import round_activation, round_kv, simulate_fp4
from pyrosome.quant.rows import index_rows, kv_rows

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
OVERHEAD, OVERHEAD_LIMIT = "overhead", 0.10  # of a decode step's CPU time, outside the kernels
LEAST_SAMPLES, MOST_SAMPLES = 5, 300
FEW = 64  # tokens: a product of fewer is given its bytes per second too
WARM_READS = 50
SHORT_CALLS = 16  # calls of a few microseconds are timed so many together
PRODUCT_ERROR, SCORE_ERROR, ATTENTION_ERROR = 1e-5, 1e-6, 3e-3  # relative to float64, where exact


@dataclasses.dataclass
class Case:
    """One row: what is called, what a call takes, and what it must keep to."""

    call: Callable[[int], Any]  # with the number of the call, by which it picks its weights
    bytes: int = 0  # read by a call; 0: no figure
    flops: int = 0
    limit: tuple[str, float] | None = None  # ("read" | "gemm", least share) or ("ms", most)
    batch: int = 1
    errors: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)  # name -> (found, allowed)


def captured(call: Callable[[int], Any], count: int) -> Callable[[int], None]:
    """The native calls that are made for each of so many, made again."""
    made, results = [], []
    for i in range(count):
        with native.recording() as recorder:
            results.append(call(i))
        made.append(recorder.calls)

    def again(i: int, _alive: Any = (call, results)) -> None:  # what is read and written by address
        for function, arguments in made[i % count]:
            function(*arguments)

    return again


def product(s: Size, kind: str, N: int, K: int, M: int = 1, limit: tuple[str, float] | None = None) -> Case:
    """x [M, K] times one quantised weight [N, K], its input rounded as trained."""
    weight = quantized(kind, N, K, seed=3)
    held = [group[0] for group in copies([(weight, 1)], s.cold_bytes)]
    x = normal(M, K)

    def call(i: int) -> Tensor:
        return linear(x, held[i % len(held)], round_activation)  # type: ignore[no-any-return]

    if M == 1:
        wanted = round_activation(x).double() @ weight.dequantize().double().t()
        errors = {"from float64": (shapes.rms(call(0), wanted), PRODUCT_ERROR)}
        return Case(captured(call, len(held)), bytes=native_bytes(held[0]), limit=limit, errors=errors)
    alone = linear(x[:1], held[0], round_activation)
    unlike = int((call(0)[:1].view(torch.int32) != alone.view(torch.int32)).sum())
    errors = {"bits unlike those alone": (unlike, 0)}
    return Case(call, native_bytes(held[0]) if M < FEW else 0, 2 * M * N * K, limit, errors=errors)


def grouped(s: Size) -> Case:
    """The first half of the output projection: a weight for each group of heads."""
    c = s.config
    G, N, K = c.o_groups, c.o_lora_rank, c.num_attention_heads * c.head_dim // c.o_groups
    held = [group[0] for group in copies([(quantized("fp8", G * N, K, seed=3), G)], s.cold_bytes)]
    x = normal(1, G, K).bfloat16().float()  # as attention gives it
    call = captured(lambda i: grouped_linear(x, held[i % len(held)]), len(held))
    return Case(call, bytes=native_bytes(held[0]))


def bf16(s: Size, N: int, K: int) -> Case:
    """One row times a bfloat16 weight."""
    held = [group[0] for group in copies([(normal(N, K).bfloat16(), 1)], s.cold_bytes)]
    x = normal(1, K)
    return Case(captured(lambda i: linear(x, held[i % len(held)]), len(held)), bytes=native_bytes(held[0]))


def experts(s: Size, T: int) -> Case:
    """Routed experts in FP4: each token visits its own."""
    c, E = s.config, s.experts
    D, inner, chosen = c.hidden_size, c.moe_intermediate_size, c.num_experts_per_tok
    matrices = enumerate([(inner, D), (inner, D), (D, inner)])
    stacks = [shapes.stacked(quantized("fp4", *shape, seed=i), E) for i, shape in matrices]
    (w1, w3, w2), *_ = copies([(stack, 1) for stack in stacks], 0)
    bank = ExpertWeights(w1, w3, w2, round_activation)
    g, x = torch.Generator().manual_seed(4), normal(T, D)
    picks = [torch.rand(T, E, generator=g).argsort(1)[:, :chosen].sort(1).values for _ in range(7)]
    weight = torch.full((T, chosen), 1.5 / chosen)
    each = sum(native_bytes(w) for w in (w1, w3, w2)) // E
    return Case(
        lambda i: routed_experts(x, bank, picks[i % len(picks)], weight, c.swiglu_limit),
        each * chosen if T == 1 else 0, 2 * T * chosen * 3 * D * inner if T > 1 else 0,
    )  # fmt: skip


def shared(s: Size, T: int) -> Case:
    """The expert of every token, in FP8."""
    c = s.config
    D, inner = c.hidden_size, c.moe_intermediate_size
    weights = [quantized("fp8", *shape, seed=i) for i, shape in enumerate([(inner, D), (inner, D), (D, inner)])]
    held = [
        ExpertWeights(w1, w3, w2, round_activation) for w1, w3, w2 in copies([(w, 1) for w in weights], s.cold_bytes)
    ]
    x = normal(T, D)
    size, flops = sum(native_bytes(w) for w in held[0][:3]), 2 * T * 3 * D * inner
    return Case(
        lambda i: shared_expert(x, held[i % len(held)], c.swiglu_limit), size if T == 1 else 0, flops if T > 1 else 0
    )


def indexer(s: Size) -> Case:
    """The indexer of one token over all rows, held to float64; equal scores stand at the edge of what is chosen."""
    c, N = s.config, s.index_rows
    C, H, K = c.index_head_dim, c.index_n_heads, c.index_topk
    row_format = index_rows("fp8", C)
    q, weight = simulate_fp4(normal(1, H, C)), normal(1, H) * (H * C) ** -0.5
    planes = shapes.encoded(row_format, N, C, seed=5)
    score_N, size_N = shapes.planted_ties(q[0], weight[0], planes, row_format, K)
    held, visible = pools(planes, row_format, s.cold_bytes), torch.tensor([N])

    def call(i: int) -> tuple[Tensor, Tensor]:
        return index_topk(q, held[i % len(held)], weight, visible, ((0, 1),), K)  # type: ignore[no-any-return]

    (score_K,), (index_K,) = call(0)
    wanted_K = score_N.sort(descending=True, stable=True).indices[:K].sort().values  # stable: ties by lowest index
    off = float(((score_K.double() - score_N[index_K]).abs() / size_N[index_K]).max())
    errors = {"scores from float64": (off, SCORE_ERROR), "rows chosen wrongly": (int((wanted_K != index_K).sum()), 0)}
    return Case(call, sum(p.nbytes for p in planes), 2 * H * C * N, ("ms", 15.0), errors=errors)


def attend(s: Size, num_rows: int, chosen: int, limit_ms: float) -> Case:
    """Attention of one token over its window and `chosen` rows of a history, held to float64."""
    c, H, C, F = s.config, s.config.num_attention_heads, s.config.head_dim, s.config.qk_rope_head_dim // 2
    row_format, W, g = kv_rows("fp8", C, 2 * F), c.sliding_window, torch.Generator().manual_seed(6)
    pages = pools(shapes.encoded(row_format, num_rows, C, seed=7), row_format, s.cold_bytes)
    ring = tuple(plane.unflatten(0, (len(pages), W)) for plane in shapes.encoded(row_format, len(pages) * W, C, seed=8))
    fresh = row_format.round_trip(normal(1, C))
    near = torch.arange(2, W + 2)[None]  # 0 is no row, 1 the ring's oldest; the last is this step's own
    far = [torch.randperm(num_rows, generator=g)[:chosen].sort().values[None] for _ in pages]
    q, sink, turn = normal(1, H, C), normal(H), rotation(frequencies(10000.0, 2 * F, None), torch.tensor([num_rows]))

    def parts(i: int) -> list[tuple[Any, Tensor]]:
        window = WindowRows(ring, row_format, torch.tensor([i % len(pages)]), fresh)
        return [(window, near), (pages[i % len(pages)], far[i % len(pages)])]

    rows = [source.read(index) for source, index in parts(0)]
    row_NC = torch.cat([row_MC[flat[0]] for row_MC, flat in rows]).double()
    q_HC = q[0].bfloat16().double()  # over rows of this format queries are bfloat16: part of the definition
    score_HN = torch.cat([q_HC @ row_NC.t() * C**-0.5, sink.double()[:, None]], 1)
    wanted = rope.definition((score_HN.softmax(1)[:, :-1] @ row_NC)[None], turn.to(torch.complex128), inverse=True)
    errors = {"from float64": (shapes.rms(attention(q, parts(0), sink, turn), wanted), ATTENTION_ERROR)}
    held = [parts(i) for i in range(len(pages))]
    size = sum(plane.shape[1] for plane in pages[0].planes) * (W + chosen)
    return Case(
        lambda i: attention(q, held[i % len(held)], sink, turn), size, 4 * H * C * (W + chosen), ("ms", limit_ms),
        errors=errors,
    )  # fmt: skip


def turn(s: Size) -> Case:
    """Out of one sub-block and into the next: the hyper-connections of one token."""
    c, J, D = s.config, s.config.hc_mult, s.config.hidden_size
    fns = [group[0] for group in copies([(normal((2 + J) * J, J * D) * (J * D) ** -0.5, 1)], s.cold_bytes)]
    rest = normal((2 + J) * J), normal(3), c.rms_norm_eps, c.hc_eps, c.hc_sinkhorn_iters, normal(D)
    before = normal(1, J, D), normal(1, D), normal(1, J), normal(1, J, J).softmax(-1)
    return Case(lambda i: hyper_connection_turn(*before, fns[i % len(fns)], *rest), bytes=native_bytes(fns[0]))


def routes(s: Size) -> Case:
    """Which experts one token visits, of all there are."""
    c, E, D = s.config, s.config.n_routed_experts, s.config.hidden_size
    gates = [group[0] for group in copies([(normal(E, D) * D**-0.5, 1)], s.cold_bytes)]
    x, bias, position = normal(1, D), normal(E) * 0.05, torch.tensor([5])
    rest = bias, c.num_experts_per_tok, c.routed_scaling_factor, position
    return Case(lambda i: route(x, gates[i % len(gates)], *rest), bytes=native_bytes(gates[0]))


def heads(s: Size) -> Case:
    """Queries of one token: normalised and turned."""
    c = s.config
    q = normal(1, c.num_attention_heads, c.head_dim)
    angles = rotation(frequencies(10000.0, c.qk_rope_head_dim, None), torch.tensor([5]))
    return Case(lambda i: norm_rope(q, None, angles, c.rms_norm_eps), batch=SHORT_CALLS)


def pooled(s: Size) -> Case:
    """The row that a CSA layer emits after every fourth token, from seven tokens of its tail and one of this step."""
    c, C = s.config, s.config.head_dim
    angles = rotation(frequencies(c.compress_rope_theta, c.qk_rope_head_dim, c.rope_scaling), torch.tensor([8]))
    emit = Emit(*(torch.tensor([v]) for v in (0, 11, 11, 0)))
    args = (normal(1, 2 * C), normal(1, 2 * C), normal(1, 8, 2 * C), normal(1, 8, 2 * C), normal(4, 2 * C), emit, 8,
            normal(C), angles, c.rms_norm_eps, round_kv)  # fmt: skip
    return Case(lambda i: compressed_rows(*args), batch=SHORT_CALLS)


def cases(s: Size) -> dict[str, Callable[[], Case]]:
    """Every row by name; what makes it is called when its turn comes, and freed after it."""
    c, reads = s.config, ("read", 0.75)
    D, inner, latent = c.hidden_size, c.moe_intermediate_size, c.q_lora_rank
    fp8 = {"wq_a": (latent, D), "wq_b": (c.num_attention_heads * c.head_dim, latent), "wkv": (c.head_dim, D),
           "wo_b": (D, c.o_groups * c.o_lora_rank)}  # fmt: skip
    make = functools.partial
    some = [m for m in (2, 4, 8, 16, 64) if m < s.many]
    return {
        "fp4-w1": make(product, s, "fp4", inner, D, limit=reads),
        "fp4-w2": make(product, s, "fp4", D, inner, limit=reads),
        **{f"fp8-{name}": make(product, s, "fp8", *shape, limit=reads) for name, shape in fp8.items()},
        "fp8-wo_a": make(grouped, s),
        "bf16-compressor": make(bf16, s, 2 * c.head_dim, D),
        "bf16-head": make(bf16, s, s.head_rows, D),
        **{f"fp4-w1-m{m}": make(product, s, "fp4", inner, D, m) for m in some},
        f"fp4-w1-m{s.many}": make(product, s, "fp4", inner, D, s.many, ("gemm", 0.80)),
        "experts-t1": make(experts, s, 1),
        f"experts-t{s.many}": make(experts, s, s.many),
        "shared-t1": make(shared, s, 1),
        f"shared-t{s.many}": make(shared, s, s.many),
        "indexer": make(indexer, s),
        "attention-csa": make(attend, s, s.csa_rows, c.index_topk, 0.8),
        "attention-hca": make(attend, s, s.hca_rows, s.hca_rows, 6.0),
        "turn": make(turn, s),
        "route": make(routes, s),
        "norm_rope": make(heads, s),
        "compressed_rows": make(pooled, s),
    }


def measured(name: str, case: Case, ceilings: Ceilings, seconds: float) -> dict[str, Any]:
    """One row's figures: the median time of a call, its rates, and their shares of the ceilings around it."""
    case.call(0)  # the first allocates
    once = max(cpu_seconds(lambda: case.call(1)), 1e-7)
    count = min(max(LEAST_SAMPLES, int(seconds / (once * case.batch))), MOST_SAMPLES)
    before = ceilings.read(), ceilings.gemm() if case.flops else 0.0
    spent = []
    for first in range(0, count * case.batch, case.batch):
        spent.append(_batch(case, first) / case.batch)
    after = ceilings.read(), ceilings.gemm() if case.flops else 0.0
    read, gemm = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    median = statistics.median(spent)
    found: dict[str, Any] = {
        "name": name, "us": median * 1e6, "range_us": [min(spent) * 1e6, max(spent) * 1e6], "samples": count,
        "bytes": case.bytes, "flops": case.flops, "ceiling_read": [before[0], after[0]],
        "ceiling_gemm": [before[1], after[1]], "read_share": case.bytes / median / read if case.bytes else None,
        "gemm_share": case.flops / median / gemm if case.flops else None, "limit": case.limit, "errors": case.errors,
    }  # fmt: skip
    return {**found, "problems": missed(found)}


def _batch(case: Case, first: int) -> float:
    return cpu_seconds(lambda: [case.call(i) for i in range(first, first + case.batch)])


def missed(row: dict[str, Any]) -> list[str]:
    """Which of its limits a row misses, in words."""
    found = [
        f"{row['name']}: {name}: {value:.3g}, and {allowed:g} is allowed"
        for name, (value, allowed) in row["errors"].items()
        if not value <= allowed
    ]
    if row["limit"] is None:
        return found
    kind, limit = row["limit"]
    if kind == "ms" and row["us"] / 1000 > limit:
        found.append(f"{row['name']}: {row['us'] / 1000:.2f} ms, and {limit:g} ms are allowed")
    if kind != "ms" and row[f"{kind}_share"] < limit:
        found.append(f"{row['name']}: {row[f'{kind}_share']:.2f} of the {kind} ceiling, and {limit:g} is the least")
    return found


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    rates = [f"{row[unit] / row['us'] / 1000:9.1f}" if row[unit] else f"{'-':>9s}" for unit in ("bytes", "flops")]
    shares = [f"{row[k]:7.2f}" if row[k] is not None else f"{'-':>7s}" for k in ("read_share", "gemm_share")]
    limit = row["limit"] and (f"<= {row['limit'][1]:g} ms" if row["limit"][0] == "ms" else f">= {row['limit'][1]:.2f}")
    errors = ", ".join(f"{name} {value:.1e}" if value else f"{name} 0" for name, (value, _) in row["errors"].items())
    return f"{row['name']:18s}{row['us']:12,.1f}{rates[0]}{shares[0]}{rates[1]}{shares[1]}{limit or '-':>11s}  {errors}"


def run(names: list[str], size: Size, promises: bool) -> dict[str, Any]:
    """The rows of these names, printed as they come; the record to keep."""
    torch.set_num_threads(1)
    makers, rows = cases(size), []
    ceilings = Ceilings(size.read_bytes, size.gemm)
    for _ in range(WARM_READS):  # what ran before may still be giving its memory back
        ceilings.read()
    print(f"{'':18s}{'us':>12s}{'GB/s':>9s}{'share':>7s}{'GFLOP/s':>9s}{'share':>7s}{'limit':>11s}  errors")
    for name in (n for n in makers if n in names):
        case = makers[name]()
        rows.append(measured(name, case if promises else dataclasses.replace(case, limit=None), ceilings, size.seconds))
        print(line(rows[-1]), flush=True)
        del case
    found: dict[str, Any] = {"rows": rows, "problems": [p for row in rows for p in row["problems"]]}
    if OVERHEAD in names:
        from bench import wide  # only here: a model of 4 GB

        found[OVERHEAD] = {**wide.overhead(wide.FULL if promises else wide.QUICK), "limit": OVERHEAD_LIMIT}
        share, step = found[OVERHEAD]["share"], found[OVERHEAD]["step_ms"]
        print(
            f"\nof a decode step of {step:.1f} ms, {share:.1%} is outside the kernels (limit: < {OVERHEAD_LIMIT:.0%})"
        )
        if promises and share >= OVERHEAD_LIMIT:
            found["problems"].append(f"{share:.1%} of a decode step is spent outside the kernels")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if any(argument.split("=")[0] == "--device" for argument in argv):
        from bench import kernels_gpu  # only here: it needs Triton

        return kernels_gpu.main(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, in seconds; promises no time, no record")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/kernels.jsonl alone")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose names begin so; writes no record")
    parser.add_argument("--overhead", action="store_true", help="measure a decode step of bench.wide's model too")
    args = parser.parse_args(argv)
    size = shapes.QUICK if args.quick else shapes.FULL
    known = [*cases(size), OVERHEAD]
    for begin in args.only or ():
        if not any(name.startswith(begin) for name in known):
            parser.error(f"--only {begin}: the rows are {', '.join(known)}")
    names = [n for n in known if (n.startswith(tuple(args.only)) if args.only else n != OVERHEAD)]
    where = records.machine()
    with torch.inference_mode():
        found = run([*names, *([OVERHEAD] if args.overhead else [])], size, promises=not args.quick)
    for problem in found["problems"]:
        print(f"FAILED {problem}", file=sys.stderr)
    if not (args.no_save or args.quick or args.only):
        records.append(RESULTS, {
            **where, "bench": "kernels", "engine": f"pyrosome {pyrosome.__version__}", "torch": torch.__version__,
            "level": native.level(), **found,
        })  # fmt: skip
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
