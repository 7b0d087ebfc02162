"""Products compile ahead of time for every architecture, by its matrix units, within what a program may take."""

from __future__ import annotations

from collections import Counter

from tests.ops.gpu.held import ahead


def test_they_compile_for_every_architecture():
    found = ahead("linear")
    assert {r["capability"] for r in found} == {80, 89, 90, 100, 120}
    # What a model's shapes are is no reason to compile again.
    assert max(Counter(r["capability"] for r in found).values()) <= 24
    assert not [fault for r in found for fault in r["faults"]]
    assert {r["kernel"] for r in found if r["matrix"] == "fp8"} == {"code_products"}
    assert {r["kernel"] for r in found if r["matrix"] == "bf16"} == {"value_products"}
