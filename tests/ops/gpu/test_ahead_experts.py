"""Experts' kernels compile ahead of time, within what a program may take, on matrix units."""

from __future__ import annotations

from tests.ops.gpu.held import ahead


def test_they_compile_for_every_architecture():
    found = ahead("experts")
    assert {r["capability"] for r in found} == {80, 89, 90, 100, 120}
    assert not [fault for r in found for fault in r["faults"]]
    products = [r for r in found if r["kernel"] in ("gate_up", "down")]
    assert {r["capability"] for r in products if r["instruction"]} == {80, 89, 90, 100, 120}
    assert all(r["instruction"] for r in products)
