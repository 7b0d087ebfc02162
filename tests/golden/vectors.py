"""The official vectors, loaded once per test session.  Their origin is told in tests/data/golden/README.md."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pyrosome.llm import LoadedModel, load_model

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


@functools.cache
def vectors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@functools.cache
def layer_numbers() -> dict[str, int]:
    """Which layer each intermediate vector belongs to."""
    with safe_open(GOLDEN / "bf16_intermediates.safetensors", "pt") as f:
        return json.loads(f.metadata()["layers"])


@functools.cache
def model(name: str, numerics: str = "exact", kv_format: str | None = None, unpack: bool | None = None) -> LoadedModel:
    return load_model(GOLDEN / name, numerics=numerics, kv_format=kv_format, unpack=unpack)


def ids(name: str) -> list[int]:
    return vectors(f"{name}_vectors")["input_ids"][0].tolist()


def assert_logits(ours: Tensor, theirs: Tensor, atol: float = 1e-4) -> None:
    """Within `atol` everywhere, and the same best token at every position."""
    assert ours.shape == theirs.shape
    worst = (ours - theirs).abs().max().item()
    assert worst <= atol, f"logits differ by up to {worst:.2e}"
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
