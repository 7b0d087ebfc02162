"""`choose_tokens` compiles ahead of time, within what a program may take."""

from __future__ import annotations

from tests.ops.gpu.held import ahead


def test_it_compiles_for_every_architecture():
    found = ahead("sample")
    assert {r["capability"] for r in found} == {80, 89, 90, 100, 120}
    assert not [fault for r in found for fault in r["faults"]]
