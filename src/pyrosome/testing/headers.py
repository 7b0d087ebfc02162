"""Checkpoints of true headers and no data: `python -m pyrosome.testing.headers DIRECTORY [PRESET]`.

Shards have the names, dtypes, shapes and sizes of an official release, and are sparse files: 167 GB to look at, a few
megabytes on disk.  They show what reading headers costs; loading one would give zeros.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from pyrosome.checkpoint.index import INDEX_NAME
from pyrosome.checkpoint.names import DTYPE_BYTES, official_storage
from pyrosome.config import ModelConfig

SHARD_BYTES = 4 << 30
DSPARK_STAGES = 3


def write_headers(
    path: str | Path,
    config: ModelConfig | None = None,
    num_stages: int | None = None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write config.json, index and sparse shards to directory `path`; returns payload bytes.

    Args:
        config: V4-Flash-0731 if None.
        num_stages: draft stages; None takes three for a DSpark head, else what the configuration speaks of.

    Raises:
        OSError: the file system has no sparse files as large as a shard.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = config or ModelConfig.preset("flash-0731")
    if num_stages is None:
        num_stages = DSPARK_STAGES if config.dspark else len(config.draft_ratios)
    shards: list[dict[str, Any]] = [{}]
    ends = [0]
    for name, dtype, shape in official_storage(config, num_stages):
        num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if ends[-1] and ends[-1] + num_bytes > max_shard_bytes:
            shards.append({})
            ends.append(0)
        span = [ends[-1], ends[-1] + num_bytes]
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        ends[-1] += num_bytes
    weight_map: dict[str, str] = {}
    for number, (entries, end) in enumerate(zip(shards, ends, strict=True), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_sparse(path / file, entries, end)
        weight_map |= dict.fromkeys(entries, file)
    index = {"metadata": {"total_size": sum(ends)}, "weight_map": weight_map}
    (path / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    return sum(ends)


def _write_sparse(file: Path, entries: dict[str, Any], payload_bytes: int) -> None:
    raw = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        os.truncate(f.fileno(), 8 + len(raw) + payload_bytes)


if __name__ == "__main__":
    asked = ModelConfig.preset(sys.argv[2]) if len(sys.argv) > 2 else None
    print(f"{write_headers(sys.argv[1], asked):,} bytes of payload, none of them on disk")
