"""Make a checkpoint of noise: `python -m pyrosome.testing.make_nano DIRECTORY`.

A tiny network of seeded random weights in the official FP8 + FP4 layout, with a tokenizer in the official format that
has one token for each byte.  For tests: its text means nothing, seldom ends by itself, and is as long as its bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from pyrosome.config import ModelConfig
from pyrosome.testing.checkpoints import random_checkpoint
from pyrosome.testing.shapes import OFFICIAL_QUANTIZATION, tiny
from pyrosome.train.tokenizer import CONTROL, FIRST, save_tokenizer

SEED = 4
VOCABULARY = 320


def nano_config() -> ModelConfig:
    """Every kind of layer, FP8 rows, and Flash's rotary constants."""
    return tiny(
        (0, 0, 4, 128, 4, 128), vocab_size=VOCABULARY, hidden_size=128, head_dim=128, qk_rope_head_dim=64,
        q_lora_rank=128, o_lora_rank=64, sliding_window=128, index_n_heads=4, index_head_dim=64, index_topk=64,
        num_experts_per_tok=2, moe_intermediate_size=128, num_hash_layers=3, max_position_embeddings=1048576,
        swiglu_limit=10.0, rope_scaling=ModelConfig.preset("flash").rope_scaling, expert_dtype="fp4",
        quantization=OFFICIAL_QUANTIZATION,
        extra={"architectures": ["DeepseekV4ForCausalLM"], "torch_dtype": "bfloat16"},
    )  # fmt: skip


def nano_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE without merges: one id per byte, then the control tokens at the end of the vocabulary."""
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    reserved = [f"<｜place▁holder▁no▁{i}｜>" for i in range(VOCABULARY - len(FIRST) - len(byte_tokens) - len(CONTROL))]
    ordered = [*FIRST, *byte_tokens, *reserved, *CONTROL]
    tokenizer = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(ordered)}, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = {t: t in FIRST for t in (*FIRST, *reserved, *CONTROL)}
    tokenizer.add_tokens([tokenizers.AddedToken(t, special=s, normalized=False) for t, s in special.items()])
    return tokenizer


def make_nano(path: Path) -> None:
    """Write the checkpoint to directory `path`; the same bytes every time."""
    random_checkpoint(path, nano_config(), SEED, "fp8fp4")
    save_tokenizer(nano_tokenizer(), path, nano_config().max_position_embeddings)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m pyrosome.testing.make_nano DIRECTORY")
    make_nano(Path(sys.argv[1]))
