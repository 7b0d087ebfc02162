"""What devices are assumed to reach before anybody has measured: one set for each kind of device.

Shares are of the makers' peaks.  They are round figures between what published deployments reach (planner.md
section 3), not fitted to any one of them: hence a band of a factor of two either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

BAND = (0.5, 2.0)

# The types whose rate a kind of arithmetic runs at, best first.  FP4 experts multiply activations in FP8.
TYPES: Mapping[str, tuple[str, ...]] = {
    "matrices": ("fp8", "bf16", "fp16", "f32"),
    "experts": ("fp8", "bf16", "fp16", "f32"),
    "plain": ("bf16", "fp16", "f32"),
    "streams": ("bf16", "fp16", "f32"),
    "attention": ("bf16", "fp16", "f32"),
    "indexer": ("fp8", "bf16", "fp16", "f32"),
}


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of one kind of device; seconds are as they are."""

    read: float
    rows: float
    compute: Mapping[str, float]
    layer_s: float
    token_s: float
    step_s: float
    link: float
    hop_s: float  # between devices with a link of their own
    far_hop_s: float  # over the host or a network
    overlaps: bool
    source: str


_GPU = {"matrices": 0.25, "experts": 0.2, "plain": 0.25, "streams": 0.03, "attention": 0.15, "indexer": 0.12}

SHARES: Mapping[str, Shares] = {
    "gpu": Shares(
        read=0.75, rows=0.5, compute=_GPU, layer_s=60e-6, token_s=0.0, step_s=300e-6, link=0.7, hop_s=12e-6,
        far_hop_s=40e-6, overlaps=True,
        source="assumed for a GPU: 75% of the maker's bandwidth, 12 to 25% of its FLOPs, 60 us a layer",
    ),
    "unified": Shares(
        read=0.75, rows=0.5, compute=_GPU, layer_s=120e-6, token_s=0.0, step_s=500e-6, link=0.7, hop_s=20e-6,
        far_hop_s=40e-6, overlaps=True,
        source="assumed for one shared memory: 75% of the maker's bandwidth, 12 to 25% of its FLOPs, 120 us a layer",
    ),
    "cpu": Shares(
        read=0.65, rows=0.4,
        compute={"matrices": 0.25, "experts": 0.25, "plain": 0.2, "streams": 0.02, "attention": 0.25, "indexer": 0.4},
        layer_s=100e-6, token_s=10e-6, step_s=300e-6, link=0.7, hop_s=40e-6, far_hop_s=40e-6, overlaps=True,
        source="assumed for a CPU: 65% of the maker's bandwidth, 20 to 40% of its FLOPs",
    ),
}  # fmt: skip
