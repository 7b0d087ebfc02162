"""The lightning indexer compiles ahead of time, within what a program may take."""

from __future__ import annotations

from tests.ops.gpu.held import ahead


def test_it_compiles_for_every_architecture():
    found = ahead("index_topk")
    assert {r["capability"] for r in found} == {80, 89, 90, 100, 120}
    assert {r["kernel"] for r in found} == {"split_queries", "scores", "best_rows"}
    assert not [fault for r in found for fault in r["faults"]]
