"""Warnings: each of a machine that differs from a sound one in one thing, and none of the sound one."""

from __future__ import annotations

import copy

import pytest

from pyrosome.cli import checks
from pyrosome.cli.checks import AT_START, CHECKS, warnings

GIB = 1 << 30
FOLDER = {"path": "/home/me/x", "is_there": True, "free": 50 * GIB, "why_not": "", "open_to": ""}
GPU = {"name": "H100", "capability": "9.0", "bus": "0000:81:00.0", "memory": 80 * GIB, "memory_free": 79 * GIB}
SOUND = {
    "cpu": {"usable_cores": 16, "quota": None, "load": 0.4},
    "memory": {"total": 64 * GIB, "available": 60 * GIB, "limit": 0, "limit_used": 0, "swap": 8 * GIB, "swap_used": 0,
               "huge_pages": "madvise"},
    "gpus": [{"name": "H100", "capability": "9.0", "memory": 80 * GIB, "tuned": "variants of kernels by default"}],
    "drivers": {
        "nvidia": {"version": "580.65.06", "gpus": [GPU]}, "tool": True,
        "torch": {"cuda": "13.0", "hip": "", "architectures": ["sm_75", "sm_90a", "compute_120"]},
        "links": [{"bus": "0000:81:00.0", "vendor": "NVIDIA", "lanes": 16, "max_lanes": 16, "generation": 1,
                   "max_generation": 5}],
    },
    "folders": {"state": FOLDER, "models": FOLDER, "kernels": FOLDER},
    "limits": {"open_files": 20_000, "locked_bytes": 8 << 20},
    "clock_behind_s": 0.0,
    "versions": {"torch": "2.13.0"},
    "environment": {"set": {}, "unknown": {}},
    "native": {"level": "avx512", "error": "", "asked": "auto", "above": []},
    "ops": [
        {"op": "compress", "chosen": "cpu", "versions": ["torch", "cpu"]},
        {"op": "route_scores", "chosen": "torch", "versions": ["torch"]},
    ],
}  # fmt: skip


def without(**changes):
    """The sound machine with other values; `a__b=x` is report["a"]["b"] = x."""
    report = copy.deepcopy(SOUND)
    for path, value in changes.items():
        *lead, last = path.split("__")
        place = report
        for key in lead:
            place = place[key]
        place[last] = value
    return report


CASES = [
    ("kernels", {"native": {"level": "", "error": "no C++ compiler was found", "asked": "auto", "above": []}},
     ["no native kernels", "no C++ compiler was found (", "install"]),
    ("kernels", {"native": {"level": "avx2", "error": "", "asked": "avx2", "above": [{"level": "avx512"}]}},
     ["PYROSOME_CPU=avx2", "avx512", "unset it"]),
    ("versions of ops", {"environment__set": {"PYROSOME_OPS": "torch"},
                         "ops": [{"op": "compress", "chosen": "torch", "versions": ["torch", "cpu"]}]},
     ["PYROSOME_OPS=torch", "1 op by definition", "compress"]),
    ("environment", {"environment__unknown": {"PYROSOME_OP": "torch"}}, ["PYROSOME_OP is", "PYROSOME_OPS is meant"]),
    ("environment", {"environment__unknown": {"PYROSOME_ZZZZZZ": "1"}}, ["PYROSOME_ZZZZZZ is set"]),
    ("drivers", {"drivers__nvidia__version": "535.104.05"}, ["535.104.05", "CUDA 13.0", "580 or newer"]),
    ("drivers", {"drivers__torch": {"cuda": "", "hip": "", "architectures": []}}, ["H100", "without CUDA"]),
    ("drivers", {"gpus": []}, ["1 GPU and", "CUDA_VISIBLE_DEVICES"]),
    ("drivers", {"drivers__nvidia": {"version": "", "gpus": []}}, ["nvidia-smi is there", "no GPU"]),
    ("drivers", {"drivers__nvidia__gpus": [GPU | {"name": "P100", "capability": "6.0"}]},
     ["P100", "capability 6.0", "from 7.5 on"]),
    ("PCIe", {"drivers__links": [SOUND["drivers"]["links"][0] | {"lanes": 4}]}, ["0000:81:00.0", "4 of 16", "4 times"]),
    ("threads", {"environment__set": {"OMP_NUM_THREADS": "32"}}, ["OMP_NUM_THREADS=32", "16 cores", "set it to 16"]),
    ("threads", {"environment__set": {"OMP_NUM_THREADS": "4"}}, ["OMP_NUM_THREADS=4", "12 of 16 cores idle"]),
    ("threads", {"environment__set": {"OMP_NUM_THREADS": "all"}}, ["OMP_NUM_THREADS=all", "no number"]),
    ("threads", {"environment__set": {"OMP_NUM_THREADS": "0"}}, ["no number", "set it to 16"]),
    ("threads", {"cpu__quota": 3.5}, ["16 threads", "3.5 cores", "OMP_NUM_THREADS=4"]),
    ("threads", {"cpu__quota": 3.5, "environment__set": {"OMP_NUM_THREADS": "8"}}, ["4 cores", "3.5 of 16"]),
    ("load", {"cpu__load": 9.0}, ["9.0 tasks", "busy"]),
    ("memory", {"memory__available": 3 * GIB}, ["3.0 GiB of memory are free, of 64.0 GiB", "end what else runs"]),
    ("memory", {"memory__limit": 8 * GIB, "memory__limit_used": 8 * GIB - (512 << 20)},
     ["512.0 MiB", "8.0 GiB", "container", "killed"]),
    ("huge pages", {"memory__huge_pages": "never"},
     ["64.0 GiB are 16,777,216 pages of 4 KiB instead of 32,768", "echo madvise >"]),
    ("swap", {"memory__swap_used": 3 * GIB}, ["3.0 GiB are swapped out", "--lock-memory", "8.0 MiB"]),
    ("open files", {"limits__open_files": 256}, ["256 files", "ulimit -n"]),
    ("folders", {"folders__state": FOLDER | {"why_not": "it cannot be written"}}, ["state", "/home/me/x", "written"]),
    ("folders", {"folders__models": FOLDER | {"free": 5 << 20}}, ["5.0 MiB are free for models"]),
    ("folders", {"folders__state": FOLDER | {"open_to": "everybody"}}, ["open to everybody", "chmod 700 /home/me/x"]),
    ("clock", {"clock_behind_s": 3 * 86400.0}, ["3.0 days behind"]),
]  # fmt: skip


def test_a_sound_machine_is_not_warned_of():
    assert warnings(SOUND) == []


@pytest.mark.parametrize(("about", "changes", "words"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_a_machine_with_one_fault_is_warned_of_that_alone(about, changes, words):
    (found,) = warnings(without(**changes))
    assert found["about"] == about and all(word in found["text"] for word in words), found["text"]
    assert "\n" not in found["text"]


def test_every_check_has_a_machine_that_fails_it():
    assert {about for about, _, _ in CASES} == set(CHECKS)


def test_a_machine_without_gpus_limits_or_load_is_sound():
    nothing = {"nvidia": {"version": "", "gpus": []}, "tool": False, "links": [],
               "torch": {"cuda": "", "hip": "", "architectures": []}}  # fmt: skip
    report = without(gpus=[], drivers=nothing, cpu__load=None, memory__huge_pages="", memory__available=0,
                     limits={"open_files": None, "locked_bytes": None})  # fmt: skip
    assert warnings(report) == []


def test_threads_that_were_asked_for_as_they_should_be_are_sound():
    assert warnings(without(environment__set={"OMP_NUM_THREADS": "16"})) == []
    assert warnings(without(cpu__quota=4.0, environment__set={"OMP_NUM_THREADS": "4"})) == []


def test_the_command_that_installs_a_compiler_is_this_system_s(monkeypatch):
    report = without(native={"level": "", "error": "no C++ compiler was found", "asked": "auto", "above": []})
    monkeypatch.setattr(checks.shutil, "which", lambda tool: tool if tool == "apk" else None)
    assert "(apk add g++)" in warnings(report)[0]["text"]
    monkeypatch.setattr(checks.shutil, "which", lambda tool: None)
    assert "install g++ or clang++" in warnings(report)[0]["text"]


def test_at_a_server_s_start_no_driver_is_asked():
    report = without(cpu__load=9.0, drivers__nvidia__version="1.0")
    for late in ("drivers", "gpus", "ops", "versions"):
        del report[late]
    assert [w["about"] for w in warnings(report, AT_START)] == ["load"]
    assert set(AT_START) <= set(CHECKS)
