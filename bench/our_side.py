"""Our side of `bench.peers`: the same measurements through the cache, in float32 by the torch definitions."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import measure
import torch
from safetensors.torch import save_file

import pyrosome

CHUNK = 2048  # tokens of one prefill span, so that memory does not grow with the prompt
LINEAR_AT = (4096, 8192, 16384)


def main(checkpoint: str, answer: str, logits: str, repeats: int) -> None:
    torch.set_num_threads(1)
    model = pyrosome.load_model(checkpoint, numerics="exact")
    save_file({"logits": model.logits(measure.prompt(measure.CHECKED_TOKENS))}, logits)

    def prefill(length):
        runner = model.runner(max_sequences=1, max_context=length + 8 * measure.DECODED)
        sequence, ids = runner.open(), measure.prompt(length)
        for at in range(0, length, CHUNK):
            (last,) = runner.step([(sequence, ids[at : at + CHUNK])])
        return [runner, sequence, int(last.argmax())]

    def decode(state, count):
        runner, sequence, _ = state
        for _ in range(count):
            (last,) = runner.step([(sequence, [state[2]])])
            state[2] = int(last.argmax())

    out = measure.measure(prefill, decode, repeats)
    out["linear"] = {}
    for length in LINEAR_AT:
        with measure.PeakMemory() as memory:
            runner, *_ = prefill(length)
        assert runner.pool.allocated_bytes == runner.pool.plan.total_bytes
        out["linear"][length] = {"peak_mb": memory.extra_mb, "cache_bytes": runner.pool.allocated_bytes}
    measure.answer(answer, {**out, "engine": f"pyrosome {pyrosome.__version__}", "torch": torch.__version__})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
