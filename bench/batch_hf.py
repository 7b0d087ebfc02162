"""The transformers side of `bench.engine`: one batch of equal lengths through `generate`, greedy, in float32.

Run as a file by an interpreter that has transformers; nothing of pyrosome is imported.
"""

from __future__ import annotations

import json
import sys
import time

import hf_side  # first: it takes this folder off the path, for the library's sake
import torch
import transformers


@torch.inference_mode()
def main(checkpoint: str, answer: str, count: int, length: int, num_tokens: int, repeats: int) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model = hf_side.loaded(checkpoint)
    ids = torch.tensor(hf_side.measure.prompt(count * length)).view(count, length)
    how = {
        "attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip
    model.generate(ids[:, :8], **{**how, "attention_mask": how["attention_mask"][:, :8]}, max_new_tokens=2)
    seconds, tokens = [], []
    for _ in range(repeats):
        began = time.process_time()
        tokens = model.generate(ids, **how, max_new_tokens=num_tokens, min_new_tokens=num_tokens)[:, length:].tolist()
        seconds.append(time.process_time() - began)
    out = {"seconds": seconds, "tokens": tokens, "engine": f"transformers {transformers.__version__}"}
    hf_side.measure.answer(answer, {**out, "torch": torch.__version__})


if __name__ == "__main__":
    main(*sys.argv[1:3], *(json.loads(a) for a in sys.argv[3:]))
