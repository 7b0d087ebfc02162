"""A GPU's kernels one by one, where there is none: tiny calls in the interpreter, and a clock that is made up."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from bench import kernels, kernels_gpu, tiny_calls
from bench.device_clock import CpuClock, CudaClock
from bench.kernels_gpu import TINY, Size, line, measured, run, selected
from pyrosome.ops import accelerators, gpu
from pyrosome.ops.seam import Kernel
from pyrosome.testing.calls import Call
from tests.bench.fake_cuda import fake_cuda
from tests.ops.gpu.doubled import doubled

__all__ = ["fake_cuda"]
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's compiler, of torch
CPU = torch.device("cpu")
MOST = {"read": 1e12, "copy": 1e12, "memory": 1e12, "f32": 1e12, "bf16": 1e13, "fp8": 2e13}


def call(M=4, **changes) -> Call:
    def make(device):
        return (torch.randn(M, 8, device=device),), {}

    made = Call(doubled, "some", M, 0, make, 64 * M, 1000 * M, "bf16", 1e-6)
    return made._replace(**changes)


class Fixed(CpuClock):
    """Every call takes 2 microseconds."""

    def seconds(self, run, count):
        run()
        return [2e-6] * count


def row(made=None, clock=None, **size) -> dict:
    return measured(made or call(), CPU, clock or Fixed(), MOST, dataclasses.replace(TINY, **size))


def test_a_row_has_times_rates_shares_and_what_was_checked():
    found = row(compile=lambda f: f)
    assert found["us"] == pytest.approx(2.0) and found["problems"] == []
    assert found["memory_share"] == pytest.approx(256 / 1e12 / 2e-6)
    assert found["products_share"] == found["share"] == pytest.approx(4000 / 1e13 / 2e-6)
    assert found["variants"] == {"doubled": "few"}
    assert found["difference"] == 0.0 and found["same_alone"] is True
    assert found["definition"]["eager"]["us"] == found["definition"]["compiled"]["us"] == pytest.approx(2.0)
    assert json.loads(json.dumps(found)) == found
    assert " ".join(line(found).split()) == "doubled some, M = 4 2.0 0.1 0.00 0.0 0.00 1.0 1.0 0.0e+00 same"
    assert "-" in line(row(call(M=1)))


def test_a_kernel_that_differs_is_a_problem(monkeypatch):
    monkeypatch.setattr(doubled, "definition", lambda x: x * 2.5)
    found = row()
    (problem,) = found["problems"]
    assert problem == "doubled some, M = 4: 2.0e-01 from the definition, and 1e-06 is allowed"


def test_a_row_that_depends_on_others_is_a_problem(monkeypatch):
    right = gpu.of(doubled)
    monkeypatch.setattr(gpu, "of", lambda op: lambda x: right(x) * (1 + 1e-4 * (len(x) > 1)))
    monkeypatch.setattr(doubled, "kernels", [])
    gpu.kernel(doubled)
    found = row(call(tolerance=1e-2))
    assert found["same_alone"] is False
    assert found["problems"] == ["doubled some, M = 4: a row alone has other bits than among others"]
    assert "OTHER" in line(found)


def test_a_kernel_that_fails_is_a_problem_and_others_follow(monkeypatch, capsys):
    def broken(device):
        return (torch.randn(4, 8, dtype=torch.float64),), {}

    found = run([call(make=broken), call()], CPU, Fixed(), TINY)
    assert [r["us"] is None for r in found["rows"]] == [True, False]
    (problem,) = found["problems"]
    assert "KernelUnavailable" in problem and "float64" in problem
    assert problem in capsys.readouterr().out


def test_what_a_definition_cannot_do_is_told_and_no_problem(monkeypatch):
    def no_compiler(definition):
        raise ValueError("no compiler")

    assert row(compile=no_compiler)["definition"]["compiled"] == {"why_not": "ValueError: no compiler"}
    assert row(definitions=False)["definition"] == {}

    def too_large(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(doubled, "definition", too_large)
    found = row()
    assert found["definition"]["eager"]["why_not"].startswith("OutOfMemoryError") and not found["problems"]


def test_the_first_call_of_each_name_is_compiled(capsys):
    size = dataclasses.replace(TINY, compile=lambda f: f)
    found = run([call(), call(2), call(name="other")], CPU, Fixed(), size)
    assert [sorted(r["definition"]) for r in found["rows"]] == [["compiled", "eager"], ["eager"], ["compiled", "eager"]]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_slow_definition_is_timed_once():
    class Slow(CpuClock):
        def seconds(self, run, count):
            asked.append(count)
            return [3.0] * count

    asked: list[int] = []
    found = row(clock=Slow())
    assert found["definition"]["eager"]["us"] == pytest.approx(3e6)
    assert asked == [1, 2, 1]  # the kernel's once and samples, the definition's once


def test_calls_are_replayed_as_graphs_where_that_can_be(fake_cuda):
    found = row(clock=CudaClock(CPU))
    assert found["us"] == pytest.approx(10.0) and fake_cuda.captures == 2
    assert "captured" not in found["definition"]["eager"]


def test_a_definition_that_reads_values_back_is_timed_as_it_is(fake_cuda, monkeypatch):
    plain = doubled.definition

    def reading(x):
        if fake_cuda.captures == 2:  # within the graph of the definition
            fake_cuda.captures = 0
            raise RuntimeError("operation not permitted when stream is capturing")
        return plain(x)

    monkeypatch.setattr(doubled, "definition", reading)
    found = row(clock=CudaClock(CPU))
    assert found["definition"]["eager"]["captured"] is False and found["definition"]["eager"]["us"] == pytest.approx(10)


def test_kernels_of_other_packages_stand_beside(monkeypatch):
    def broken(x):
        raise OSError("no library")

    made = [
        Kernel(name, lambda place: "", lambda f=f: f, False) for name, f in (("fast", torch.clone), ("bad", broken))
    ]
    made.append(Kernel("refused", lambda place: "it is unequal", lambda: None, False))
    monkeypatch.setattr(accelerators, "kernels", lambda op: made)
    found = row()
    assert found["accelerators"]["fast"]["us"] == pytest.approx(2.0)
    assert found["accelerators"]["bad"] == {"why_not": "OSError: no library"}
    assert "refused: it is unequal" in found["accelerators"]["refused"]["why_not"]
    assert "fast 1.00, bad (OSError: no library)" in line(found) and not found["problems"]


def test_calls_are_chosen_by_title_and_size():
    calls = [call(M) for M in (1, 16, 64)] + [call(2, num_bytes=1 << 40)]
    assert selected(iter(calls), None, quick=False) == calls
    assert selected(iter(calls), None, quick=True) == calls[:2]
    assert selected(iter(calls), ["doubled some, M = 64", "other"], quick=False) == calls[2:3]


def test_the_whole_run_in_the_interpreter_keeps_no_record(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels_gpu, "RESULTS", tmp_path / "kernels_gpu.jsonl")
    assert kernels.main(["--device", "cpu", "--calls", "tiny"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.startswith("Triton's interpreter: memory ") and "fp8 " in out
    assert all(f"\n{made.title} " in out for made in tiny_calls.all_calls()) and not list(tmp_path.iterdir())


def test_a_record_has_the_device_the_command_and_all_rows(monkeypatch, tmp_path, capsys, fake_cuda):
    monkeypatch.setattr(kernels_gpu, "RESULTS", tmp_path / "kernels_gpu.jsonl")
    monkeypatch.setattr(kernels_gpu, "device_of", lambda *_: CPU)
    monkeypatch.setattr(kernels_gpu, "clock_of", CudaClock)
    monkeypatch.setattr(kernels_gpu, "FULL", dataclasses.replace(TINY, compile=torch.compile))
    monkeypatch.setattr(torch, "compile", functools.partial(lambda f: f))
    wrong = call(3, tolerance=-1.0)
    monkeypatch.setattr(kernels_gpu, "all_calls", lambda: iter([call(), wrong]))
    assert kernels.main(["--device=cuda"]) == 1
    record = json.loads((tmp_path / "kernels_gpu.jsonl").read_text())
    assert record["bench"] == "kernels_gpu" and record["command"] == "python -m bench.kernels --device=cuda"
    assert [r["title"] for r in record["rows"]] == ["doubled some, M = 4", "doubled some, M = 3"]
    assert {"device", "versions", "capability", "ceilings", "date", "commit", "torch", "cpu"} <= set(record)
    assert "FAILED doubled some, M = 3" in capsys.readouterr().err and len(record["problems"]) == 1
    for option in ("--no-definitions", "--no-compile"):
        assert kernels.main(["--device", "cuda", option, "--only", "doubled some, M = 4"]) == 0
    assert len((tmp_path / "kernels_gpu.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cuda"], "--device cuda: torch finds no GPU; `--device cpu --calls tiny` shows"),
        (["--device", "cuda:7", "--calls", "tiny"], "--device cuda:7: torch finds no GPU"),
        (["--device", "cpu"], "for which only --calls tiny will do"),
        (["--device", "mps"], "it is cuda, cuda:1 or cpu"),
        (["--device", "gpu"], "it is cuda, cuda:1 or cpu"),
        (
            ["--device", "cpu", "--calls", "tiny", "--only", "nothing"],
            "no call's title begins with nothing; one is 'rms",
        ),
    ],
)
def test_what_cannot_be_measured_is_status_2(options, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        kernels.main(options)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_one_of_several_gpus_can_be_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert kernels_gpu.device_of("cuda", "flash", "x") == torch.device("cuda", 0)
    assert kernels_gpu.device_of("cuda:1", "flash", "x") == torch.device("cuda", 1)


def test_on_a_cpu_the_interpreter_is_asked_for():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernels", "--device", "cpu", "--calls", "tiny", "--only", "rms_norm"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "rms_norm norm, M = 3" in done.stdout, done.stderr


def test_nothing_is_left_out_of_what_a_full_run_does():
    assert (
        Size() == kernels_gpu.FULL and Size().samples >= 20 and Size().definitions and Size().compile is torch.compile
    )
    assert SimpleNamespace(**dataclasses.asdict(TINY)).samples < Size().samples
