"""V4-Flash itself, on no device: what its steps would launch, and that all of it is compiled ahead of time."""

from __future__ import annotations

import functools

import pytest
import torch

from pyrosome.config import ModelConfig
from pyrosome.ops.seam import OPS
from pyrosome.testing import ahead
from pyrosome.testing.calls import all_calls
from pyrosome.testing.on_meta import meta_network, trace_step

# Spans (start, tokens): one token early and late, a batch, a draft check, a prompt's part, and all together.
STEPS = {
    "one token": [(5_000, 1)],
    "one token at a million": [(1_000_000, 1)],
    "sixteen sequences": [(1_000 * i, 1) for i in range(1, 17)],
    "a draft check": [(40_000, 4)],
    "a prompt's part": [(8_192, 512)],
    "a long part": [(0, 4_096)],
    "mixed": [(70_000, 1), (300, 2), (0, 600)],
}
KINDS = range(2, 6)  # layers of Flash that have every kind of attention and of routing between them


@functools.cache
def flash():
    return meta_network(ModelConfig.preset("flash"))


@pytest.mark.parametrize("capability", ahead.CAPABILITIES)
@pytest.mark.parametrize("name", STEPS)
def test_whatever_a_step_launches_is_compiled_ahead_of_time(name, capability):
    made = trace_step(flash(), STEPS[name], "fp8", capability, layers=[0, *KINDS])
    assert made.logits.shape == (len(STEPS[name]), 129_280)
    known = compiled_keys(capability)
    unknown = {launch.kernel.__name__ for launch in made.launches if ahead.key_of(launch) not in known}
    assert not unknown, "testing.calls lacks a call that launches these as this step does"


@functools.cache
def compiled_keys(capability: int) -> set[object]:
    return {ahead.key_of(launch) for launch, _ in ahead.launches(list(all_calls()), capability)}


def test_a_whole_step_of_flash_runs_on_one_device():
    made = trace_step(flash(), [(5_000, 1)], "fp8", 90)
    assert made.logits.device == torch.device("meta")
    assert len(made.launches) < 43 * 40


def test_every_op_of_a_step_has_a_kernel(monkeypatch):
    called = set()
    for op in OPS.values():
        monkeypatch.setattr(op, "definition", told(op.definition, op.name, called))
    trace_step(flash(), STEPS["mixed"], "fp8", 90, layers=[0, *KINDS])
    assert not called, "these ran by their definitions"


def told(definition, name, called):
    def run(*args, **kwargs):
        called.add(name)
        return definition(*args, **kwargs)

    return run
