"""Training steps of the built-in model's recipe: by definitions, by native kernels, and with bfloat16 products.

    python -m bench.train [--rounds N] [--step-tokens N] [--quick] [--no-save]

One thread, steps of the recipe's second stage: forward, backward, optimizer and copies.  The three ways take turns in
one process, and figures are medians of the thread's own CPU time.  Exit status 1 where the kernels are not at least 1.5
times as fast as the definitions, or where the ways' losses of one step differ by more than 2%.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import records
from pyrosome.ops.seam import OPS, use
from pyrosome.train.batch import pack
from pyrosome.train.recipe import Recipe
from pyrosome.train.trainer import Run

ROUNDS, STEP_TOKENS, STAGE = 5, 4096, 1
GAIN, AGREEMENT = 1.5, 0.02  # promised
WAYS = {"definitions": "float32", "kernels": "float32", "bfloat16": "bfloat16"}


@contextlib.contextmanager
def way(name: str) -> Any:
    """Within, ops run as that way has them."""
    with contextlib.ExitStack() as stack:
        for op in OPS.values() if name == "definitions" else ():
            stack.enter_context(use(op, "torch"))
        yield


def measured(rounds: int, step_tokens: int) -> dict[str, Any]:
    """Of each way: tokens per CPU second of every round, and the loss of the first step, before any was taken."""
    out: dict[str, Any] = {name: {"rates": []} for name in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        runs = {}
        for name, dtype in WAYS.items():
            recipe = Recipe.load("nano", [f"run.dtype={dtype}", f"run.step_tokens={step_tokens}"])
            runs[name] = Run(recipe, Path(scratch) / name, resume=False, threads=1, device="cpu")
            runs[name].state.stage = STAGE
        for number in range(rounds + 1):
            for name, run in runs.items():
                samples, _ = run.samples.source(run.stage).batch(100 * number, step_tokens)
                with way(name):
                    began = time.thread_time()
                    row = run.step(pack(samples))
                    spent = time.thread_time() - began
                if number:  # the first builds and warms
                    out[name]["rates"].append(sum(len(s.ids) for s in samples) / spent)
                else:
                    out[name]["loss"] = row["loss"]
    for found in out.values():
        found["tokens_per_cpu_s"] = statistics.median(found["rates"])
    return out


def problems(found: dict[str, Any]) -> list[str]:
    """What was promised and is not so."""
    said = []
    gain = found["kernels"]["tokens_per_cpu_s"] / found["definitions"]["tokens_per_cpu_s"]
    if gain < GAIN:
        said.append(f"kernels train {gain:.2f} times as fast as the definitions; {GAIN} was promised")
    for name in ("kernels", "bfloat16"):
        off = abs(found[name]["loss"] / found["definitions"]["loss"] - 1)
        if off > AGREEMENT:
            said.append(f"{name}: the first loss is {off:.1%} off the definitions'; {AGREEMENT:.0%} is allowed")
    return said


def main() -> int:
    """Run, print, record; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS)
    parser.add_argument("--quick", action="store_true", help="one round of short steps; promises nothing")
    parser.add_argument("--no-save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    before = records.machine()
    tokens = 512 if given.quick else given.step_tokens
    found = measured(1 if given.quick else given.rounds, tokens)
    for name, each in found.items():
        print(f"{name:12s} {each['tokens_per_cpu_s']:10,.0f} tokens/CPU-s   first loss {each['loss']:.4f}")
    said = [] if given.quick else problems(found)
    print("\n".join(said) or "as promised")
    if not given.no_save and not given.quick:
        record = {**before, "bench": "train", "torch": torch.__version__, "step_tokens": tokens, "ways": found}
        records.append(records.HERE / "results" / "train.jsonl", record)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
