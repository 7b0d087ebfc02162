"""A step's own numbers: on a CPU as its workspace is planned, on other devices never less than that in halves."""

from __future__ import annotations

import pytest

from pyrosome.config import ModelConfig
from pyrosome.plan.reserve import (
    KERNEL_BYTES,
    CpuStep,
    cpu_decode_bytes,
    cpu_prompt_bytes,
    device_system_bytes,
    host_system_bytes,
    logit_bytes,
    step_bytes,
)
from pyrosome.plan.workspace import Spans, prompt_step, step_workspace

FLASH = ModelConfig.preset("flash")
FP8 = CpuStep("fp8", "trained", 3, True)


@pytest.mark.parametrize("tokens", [256, 2048])
@pytest.mark.parametrize("context", [4096, 1_048_576])
def test_the_bound_is_above_the_tensors_of_the_cpu_kernels_and_not_far(tokens, context):
    measured = prompt_step(FLASH, tokens, context, kv_format="fp8", has_drafts=True, num_drafts=3).tensor_bytes
    scores = 4 * 256 * context // 4  # which those kernels do not keep
    assert measured < step_bytes(FLASH, tokens, context, 4) < 1.15 * measured + scores + KERNEL_BYTES


def test_the_bound_follows_tokens_elements_and_ranks():
    whole = step_bytes(FLASH, 8192, 65_536, 2)
    assert 1.7 * whole < step_bytes(FLASH, 8192, 65_536, 4) < 2 * whole
    assert 0.45 * whole < step_bytes(FLASH, 4096, 65_536, 2) < 0.55 * whole
    assert 0.5 * whole < step_bytes(FLASH, 8192, 65_536, 2, tensor_ranks=4) < whole


def test_a_prompt_on_a_cpu_takes_its_planned_workspace():
    assert cpu_prompt_bytes(FLASH, 512, 100_000, FP8) == prompt_step(
        FLASH, 512, 100_000, kv_format="fp8", has_drafts=True, num_drafts=3
    ).total_bytes  # fmt: skip


def test_decoding_takes_each_sequences_tokens_and_drafts():
    spans = Spans(FLASH, ((996, 4),) * 3, 1000, every_row=True, num_drafts=3, has_drafts=True)
    assert cpu_decode_bytes(FLASH, 3, 1000, FP8) == step_workspace(spans).total_bytes
    assert cpu_decode_bytes(FLASH, 0, 1000, FP8) == 0
    assert cpu_decode_bytes(FLASH, 192, 1000, FP8) == 3 * cpu_decode_bytes(FLASH, 64, 1000, FP8)
    assert cpu_decode_bytes(FLASH, 1, 2, FP8) > 0  # a context shorter than a token and its drafts


def test_logits_are_cut_with_the_head():
    assert logit_bytes(FLASH, 10) == 10 * 129_280 * 8
    assert logit_bytes(FLASH, 10, 4) == 10 * 32_320 * 8


def test_several_devices_take_more_of_each_and_of_the_host():
    assert device_system_bytes(2) > device_system_bytes(1) >= 1 << 30
    assert host_system_bytes(2) - host_system_bytes(0) == 2 * (1 << 30)
