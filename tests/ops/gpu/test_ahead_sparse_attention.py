"""Attention compiles ahead of time, on matrix units and within what a program may take, and always adds alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.ops.gpu.held import ahead


def test_it_compiles_for_every_architecture():
    found = ahead("sparse_attention")
    assert {r["capability"] for r in found} == {80, 89, 90, 100, 120}
    assert {r["kernel"] for r in found} == {"attend", "weigh", "gather", "merge_runs", "join_parts"}
    assert not [fault for r in found for fault in r["faults"]]


def test_no_kernel_adds_in_an_order_of_its_own():
    """A leaf is computed by one kernel in a small step and by two in a large one: to the same bits, on each device."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.gpu.attention_order"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert said.returncode == 0, said.stderr[-2000:]
    found = json.loads(said.stdout)
    assert len(found) == 4
    for orders in found.values():
        assert len(orders["sums"]) == 1
        assert len(orders["terms"]) <= 1
