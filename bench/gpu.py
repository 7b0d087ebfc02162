"""The whole model on one GPU: the official vectors, then rates by context at V4-Flash's true widths.

    python -m bench.gpu [--device cuda] [--layers N] [--contexts N ...] [--quick] [--no-save]

First what fits whole (the official test checkpoints, the built-in models): logits on the device beside the official
vectors, or beside the CPU's.  Then as many layers of V4-Flash as are asked for, with random weights in the official
formats: prefill in chunks, and decoding over caches filled with random rows.  Medians of clock time, the device waited
for.  Exit status 1 where logits differ by more than is promised.
Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import pyrosome
from bench import records
from pyrosome.checkpoint.names import TensorSpec, expected_tensors
from pyrosome.config import ModelConfig
from pyrosome.engine.loaded import load_model
from pyrosome.engine.runner import Runner
from pyrosome.model.build import Network, fill
from pyrosome.model.numerics import TRAINED
from pyrosome.quant import QuantTensor
from pyrosome.testing import filled
from pyrosome.testing.coded import coded

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "golden"
CONTEXTS = (4_096, 32_768, 131_072, 1_048_576)
LAYERS, CHUNK, PROMPT = 6, 8_192, 32_768
WARM, TIMED, REPEATS = 8, 16, 5
EXACT, TRAINED_RMS = 1e-4, 1e-2  # promised: numerics `exact`, and `trained` beside the definitions


def quick() -> ModelConfig:
    """Flash's rows between narrow matrices: every kernel runs, and nothing takes long."""
    return ModelConfig.preset(
        "flash", hidden_size=256, moe_intermediate_size=128, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4),
        num_attention_heads=4, q_lora_rank=128, o_groups=2, o_lora_rank=64, index_n_heads=8, n_routed_experts=8,
        num_experts_per_tok=2, num_hash_layers=1, vocab_size=512, num_nextn_predict_layers=0,
    )  # fmt: skip


def random_weights(config: ModelConfig, device: torch.device) -> Iterator[tuple[str, Tensor | QuantTensor]]:
    """Tensors of the official names, shapes and formats, drawn on the device: quantised ones code by code."""
    g = torch.Generator(device).manual_seed(11)
    for name, spec in expected_tensors(config, 0).items():
        yield name, _random(config, spec, device, g)


def _random(config: ModelConfig, spec: TensorSpec, device: torch.device, g: torch.Generator) -> Tensor | QuantTensor:
    kind = {"expert": "fp4", "matrix": "fp8"}.get(spec.kind)
    if spec.kind == "table":
        chosen = torch.rand(spec.shape[0], config.n_routed_experts, generator=g, device=device).argsort(1)
        return chosen[:, : spec.shape[1]].sort(1).values.cpu()
    if kind is None:
        values = torch.randn(spec.shape, generator=g, device=device)
        if len(spec.shape) > 1:
            values *= spec.shape[-1] ** -0.5
        return values if spec.kind == "f32" else values.bfloat16()
    # A power of two near 1 / sqrt(K) keeps sums of unit size.
    byte = 127 - round(math.log2(spec.shape[-1]) / 2)
    return coded(kind, spec.shape, device, (byte, byte), g)


def equality(device: str) -> list[dict[str, Any]]:
    """Logits of whole checkpoints on the device: beside the official vectors, and beside the CPU's."""
    found = []
    for name, key in (("bf16", "logits_prefill"), ("fp8fp4", "logits_exact")):
        vectors = load_file(GOLDEN / f"{name}_vectors.safetensors")
        ids = vectors["input_ids"][0].tolist()
        ours = load_model(GOLDEN / name, device).logits(ids).cpu()
        apart = float((ours - vectors[key][0]).abs().max())
        found.append({"checkpoint": name, "numerics": "exact", "tokens": len(ids), "apart": apart, "allowed": EXACT})
    for name in (str(GOLDEN / "fp8fp4"), "builtin:nano"):
        there, here = (load_model(name, d, "trained") for d in (device, "cpu"))
        ids = [(7 * i + 3) % here.config.vocab_size for i in range(300)]
        ours, theirs = there.logits(ids).cpu(), here.logits(ids)
        apart = float((ours - theirs).norm() / theirs.norm())
        found.append({"checkpoint": name.rsplit("/", 1)[-1], "numerics": "trained", "tokens": len(ids),
                      "apart": apart, "allowed": TRAINED_RMS})  # fmt: skip
    for row in found:
        row["ok"] = row["apart"] <= row["allowed"]
        print(f"{row['checkpoint']:14s} {row['numerics']:8s} {row['tokens']:5d} tokens: {row['apart']:.2e} apart, "
              f"{row['allowed']:.0e} allowed{'' if row['ok'] else '   TOO FAR'}", flush=True)  # fmt: skip
    return found


def network(config: ModelConfig, device: torch.device) -> Network:
    """A network of random weights on the device, in the arithmetic that official weights were trained for."""
    model = Network(config, TRAINED, drafts=False)
    fill(model, random_weights(config, device), device=device)
    return model.eval()


def waited(device: torch.device) -> Callable[[], float]:
    """A clock that is read when the device has done what it was given."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def prefilled(model: Network, length: int, chunk: int, now: Callable[[], float]) -> dict[str, Any]:
    """A prompt read in chunks: seconds of each, the second time over, when kernels are there."""
    ids = [(7 * i + 3) % model.config.vocab_size for i in range(length)]
    for _ in range(2):
        runner, seconds = Runner(model, "fp8", 1, length), []
        sequence = runner.open()
        for at in range(0, length, chunk):
            began = now()
            runner.step([(sequence, ids[at : at + chunk])])
            seconds.append(now() - began)
        runner.close(sequence)
    rates = [min(chunk, length - i * chunk) / s for i, s in enumerate(seconds)]
    print(f"prefill of {length:,} tokens in chunks of {chunk:,}: {length / sum(seconds):,.0f} tok/s, "
          f"first chunk {rates[0]:,.0f}, last {rates[-1]:,.0f}", flush=True)  # fmt: skip
    return {"tokens": length, "chunk": chunk, "seconds": seconds, "rate": length / sum(seconds)}


def decoded(model: Network, context: int, now: Callable[[], float], repeats: int, timed: int) -> dict[str, Any]:
    """Decoding that ends near `context` tokens over a cache of random rows: seconds of a step, medians over repeats."""
    runner = Runner(model, "fp8", 1, context)
    sequence = runner.open()
    filled.fill(runner, sequence, context - WARM - timed * repeats, filled.RandomRows(7))
    token, each = 1, []

    def decode(count: int) -> None:
        nonlocal token
        for _ in range(count):
            (last,) = runner.step([(sequence, [token])])
            token = int(last.argmax())

    decode(WARM)
    for _ in range(repeats):
        began = now()
        decode(timed)
        each.append((now() - began) / timed)
    step = statistics.median(each)
    print(f"decode at {context:10,d} tokens: {step * 1e3:8.3f} ms a step, {1 / step:8.1f} tok/s", flush=True)
    return {"context": context, "step_s": step, "repeats_s": each}


def run(device: torch.device, config: ModelConfig, contexts: list[int], prompt: int, chunk: int) -> dict[str, Any]:
    """All measurements, printed as they come; the record to keep."""
    checks = equality(str(device))
    model, now = network(config, device), waited(device)
    c = config
    held = f"; {torch.cuda.memory_allocated(device) / 1e9:.1f} GB held" if device.type == "cuda" else ""
    print(
        f"\n{c.num_hidden_layers} layers of width {c.hidden_size:,}, {c.n_routed_experts} experts{held}\n", flush=True
    )
    prefill = prefilled(model, prompt, chunk, now)
    points = [decoded(model, n, now, REPEATS, TIMED) for n in contexts]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"bench": "gpu", "engine": f"pyrosome {pyrosome.__version__}", "torch": torch.__version__, "device": name,
            "layers": c.num_hidden_layers, "hidden": c.hidden_size, "experts": c.n_routed_experts,
            "equality": checks, "prefill": prefill, "decode": points,
            "problems": [f"{r['checkpoint']} ({r['numerics']})" for r in checks if not r["ok"]]}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"layers of V4-Flash (default: {LAYERS})")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS), help="tokens to decode at")
    parser.add_argument("--quick", action="store_true", help="narrow matrices and short contexts; writes no record")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/gpu.jsonl alone")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"bench.gpu: {given.device} was asked for and torch finds no GPU; run it where there is one, or see "
              "that all of it works with --quick --device cpu", file=sys.stderr)  # fmt: skip
        return 2
    if given.quick:
        record = run(device, quick(), [1_024, 2_048], 512, 256)
    else:
        ratios = ModelConfig.preset("flash").compress_ratios[: given.layers]
        config = ModelConfig.preset(
            "flash", num_hidden_layers=len(ratios), compress_ratios=tuple(ratios), num_nextn_predict_layers=0
        )
        record = run(device, config, given.contexts, PROMPT, CHUNK)
        if not given.no_save:
            records.append(RESULTS, record)
    for problem in record["problems"]:
        print(f"FAILED: {problem} is further away than is promised", file=sys.stderr)
    return 1 if record["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
