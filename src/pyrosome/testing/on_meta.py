"""A network without bytes: V4-Flash at its true shapes runs on torch's meta device, where nothing is computed.

What a step would launch on a GPU can be asked there, and a tensor that was made on another device than the network's is
an error, as it would be on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyrosome.cache.pool import CachePool
from pyrosome.checkpoint.names import expected_tensors
from pyrosome.config import ModelConfig
from pyrosome.model.build import Network, fill
from pyrosome.model.numerics import numerics_named
from pyrosome.model.step import Span, Step
from pyrosome.ops import gpu
from pyrosome.ops.gpu import Launch
from pyrosome.ops.seam import OPS, use
from pyrosome.quant import QuantTensor
from pyrosome.testing.coded import coded


def meta_tensors(config: ModelConfig, num_stages: int = 1) -> Iterator[tuple[str, Tensor | QuantTensor]]:
    """The official tensors without their bytes; tables are there, as they are looked into."""
    for name, spec in expected_tensors(config, num_stages).items():
        kind = {"expert": "fp4", "matrix": "fp8"}.get(spec.kind)
        if spec.kind == "table":
            yield name, torch.zeros(spec.shape, dtype=torch.int64)
        elif kind:
            yield name, coded(kind, spec.shape, "meta")
        else:
            dtype = torch.float32 if spec.kind == "f32" else torch.bfloat16
            yield name, torch.empty(spec.shape, dtype=dtype, device="meta")


def meta_network(config: ModelConfig, numerics: str = "trained", *, drafts: bool = False) -> Network:
    """A network of official weights that hold nothing."""
    model = Network(config, numerics_named(numerics), drafts=drafts)
    fill(model, (pair for pair in meta_tensors(config) if drafts or not pair[0].startswith("mtp.")), device="meta")
    return model.eval()


class StepTrace(NamedTuple):
    """What a step would start on a device."""

    launches: list[Launch]
    logits: Tensor  # without values


@torch.inference_mode()
def trace_step(
    model: Network,
    spans: Sequence[tuple[int, int]],
    kv_format: str,
    capability: int,
    layers: Sequence[int] | None = None,
) -> StepTrace:
    """Run one step of spans (start, tokens) of different sequences with every op that has a Triton kernel on it."""
    context = max(start + count for start, count in spans)
    pool = CachePool(model.config, kv_format, len(spans), context, drafts=False, device="meta")
    held = [pool.open() for _ in spans]
    for holding, (start, count) in zip(held, spans, strict=True):
        pool.prepare(holding, start, start + count)
    asked = [Span(h.slot, start, [0] * count) for h, (start, count) in zip(held, spans, strict=True)]
    step = Step.of(asked, "meta")
    layers = range(len(model.layers)) if layers is None else layers
    cache = dict(zip(layers, (pool.layers(step)[i] for i in layers), strict=True))
    with every_kernel(), gpu.tracing(capability) as launches:
        trunk = model(step, layers=layers, cache=cache)
        logits = model.logits(trunk.streams[step.last_token_B()])
    return StepTrace(launches, logits)


@contextlib.contextmanager
def every_kernel() -> Iterator[None]:
    """Every op that has a Triton kernel runs it in the block; asked for by name, so that failing to is an error."""
    with contextlib.ExitStack() as stack:
        for op in OPS.values():
            if any(k.name == "triton" for k in op.kernels):
                stack.enter_context(use(op, "triton"))
        yield
