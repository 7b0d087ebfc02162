"""A recipe of seconds, for tests."""

from pyrosome.train.recipe import Recipe

MODEL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 80, "qk_rope_head_dim": 16,
    "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16, "sliding_window": 8, "index_n_heads": 2, "index_head_dim": 32,
    "index_topk": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "num_hash_layers": 1, "hc_mult": 4, "hc_sinkhorn_iters": 20, "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "compress_ratios": [0, 4, 128, 0],
}  # fmt: skip
RECORDS = {"kind": "records", "length": [40, 64], "facts": [2, 4]}


def small(**changes) -> Recipe:
    """Dense, warm-up and sparse stages of a few steps; keyword arguments "section__key" replace values."""
    whole = {
        "name": "test", "seed": 3, "model": MODEL, "tokenizer": {"vocab_size": 1024}, "optimizer": {"adamw_lr": 0.02},
        "loss": {},
        "run": {
            "max_tokens": 3000, "step_tokens": 256, "evaluate_steps": 4, "evaluate_samples": 2, "decay_tokens": 1500,
            "quantize_tokens": 600, "checkpoint_seconds": 1000.0,
        },
        "stages": [
            {"name": "dense", "selection": "dense", "max_tokens": 1000, "mix": [RECORDS]},
            {"name": "warmup", "selection": "warmup", "max_tokens": 500, "mix": [RECORDS]},
            {
                "name": "sparse", "selection": "sparse", "max_tokens": 100_000,
                "mix": [RECORDS, {"kind": "sums", "length": 36, "thinking": "high"}],
            },
        ],
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            whole[section] = {**whole[section], name: value}
        else:
            whole[section] = value
    return Recipe.from_dict(whole)
