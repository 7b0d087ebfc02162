"""Our side of `bench.peers`: the same measurements through the cache, as the package runs by default.

Rates are of numerics "trained" on the weights as they are stored.  Whether both sides compute the same is checked in
numerics "exact", which rounds nothing, as the other side does not.
"""

from __future__ import annotations

import measure
import torch
from safetensors.torch import save_file

import pyrosome
from pyrosome.ops import workspace

CHUNK = 1024  # tokens of one prefill span, so that memory does not grow with the prompt
LINEAR_AT = (4096, 8192, 16384)


def main(checkpoint: str, answer: str, logits: str, repeats: int, quick: bool, shape: measure.Shape) -> None:
    torch.set_num_threads(1)
    measure.KEEPERS.append(workspace.give_back)
    vocab = shape.config["vocab_size"]

    def prefill(length, room):
        runner = model.runner(max_sequences=1, max_context=length + room)
        sequence, ids = runner.open(), measure.prompt(length, vocab)
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

    model = pyrosome.load_model(checkpoint, numerics="exact")
    save_file({"logits": model.logits(measure.prompt(measure.CHECKED_TOKENS, vocab))}, logits)
    tokens = decode(prefill(measure.DECODED_AFTER, measure.DECODED), measure.DECODED)
    del model
    model = pyrosome.load_model(checkpoint, numerics="trained")
    out = {**measure.measure(prefill, decode, repeats, quick, shape), "tokens": tokens}
    out["linear"] = {}
    for length in LINEAR_AT[:2] if quick or not shape.whole else LINEAR_AT:
        with measure.PeakMemory() as memory:
            runner, *_ = prefill(length, 0)
        out["linear"][length] = {"peak_mb": memory.extra_mb, "cache_bytes": runner.pool.allocated_bytes}
        del runner, _
    measure.answer(answer, {**out, "engine": f"pyrosome {pyrosome.__version__}", "torch": torch.__version__})


if __name__ == "__main__":
    main(*measure.arguments())
