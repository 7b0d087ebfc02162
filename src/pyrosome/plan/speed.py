"""How long a step takes: for each part of it, the slower of reading its bytes and computing, then what layers cost.

    step = sum over parts of max(bytes / (bandwidth x read), FLOPs / (peak x compute)) + layers x layer_s + links

Source: planner.md section 3 (its formula, taken part by part) and model.md section 12 for FLOPs.
"""

from __future__ import annotations

import dataclasses

from pyrosome.plan.hardware import Machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import Layout, Placement


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """What is reached of the maker's peaks: assumed for a kind of device, or fitted on this one."""

    read: float  # share of memory bandwidth that weights stream at
    compute: dict[str, float]  # share of the peak by part: "linear", "experts", "attention", "indexer", "head"
    layer_s: float  # what a layer costs beside its bytes and FLOPs
    step_s: float  # what a step costs beside its layers
    link: float  # share of a link's bandwidth
    band: tuple[float, float]  # what times lie between, as factors
    source: str


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and of what."""

    seconds: float
    parts: dict[str, float]
    limit: str  # the part and the resource that take longest


@dataclasses.dataclass(frozen=True)
class Load:
    """One step: `tokens` of each of `sequences` spans, which stand at `context` tokens."""

    sequences: int
    tokens: int  # 1: decoding
    context: int
    kv_format: str = "fp8"
    with_head: bool = True


def step_time(
    model: Model, machine: Machine, layout: Layout, placement: Placement, load: Load, coefficients: Coefficients
) -> StepTime:
    """Seconds of one step of the whole deployment."""
    raise NotImplementedError
