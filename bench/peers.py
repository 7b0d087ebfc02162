"""The same weights in transformers and here: equal logits, then speed and memory side by side.

    python -m bench.peers [--shape small|wide] [--hf-python PATH] [--rounds N] [--repeats N] [--quick] [--no-save]

Each side runs in a process of its own with one thread; rounds alternate, so that a machine whose speed drifts
is fair to both.  Exit status 1 where logits differ by more than 1e-4 or the greedy tokens are not the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench import measure, records
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.checkpoint.save import save_checkpoint
from pyrosome.config import ModelConfig
from pyrosome.plan.inventory import Model
from pyrosome.plan.work import Load
from pyrosome.quant import QuantTensor
from pyrosome.testing.checkpoints import random_checkpoint

TOLERANCE = 1e-4
CHUNK = 1024  # tokens of our side's spans (`our_side.py`)
SEED = 11


def make_checkpoints(official: Path, plain: Path, shape: measure.Shape) -> None:
    """Seeded weights in the official FP8 and FP4 layout, without a draft stage; and their exact values in bfloat16.

    The other side has no arithmetic for the official layout on a CPU: it is given the values, which bfloat16 holds
    exactly, and widens them to float32.  So both compute with the same numbers.
    """
    config = ModelConfig.preset("flash", **shape.config, compress_ratios=shape.ratios, num_nextn_predict_layers=0)
    random_checkpoint(official, config, SEED, "fp8fp4", num_stages=0)
    tensors = (
        (name, value.dequantize(torch.bfloat16) if isinstance(value, QuantTensor) else value)
        for name, value in read_tensors(open_checkpoint(official))
    )
    unquantised = dataclasses.replace(config, expert_dtype=None, quantization=None)
    save_checkpoint(plain, unquantised, tensors)


def run_side(
    python: str, script: str, checkpoint: Path, folder: Path, repeats: int, quick: bool, shape: str
) -> tuple[dict[str, Any], Tensor]:
    """One child process: its measurements, and its logits [T, V].

    Raises:
        SystemExit: the child failed; what it said is on standard error.
    """
    out, logits = folder / f"{script}.json", folder / f"{script}.safetensors"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    extent = "quick" if quick else "full"
    command = [python, Path(__file__).parent / script, checkpoint, out, logits, str(repeats), extent, shape]
    if subprocess.run(command, env=env, check=False).returncode:
        raise SystemExit(f"{script} failed under {python}; bench/README.md says what its environment needs")
    return json.loads(out.read_text()), load_file(logits)["logits"]


def compare(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far two sets of logits [T, V] are apart, and how large they are."""
    return {
        "max_abs": (ours - theirs).abs().max().item(),
        "top1": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        "std": theirs.std().item(),
        "positions": len(ours),
    }


def same_tokens(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> bool:
    """Whether greedy decoding went the same way in every round, as far as both sides of a round went."""
    for our, their in zip(ours, theirs, strict=True):
        shorter = min(len(our["tokens"]), len(their["tokens"]))
        if our["tokens"][:shorter] != their["tokens"][:shorter]:
            return False
    return True


def passes(logits: list[dict[str, float]], tokens_agree: bool) -> bool:
    """The verdict: every round's logits within `TOLERANCE` (NaN is not), greedy tokens equal."""
    return tokens_agree and all(d["max_abs"] <= TOLERANCE for d in logits)


def predicted(config: ModelConfig, rows: dict[str, float]) -> list[dict[str, Any]]:
    """Our rates beside those that the planner predicts."""
    beside = records.Predictions("peers", Model.of(config, 0))
    for name, rate in rows.items():
        found = re.fullmatch(r"prefill ([\d,]+) \(tok/CPU-s\)", name)
        if found:
            beside.prompt(int(found[1].replace(",", "")), CHUNK, rate)
    decoding = Load(1, 1, measure.DECODED_AFTER + measure.DECODED // 2)
    beside.step(decoding, rows["decode (tok/CPU-s)"])
    return beside.lines


def main() -> int:
    """Run the comparison; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-python", default=os.environ.get("PYROSOME_HF_PYTHON", sys.executable),
                        help="an interpreter with transformers (default: PYROSOME_HF_PYTHON, or this one)")  # fmt: skip
    parser.add_argument("--shape", choices=measure.SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of each figure within a round")
    parser.add_argument("--quick", action="store_true", help="one round, one repeat, short prompts alone")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/peers.jsonl alone")
    args = parser.parse_args()
    if min(args.rounds, args.repeats) < 1:
        parser.error(f"--rounds {args.rounds} --repeats {args.repeats}: both must be at least 1")
    rounds, repeats = (1, 1) if args.quick else (args.rounds, args.repeats)

    where = records.machine()
    theirs, ours, logits = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_checkpoints(folder / "official", folder / "plain", measure.SHAPES[args.shape])
        config = open_checkpoint(folder / "official").config
        for _ in range(rounds):
            sides = ((args.hf_python, "hf_side.py", "plain"), (sys.executable, "our_side.py", "official"))
            (their, their_logits), (our, our_logits) = (
                run_side(python, script, folder / checkpoint, folder, repeats, args.quick, args.shape)
                for python, script, checkpoint in sides
            )
            theirs.append(their)
            ours.append(our)
            logits.append(compare(our_logits, their_logits))

    worst = max(logits, key=lambda d: (d["max_abs"] != d["max_abs"], d["max_abs"]))  # NaN is the worst of all
    tokens_agree = same_tokens(ours, theirs)
    our_rows, their_rows = records.merged(ours), records.merged(theirs)
    print(f"logits of {worst['positions']:,} positions: max abs difference {worst['max_abs']:.2e} (limit {TOLERANCE}), "
          f"same best token {worst['top1']:.4f}, std {worst['std']:.2f}")  # fmt: skip
    print(f"greedy tokens after {measure.DECODED_AFTER:,}: {'the same' if tokens_agree else 'DIFFERENT'}\n")
    title = f"one thread each, medians of {rounds} x {repeats}; decode after {measure.DECODED_AFTER:,} tokens"
    print(records.table(title, our_rows, their_rows, (ours[0]["engine"], theirs[0]["engine"])))
    print("\nours, prefilled in parts of 1,024:")
    for n, row in ours[-1]["linear"].items():
        cache_mb = row["cache_bytes"] / 1e6
        print(f"{int(n):8,d} tokens: cache {cache_mb:7.2f} MB, peak above the model {row['peak_mb']:7.1f} MB")
    if not args.no_save:
        record = {**where, "bench": "peers", "shape": args.shape, "numerics": "trained", "torch": ours[0]["torch"],
                  "their_torch": theirs[0]["torch"], "their_engine": theirs[0]["engine"],
                  "their_experts": theirs[0]["experts"], "ours": our_rows, "theirs": their_rows, "logits": worst,
                  "predicted": predicted(config, our_rows),
                  "same_tokens": tokens_agree, "linear": ours[-1]["linear"], "rounds": rounds,
                  "repeats": repeats}  # fmt: skip
        records.append(Path(__file__).parent / "results" / "peers.jsonl", record)
    return 0 if passes(logits, tokens_agree) else 1


if __name__ == "__main__":
    sys.exit(main())
