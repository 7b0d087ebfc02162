"""Attention compiles ahead of time, on matrix units and within what a program may take."""

from __future__ import annotations

from tests.ops.gpu.held import ahead


def test_it_compiles_for_every_architecture():
    found = ahead("sparse_attention")
    assert {r["capability"] for r in found} == {80, 89, 90, 100, 120}
    assert {r["kernel"] for r in found} == {"weigh", "gather", "merge_runs", "join_parts"}
    assert not [fault for r in found for fault in r["faults"]]
