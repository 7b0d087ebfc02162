"""Small checkpoints on disk, whole or spoilt on purpose.  Headers are written here, not by the code under test."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyrosome.checkpoint.names import DTYPE_BYTES, official_storage
from pyrosome.config import ModelConfig

DATA = Path(__file__).parent.parent / "data"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"

Entry = tuple[str, tuple[int, ...], bytes]  # dtype, shape, bytes


def copied(tmp_path: Path, name: str = "golden/fp8fp4") -> Path:
    """A copy of one of the stored checkpoints, free to be spoilt."""
    target = tmp_path / "checkpoint"
    shutil.copytree(DATA / name, target)
    return target


def read_entries(file: Path) -> dict[str, Entry]:
    """Every tensor of a sound file, in the order of its bytes."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (e["dtype"], tuple(e["shape"]), raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def write_entries(file: Path, entries: dict[str, Entry]) -> None:
    header, at = {}, 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    write_raw(file, header, b"".join(data for *_, data in entries.values()))


def write_raw(file: Path, header: Any, payload: bytes = b"", length: int | None = None) -> None:
    """Any header, true or false, before any payload."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)


def rewrite(directory: Path, changes: dict[str, Entry | None], *, file: str = SHARD) -> None:
    """Replace, add or (None) remove tensors of a one-shard checkpoint, its index included."""
    entries: dict[str, Entry | None] = {**read_entries(directory / file), **changes}
    kept = {name: e for name, e in entries.items() if e is not None}
    write_entries(directory / file, kept)
    write_index(directory, dict.fromkeys(kept, file))


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def split(directory: Path, num_shards: int, *, apart: Iterable[str] = ()) -> list[str]:
    """Cut a one-shard checkpoint into several of about equal bytes; tensors ending in `apart` go to the last."""
    entries = read_entries(directory / SHARD)
    last = {n for n in entries if n.endswith(tuple(apart))} if apart else set()
    total, at = sum(len(e[2]) for e in entries.values()), 0
    shards: list[dict[str, Entry]] = [{} for _ in range(num_shards)]
    for name, entry in entries.items():
        shards[-1 if name in last else min(num_shards - 1, at * num_shards // total)][name] = entry
        at += len(entry[2])
    (directory / SHARD).unlink()
    names = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    for name, shard in zip(names, shards, strict=True):
        write_entries(directory / name, shard)
    write_index(directory, {t: name for name, shard in zip(names, shards, strict=True) for t in shard})
    return names


def random_checkpoint(directory: Path, config: ModelConfig, num_stages: int, num_shards: int, seed: int = 0) -> int:
    """An official-layout checkpoint of random bytes (scales near 1), cut into shards; returns its payload bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    stored = list(official_storage(config, num_stages))
    total = sum(math.prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in stored)
    draw, at = random.Random(seed), 0
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[] for _ in range(num_shards)]
    for name, dtype, shape in stored:
        num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
        shards[min(num_shards - 1, at * num_shards // total)].append((name, dtype, shape, num_bytes))
        at += num_bytes
    weight_map: dict[str, str] = {}
    noise = draw.randbytes(1 << 20)
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        header, end = {}, 0
        for name, dtype, shape, num_bytes in shard:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + num_bytes]}
            end += num_bytes
        write_raw(directory / file, header)
        with (directory / file).open("ab") as f:
            for name, dtype, _, num_bytes in shard:
                weight_map[name] = file
                pattern = bytes([120 + draw.randrange(8)]) if dtype == "F8_E8M0" else noise
                f.write((pattern * (num_bytes // len(pattern) + 1))[:num_bytes])
    write_index(directory, weight_map)
    return total
