"""`pyrosome doctor`: what it finds, and that it finds what is wrong."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from pyrosome.cli import app, machine, recorded
from pyrosome.cli import self_test as tested
from pyrosome.cli.doctor import (
    choices,
    clock_behind,
    expected_native,
    experts_for,
    largest_file,
    native,
    place_of,
    short,
)
from pyrosome.cli.doctor_report import show
from pyrosome.cli.self_test import NEW_TOKENS, PROMPTS, fingerprint, prompt_ids, record, self_test
from pyrosome.cli.terminal import Screen
from pyrosome.errors import RequestError
from pyrosome.llm import load_model
from pyrosome.ops import native as kernels
from pyrosome.ops import toolchain
from pyrosome.ops.seam import OPS
from pyrosome.plan.hardware import machine as planned
from tests.checkpoint.files import DATA
from tests.cli.sessions import REAL, piped
from tests.cli.test_checks import GIB, GPU, SOUND, without


@pytest.fixture
def nano():
    return load_model("builtin:nano", numerics="exact")


def failed(findings):
    return {f["check"] for f in findings if not f["ok"]}


def test_the_built_in_model_answers_as_recorded(nano):
    findings = self_test(nano, "builtin:nano")
    assert len(findings) == 3 * len(recorded.CASES) == 9 and failed(findings) == set()
    assert all(len(c["answer"]) == len(c["logprobs"]) == NEW_TOKENS for c in recorded.CASES)
    assert all(c["prompt"].endswith(f["prompt"].removeprefix("... ")) and len(f["prompt"]) < 60
               for c, f in zip(recorded.CASES, findings[::3], strict=True))  # fmt: skip
    config = nano.config
    assert max(len(c["ids"]) for c in recorded.CASES) > max(128, 4 * config.index_topk, config.sliding_window)


def test_a_changed_weight_is_found_by_the_recorded_answers(nano):
    with torch.no_grad():
        nano.network.hc_head.fn.mul_(1.5)
    assert failed(self_test(nano, "builtin:nano")) == {"as recorded"}


def test_a_small_change_of_a_logprob_is_found(nano, monkeypatch):
    cases = json.loads(json.dumps(recorded.CASES))
    cases[2]["logprobs"][-1] += 0.01
    monkeypatch.setattr(recorded, "CASES", cases)
    (finding,) = (f for f in self_test(nano, "builtin:nano") if not f["ok"])
    assert finding["check"] == "as recorded" and cases[2]["prompt"].endswith(finding["prompt"].removeprefix("... "))


def test_a_logit_that_is_not_finite_is_found(nano):
    step = type(nano.runner(1, 1)).step

    def spoilt(self, spans, **kwargs):
        rows = [r.clone() for r in step(self, spans, **kwargs)]
        rows[0][-1, 7] = float("inf")
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(nano.runner(1, 1)), "step", spoilt)
        assert "finite" in failed(self_test(nano, "builtin:nano"))


def test_a_route_that_gives_other_logits_is_found(nano):
    logits = nano.logits
    nano.logits = lambda ids, cuts=None: logits(ids, cuts) * 1.001
    assert failed(self_test(nano, "builtin:nano")) == {"whole = token by token"}


def test_answers_recorded_with_other_weights_are_not_compared(nano, monkeypatch):
    monkeypatch.setattr(recorded, "WEIGHTS", "of another release")
    assert failed(self_test(nano, "builtin:nano")) == {"as recorded"}


def test_what_is_recorded_are_clear_answers_to_one_prompt_of_each_task(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(tested, "NUM_TRIED", 2)
    monkeypatch.setattr(tested, "SAFE_MARGIN", 0.0)
    record(tmp_path / "recorded.py")
    told: dict = {}
    exec((tmp_path / "recorded.py").read_text(encoding="utf-8"), told)
    assert told["WEIGHTS"] == fingerprint(nano.path) and len(told["CASES"]) == 3
    for case in told["CASES"]:
        assert case["ids"] == prompt_ids(nano, case["prompt"])
        rows = nano.logits([*case["ids"], *case["answer"]])[len(case["ids"]) - 1 : -1].log_softmax(-1)
        assert rows.argmax(-1).tolist() == case["answer"]
        assert rows.max(-1).values.tolist() == pytest.approx(case["logprobs"], abs=1e-3)
    monkeypatch.setattr(tested, "SAFE_MARGIN", 1e6)
    with pytest.raises(RuntimeError, match="asked for ledger, the model is nowhere surer"):
        record(tmp_path / "other.py")
    assert not (tmp_path / "other.py").exists()


def test_any_checkpoint_is_tested_by_its_routes_with_a_tokenizer_or_without():
    model = load_model(DATA / "golden" / "bf16", numerics="exact")
    ids = prompt_ids(model, PROMPTS[2])
    assert ids[0] == model.config.bos_token_id and max(ids) < model.config.vocab_size
    findings = self_test(model, "golden")
    assert len(findings) == 2 * len(PROMPTS) and failed(findings) == set()


def test_every_op_says_what_it_runs_and_why(monkeypatch):
    found = choices()
    assert {o["op"] for o in found} == set(OPS)
    assert all(o["chosen"] in o["versions"] and not o["error"] for o in found)
    monkeypatch.setattr(OPS["compress"], "choice", "imagined")
    refused = [o for o in choices() if o["error"]]
    assert {o["op"] for o in refused} == {"compress"} and "imagined" in refused[0]["error"]


def test_every_op_says_what_it_would_run_on_gpus(monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [{"capability": c} for c in ("9.0", "7.5", "9.0")])
    monkeypatch.setattr(OPS["rms_norm"], "passed_over", {})  # what other tests have made it choose
    for _ in range(2):  # what would run is no place where something ran
        found = [o for o in choices() if o["op"] == "rms_norm" and o["device"] == "cuda"]
        assert {(o["capability"], o["chosen"]) for o in found} == {("7.5", "torch"), ("9.0", "triton")}
    old = next(o for o in found if o["capability"] == "7.5")
    assert "triton: it needs compute capability 8.0, and this device has 7.5" in old["passed_over"]
    monkeypatch.setattr(OPS["rms_norm"], "choice", "cpu")
    assert not any(o["error"] for o in choices())


def test_choices_measured_on_a_gpu_are_told(monkeypatch, tmp_path):
    from pyrosome.ops import tuned

    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.choices.cache_clear()
    assert machine.tuned("Some GPU") == "variants of kernels by default"
    tuned.choices.cache_clear()
    (tmp_path / "some-gpu.json").write_text("{")
    assert "is no JSON" in machine.tuned("Some GPU")
    (tmp_path / "some-gpu.json").write_text('{"device": "Some GPU", "capability": 90, "choices": {"a": {"b": "c"}}}')
    assert machine.tuned("Some GPU") == "variants of kernels as measured on it"
    tuned.choices.cache_clear()


def test_the_whole_report_is_one_object(tmp_path):
    done = piped(tmp_path, "doctor", "--json", program=REAL)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"], done.stderr.decode()
    assert len(report["self_test"]) == 3 * len(recorded.CASES) and report["versions"]["torch"]
    assert report["memory"]["total"] > 0 and report["disk"]["free"] > 0 and report["cpu"]["cores"] >= 1
    assert report["speeds"]["memory"]["one_core"] > 0 or report["speeds"]["memory"]["why_not"]
    assert report["speeds"]["state"]["write"] > 0 or report["speeds"]["state"]["why_not"]
    (flash,) = (p for p in report["advice"]["plans"] if p["kind"] == "cpu")
    assert flash["model"] == "flash" and flash["text"] and flash["stored_bytes"] == 159_609_485_896
    assert report["advice"]["calibration"]["state"] == "none" and isinstance(report["warnings"], list)
    assert report["not_tested"] == "" and report["clock_behind_s"] == 0


def test_a_version_that_was_asked_for_and_cannot_run_fails_with_status_1(tmp_path):
    done = piped(tmp_path, "doctor", "--no-speeds", program=REAL, PYROSOME_OPS="compress:imagined", PYROSOME_TYPO="1")
    shown = done.stdout.decode()
    assert done.returncode == 1 and "FAIL" in shown and "'imagined' was asked for" in shown
    assert "PYROSOME_OPS=compress:imagined" in shown and "PYROSOME_TYPO is set, and nothing here reads it" in shown


def test_a_bad_model_is_one_line_and_status_2(tmp_path):
    done = piped(tmp_path, "doctor", "/no/such/model", program=REAL)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"pyrosome: /no/such/model does not exist")


@pytest.mark.parametrize(
    ("info", "model", "flags"),
    [
        ("model name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 avx512f\n", "Some CPU @ 2GHz", {"avx2", "avx512f"}),
        ("Features\t: fp asimd bf16\n", None, {"asimd", "bf16"}),
        ("", None, None),
    ],
)
def test_a_cpu_is_read_from_what_the_system_tells(tmp_path, info, model, flags):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(info)
    cpu = machine.cpu(tmp_path)
    assert cpu["model"] == model or (model is None and cpu["model"])
    assert flags == (None if cpu["flags"] is None else {f for f, there in cpu["flags"].items() if there})


DOCTOR = sys.modules["pyrosome.cli.doctor"]  # the package's `doctor` is the command


@pytest.fixture
def looked(monkeypatch, tmp_path):
    """Runs the command in this process, on a state folder of its own; gives its exit status and its report."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("PYROSOME_CLIENTS", "PYROSOME_FUZZ_SECONDS", "PYROSOME_HF_PYTHON"):  # of tests and benchmarks
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        done = CliRunner().invoke(app, ["doctor", "--json", *arguments])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, json.loads(done.stdout)

    return run


def test_nothing_is_measured_or_loaded_where_that_is_not_wanted(looked, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrosome.cli.speeds.memory_speed", lambda *_: pytest.fail("memory was measured"))
    monkeypatch.setattr("pyrosome.llm.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    status, report = looked("--no-speeds", "--no-self-test")
    assert status == 0 and report["ok"] and (report["speeds"], report["self_test"]) == ({}, [])
    assert not (tmp_path / "state").exists()  # looking makes no folder


def test_warnings_do_not_fail(looked, monkeypatch):
    monkeypatch.setenv("PYROSOME_OP", "torch")
    status, report = looked("--no-speeds", "--no-self-test")
    assert status == 0 and report["ok"]
    assert "PYROSOME_OPS is meant" in next(w["text"] for w in report["warnings"] if w["about"] == "environment")


def test_a_machine_that_is_not_planned_for_is_looked_at_all_the_same(looked, monkeypatch):
    def unknown(*_, **__):
        raise RequestError("this machine's GPU is not in the table: Banana 9")

    monkeypatch.setattr("pyrosome.plan.hardware.machine", unknown)
    status, report = looked("--no-speeds", "--no-self-test")
    assert status == 0 and report["advice"]["plans"] == [] and "Banana 9" in report["advice"]["why_not"]


def test_the_named_model_is_planned_for_too(looked):
    path = str(DATA / "golden" / "bf16")
    _, report = looked("--no-speeds", "--no-self-test", path)
    assert [p["model"] for p in report["advice"]["plans"] if p["kind"] == "cpu"] == ["flash", path]
    assert place_of(path) == DATA / "golden" / "bf16" and largest_file(path).suffix == ".safetensors"
    assert largest_file("/no/such/model") is None and str(place_of("/no/such/model")) == "/no/such/model"


@pytest.mark.parametrize(
    ("fits", "experts", "free", "way"),
    [(True, "resident", 200 * GIB, "resident"), (True, "mapped", 20 * GIB, "mapped"), (False, "", 4 * GIB, ""),
     (True, "resident", 100 * GIB, "mapped"), (True, "resident", 0, "resident")],
)  # fmt: skip
def test_the_self_test_holds_experts_where_memory_allows(fits, experts, free, way):
    plan = {"model": "big", "kind": "cpu", "fits": fits, "experts": experts, "free_bytes": free,
            "stored_bytes": 150 * GIB, "text": "big: RAM lacks it"}  # fmt: skip
    report = {"model": "big", "advice": {"plans": [plan | {"kind": "gpu", "fits": True}, plan]}}
    assert experts_for("big", report) == way
    assert experts_for("builtin:nano", report | {"model": "builtin:nano"}) == "resident"


def test_a_model_that_memory_does_not_hold_is_not_loaded_and_that_is_said(looked, monkeypatch, capsys):
    monkeypatch.setattr(DOCTOR, "experts_for", lambda *_: "")
    status, report = looked("--no-speeds", str(DATA / "golden" / "bf16"))
    assert status == 0 and report["self_test"] == [] and "RAM" in report["not_tested"]
    show(report, Screen())
    said = capsys.readouterr().out
    assert "left out, since memory does not hold the model" in said and "the model was not tested" in said


def test_levels_above_the_one_in_use_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(kernels, "level", lambda: "avx2")
    monkeypatch.setattr(machine, "lacking_flags", lambda level: ["avx512_bf16", "avx512_vbmi"])
    assert native()["above"] == [{"level": "avx512", "why_not": "this processor has no avx512_bf16, avx512_vbmi"}]
    monkeypatch.setattr(machine, "lacking_flags", lambda level: [])
    monkeypatch.setenv("PYROSOME_CPU", "avx2")
    assert native()["above"][0]["why_not"] == "PYROSOME_CPU asks for avx2"
    monkeypatch.setenv("PYROSOME_CPU", "auto")
    monkeypatch.setattr(kernels, "_opened", lambda level: "bfloat16 adds in another order")
    assert native()["above"][0]["why_not"] == "bfloat16 adds in another order"

    def none():
        raise OSError("no C++ compiler was found")

    monkeypatch.setattr(kernels, "level", none)
    assert (native()["level"], native()["error"]) == ("", "no C++ compiler was found")


def test_kernels_are_foretold_without_building_them(monkeypatch):
    monkeypatch.delenv("PYROSOME_CPU", raising=False)
    assert expected_native()["level"] == native()["level"]
    monkeypatch.setattr(toolchain, "supported", lambda: ("portable", "avx2"))
    assert expected_native()["level"] == "avx2"
    monkeypatch.setenv("PYROSOME_CPU", "portable")
    assert [a["level"] for a in expected_native()["above"]] == ["avx2"]
    monkeypatch.setenv("PYROSOME_CPU", "avx512")
    assert "here it is auto, portable, avx2" in expected_native()["error"]
    monkeypatch.setenv("PYROSOME_CPU", "auto")

    def none():
        raise OSError("no C++ compiler was found")

    monkeypatch.setattr(toolchain, "compiler", none)
    monkeypatch.setattr(toolchain, "SHIPPED", DATA)
    assert expected_native() == {"level": "", "error": "no C++ compiler was found", "asked": "auto", "above": []}


def test_a_clock_that_is_older_than_this_package_is_behind():
    assert clock_behind(now=86400.0) > 365 * 86400 and clock_behind(now=1e12) == 0.0


def at_start(monkeypatch, **changes):
    """`short` on a machine like the sound one."""
    report = without(**changes)
    here = dataclasses.replace(planned("epyc-9654", ram="512G"), is_here=True)
    monkeypatch.setattr(DOCTOR, "basics", lambda: {k: v for k, v in report.items() if k != "native"})
    monkeypatch.setattr(DOCTOR, "expected_native", lambda: report["native"])
    monkeypatch.setattr("pyrosome.cli.advice.this_machine", lambda _: here)
    return short()


def test_a_server_s_start_is_one_line_where_nothing_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (line,) = at_start(monkeypatch)
    assert line.startswith("Native kernels: avx512; this machine is not calibrated") and "pyrosome calibrate" in line


def test_a_server_s_start_tells_two_warnings_and_how_many_more(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    one = at_start(monkeypatch, cpu__load=9.0)
    assert len(one) == 2 and one[1].startswith("Warning: load: ") and "more" not in one[1]
    many = at_start(monkeypatch, cpu__load=9.0, limits__open_files=5, memory__huge_pages="never")
    assert len(many) == 3 and many[2].endswith("1 more: `pyrosome doctor`.")


def test_a_server_s_start_says_nothing_of_calibrations_where_the_machine_is_unknown(monkeypatch):
    def unknown(_):
        raise RequestError("not in the table")

    at_start(monkeypatch)
    monkeypatch.setattr("pyrosome.cli.advice.this_machine", unknown)
    assert short() == ["Native kernels: avx512."]
    monkeypatch.setattr(DOCTOR, "expected_native", lambda: {"level": "", "error": "none", "asked": "auto", "above": []})
    assert short()[0] == "Native kernels: none." and "no native kernels" in short()[1]


def test_a_report_of_a_large_machine_is_told_in_words(capsys):
    cpu = {"model": "Big \x1b[31m", "architecture": "x86_64", "cores": 192, "sockets": 2, "nodes": 2, "quota": 16.0,
           "flags": {"avx2": True, "avx512f": False}}  # fmt: skip
    other = {"bus": "0000:99:00.0", "vendor": "AMD", "lanes": 8, "max_lanes": 16, "generation": None,
             "max_generation": 4}  # fmt: skip
    above = [{"level": "avx512", "why_not": "it lacks vbmi"}]
    report = without(
        memory__limit=32 * GIB, memory__limit_used=GIB, disk={"path": "/data", "free": 5 * GIB}, model="builtin:nano",
        extras={"serve": ["fastapi", "uvicorn"], "train": []}, self_test=[], not_tested="", ok=True,
        drivers__links=[*SOUND["drivers"]["links"], other],
        native={"level": "avx2", "error": "", "asked": "auto", "above": above},
        speeds={"memory": {"cores": 16, "one_core": 12.34e9, "all_cores": 180e9, "why_not": ""},
                "state": {"path": "/home/me", "write": 300e6, "read": 0.0, "why_not": "it lies in memory"},
                "model": {"path": "/data/x", "num_bytes": GIB, "read": 3.21e9, "why_not": ""}},
        warnings=[{"about": "load", "text": "busy"}], ops=[{"op": "linear", "device": "cuda", "capability": "9.0",
        "format": "fp8", "chosen": "triton", "passed_over": ["cpu: it is for CPU"], "versions": [], "error": ""}],
        accelerators=[{"entry": "fast", "package": "fast 1.2", "ops": ["linear"], "error": ""},
                      {"entry": "slow", "package": "slow 0.1", "ops": [], "error": "ImportError: none"}],
        advice={"why_not": "", "plans": [{"parts": ["flash on it", "it fits"]}],
                "calibration": {"text": "not calibrated"}},
    )  # fmt: skip
    report["cpu"] |= cpu
    show(report, Screen())
    said = capsys.readouterr().out
    for words in (
        "2 sockets, 2 memory nodes, 16 of 192 cores usable, a quota of 16 cores' time", "swap 8.0 GiB (0 B used)",
        "of it this container may use 32.0 GiB, and uses 1.0 GiB", "NVIDIA driver 580.65.06",
        f"{GPU['name']}, capability 9.0, 80.0 GiB, 79.0 GiB free, PCIe 16 of 16 lanes, generation 1 of 5",
        "AMD at 0000:99:00.0, PCIe 8 of 16 lanes, generation ? of 4", "torch is built for CUDA 13.0; no triton",
        "torch can use: H100, capability 9.0, 80.0 GiB; variants of kernels by default",
        "cuda 9.0", "kernels of fast 1.2 (fast): for linear", "kernels of slow 0.1 (slow): ImportError: none",
        "memory is read at 12.3 GB/s by one core, 180.0 GB/s by 16 cores", "/home/me is written at 300 MB/s",
        "/home/me was not read: it lies in memory", "the model is read at 3.2 GB/s (1.0 GiB of /data/x)",
        "serve lacks fastapi, uvicorn: pip install 'pyrosome[serve]'", "not avx512: it lacks vbmi", "load: busy",
        "flash on it\n- it fits\nthis machine is not calibrated", "all is well, with 1 warning",
    ):  # fmt: skip
        assert words in said, words
    assert "\x1b[31m" not in said and "train lacks" not in said


def test_a_user_without_a_home_is_told_and_not_shown_a_traceback(looked, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    for name in ("XDG_STATE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    status, report = looked("--no-self-test")
    assert status == 0 and "state" not in report["speeds"]
    assert sum("set HOME" in w["text"] for w in report["warnings"]) >= 2
    assert "home directory" in report["advice"]["plans"][0]["why_not"]
    assert report["advice"]["calibration"]["state"] == "unknown"


def test_advice_is_asked_with_what_was_measured(monkeypatch):
    asked = []
    monkeypatch.setattr("pyrosome.cli.advice.advise", lambda names, found: asked.append((names, found)) or {})
    memory = {"one_core": 30e9, "all_cores": 90e9, "cores": 4}

    def advice(speeds, model="builtin:nano"):
        DOCTOR._advice(model, {"memory": SOUND["memory"], "speeds": speeds})
        return asked[-1]

    names, found = advice({"memory": memory, "state": {"read": 1e9}, "model": {"read": 3e9}}, "/data/x")
    assert names == ["flash", "/data/x"] and (found.memory_bytes, found.free_bytes) == (64 * GIB, 60 * GIB)
    assert (found.memory_read, found.cores, found.drive_read) == (90e9, 4, 3e9)
    names, found = advice({"memory": memory | {"all_cores": 20e9}, "state": {"read": 1e9}, "model": {"read": 0.0}})
    assert names == ["flash"] and (found.memory_read, found.cores, found.drive_read) == (30e9, 1, 1e9)
    _, found = advice({})
    assert (found.memory_read, found.drive_read) == (0.0, 0.0)
