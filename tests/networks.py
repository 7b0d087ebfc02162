"""Tiny seeded networks, built in memory."""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor

from pyrosome.cache.pool import CachePool
from pyrosome.config import ModelConfig
from pyrosome.engine.runner import Runner
from pyrosome.model.build import Network, fill
from pyrosome.model.numerics import numerics_named
from pyrosome.testing.checkpoints import Layout, random_tensors
from pyrosome.testing.shapes import tiny


@functools.lru_cache(maxsize=8)
def _shared(key: tuple, numerics: str, seed: int, layout: Layout) -> Network:
    return build_network(ModelConfig.from_dict(_thaw(key)), numerics, seed, layout)


def network(config: ModelConfig, numerics: str = "exact", seed: int = 0, layout: Layout = "bf16") -> Network:
    """A shared network: tests must not change it."""
    return _shared(_freeze(config.to_dict()), numerics, seed, layout)


def build_network(config: ModelConfig, numerics: str = "exact", seed: int = 0, layout: Layout = "bf16") -> Network:
    """A network of the caller's own."""
    model = Network(config, numerics_named(numerics), drafts=True)
    fill(model, random_tensors(config, seed, layout), unpack=True)
    return model.eval()


def _freeze(value):
    if isinstance(value, dict):
        return tuple(sorted((k, _freeze(v)) for k, v in value.items()))
    return ("list", *map(_freeze, value)) if isinstance(value, list | tuple) else value


def _thaw(value):
    if isinstance(value, tuple):
        return [_thaw(v) for v in value[1:]] if value and value[0] == "list" else {k: _thaw(v) for k, v in value}
    return value


def tokens(length: int, vocab: int = 160, seed: int = 1) -> list[int]:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model: Network, ids: list[int], cuts=(), kv_format: str = "f32", poison: bool = True) -> Tensor:
    """Logits [T, V] in spans that end at the cuts, through a cache that starts out poisoned."""
    runner = Runner(model, kv_format, 1, len(ids))
    if poison:
        runner.pool.poison()
    sequence = runner.open()
    edges = [0, *cuts, len(ids)]
    return torch.cat([runner.step([(sequence, ids[a:b])], every_row=True)[0] for a, b in pairwise(edges)])


def free(pool: CachePool) -> tuple[int, dict[int, int]]:
    """Slots, and pages of each ratio, that nobody holds."""
    return pool.num_free_slots, {r: pool.num_free_pages(r) for r in pool.ratios}


def assert_same(ours: Tensor, theirs: Tensor, atol: float = 1e-4) -> None:
    """Equal within `atol`, NaN nowhere, and the same best token wherever the best two differ by more than 1e-3."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    worst = (ours - theirs).abs().max().item()
    assert worst <= atol, f"logits differ by up to {worst:.2e}"
    best = theirs.topk(2, -1).values
    clear = best[..., 0] - best[..., 1] > 1e-3
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()


@functools.cache
def agreeing_network(ratios: tuple[int, ...] = (0, 4, 128), numerics: str = "exact", scale: float = 0.3) -> Network:
    """A network whose draft stage often says what the trunk will: the next token follows mostly from the last one.

    Sub-blocks write little into the streams (`scale`), and the draft stage passes on the embedding of the last id.
    """
    config = tiny(ratios)
    width = config.hidden_size

    def changed(name: str, value: Tensor) -> Tensor:
        if name.endswith(("attn.wo_b.weight", "w2.weight")):
            return value * (0.0 if name.startswith("mtp.") else scale)
        if name == "mtp.0.e_proj.weight":
            return torch.eye(width, dtype=value.dtype)
        if name == "mtp.0.h_proj.weight":
            return torch.zeros_like(value)
        return torch.ones_like(value) if name in ("norm.weight", "mtp.0.norm.weight", "mtp.0.enorm.weight") else value

    model = Network(config, numerics_named(numerics), drafts=True)
    fill(model, ((n, changed(n, t)) for n, t in random_tensors(config, 0, "bf16")), unpack=True)
    return model.eval()
