"""Our side of `bench.peers`: the same measurements through the cache, in float32 (numerics "exact")."""

from __future__ import annotations

import measure
import torch
from safetensors.torch import save_file

import pyrosome

CHUNK = 2048  # tokens of one prefill span, so that memory does not grow with the prompt
LINEAR_AT = (4096, 8192, 16384)


def main(checkpoint: str, answer: str, logits: str, repeats: int, quick: bool) -> None:
    torch.set_num_threads(1)
    model = pyrosome.load_model(checkpoint, numerics="exact")

    def prefill(length, room):
        runner = model.runner(max_sequences=1, max_context=length + room)
        sequence, ids = runner.open(), measure.prompt(length)
        for at in range(0, length, CHUNK):
            (last,) = runner.step([(sequence, ids[at : at + CHUNK])])
        return [runner, sequence, int(last.argmax())]

    def decode(state, count):
        runner, sequence, _ = state
        tokens = []
        for _ in range(count):
            tokens.append(state[2])
            (last,) = runner.step([(sequence, [state[2]])])
            state[2] = int(last.argmax())
        return tokens

    out = measure.measure(prefill, decode, repeats, quick)
    out["linear"] = {}
    for length in LINEAR_AT[:2] if quick else LINEAR_AT:
        with measure.PeakMemory() as memory:
            runner, *_ = prefill(length, 0)
        out["linear"][length] = {"peak_mb": memory.extra_mb, "cache_bytes": runner.pool.allocated_bytes}
        del runner, _
    save_file({"logits": model.logits(measure.prompt(measure.CHECKED_TOKENS))}, logits)
    measure.answer(answer, {**out, "engine": f"pyrosome {pyrosome.__version__}", "torch": torch.__version__})


if __name__ == "__main__":
    main(*measure.arguments())
