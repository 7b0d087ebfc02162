"""The same weights in transformers and here: equal logits, then speed and memory side by side.

    python -m bench.peers [--hf-python PATH] [--rounds N] [--quick] [--no-save]

Each side runs in a process of its own with one thread; rounds alternate, so that a machine whose speed drifts
is fair to both.  Exit status 1 where logits differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench import measure
from pyrosome.config import ModelConfig
from pyrosome.testing.checkpoints import random_checkpoint

HERE = Path(__file__).parent
TOLERANCE = 1e-4
SEED = 11


def make_checkpoint(path: Path) -> None:
    """Seeded bf16 weights of the small shape in the official layout, without a draft stage."""
    config = ModelConfig.preset(
        "flash", **measure.SMALL, compress_ratios=measure.RATIOS, num_nextn_predict_layers=0, expert_dtype=None,
        quantization=None,
    )  # fmt: skip
    random_checkpoint(path, config, SEED, "bf16", num_stages=0)


def run_side(python: str, script: str, checkpoint: Path, folder: Path, repeats: int) -> tuple[dict[str, Any], Path]:
    """One child process; its measurements, and where it left its logits."""
    out, logits = folder / f"{script}.json", folder / f"{script}.safetensors"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([python, HERE / script, checkpoint, out, logits, str(repeats)], check=True, env=env)
    return json.loads(out.read_text()), logits


def merged(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over all rounds and repeats, one number per figure."""
    rows = {
        f"prefill {n} (tok/CPU-s)": measure.median([v for r in rounds for v in r["prefill"][str(n)]])
        for n in measure.PREFILLS
    }
    rows["decode after 1,024 (tok/CPU-s)"] = measure.median([v for r in rounds for v in r["decode"]])
    for n in measure.PREFILLS:
        rows[f"peak of prefill {n} (MB)"] = max(r["prefill_peak_mb"][str(n)] for r in rounds)
    rows["peak of decode (MB)"] = max(r["decode_peak_mb"] for r in rounds)
    return rows


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": 1,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-python", default=os.environ.get("PYROSOME_HF_PYTHON", sys.executable))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of each figure within a round")
    parser.add_argument("--quick", action="store_true", help="one round, one repeat")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    rounds, repeats = (1, 1) if args.quick else (args.rounds, args.repeats)
    theirs, ours = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_checkpoint(folder / "checkpoint")
        for _ in range(rounds):
            their, their_logits = run_side(args.hf_python, "hf_side.py", folder / "checkpoint", folder, repeats)
            our, our_logits = run_side(sys.executable, "our_side.py", folder / "checkpoint", folder, repeats)
            theirs.append(their)
            ours.append(our)
        a, b = load_file(our_logits)["logits"], load_file(their_logits)["logits"]
    worst = (a - b).abs().max().item()
    top1 = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    print(f"\nlogits of {len(a)} positions: max abs difference {worst:.2e}, same best token {top1:.4f}, std {b.std():.2f}")
    our_rows, their_rows = merged(ours), merged(theirs)
    print(f"{'':34s}{ours[0]['engine']:>18s}{theirs[0]['engine']:>22s}{'ratio':>8s}")
    for name, value in our_rows.items():
        print(f"{name:34s}{value:18,.1f}{their_rows[name]:22,.1f}{value / max(their_rows[name], 1e-9):8.2f}")
    linear = ours[-1]["linear"]
    for n, row in linear.items():
        print(f"ours at {int(n):6,d} tokens: cache {row['cache_bytes'] / 1e6:8.2f} MB, peak {row['peak_mb']:8.1f} MB")
    if not args.no_save:
        record = {**machine(), "bench": "peers", "shape": "small", "numerics": "exact", "torch": torch.__version__,
                  "ours": our_rows, "theirs": their_rows, "their_engine": theirs[0]["engine"], "max_abs": worst,
                  "top1": top1, "linear": linear, "rounds": rounds, "repeats": repeats}  # fmt: skip
        (HERE / "results").mkdir(exist_ok=True)
        with open(HERE / "results" / "peers.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
