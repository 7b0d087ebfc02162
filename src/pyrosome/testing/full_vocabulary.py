"""A tiny random checkpoint with the whole official vocabulary.

    python -m pyrosome.testing.full_vocabulary TOKENIZER DIRECTORY

TOKENIZER is the path of an official tokenizer.json, which is not part of this package.  The network is as narrow as it
gets, so that nearly all of its bytes are the 129,280 rows of embedding, head and routing table.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError
from pyrosome.testing.checkpoints import Layout, random_checkpoint
from pyrosome.testing.shapes import OFFICIAL_QUANTIZATION, tiny

OFFICIAL_VOCABULARY = 129280
BESIDE = ("tokenizer_config.json", "generation_config.json")  # copied where they are there


def full_vocabulary_config() -> ModelConfig:
    """A window-only, a CSA and an HCA layer of width 64 over the official vocabulary; rows can be stored as FP8."""
    return tiny(
        (0, 4, 128), vocab_size=OFFICIAL_VOCABULARY, head_dim=128, qk_rope_head_dim=64, index_head_dim=64,
        expert_dtype="fp4", quantization=OFFICIAL_QUANTIZATION,
    )  # fmt: skip


def full_vocabulary(path: str | Path, tokenizer: str | Path, seed: int = 0, layout: Layout = "fp8fp4") -> Path:
    """Write the checkpoint to directory `path`, the tokenizer beside its weights; returns the directory.

    Raises:
        CheckpointError: the tokenizer is missing, or has an id that this vocabulary has no row for.
    """
    path, tokenizer = Path(path), Path(tokenizer)
    config = full_vocabulary_config()
    try:
        values = json.loads(tokenizer.read_bytes())
        ids = [*values["model"]["vocab"].values(), *(t["id"] for t in values["added_tokens"])]
        highest = max(ids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{tokenizer} is not a usable tokenizer.json ({error}); give the official one") from None
    if highest >= config.vocab_size:
        raise CheckpointError(
            f"{tokenizer} has id {highest} and the vocabulary ends at {config.vocab_size - 1}; give the official one"
        )
    random_checkpoint(path, config, seed, layout)
    shutil.copyfile(tokenizer, path / "tokenizer.json")
    for name in BESIDE:
        if (tokenizer.parent / name).is_file():
            shutil.copyfile(tokenizer.parent / name, path / name)
    return path


if __name__ == "__main__":
    print(full_vocabulary(sys.argv[2], sys.argv[1]))
