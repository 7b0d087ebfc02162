"""Tiny network shapes that have every part of the big ones."""

from __future__ import annotations

from typing import Any

from pyrosome.config import ModelConfig, QuantizationConfig, YarnScaling

OFFICIAL_QUANTIZATION = QuantizationConfig("fp8", "e4m3", "ue8m0", (128, 128), "dynamic")


def tiny(ratios: tuple[int, ...] = (0, 4, 128), **overrides: Any) -> ModelConfig:
    """Window-only, CSA and HCA layers of width 64, one draft stage; keyword arguments replace fields."""
    values: dict[str, Any] = {
        "vocab_size": 160, "hidden_size": 64, "num_hidden_layers": len(ratios), "num_attention_heads": 4,
        "head_dim": 80, "qk_rope_head_dim": 16, "q_lora_rank": 48, "o_groups": 2, "o_lora_rank": 24,
        "sliding_window": 24, "index_n_heads": 8, "index_head_dim": 32, "index_topk": 16, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 32, "num_hash_layers": 1, "hc_mult": 4,
        "hc_sinkhorn_iters": 20, "max_position_embeddings": 8192, "routed_scaling_factor": 1.5, "swiglu_limit": 1.5,
        "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "compress_rope_theta": 160000.0,
        "compress_ratios": (*ratios, 0), "rope_scaling": YarnScaling(16.0, 32.0, 1.0, 64),
        "num_nextn_predict_layers": 1, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return ModelConfig(**{**values, **overrides})
