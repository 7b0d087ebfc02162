"""What a plan sets aside for a step on a GPU is more than the step's tensors take, and not much more."""

from __future__ import annotations

import functools

import pytest
import torch

from pyrosome.cache.pool import CachePool
from pyrosome.config import ModelConfig
from pyrosome.model.step import Span, Step
from pyrosome.ops import gpu
from pyrosome.plan.memory import ELEMENT_BYTES
from pyrosome.plan.reserve import KERNEL_BYTES, SCORE_TOKENS, logit_bytes, step_bytes
from pyrosome.testing.live_bytes import LiveBytes
from pyrosome.testing.on_meta import every_kernel, meta_network

pytest.importorskip("triton")
FLASH = ModelConfig.preset("flash")
STEPS = {
    "a prompt's first part": [(0, 2048)],
    "a large part": [(0, 8192)],
    "a part at a million": [(1_000_000, 2048)],
    "a token at a million": [(1_000_000, 1)],
    "many tokens": [(100_000, 1)] * 16,
}


@functools.cache
def flash():
    return meta_network(FLASH)


@pytest.mark.parametrize("name", STEPS)
def test_a_plan_s_bound_is_above_what_a_step_allocates_and_not_far(name):
    spans = STEPS[name]
    tokens, context = sum(n for _, n in spans), max(start + n for start, n in spans)
    found = peak(spans, context)
    planned = step_bytes(FLASH, tokens, context, ELEMENT_BYTES) + logit_bytes(FLASH, len(spans))
    scores = 4 * min(tokens, SCORE_TOKENS) * context // 4
    assert found < planned < 1.4 * found + scores + KERNEL_BYTES


@torch.inference_mode()
def peak(spans, context) -> int:
    """The most bytes of tensors that are alive at once in a step, on a device without memory."""
    network = flash()
    pool = CachePool(FLASH, "fp8", len(spans), context, drafts=False, device="meta")
    held = [pool.open() for _ in spans]
    for holding, (start, count) in zip(held, spans, strict=True):
        pool.prepare(holding, start, start + count)
    with LiveBytes() as live, every_kernel(), gpu.tracing(90):
        step = Step.of([Span(h.slot, a, [0] * n) for h, (a, n) in zip(held, spans, strict=True)], "meta")
        trunk = network(step, cache=pool.layers(step))
        network.logits(trunk.streams[step.last_token_B()])
    return live.peak
