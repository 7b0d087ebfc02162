"""A model of V4-Flash's widths with few layers: decoding and prefill beside the memory they read, one thread and more.

    python -m bench.wide [--quick] [--no-save] [--threads N]

Seeded weights in the official layout, numerics "trained", rows "fp8".  CPU time is the thread's own where it is alone;
several threads are compared by the clock.  Exit status 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import pyrosome
from bench import measure, records
from bench.shapes import Ceilings, cpu_seconds, native_bytes
from pyrosome.config import ModelConfig
from pyrosome.engine.graphs import StepGraphs
from pyrosome.engine.runner import Runner
from pyrosome.model.build import Network
from pyrosome.model.build import fill as fill_weights
from pyrosome.model.layers import Weight
from pyrosome.model.numerics import TRAINED
from pyrosome.ops import native
from pyrosome.plan.inventory import Model
from pyrosome.plan.work import Load
from pyrosome.quant import QuantTensor
from pyrosome.testing.checkpoints import random_tensors
from pyrosome.testing.filled import RandomRows, fill

RATIOS = (0, 0, 4, 128, 4, 128)
KV_FORMAT = "fp8"
WEIGHTS_SEED, ROWS_SEED = 5, 7
WARM = 12  # decode steps before any is timed: those that finish a row of four tokens are captured by then too
EMPTY_CALLS = 3000
RESULTS = Path(__file__).parent / "results" / "wide.jsonl"
# Of one thread: the least share of the read ceiling and the most milliseconds of a token at the nearer context, how
# much longer one may take at the farther, and the most milliseconds of a prompt's token.
READ_SHARE, DECODE_MS, FARTHER, PREFILL_MS = 0.70, 80.0, 1.6, 26.0
# Of several threads beside one, by the clock: prefill, decoding, and decoding while another process takes a core.
PREFILL_GAIN, DECODE_GAIN, BUSY_GAIN = 1.6, 1.0, 0.5


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the model is, and how long it is run."""

    config: ModelConfig
    contexts: tuple[int, int]
    prompt: int
    steps: int  # decode steps of a measurement
    prefills: int
    read_bytes: int


def _config(**changes: Any) -> ModelConfig:
    return ModelConfig.preset(
        "flash", num_hidden_layers=len(RATIOS), compress_ratios=RATIOS, n_routed_experts=32, vocab_size=4096,
        num_nextn_predict_layers=0, **changes,
    )  # fmt: skip


FULL = Size(_config(), (4096, 262144), 512, 16, 3, 512 << 20)
QUICK = Size(
    _config(hidden_size=256, moe_intermediate_size=128, num_attention_heads=4, head_dim=128, q_lora_rank=128,
            o_groups=2, o_lora_rank=64, index_n_heads=4, index_head_dim=64, index_topk=32, sliding_window=16),
    (512, 2048), 64, 3, 1, 1 << 20,
)  # fmt: skip


def network(config: ModelConfig) -> Network:
    """The model with seeded weights as a checkpoint has them: FP8 matrices, FP4 experts."""
    model = Network(config, TRAINED, drafts=False)
    fill_weights(model, random_tensors(config, WEIGHTS_SEED, "fp8fp4", num_stages=0), unpack=False)
    return model.eval()


def weight_bytes(model: Network) -> dict[str, int]:
    """What all weights take, and what one token reads of them: the dense ones, its experts, the head, an embedding row.

    Tables of experts by token id are left out of the latter: one row of each is read.
    """
    config = model.config
    stored = [m.value for m in model.modules() if isinstance(m, Weight) and isinstance(m.value, QuantTensor)]
    plain = [p for name, p in model.named_parameters() if not name.startswith("bank.")]
    dense = sum(native_bytes(w) for w in stored) + sum(native_bytes(p) for p in plain)
    bank = [model.bank.weights(f"layers.{i}") for i in range(config.num_hidden_layers)]
    experts = sum(native_bytes(w) for layer in bank for w in (layer.w1, layer.w3, layer.w2))
    embed = native_bytes(model.embed.value)
    visited = experts * config.num_experts_per_tok // config.n_routed_experts
    return {"all": dense + experts, "touched": dense - embed + embed // config.vocab_size + visited}


class Decoding:
    """One sequence over a cache filled with random rows, going on greedily."""

    def __init__(self, model: Network, context: int, steps: int) -> None:
        self.runner = Runner(model, KV_FORMAT, 1, context + 2 * WARM + steps)
        self.sequence, self.token = self.runner.open(), 1
        fill(self.runner, self.sequence, context, RandomRows(ROWS_SEED))
        for _ in range(WARM):
            self.step()

    def recapture(self) -> None:
        """Capture steps anew."""
        if self.runner.graphs is not None:
            self.runner.graphs = StepGraphs(self.runner.model, self.runner.pool)
        for _ in range(WARM):
            self.step()

    def step(self) -> None:
        """One token more."""
        (last,) = self.runner.step([(self.sequence, [self.token])])
        self.token = int(last.argmax())


def decoded(model: Network, size: Size, context: int, touched: int, ceilings: Ceilings) -> dict[str, Any]:
    """Decoding by one thread: CPU milliseconds of a token, and what it reads beside what can be read just then."""
    decoding = Decoding(model, context, size.steps)
    reads, spent = [ceilings.read()], []
    for _ in range(size.steps):
        spent.append(cpu_seconds(decoding.step))
        reads.append(ceilings.read())
    around = [(a + b) / 2 for a, b in itertools.pairwise(reads)]
    shares = [touched / s / read for s, read in zip(spent, around, strict=True)]
    found: dict[str, Any] = {
        "context": context,
        "ms": 1e3 * statistics.median(spent),
        "range_ms": [1e3 * min(spent), 1e3 * max(spent)],
        "read_share": statistics.median(shares),
        "ceiling_read": statistics.median(reads),
    }
    print(f"decode at {context:,} tokens: {found['ms']:.2f} CPU ms per token ({found['range_ms'][0]:.2f} to "
          f"{found['range_ms'][1]:.2f}); {touched / found['ms'] / 1e6:.1f} GB/s of weights, {found['read_share']:.2f} "
          f"of the read ceiling ({found['ceiling_read'] / 1e9:.1f} GB/s)", flush=True)  # fmt: skip
    return found


def prefilled(model: Network, size: Size) -> Callable[[], None]:
    """What reads a prompt from position 0, into the same cache every time."""
    ids = [token % model.config.vocab_size for token in measure.prompt(size.prompt)]
    runner = Runner(model, KV_FORMAT, 1, size.prompt)

    def run() -> None:
        sequence = runner.open()
        runner.step([(sequence, ids)])
        runner.close(sequence)

    return run


def timed(run: Callable[[], None], threads: int, count: int) -> list[float]:
    """Seconds of the clock for each of so many calls, after one that is not timed where there are several."""
    torch.set_num_threads(threads)
    out = []
    for _ in range(count + (count > 1)):
        began = time.perf_counter()
        run()
        out.append(time.perf_counter() - began)
    torch.set_num_threads(1)
    return out[-count:]


@contextlib.contextmanager
def busy_core() -> Iterator[subprocess.Popen[bytes]]:
    """Another process takes one core, as long as the block and this process last."""
    core = max(os.sched_getaffinity(0))
    loop = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile os.getppid() == {os.getpid()}:\n pass"
    child = subprocess.Popen([sys.executable, "-c", loop])
    try:
        time.sleep(0.3)  # it has begun
        yield child
    finally:
        child.kill()
        child.wait()


def compared(model: Network, size: Size, threads: int) -> tuple[dict[str, Any], list[float]]:
    """Several threads beside one, by the clock, in rounds that alternate; and the CPU seconds of one's prefills."""
    run, alone, together, cpu = prefilled(model, size), [], [], []
    run()  # first calls allocate
    for _ in range(size.prefills):
        began = time.thread_time()
        alone += timed(run, 1, 1)
        cpu.append(time.thread_time() - began)
        if threads > 1:
            together += timed(run, threads, 1)
    if threads == 1:
        return {}, cpu
    rounds, each = 3, max(2, size.steps // 2)
    step = Decoding(model, size.contexts[0], 3 * rounds * (each + 1)).step
    spent: dict[str, list[float]] = {"one": [], "several": [], "busy": []}
    for _ in range(rounds):
        spent["one"] += timed(step, 1, each)
        spent["several"] += timed(step, threads, each)
        with busy_core():
            spent["busy"] += timed(step, threads, each)
    ms = {name: 1e3 * statistics.median(values) for name, values in spent.items()}
    prefill_s = statistics.median(alone), statistics.median(together)
    found = {
        "threads": threads, "prefill_s": prefill_s, "decode_ms": ms, "prefill_gain": prefill_s[0] / prefill_s[1],
        "decode_gain": ms["one"] / ms["several"], "busy_gain": ms["one"] / ms["busy"],
    }  # fmt: skip
    print(f"{threads} threads beside one, by the clock: prefill {found['prefill_gain']:.2f} times as fast, decoding "
          f"{found['decode_gain']:.2f} times, and {found['busy_gain']:.2f} times beside a busy process")  # fmt: skip
    return found, cpu


def predicted(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One thread's rates beside those that the planner predicts."""
    prompt = record["prefill"]
    beside = records.Predictions("wide", Model.of(FULL.config, 0))
    for d in record["decode"]:
        beside.step(Load(1, 1, d["context"], KV_FORMAT), 1e3 / d["ms"])
    beside.step(Load(1, prompt["tokens"], 0, KV_FORMAT), 1e3 / prompt["ms"])
    return beside.lines


def checks(record: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    """What is promised: (what, how much was found, whether the limit is the least or the most, the limit)."""
    (near, far), prompt, several = record["decode"], record["prefill"], record["several"]
    found = [
        (f"share of the read ceiling at {near['context']:,} tokens", near["read_share"], "least", READ_SHARE),
        (f"CPU ms per token at {near['context']:,} tokens", near["ms"], "most", DECODE_MS),
        (f"times as long a token at {far['context']:,} tokens", far["ms"] / near["ms"], "most", FARTHER),
        (f"CPU ms per token of a prompt of {prompt['tokens']:,}", prompt["ms"], "most", PREFILL_MS),
    ]
    if several:
        threads = f"with {several['threads']} threads"
        found += [
            (f"prefill {threads}, times as fast by the clock", several["prefill_gain"], "least", PREFILL_GAIN),
            (f"decoding {threads}, times as fast by the clock", several["decode_gain"], "least", DECODE_GAIN),
            (f"decoding {threads} beside a busy process, times as fast", several["busy_gain"], "least", BUSY_GAIN),
        ]
    return found


def problems(record: dict[str, Any]) -> list[str]:
    """Which limits are missed, in words."""
    return [
        f"{what}: {value:.2f}, and {limit:g} is the {kind}"
        for what, value, kind, limit in record["checks"]
        if not (value <= limit if kind == "most" else value >= limit)
    ]


def run(size: Size, threads: int) -> dict[str, Any]:
    """All measurements, printed as they come; the record to keep."""
    torch.set_num_threads(1)
    model = network(size.config)
    weights = weight_bytes(model)
    print(
        f"{weights['all'] / 1e9:.3f} GB of weights, of which a token reads {weights['touched'] / 1e9:.3f} GB",
        flush=True,
    )
    ceilings = Ceilings(size.read_bytes)
    decode = [decoded(model, size, context, weights["touched"], ceilings) for context in size.contexts]
    del ceilings
    several, cpu = compared(model, size, threads)
    each = [1e3 * seconds / size.prompt for seconds in cpu]
    prefill = {"tokens": size.prompt, "ms": statistics.median(each), "range_ms": [min(each), max(each)]}
    print(f"prefill of {size.prompt:,} tokens: {prefill['ms']:.2f} CPU ms per token")
    return {"bench": "wide", "engine": f"pyrosome {pyrosome.__version__}", "torch": torch.__version__,
            "level": native.level(), "numerics": TRAINED.name, "kv_format": KV_FORMAT,
            "layer_ratios": size.config.layer_ratios, "experts": size.config.n_routed_experts,
            "vocab_size": size.config.vocab_size, "weights": weights, "decode": decode, "prefill": prefill,
            "several": several}  # fmt: skip


def overhead(size: Size) -> dict[str, Any]:
    """The share of a decode step's CPU time outside the kernels, and what was counted: medians over steps.

    Every function of the library is wrapped in a timer.  What a timer itself takes, and the call of a function that
    does nothing, is measured on such a function and taken off: the way into a kernel counts as outside it.
    """
    torch.set_num_threads(1)
    decoding = Decoding(network(size.config), size.contexts[0], size.steps)
    library, inside = native.library(), [0.0, 0]
    plain = {name: getattr(library, name) for name in native._SIGNATURES}

    def timer(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.thread_time()
            result = function(*args)
            inside[0] += time.thread_time() - began
            inside[1] += 1
            return result

        return call

    nothing = timer(library.affinity)  # of no elements
    kernel_s = _each(lambda: library.affinity(None, None, 0))
    timed_s = _each(lambda: nothing(None, None, 0))
    within_s = inside[0] / inside[1]
    shares, totals, counts = [], [], []
    try:
        for name, function in plain.items():
            setattr(library, name, timer(function))
        decoding.recapture()  # what was captured before calls the plain functions
        for _ in range(size.steps):
            inside[:] = 0.0, 0
            total = cpu_seconds(decoding.step) - inside[1] * (timed_s - kernel_s)
            native_s = inside[0] - inside[1] * within_s
            shares.append(1 - native_s / total)
            totals.append(total)
            counts.append(inside[1])
    finally:
        for name, function in plain.items():
            setattr(library, name, function)
    return {"share": statistics.median(shares), "step_ms": 1e3 * statistics.median(totals),
            "calls": statistics.median(counts), "timer_us": 1e6 * (timed_s - kernel_s)}  # fmt: skip


def _each(run: Callable[[], Any]) -> float:
    return cpu_seconds(lambda: [run() for _ in range(EMPTY_CALLS)]) / EMPTY_CALLS


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, in seconds; promises nothing, no record")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/wide.jsonl alone")
    parser.add_argument("--threads", type=int, default=min(2, cores), help="compared with one; 1 compares nothing")
    args = parser.parse_args(argv)
    if not 1 <= args.threads <= cores:
        parser.error(f"--threads {args.threads}: this process has {cores} cores")
    where = records.machine()
    record = run(QUICK if args.quick else FULL, args.threads)
    if not args.quick:
        record["predicted"] = predicted(record)
    record["checks"] = checks(record)
    record["problems"] = [] if args.quick else problems(record)
    for problem in record["problems"]:
        print(f"FAILED {problem}", file=sys.stderr)
    if not args.no_save and not args.quick:
        threads = f"1, and {args.threads} where said" if args.threads > 1 else 1
        records.append(RESULTS, {**where, "threads": threads, **record})
    return 1 if record["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
