"""Random checkpoints of any shape in the official layout."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyrosome.checkpoint.names import TensorSpec, expected_tensors
from pyrosome.checkpoint.save import save_checkpoint
from pyrosome.config import ModelConfig
from pyrosome.quant import FORMATS, QuantTensor

Layout = Literal["fp8fp4", "fp8", "bf16", "f32"]


def random_tensors(
    config: ModelConfig, seed: int, layout: Layout = "bf16", num_stages: int = 1
) -> Iterator[tuple[str, Tensor | QuantTensor]]:
    """Every tensor the configuration implies, with seeded values of a size that keeps activations near one.

    A tensor's values depend on the seed and its name alone, so shapes of different depth share their layers.
    """
    for name, spec in expected_tensors(config, num_stages).items():
        g = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        yield name, _stored(_values(config, name, spec, g), spec, layout)


def _values(config: ModelConfig, name: str, spec: TensorSpec, g: torch.Generator) -> Tensor:
    if spec.kind == "table":
        scores = torch.rand(spec.shape[0], config.n_routed_experts, generator=g)
        return scores.argsort(-1)[:, : spec.shape[1]].contiguous()
    noise = torch.randn(spec.shape, generator=g)
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if spec.kind == "vector":
        return 1 + 0.1 * noise
    if leaf.endswith("_scale"):
        return 0.5 + 0.1 * noise
    if leaf.endswith("_base") or leaf in ("ape", "attn_sink"):
        return 0.5 * noise
    if leaf == "bias":
        return 0.05 * noise
    if leaf == "embed":
        return noise
    return noise * spec.shape[-1] ** -0.5


def _stored(values: Tensor, spec: TensorSpec, layout: Layout) -> Tensor | QuantTensor:
    if spec.kind == "table":
        return values
    if spec.kind == "f32" or layout == "f32":
        return values.float()
    if spec.kind in ("matrix", "expert") and layout in ("fp8", "fp8fp4"):
        name = "fp4" if spec.kind == "expert" and layout == "fp8fp4" else "fp8"
        return QuantTensor(name, *FORMATS[name].quantize(values))
    return values.bfloat16()


def random_checkpoint(
    path: str | Path, config: ModelConfig, seed: int = 0, layout: Layout = "bf16", num_stages: int = 1, **kwargs: Any
) -> Path:
    """Write a seeded random checkpoint of `config` to directory `path`, and return it."""
    save_checkpoint(path, config, random_tensors(config, seed, layout, num_stages), **kwargs)
    return Path(path)
