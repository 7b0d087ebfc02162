"""What is compiled ahead of time: faults in words, several processes, measured choices, and the table in docs."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from pyrosome.ops import gpu, tuned
from pyrosome.ops.seam import OPS
from pyrosome.testing import ahead, ahead_table
from pyrosome.testing.ahead import CAPABILITIES, Compiled
from pyrosome.testing.calls import Call, all_calls
from tests.ops.gpu.doubled import doubled

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def calls(*rows: int) -> list[Call]:
    def make(M, device):
        return (torch.randn(M, 8, device=device),), {}

    return [Call(doubled, name, M, 0, functools.partial(make, M), 64 * M) for M in rows for name in ("some", "more")]


def result(**changes) -> Compiled:
    made = Compiled("linear", "product", "wide", {}, 90, ["linear wq_a, M = 1"], "fp8", 200_000, 128)
    made.instruction = "wgmma.mma_async.e4m3"
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"shared": 232_449}, "takes 232449 bytes of shared memory, and a program may take 232448"),
        ({"stack": 8}, "spills 8 bytes a thread"),
        ({"instruction": ""}, "multiplies fp8 without wgmma"),
        ({"error": "PassError: no"}, "does not compile: PassError: no"),
        ({"matrix": "", "instruction": ""}, None),
    ],
)
def test_faults_are_told_in_words(changes, said):
    found = result(**changes).faults()
    assert len(found) == (said is not None)
    assert said is None or (found[0].startswith("product (wide) for sm_90 ") and said in found[0])


def test_equal_launches_are_compiled_once_and_know_who_makes_them():
    found = ahead.launches(calls(1, 16, 17), 90)
    assert [(ahead.name_of(launch), launch.variant.name) for launch, _ in found] == [
        ("doubled", "few"),
        ("doubled", "many"),
    ]
    assert found[0][1] == [f"doubled {name}, M = {M}" for M in (1, 16) for name in ("some", "more")]


def test_choices_that_were_measured_are_compiled_beside_the_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.choices.cache_clear()
    record = {"device": "Some GPU", "capability": 90, "choices": {"doubled": {"M<=16": "many"}}}
    (tmp_path / "some-gpu.json").write_text(json.dumps(record))
    try:
        variants = {c: [launch.variant.name for launch, _ in ahead.launches(calls(1), c)] for c in (80, 90)}
    finally:
        tuned.choices.cache_clear()
    assert variants == {80: ["few"], 90: ["few", "many"]}


def test_several_processes_give_what_one_gives_in_the_same_order():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = ["--op", "rms_norm", "--json", "--capability", "90", "--capability", "80"]
    said = [
        subprocess.run(
            [sys.executable, "-m", "pyrosome.testing.ahead", *options, "--jobs", jobs],
            capture_output=True, text=True, env=environment, check=True,
        ).stdout
        for jobs in ("1", "2")
    ]  # fmt: skip
    one, two = ([{**r, "seconds": 0} for r in json.loads(text)] for text in said)
    assert one == two and [r["capability"] for r in one] == [90, 80]


def test_the_table_is_of_everything(capsys):
    with pytest.raises(SystemExit):
        ahead.main(["--table", "page.md", "--op", "rms_norm"])
    assert "it goes with neither --op nor --capability" in capsys.readouterr().err


def compiled(capability: int, variant: str, title: str, **changes) -> Compiled:
    return Compiled("doubled", "doubled", variant, {}, capability, [title], **changes)


def test_a_row_has_the_most_that_a_variant_takes_and_who_launches_it(tmp_path):
    one, many = calls(1)[0], calls(512)[1]
    results = [
        compiled(80, "few", one.title, registers=40, shared=2048),
        compiled(80, "few", calls(16)[1].title, registers=32, shared=4096),
        compiled(90, "few", one.title, registers=64, stack=8),
        compiled(90, "many", many.title, registers=168, shared=100_000),
    ]
    lines = ahead_table.filled(results, calls(1, 16, 512))
    assert lines[2:] == [
        "| `doubled` | few | - | 40 / 4 | - | 64 / 0 (spills 8) | - | - | `doubled` (M = 1 to 16) |",
        "| `doubled` | many | - | - | - | 168 / 98 | - | - | `doubled` (more: M = 512) |",
    ]
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n{ahead_table.BEGIN}\n{ahead_table.END}\nafter\n")
    for _ in range(2):  # writing again is the same
        ahead_table.write(page, lines)
        assert ahead_table.read(page) == lines
    assert page.read_text().startswith("# Before\n<!--") and page.read_text().endswith("-->\nafter\n")
    assert ahead_table.without_figures(lines)[2].count(" figure |") == 2
    (tmp_path / "other.md").write_text("nothing")
    with pytest.raises(ValueError, match="which the table goes between"):
        ahead_table.write(tmp_path / "other.md", lines)


def test_what_is_traced_is_what_would_be_compiled():
    few, many = ahead_table.traced(calls(1, 512))[2:]
    figures = " figure |" * len(CAPABILITIES)
    assert few == f"| `doubled` | few | - |{figures} `doubled` (M = 1) |"
    assert many == f"| `doubled` | many | - |{figures} `doubled` (M = 512) |"


def test_the_table_in_docs_is_of_the_kernels_that_there_are():
    written = ahead_table.without_figures(ahead_table.read(PAGE))
    assert written == ahead_table.traced(), "run: python -m pyrosome.testing.ahead --jobs 2 --table docs/kernels.md"


def test_every_op_with_a_kernel_has_calls():
    import pyrosome.model.deepseek_v4  # noqa: F401  # every op of the network registers itself

    with_calls = {call.op.name for call in all_calls()}
    assert with_calls == {name for name, op in OPS.items() if any(k.name == "triton" for k in op.kernels)}
    assert not gpu.missing()
