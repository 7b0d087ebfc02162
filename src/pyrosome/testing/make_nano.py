"""Make the built-in checkpoint: `python -m pyrosome.testing.make_nano [DIRECTORY]`.

A tiny network in the official FP8 + FP4 layout, with a byte-level tokenizer in the official format.  Its
weights are seeded noise for now: it shows that everything runs, and its text means nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from pyrosome.config import ModelConfig
from pyrosome.testing.checkpoints import random_checkpoint
from pyrosome.testing.shapes import OFFICIAL_QUANTIZATION, tiny

SEED = 4
VOCABULARY = 320
HOME = Path(__file__).parent.parent / "builtin" / "nano"

# Strings and flags of the official tokenizer's control tokens: (content, special).  Ids are this tokenizer's own.
FIRST = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
CONTROL = (
    "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>", "<|EOT|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>", "<｜begin▁of▁repo▁name｜>", "<｜end▁of▁repo▁name｜>", "<｜begin▁of▁file▁name｜>",
    "<｜end▁of▁file▁name｜>", "<｜begin▁of▁file｜>", "<｜end▁of▁file｜>", "<think>", "</think>", "｜DSML｜",
    "<｜begin▁sys｜>", "<｜end▁sys｜>", "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>",
    "<｜domain｜>", "<｜task｜>", "<｜title｜>", "<｜answer｜>", "<｜search｜>", "<dsml:", "</dsml:",
    "<｜search▁begin｜>", "<｜search▁end｜>", "<｜extracted_url｜>", "<｜read_url｜>",
)  # fmt: skip


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
    """Write the built-in checkpoint to `path`; the same bytes every time."""
    random_checkpoint(path, nano_config(), SEED, "fp8fp4")
    nano_tokenizer().save(str(path / "tokenizer.json"))
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    settings: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": {**token, "content": FIRST[0]},
        "eos_token": {**token, "content": FIRST[1]},
        "pad_token": {**token, "content": FIRST[1]},
        "model_max_length": nano_config().max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
    for name, values in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
        (path / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make_nano(Path(sys.argv[1]) if len(sys.argv) > 1 else HOME)
