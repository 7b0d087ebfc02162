"""The transformers side of `bench.peers`: float32, eager attention (the only one it has for this model).

Run as a file by an interpreter that has transformers; nothing of pyrosome is imported.
"""

from __future__ import annotations

import os
import sys

import hf_names
import measure

sys.path.pop(0)  # this folder: the library looks for packages by names that files here have too
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache


def loaded(checkpoint: str) -> DeepseekV4ForCausalLM:
    """The model in float32 with the checkpoint's values, every parameter accounted for.

    Raises:
        SystemExit: a tensor that one side has and the other has not.
    """
    model = DeepseekV4ForCausalLM(DeepseekV4Config.from_pretrained(checkpoint)).eval()
    tensors = {}
    for file in sorted(os.listdir(checkpoint)):
        if file.endswith(".safetensors"):
            tensors |= load_file(os.path.join(checkpoint, file))
    state = hf_names.their_state(tensors, model.config.n_routed_experts)
    state = {name: t if t.dtype == torch.int64 else t.float() for name, t in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)  # shapes that differ raise here
    if missing or unexpected:
        raise SystemExit(f"transformers {transformers.__version__} misses {missing} and does not expect {unexpected}")
    return model


@torch.inference_mode()  # a tenth faster at decoding than no_grad, and our side has it too
def main(checkpoint: str, answer: str, logits: str, repeats: int, quick: bool, shape: measure.Shape) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model = loaded(checkpoint)
    vocab = shape.config["vocab_size"]

    def prefill(length, room):
        cache = DynamicCache(config=model.config)  # grows as needed: `room` is for an engine that allocates ahead
        ids = torch.tensor([measure.prompt(length, vocab)])
        part = length if length <= shape.whole else measure.PART
        for at in range(0, length, part):
            last = model(ids[:, at : at + part], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:]
        return [cache, last.argmax(-1)]

    def decode(state, count):
        tokens = []
        for _ in range(count):
            tokens.append(int(state[1]))
            state[1] = model(state[1], past_key_values=state[0], use_cache=True).logits[:, -1:].argmax(-1)
        return tokens

    out = measure.measure(prefill, decode, repeats, quick, shape)
    ids = torch.tensor([measure.prompt(measure.CHECKED_TOKENS, vocab)])
    save_file({"logits": model(ids).logits[0].contiguous()}, logits)
    experts = getattr(model.config, "_experts_implementation", None)
    name = f"transformers {transformers.__version__}"
    measure.answer(answer, {**out, "engine": name, "torch": torch.__version__, "experts": experts})


if __name__ == "__main__":
    main(*measure.arguments())
