"""Many requests at once: against one at a time, and against transformers' `generate` on the same weights.

    python -m bench.engine [--hf-python PATH | --no-hf] [--repeats N] [--quick] [--no-save]

Prompts of 128 tokens, 64 tokens of output each, greedy, one thread, CPU time; weights in the official FP8 and FP4
layout, numerics "trained", against float32 of the same values.  Exit status 1 where 16 at once are less than 4 times as
fast as one at a time on the built-in model, where a batch of 16 is less than 10 times as fast as transformers', or
where the two do not say the same when nothing is rounded (numerics "exact").
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import measure, peers, records
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.plan.inventory import Model
from pyrosome.plan.work import Load

HERE = Path(__file__).parent
RESULTS = HERE / "results"
COUNTS, LENGTH, NUM_TOKENS, BATCH = (1, 4, 16, 64), 128, 64, 16
AT_ONCE, AGAINST_THEIRS = 4.0, 10.0  # the least that is promised


def child(python: str, script: str, checkpoint: Path, folder: Path, *about: Any) -> dict[str, Any]:
    """What one child process measured.

    Raises:
        SystemExit: it failed; what it said is on standard error.
    """
    answer = folder / f"{script}.json"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command: list[str | Path] = [python, HERE / script, checkpoint, answer, *(json.dumps(a) for a in about)]
    if subprocess.run(command, env=env, check=False).returncode:
        raise SystemExit(f"{script} failed under {python}; bench/README.md says what its environment needs")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def at_once(checkpoint: Path, folder: Path, num_tokens: int, repeats: int, drafter: str = "off") -> dict[str, Any]:
    """Output tokens per CPU second by the number of requests at once, and each over that of one."""
    found = child(sys.executable, "batch_ours.py", checkpoint, folder, COUNTS, LENGTH, num_tokens, repeats, drafter)
    rate = {n: int(n) * num_tokens / statistics.median(s) for n, s in found["seconds"].items()}
    # Repeats go round all counts: the ratio of each round is of one moment.
    times = {
        n: statistics.median(int(n) * one / many for one, many in zip(found["seconds"]["1"], s, strict=True))
        for n, s in found["seconds"].items()
    }
    return {"tokens_per_cpu_s": rate, "times_one": times, "accepted": found["accepted"], "drafted": found["drafted"]}


def against(
    python: str, official: Path, plain: Path, folder: Path, num_tokens: int, repeats: int, rounds: int
) -> dict[str, Any]:
    """Ours and theirs by turns, a batch of 16 of equal lengths."""
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(child(python, "batch_hf.py", plain, folder, BATCH, LENGTH, num_tokens, repeats))
        ours.append(
            child(sys.executable, "batch_ours.py", official, folder, [BATCH], LENGTH, num_tokens, repeats, "off")
        )
    our_s = statistics.median(s for o in ours for s in o["seconds"][str(BATCH)])
    their_s = statistics.median(s for t in theirs for s in t["seconds"])
    total = BATCH * num_tokens
    same = [sum(map(operator.eq, o["tokens"], t["tokens"])) for o, t in zip(ours, theirs, strict=True)]
    return {
        "ours": total / our_s, "theirs": total / their_s, "ratio": their_s / our_s, "same": min(same),
        "their_engine": theirs[0]["engine"], "their_torch": theirs[0]["torch"],
    }  # fmt: skip


def predicted(checkpoint: Path, rates: dict[str, float], num_tokens: int) -> list[dict[str, Any]]:
    """Output tokens per second, prompts included, beside those that the planner predicts."""
    beside = records.Predictions("engine", dataclasses.replace(Model.open(str(checkpoint)), num_stages=0))
    for n, rate in rates.items():
        seconds = beside.seconds(Load(int(n), LENGTH, 0))
        seconds += num_tokens * beside.seconds(Load(int(n), 1, LENGTH + num_tokens // 2))  # the mean context
        beside.rate("requests", f"{n} at once", int(n) * num_tokens / seconds, rate)
    return beside.lines


def main() -> int:
    """Measure, print, and keep a record; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-python", default=os.environ.get("PYROSOME_HF_PYTHON", sys.executable),
                        help="an interpreter with transformers (default: PYROSOME_HF_PYTHON, or this one)")  # fmt: skip
    parser.add_argument("--no-hf", action="store_true", help="leave the comparison with transformers out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat, 8 tokens of output, nothing promised")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/engine.jsonl alone")
    args = parser.parse_args()
    repeats, num_tokens, rounds = (1, 8, 1) if args.quick else (args.repeats, NUM_TOKENS, 2)
    where = records.machine()
    record: dict[str, Any] = {**where, "bench": "engine", "prompt": LENGTH, "output": num_tokens, "repeats": repeats}
    with tempfile.TemporaryDirectory() as scratch:
        folder, nano = Path(scratch), open_checkpoint("builtin:nano").path
        peers.make_checkpoints(small := folder / "official", plain := folder / "plain", measure.SHAPES["small"])
        for name, checkpoint, drafter in (("nano", nano, "off"), ("nano, drafts", nano, "mtp"), ("44M", small, "off")):
            found = record[name] = at_once(checkpoint, folder, num_tokens, repeats, drafter)
            print(f"{name}: output tokens per CPU second, and times one at a time")
            for n, rate in found["tokens_per_cpu_s"].items():
                print(f"{int(n):6d} at once {rate:10,.1f} {found['times_one'][n]:8.2f}")
            if drafter == "off" and not args.quick:
                found["predicted"] = predicted(checkpoint, found["tokens_per_cpu_s"], num_tokens)
            if drafter != "off":
                print(f"{sum(found['accepted']):6d} of {sum(found['drafted'])} drafts accepted")
        if not args.no_hf:
            them = record["batch of 16"] = against(args.hf_python, small, plain, folder, num_tokens, repeats, rounds)
            print(f"44M, a batch of {BATCH}: ours {them['ours']:,.1f}, {them['their_engine']} {them['theirs']:,.1f} "
                  f"a CPU second, ratio {them['ratio']:.2f}; {them['same']} of {BATCH} say the same")  # fmt: skip
    if not args.no_save:
        records.append(RESULTS / "engine.jsonl", record)
    if args.quick:
        return 0
    kept = record["nano"]["times_one"]["16"] >= AT_ONCE
    return 0 if kept and (args.no_hf or (them["ratio"] >= AGAINST_THEIRS and them["same"] == BATCH)) else 1


if __name__ == "__main__":
    sys.exit(main())
