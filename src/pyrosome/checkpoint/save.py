"""Checkpoints in the official layout: shards, an index, a configuration.

Tensors are written in the order given; each file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrosome.checkpoint.index import INDEX_NAME
from pyrosome.checkpoint.names import scale_name
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError
from pyrosome.quant import QuantTensor
from pyrosome.quant.formats import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes, of the data's start in a file


def save_checkpoint(
    path: str | Path,
    config: ModelConfig | dict[str, Any],
    tensors: Iterable[tuple[str, Tensor | QuantTensor]],
    *,
    max_shard_bytes: int = 5 << 30,
    copy_files: Sequence[Path] = (),
) -> None:
    """Write a checkpoint directory; untouched tensors keep their bytes.

    Args:
        tensors: (weight name, value) as `read_tensors` yields them; a QuantTensor becomes weight and scale.
        max_shard_bytes: a shard is closed before it grows beyond this; holds at least one tensor.
        copy_files: files to put beside the weights as they are (tokenizer, licence).

    Raises:
        CheckpointError: a dtype the container has no name for, or a name twice.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    parts: list[Path] = []
    shard_of: dict[str, int] = {}
    total = 0
    try:
        for number, held in enumerate(_in_shards(_flat(tensors), max_shard_bytes), 1):
            if twice := shard_of.keys() & held.keys():
                raise CheckpointError(f"{min(twice)} was given twice; a checkpoint holds each tensor once")
            parts.append(path / f".shard-{number}.partial")
            _write_shard(parts[-1], held)
            shard_of |= dict.fromkeys(held, number)
            total += sum(t.nbytes for t in held.values())
    except BaseException:  # an interrupt too: parts of a model fill a disk, and nothing would ever read them
        for part in parts:
            part.unlink(missing_ok=True)
        raise
    finals = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for part, final in zip(parts, finals, strict=True):
        os.replace(part, path / final)
    weight_map = {name: finals[number - 1] for name, number in shard_of.items()}
    values = config.to_dict() if isinstance(config, ModelConfig) else config
    _write_text(path / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in copy_files:
        shutil.copyfile(file, path / file.name)
    _write_text(path / "config.json", values)  # last: a directory without it is not a checkpoint


def _flat(tensors: Iterable[tuple[str, Tensor | QuantTensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors:
        if isinstance(value, QuantTensor):
            yield name, value.data
            yield scale_name(name), value.scale
        else:
            yield name, value


def _in_shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > max_bytes:
            yield held
            held = {}
        if name in held:
            raise CheckpointError(f"{name} was given twice; a checkpoint holds each tensor once")
        held[name] = tensor.detach().cpu().contiguous().clone()  # what was given may be a mapping that goes away
    if held:
        yield held


def dtype_name(name: str, tensor: Tensor) -> str:
    """How the container calls a tensor's dtype.

    Raises:
        CheckpointError: it has no name for that.
    """
    if tensor.dtype not in _NAMES:
        raise CheckpointError(
            f"{name} has dtype {tensor.dtype}, which the container has no name for; known are "
            f"{', '.join(_NAMES.values())}"
        )
    return _NAMES[tensor.dtype]


def container_head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What a .safetensors file begins with; the tensors' bytes follow in their order.

    Raises:
        CheckpointError: a dtype the container has no name for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": dtype_name(name, tensor),
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    head = container_head(tensors, {})
    with open(path, "wb") as f:
        f.write(head)
        for tensor in tensors.values():
            f.write(tensor.flatten().view(torch.uint8).numpy().data)
        f.flush()
        os.fsync(f.fileno())


def _write_text(path: Path, values: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.partial")
    with open(part, "w", encoding="utf-8") as f:
        json.dump(values, f, indent=2)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
