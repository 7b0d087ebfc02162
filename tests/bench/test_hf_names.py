"""The map from official names to transformers' own, and how experts are stacked."""

import pytest
import torch

from bench import measure
from bench.hf_names import their_name, their_state
from pyrosome.checkpoint.names import expected_tensors
from pyrosome.config import ModelConfig

# What transformers 5.23.0 calls the tensors of one CSA layer outside its experts.
CSA_LAYER = {
    "attn_hc.base", "attn_hc.fn", "attn_hc.scale", "ffn_hc.base", "ffn_hc.fn", "ffn_hc.scale",
    "input_layernorm.weight", "post_attention_layernorm.weight",
    "mlp.gate.e_score_correction_bias", "mlp.gate.weight",
    "mlp.shared_experts.down_proj.weight", "mlp.shared_experts.gate_proj.weight",
    "mlp.shared_experts.up_proj.weight",
    "self_attn.compressor.gate_proj.weight", "self_attn.compressor.kv_norm.weight",
    "self_attn.compressor.kv_proj.weight", "self_attn.compressor.position_bias",
    "self_attn.compressor.indexer.gate_proj.weight", "self_attn.compressor.indexer.kv_norm.weight",
    "self_attn.compressor.indexer.kv_proj.weight", "self_attn.compressor.indexer.position_bias",
    "self_attn.compressor.indexer.q_b_proj.weight", "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "self_attn.kv_norm.weight", "self_attn.kv_proj.weight", "self_attn.o_a_proj.weight", "self_attn.o_b_proj.weight",
    "self_attn.q_a_norm.weight", "self_attn.q_a_proj.weight", "self_attn.q_b_proj.weight", "self_attn.sinks",
}  # fmt: skip


def small() -> ModelConfig:
    return ModelConfig.preset(
        "flash", **measure.SMALL, compress_ratios=measure.RATIOS, num_nextn_predict_layers=0, expert_dtype=None,
        quantization=None,
    )  # fmt: skip


def test_a_csa_layer_has_exactly_transformers_names():
    names = [n for n in expected_tensors(small()) if n.startswith("layers.4.") and ".experts." not in n]
    assert {their_name(n).removeprefix("model.layers.4.") for n in names} == CSA_LAYER


def test_no_two_tensors_share_a_name():
    names = [n for n in expected_tensors(small()) if ".ffn.experts." not in n]
    assert len({their_name(n) for n in names}) == len(names)


@pytest.mark.parametrize(
    ("official", "theirs"),
    [
        ("embed.weight", "model.embed_tokens.weight"),
        ("head.weight", "lm_head.weight"),
        ("norm.weight", "model.norm.weight"),
        ("hc_head_fn", "model.hc_head.hc_fn"),
        ("layers.0.ffn.gate.tid2eid", "model.layers.0.mlp.gate.tid2eid"),
        ("layers.5.attn.compressor.ape", "model.layers.5.self_attn.compressor.position_bias"),
        ("layers.4.ffn.shared_experts.w3.weight", "model.layers.4.mlp.shared_experts.up_proj.weight"),
    ],
)
def test_named(official, theirs):
    assert their_name(official) == theirs


def test_a_name_outside_the_trunk_is_refused():
    with pytest.raises(KeyError, match=r"mtp\.0\.enorm"):
        their_name("mtp.0.enorm.weight")


def test_experts_are_stacked_in_order_with_the_gate_above():
    width, dim = 2, 3
    tensors = {
        f"layers.1.ffn.experts.{e}.{w}.weight": torch.full(shape, 10.0 * e + k)
        for e in (1, 0)
        for k, (w, shape) in enumerate([("w1", (width, dim)), ("w2", (dim, width)), ("w3", (width, dim))], 1)
    }
    state = their_state({**tensors, "mtp.0.norm.weight": torch.ones(3)}, num_experts=2)
    assert set(state) == {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}
    gate_up, down = state["model.layers.1.mlp.experts.gate_up_proj"], state["model.layers.1.mlp.experts.down_proj"]
    assert gate_up.shape == (2, 2 * width, dim) and down.shape == (2, dim, width)
    assert gate_up[:, :, 0].tolist() == [[1, 1, 3, 3], [11, 11, 13, 13]]
    assert down[:, 0, 0].tolist() == [2, 12]
