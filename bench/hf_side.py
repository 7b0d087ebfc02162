"""The transformers side of `bench.peers`: the official names mapped to its own, float32, eager attention.

Run as a file by an interpreter that has transformers; nothing of this package is imported.
"""

from __future__ import annotations

import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import measure
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

_ATTENTION = {"wq_a": "q_a_proj", "wq_b": "q_b_proj", "wkv": "kv_proj", "wo_a": "o_a_proj", "wo_b": "o_b_proj"}
_COMPRESSOR = {"wkv.weight": "kv_proj.weight", "wgate.weight": "gate_proj.weight", "ape": "position_bias",
               "norm.weight": "kv_norm.weight"}  # fmt: skip
_GLOBAL = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight", "norm.weight": "model.norm.weight",
           **{f"hc_head_{p}": f"model.hc_head.hc_{p}" for p in ("fn", "base", "scale")}}  # fmt: skip


def their_name(name: str) -> str:
    """transformers' name of an official tensor; experts are stacked apart."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    layer, rest = re.fullmatch(r"layers\.(\d+)\.(.+)", name).groups()
    at = f"model.layers.{layer}."
    if rest == "attn_norm.weight":
        return at + "input_layernorm.weight"
    if rest == "ffn_norm.weight":
        return at + "post_attention_layernorm.weight"
    if part := re.fullmatch(r"hc_(attn|ffn)_(fn|base|scale)", rest):
        return f"{at}{part[1]}_hc.{part[2]}"
    if rest.startswith("attn.indexer.compressor."):
        return f"{at}self_attn.compressor.indexer.{_COMPRESSOR[rest.removeprefix('attn.indexer.compressor.')]}"
    if rest.startswith("attn.compressor."):
        return f"{at}self_attn.compressor.{_COMPRESSOR[rest.removeprefix('attn.compressor.')]}"
    if rest == "attn.indexer.wq_b.weight":
        return f"{at}self_attn.compressor.indexer.q_b_proj.weight"
    if rest == "attn.indexer.weights_proj.weight":
        return f"{at}self_attn.compressor.indexer.scorer.weights_proj.weight"
    if rest == "attn.attn_sink":
        return f"{at}self_attn.sinks"
    if rest in ("attn.q_norm.weight", "attn.kv_norm.weight"):
        return f"{at}self_attn." + rest[5:].replace("q_norm", "q_a_norm")
    if part := re.fullmatch(r"attn\.(\w+)\.weight", rest):
        return f"{at}self_attn.{_ATTENTION[part[1]]}.weight"
    if part := re.fullmatch(r"ffn\.shared_experts\.(w[123])\.weight", rest):
        return f"{at}mlp.shared_experts.{ {'w1': 'gate', 'w3': 'up', 'w2': 'down'}[part[1]]}_proj.weight"
    return at + rest.replace("ffn.gate.bias", "mlp.gate.e_score_correction_bias").replace("ffn.", "mlp.")


def their_state(tensors: dict[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """The official tensors as transformers' state dict."""
    state, experts = {}, {}
    for name, value in tensors.items():
        if part := re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight", name):
            experts[int(part[1]), int(part[2]), part[3]] = value
        elif not name.startswith("mtp."):
            state[their_name(name)] = value
    for layer in sorted({key[0] for key in experts}):
        gate_up = [torch.cat([experts[layer, e, "w1"], experts[layer, e, "w3"]]) for e in range(num_experts)]
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        state[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(
            [experts[layer, e, "w2"] for e in range(num_experts)]
        )
    return state


def main(checkpoint: str, answer: str, logits: str, repeats: int) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yarn = {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 65536}
    config = DeepseekV4Config(**measure.SMALL, compress_ratios=list(measure.RATIOS), rope_scaling=yarn)
    model = DeepseekV4ForCausalLM(config).eval()
    tensors = load_file(os.path.join(checkpoint, "model-00001-of-00001.safetensors"))
    state = {n: t if t.dtype == torch.int64 else t.float() for n, t in their_state(tensors, config.n_routed_experts).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [n for n in missing if "inv_freq" not in n]
    assert not missing, missing
    assert not unexpected, unexpected
    with torch.no_grad():
        ids = torch.tensor([measure.prompt(measure.CHECKED_TOKENS)])
        save_file({"logits": model(ids).logits[0].contiguous()}, logits)

        def prefill(length):
            cache = DynamicCache(config=config)
            ids = torch.tensor([measure.prompt(length)])
            last = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:]
            return [cache, last.argmax(-1)]

        def decode(state, count):
            for _ in range(count):
                state[1] = model(state[1], past_key_values=state[0], use_cache=True).logits[:, -1:].argmax(-1)

        out = measure.measure(prefill, decode, repeats)
    measure.answer(answer, {**out, "engine": f"transformers {transformers.__version__}", "torch": torch.__version__})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
