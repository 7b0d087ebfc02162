"""Long contexts on a narrow model with V4-Flash's row shapes: rate and memory of prefill and decode, up to a million.

    python -m bench.frontier [--points N ...] [--prefill N] [--quick] [--no-save]

One thread.  A prompt is really prefilled; decoding is measured over caches filled with random rows, whose reading is
proved (`bench.witness`).  Exit status 1 where the allocator's bytes are not the plan's, memory is not linear in
context, or a step did not read what it should have.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyrosome
from bench import measure, records
from bench.witness import Watch, verify
from pyrosome.cache.streams import plan_cache
from pyrosome.config import ModelConfig
from pyrosome.engine.runner import Runner
from pyrosome.model.build import Network
from pyrosome.model.build import fill as fill_weights
from pyrosome.model.numerics import TRAINED
from pyrosome.ops import workspace
from pyrosome.plan.inventory import Model
from pyrosome.plan.work import Load
from pyrosome.testing.checkpoints import random_tensors
from pyrosome.testing.filled import RandomRows, fill

POINTS = (4096, 65536, 262144, 1048576)
PREFILL, CHUNK = 131072, 2048
QUICK: dict[str, Any] = {"points": (2048, 8192, 16384), "prefill": 1024, "chunk": 512, "repeats": 2}
RATIOS = (0, 4, 128)
KV_FORMAT = "fp8"
WEIGHTS_SEED, ROWS_SEED = 5, 7
WARM, TIMED, REPEATS = 4, 8, 5  # decode steps before any is timed; steps per rate; rates per median
GRAIN = 128  # contexts are multiples of so many tokens: whole rows of every stream
RESULTS = Path(__file__).parent / "results" / "frontier.jsonl"

measure.KEEPERS.append(workspace.give_back)


def narrow() -> ModelConfig:
    """Flash's row shapes (head_dim 512, rotary 64, index keys of 128, window 128, top 512), all else small."""
    return ModelConfig.preset(
        "flash", hidden_size=128, moe_intermediate_size=64, num_hidden_layers=len(RATIOS), compress_ratios=RATIOS,
        num_attention_heads=4, q_lora_rank=128, o_groups=2, o_lora_rank=64, index_n_heads=8, n_routed_experts=8,
        num_experts_per_tok=2, num_hash_layers=1, vocab_size=measure.SMALL["vocab_size"], num_nextn_predict_layers=0,
        expert_dtype=None, quantization=None,
    )  # fmt: skip


def network() -> Network:
    """The narrow model with seeded weights, in the arithmetic the official weights were trained for."""
    model = Network(narrow(), TRAINED, drafts=False)
    fill_weights(model, random_tensors(model.config, WEIGHTS_SEED, "bf16", num_stages=0), unpack=True)
    return model.eval()


def prefilled(model: Network, length: int, chunk: int) -> dict[str, Any]:
    """A prompt on an empty cache: CPU and clock seconds of each chunk, peak memory, cache bytes.

    CPU time is this thread's: the one that samples memory beside it would add some percent.
    """
    ids = measure.prompt(length)
    spent: dict[str, list[float]] = {"cpu_s": [], "wall_s": []}
    with measure.PeakMemory() as memory:
        runner = Runner(model, KV_FORMAT, 1, length)
        sequence = runner.open()
        for at in range(0, length, chunk):
            began, cpu_began = time.perf_counter(), time.thread_time()
            runner.step([(sequence, ids[at : at + chunk])])
            spent["cpu_s"].append(time.thread_time() - cpu_began)
            spent["wall_s"].append(time.perf_counter() - began)
            if at // chunk % 16 == 15:
                print(f"  {at + chunk:9,d} tokens: {chunk / spent['cpu_s'][-1]:7.1f} tokens per CPU second", flush=True)
    cpu, wall = length / sum(spent["cpu_s"]), length / sum(spent["wall_s"])
    return {"tokens": length, "chunk": chunk, "rate_cpu": cpu, "rate_wall": wall, "chunks": spent,
            "peak_mb": memory.extra_mb, "cache": cache_bytes(runner)}  # fmt: skip


def decoded(model: Network, context: int, repeats: int) -> dict[str, Any]:
    """Decoding that ends at `context` tokens over a filled cache: rates, memory, cache bytes, and the proof."""
    rows = RandomRows(ROWS_SEED)
    before = settled_bytes()
    runner = Runner(model, KV_FORMAT, 1, context)
    sequence = runner.open()
    fill(runner, sequence, context - WARM - TIMED * (1 + repeats), rows)
    resident = settled_bytes() - before
    position, token = sequence.length, 1

    def decode(count: int) -> None:
        nonlocal token
        for _ in range(count):
            (last,) = runner.step([(sequence, [token])])
            token = int(last.argmax())

    with Watch(runner) as watch:
        decode(1)
    proof = verify(runner, sequence, position, watch, rows)
    decode(WARM - 1)
    rates, peak_mb = measure.with_peak(lambda: decode(TIMED), TIMED, repeats)
    found = {"context": context, "rate_cpu": statistics.median(rates["cpu"]), "repeats_cpu": rates["cpu"],
             "rate_wall": statistics.median(rates["wall"]), "step_peak_mb": peak_mb, "resident_mb": resident / 1e6,
             "cache": cache_bytes(runner), "proof": dataclasses.asdict(proof)}  # fmt: skip
    print(f"{context:11,d}{found['rate_cpu']:14.2f}{peak_mb:14.1f}{resident / 1e6:14.1f}"
          f"{found['cache']['allocated']:16,d}{found['cache']['planned']:16,d}{proof.keys_scored:11,d}"
          f"{proof.rows_attended:9,d}{proof.attention_error:11.1e}   {proof.checksum:08x}", flush=True)  # fmt: skip
    return found


def cache_bytes(runner: Runner) -> dict[str, int]:
    """What the pool's tensors take, and what the plan for such a pool says, in bytes."""
    planned = plan_cache(runner.model.config, KV_FORMAT, 1, runner.pool.max_context)
    return {"allocated": runner.pool.allocated_bytes, "planned": planned.total_bytes}


def settled_bytes() -> int:
    """Resident bytes once what was freed has been given back."""
    gc.collect()
    measure.give_back_heap()
    return measure.resident_bytes()


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """The least-squares line through points, the largest distance of one from it, and R squared."""
    slope, start = np.polyfit(x, y, 1) if len(set(x)) > 1 else (0.0, y[0])
    off = np.asarray(y) - (slope * np.asarray(x) + start)
    spread = float(((np.asarray(y) - np.mean(y)) ** 2).sum())
    return {"slope": float(slope), "start": float(start), "worst": float(abs(off).max()),
            "r2": 1 - float((off**2).sum()) / spread if spread else 1.0}  # fmt: skip


def memory_by_context(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes per token: by the plan's table, and as the slopes of what was allocated and of what became resident."""
    plan = plan_cache(narrow(), KV_FORMAT, 1, 1)
    contexts = [p["context"] for p in points]
    return {
        "planned_per_token": plan.bytes_per_token,
        "flash_per_token": plan_cache(ModelConfig.preset("flash"), KV_FORMAT, 1, 1).bytes_per_token,
        "page_bytes": sum(plan.page_bytes.values()),
        "allocated": line(contexts, [p["cache"]["allocated"] for p in points]),
        "resident": line(contexts, [p["resident_mb"] * 1e6 for p in points]),
    }


def problems(prefill: dict[str, Any], points: list[dict[str, Any]], memory: dict[str, Any]) -> list[str]:
    """Why the run fails, in words; empty where it does not.

    Pages round a context up: a pool may lie up to a page of each kind away from the line.
    """
    found = []
    for name, cache in [("prefill", prefill["cache"]), *((f"{p['context']:,}", p["cache"]) for p in points)]:
        if cache["allocated"] != cache["planned"]:
            found.append(f"{name}: {cache['allocated']:,} B are allocated and {cache['planned']:,} B are planned")
    found += [f"{p['context']:,}: {problem}" for p in points for problem in p["proof"]["problems"]]
    if memory["allocated"]["worst"] > memory["page_bytes"]:
        found.append(f"memory is not linear: a point is {memory['allocated']['worst']:,.0f} B away from the line")
    return found


def predicted(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rates of decoding, and of the prompt's last chunk, beside those that the planner predicts."""
    beside, prompt = records.Predictions("frontier", Model.of(narrow(), 0)), record["prefill"]
    for point in record["decode"]:
        beside.step(Load(1, 1, point["context"], KV_FORMAT), point["rate_cpu"])
    chunk = prompt["chunk"]
    beside.step(Load(1, chunk, prompt["tokens"] - chunk, KV_FORMAT), chunk / prompt["chunks"]["cpu_s"][-1])
    return beside.lines


def run(points: list[int], prefill: int, chunk: int, repeats: int) -> dict[str, Any]:
    """All measurements, printed as they come; the record to keep."""
    torch.set_num_threads(1)
    model = network()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"narrow model: {weights / 1e6:.1f} MB of weights, layers {RATIOS}, rows {KV_FORMAT}, numerics trained")
    prefilled(model, 2 * GRAIN, GRAIN)  # first calls allocate and choose kernels
    print(f"\nprefill of {prefill:,} tokens in chunks of {chunk:,}")
    first = prefilled(model, prefill, chunk)
    growth = line([float(chunk * i) for i in range(len(first["chunks"]["cpu_s"]))], first["chunks"]["cpu_s"])
    print(f"  {first['rate_cpu']:.1f} tokens per CPU second overall, peak above the model {first['peak_mb']:.1f} MB, "
          f"cache {first['cache']['allocated']:,} B\n  CPU seconds of a chunk at context n: {growth['start']:.3f} + "
          f"{growth['slope'] * 1e3:.5f} x n / 1,000 (R2 {growth['r2']:.3f})\n")  # fmt: skip
    print(f"{'context':>11s}{'tokens/CPU-s':>14s}{'step peak MB':>14s}{'resident MB':>14s}{'allocated B':>16s}"
          f"{'planned B':>16s}{'keys':>11s}{'rows':>9s}{'error':>11s}   checksum")  # fmt: skip
    each = [decoded(model, n, repeats) for n in sorted(set(points))]
    memory = memory_by_context(each)
    print(
        f"\nbytes per token: {memory['planned_per_token']:.4f} planned; slope of allocated "
        f"{memory['allocated']['slope']:.4f} (whole pages and their tables included), of resident "
        f"{memory['resident']['slope']:.4f}; by the same table V4-Flash takes {memory['flash_per_token']:,.2f}"
    )
    shape = {k: getattr(model.config, k) for k in ("head_dim", "qk_rope_head_dim", "index_head_dim", "index_n_heads",
             "index_topk", "sliding_window", "num_attention_heads", "hidden_size", "layer_ratios")}  # fmt: skip
    return {"bench": "frontier", "engine": f"pyrosome {pyrosome.__version__}", "torch": torch.__version__,
            "numerics": TRAINED.name, "kv_format": KV_FORMAT, "shape": shape, "weights_mb": weights / 1e6,
            "prefill": {**first, "growth": growth}, "decode": each, "memory": memory,
            "run_cpu_s": time.process_time(), "problems": problems(first, each, memory)}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", help=f"contexts to decode at (default: {POINTS})")
    parser.add_argument("--prefill", type=int, help=f"tokens of the prompt (default: {PREFILL:,})")
    parser.add_argument("--quick", action="store_true", help="small contexts, in seconds; writes no record")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/frontier.jsonl alone")
    args = parser.parse_args(argv)
    usual = QUICK if args.quick else {"points": POINTS, "prefill": PREFILL, "chunk": CHUNK, "repeats": REPEATS}
    points, prefill = args.points or list(usual["points"]), args.prefill or usual["prefill"]
    limit = narrow().max_position_embeddings
    for n in (*points, prefill):
        if n % GRAIN or not 2 * GRAIN <= n <= limit:
            parser.error(f"{n:,} tokens: contexts are multiples of {GRAIN} from {2 * GRAIN} to {limit:,}")
    if len(set(points)) < 2:
        parser.error(f"--points {points[0]}: bytes per token are a slope and need two different contexts")
    where = records.machine()
    record = run(points, prefill, usual["chunk"], usual["repeats"])
    if not args.quick:
        record["predicted"] = predicted(record)
    for problem in record["problems"]:
        print(f"FAILED {problem}", file=sys.stderr)
    if not args.no_save and not args.quick:
        records.append(RESULTS, {**where, **record})
    return 1 if record["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
