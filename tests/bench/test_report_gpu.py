"""The page has a section on a GPU's kernels where one was measured, and a picture of it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from bench import report
from tests.bench.test_report import ORIGIN


def row(**changes: Any) -> dict[str, Any]:
    return {
        "title": "linear wq_a, M = 1", "us": 2.5, "bytes": 5_000_000, "flops": 10_000_000, "kind": "fp8",
        "share": 0.456, "definition": {"eager": {"us": 50.0}, "compiled": {"why_not": "no"}}, "difference": 1.25e-7,
        "same_alone": None, "problems": [], **changes,
    }  # fmt: skip


def record(**changes: Any) -> dict[str, Any]:
    rows = [
        row(),
        row(title="rms_norm norm, M = 4", flops=0, kind="", same_alone=True, definition={}),
        row(title="linear wq_a, M = 4096", us=100.0, flops=34e9, same_alone=False, difference=None, kind="bf16"),
        row(title="route, M = 1", us=None, problems=["route, M = 1: OutOfResources: shared memory"]),
    ]
    versions = {"torch": "2", "triton": "3.6.0", "cuda": "13.0", "driver": "580.1"}
    return {
        **ORIGIN, "bench": "kernels_gpu", "device": "Some GPU", "versions": versions, "rows": rows, "problems": ["one"],
        "ceilings": {"memory": 4.2e12, "fp8": 1.5e15, "bf16": 8e14, "f32": 5e13}, **changes,
    }  # fmt: skip


def test_every_call_has_its_rates_and_what_was_checked():
    text = report.page({"kernels_gpu": record()})
    for said in (
        "## Kernels on a GPU\n", "| command | `python -m bench.kernels --device cuda` |",
        "| device | Some GPU, driver 580.1, CUDA 13.0, Triton 3.6.0 |",
        "memory 4,200 GB/s, products fp8 1,500.0 TFLOP/s, bf16 800.0 TFLOP/s, f32 50.0 TFLOP/s.",
        "| linear wq_a, M = 1 | 2.5 | 2,000 | 4.0 | 0.46 | 20.0 | - | 1.2e-07 | - |",
        "| rms_norm norm, M = 4 | 2.5 | 2,000 | - | 0.46 | - | - | 1.2e-07 | same bits |",
        "| linear wq_a, M = 4096 | 100.0 | 50 | 340.0 | 0.46 | 0.5 | - | - | other bits |",
        "| route, M = 1 | - | - | - | - | - | - | - | route, M = 1: OutOfResources: shared memory |",
        "Limits of the run: FAILED: one.",
    ):  # fmt: skip
        assert said in text


def test_without_a_record_nothing_is_said():
    assert "GPU" not in report.page({})


@pytest.mark.parametrize("rows", [record()["rows"], []])
def test_the_picture_is_drawn(rows, tmp_path):
    pytest.importorskip("matplotlib", reason="the pictures need the extra `bench`")
    (tmp_path / "kernels_gpu.jsonl").write_text(json.dumps(record(rows=rows)))
    assert report.main(["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 0
    picture = (tmp_path / "docs" / "img" / "kernels-gpu.svg").read_text(encoding="utf-8")
    assert ">Some GPU<" in picture and (">fp8 (measured)<" in picture) == bool(rows)
    assert re.search(r"!\[[^]]+\]\(img/kernels-gpu.svg\)", (tmp_path / "docs" / "performance.md").read_text())
