"""Official tensor names as transformers' deepseek_v4 names them.  Needs torch, not transformers.

Letters in shapes: E experts, I expert width, D model dim.
"""

from __future__ import annotations

import re

import torch

_ATTENTION = {"wq_a": "q_a_proj", "wq_b": "q_b_proj", "wkv": "kv_proj", "wo_a": "o_a_proj", "wo_b": "o_b_proj"}
_COMPRESSOR = {"wkv.weight": "kv_proj.weight", "wgate.weight": "gate_proj.weight", "ape": "position_bias",
               "norm.weight": "kv_norm.weight"}  # fmt: skip
_EXPERT = {"w1": "gate", "w3": "up", "w2": "down"}
_GLOBAL = {
    "embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight", "norm.weight": "model.norm.weight",
    **{f"hc_head_{p}": f"model.hc_head.hc_{p}" for p in ("fn", "base", "scale")},
}  # fmt: skip


def their_name(name: str) -> str:
    """transformers' name of one official trunk tensor (not of an expert: those are stacked by `their_state`).

    Raises:
        KeyError: a name outside the trunk.
    """
    if name in _GLOBAL:
        return _GLOBAL[name]
    if not (found := re.fullmatch(r"layers\.(\d+)\.(.+)", name)):
        raise KeyError(f"{name} is no name of the official layout's trunk")
    layer, rest = found.groups()
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
        return f"{at}mlp.shared_experts.{_EXPERT[part[1]]}_proj.weight"
    return at + rest.replace("ffn.gate.bias", "mlp.gate.e_score_correction_bias").replace("ffn.", "mlp.")


def their_state(tensors: dict[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """The official tensors as transformers' state dict.

    Experts are stacked: gate_up_proj [E, 2I, D] with w1 (gate) above w3 (up), down_proj [E, D, I] of w2.
    Draft stages (`mtp.*`) are left out: transformers has none.
    """
    state: dict[str, torch.Tensor] = {}
    experts: dict[tuple[int, int, str], torch.Tensor] = {}
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
