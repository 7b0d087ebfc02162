"""Advice: what is said of machines that hold the model, hold it but for its experts, or do not; and of calibrations."""

from __future__ import annotations

import dataclasses
import shutil
from collections import namedtuple

import pytest

from pyrosome.cli import advice, machine
from pyrosome.cli.advice import Measured, advise
from pyrosome.errors import PlanError, RequestError
from pyrosome.plan import calibration as kept
from pyrosome.plan.calibration import TERMS, Calibration
from pyrosome.plan.hardware import machine as planned
from pyrosome.plan.history import installed

GIB = 1 << 30
PLENTY = namedtuple("usage", "free")(900 * GIB)


@pytest.fixture(autouse=True)
def of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: PLENTY)


def cpu(ram, **changes):
    return dataclasses.replace(planned("epyc-9654", ram=ram, nvme="1T"), is_here=True, **changes)


UNMEASURED = Measured(0, 0)


def told(here, measured=UNMEASURED, name="flash"):
    found = advise([name], measured, here)
    assert not found["why_not"]
    return found["plans"][-1]


def calibrated(title, **changes):
    seconds = dict.fromkeys(TERMS, 1e-11)
    found = Calibration(
        processor=title, threads=8, level="avx512", engine=installed("pyrosome"), torch=installed("torch"),
        when="2026-01-02T03:04:05+00:00", seconds=seconds, read_bytes_s=1e11, flops_s=1e12, disk_bytes_s=2e9,
        link_bytes_s=0.0, residual=0.03, worst=0.12, points=40,
    )  # fmt: skip
    kept.save(dataclasses.replace(found, **changes))


def test_memory_that_holds_the_experts_is_told_with_what_to_expect():
    plan = told(cpu("512G"))
    assert plan["fits"] and plan["experts"] == "resident" and plan["max_context"] == 1_048_576
    assert 150 * GIB < plan["needed_bytes"] < 160 * GIB and plan["memory_bytes"] == 512 * GIB
    assert "RAM holds all of it, the experts too" in plan["text"] and "of 512.0 GiB" in plan["text"]
    low, high = plan["speed"]["decode_tok_s"]["low"], plan["speed"]["decode_tok_s"]["high"]
    assert 0 < low < high and f"-{high:.0f} tok/s of one session at 131,072 tokens" in plan["text"]
    assert "65% of the maker's bandwidth" in plan["text"]
    assert "1,048,576 tokens, all that it has positions for, with rows in fp8" in plan["text"]
    assert plan["sessions"] > 100 and f"room for {plan['sessions']:,} sessions of 131,072 tokens" in plan["text"]
    assert "lack" not in plan["text"] and "end what else runs" not in plan["text"]


def test_memory_that_lacks_room_for_the_experts_is_told_to_map_them():
    plan = told(cpu("64G"))
    assert plan["fits"] and plan["experts"] == "mapped" and plan["mapped_bytes"] < 20 * GIB
    lacking = (plan["needed_bytes"] - 64 * GIB) / GIB
    assert plan["sessions"] > 10 and plan["max_context"] == 1_048_576  # beside the rest, not beside some experts
    assert f"RAM lacks {lacking:.1f} GiB to hold the experts" in plan["text"]
    assert "with --experts mapped" in plan["text"] and "limit: NVMe" in plan["text"]


def test_memory_that_does_not_even_hold_the_rest_is_told_so():
    plan = told(cpu("8G"))
    assert not plan["fits"] and plan["speed"] is None and plan["max_context"] == 0
    more = (plan["mapped_bytes"] - 8 * GIB) / GIB
    assert f"{more:.1f} GiB more than there are" in plan["text"] and "expect" not in plan["text"]


def test_a_context_that_memory_shortens_is_told():
    plan = told(cpu("16G"))
    assert plan["fits"] and 131_072 <= plan["max_context"] < 1_048_576
    assert f"the longest context is {plan['max_context']:,} of 1,048,576 tokens" in plan["text"]


def test_memory_that_others_take_is_told():
    assert "100.0 GiB of RAM are free now, so end what else runs" in told(cpu("512G"), Measured(0, 100 * GIB))["text"]
    assert "end what else runs" not in told(cpu("512G"), Measured(0, 400 * GIB))["text"]


def test_a_drive_without_room_for_the_files_is_told(monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(60 * GIB))
    plan = told(cpu("64G"))
    assert plan["fits"] and plan["drive_bytes"] == 60 * GIB
    assert "148.6 GiB, and 60.0 GiB are free" in plan["text"] and "so 88.6 GiB lack" in plan["text"]


def test_a_checkpoint_that_is_there_needs_no_more_room(monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(5))
    plan = told(cpu("64G"), name="builtin:nano")
    assert plan["fits"] and plan["experts"] == "resident" and "lack" not in plan["text"]
    assert plan["model"] == "builtin:nano" and plan["context"] == min(131_072, plan["positions"])


def test_memory_that_was_measured_decides_where_nothing_was_calibrated():
    slow, fast = (told(cpu("512G"), Measured(0, 0, memory_read=rate, cores=8)) for rate in (50e9, 400e9))
    assert slow["speed"]["decode_tok_s"]["mid"] < 0.5 * fast["speed"]["decode_tok_s"]["mid"]
    assert "memory was read at 50.0 GB/s just now with 8 cores; not calibrated" in slow["text"]


def test_a_drive_that_was_measured_decides_where_experts_are_mapped():
    slow, fast = (told(cpu("64G"), Measured(0, 0, drive_read=rate)) for rate in (0.5e9, 5e9))
    assert slow["speed"]["decode_tok_s"]["mid"] < 0.2 * fast["speed"]["decode_tok_s"]["mid"]
    assert "its drive at 0.5 GB/s, measured" in slow["text"]
    assert "its drive at 5.0 GB/s, assumed" in told(cpu("64G"))["text"] and "drive at" not in told(cpu("512G"))["text"]


def test_a_machine_that_is_not_calibrated_is_told_how_to():
    found = advise([], Measured(0, 0), cpu("64G"))["calibration"]
    assert (
        found["state"] == "none" and "half or twice as high" in found["text"] and "pyrosome calibrate" in found["text"]
    )


def test_a_calibration_that_holds_is_used_before_what_was_measured_in_passing():
    here = cpu("512G")
    calibrated(here.device.title)
    found = advise(["flash"], Measured(0, 0, memory_read=1e9), here)
    assert found["calibration"]["state"] == "current"
    assert all(word in found["calibration"]["text"] for word in ("2026-01-02", "8 threads", "40 steps", "3%", "12%"))
    (plan,) = found["plans"]
    assert "calibrated 2026-01-02" in plan["text"] and "just now" not in plan["text"]


def test_a_calibration_of_another_version_is_outdated_and_what_was_measured_counts():
    here = cpu("512G")
    calibrated(here.device.title, engine="0.0.1")
    found = advise(["flash"], Measured(0, 0, memory_read=1e11), here)
    assert found["calibration"]["state"] == "outdated"
    assert "0.0.1" in found["calibration"]["text"] and "pyrosome calibrate" in found["calibration"]["text"]
    assert "just now" in found["plans"][0]["text"]


def test_a_folder_of_calibrations_that_cannot_be_read_is_told(monkeypatch):
    def refused():
        raise PermissionError("not yours")

    monkeypatch.setattr(kept, "folder", refused)
    found = advise([], Measured(0, 0), cpu("64G"))["calibration"]
    assert found["state"] == "unknown" and "not yours" in found["text"]


def test_a_machine_with_gpus_is_told_of_its_processor_and_of_them():
    here = dataclasses.replace(planned("h200:2", cpu="epyc-9654", ram="1T", nvme="1T"), is_here=True)
    on_cpu, on_gpus = advise(["flash"], Measured(0, 0), here)["plans"]
    assert (on_cpu["kind"], on_cpu["experts"], on_gpus["kind"], on_gpus["count"]) == ("cpu", "resident", "gpu", 2)
    assert "2 x " in on_gpus["text"] and "it fits by " in on_gpus["text"] and "tok/s" in on_gpus["text"]
    assert on_gpus["max_context"] == 1_048_576 and "run on the processor" in on_gpus["text"]
    assert "run on the processor" not in on_cpu["text"]


def test_experts_that_a_gpu_has_no_room_for_are_told_where_they_are():
    plan = told(dataclasses.replace(planned("rtx-5090", ram="64G", nvme="1T"), is_here=True))
    near, in_ram, on_drive = plan["spread"]
    assert plan["fits"] and near + in_ram + on_drive == 256 and in_ram > 0 and on_drive > 0
    assert f"of 256 experts of each layer {in_ram} in RAM and {on_drive} on the drive" in plan["text"]
    assert "experts of each layer" not in told(dataclasses.replace(planned("h200:2"), is_here=True))["text"]


def test_rows_in_host_memory_that_give_a_longer_context_are_told():
    def plan(ram):
        here = dataclasses.replace(planned("h200:1", ram=ram), is_here=True)
        here = dataclasses.replace(here, device=dataclasses.replace(here.device, memory_bytes=157 * GIB))
        return told(here)

    rich, bare = plan("512G"), plan(None)
    assert rich["fits"] and rich["max_context"] < rich["csa_host_context"] <= 1_048_576
    assert f"{rich['csa_host_context']:,} with CSA rows in host memory" in rich["text"]
    assert bare["fits"] and bare["csa_host_context"] == 0 and "host memory" not in bare["text"]


def test_a_gpu_that_is_too_small_is_told_the_smallest_change():
    here = dataclasses.replace(planned("h100:1", ram="32G"), is_here=True, nvme_bytes=0)
    plan = told(here)
    assert not plan["fits"] and "lacks" in plan["text"] and "it fits with" in plan["text"]


def test_a_part_that_refuses_leaves_its_reason(monkeypatch, tmp_path):
    missing = advise(["flash", str(tmp_path / "none")], Measured(0, 0), cpu("64G"))["plans"]
    assert missing[0]["fits"] and "is not planned for: " in missing[1]["text"] and missing[1]["why_not"]

    def refused(*_):
        raise PlanError("nothing is known of this device")

    monkeypatch.setattr("pyrosome.plan.planner.make_plan", refused)
    (plan,) = advise(["flash"], Measured(0, 0), cpu("64G"))["plans"]
    assert "nothing is known of this device" in plan["text"] == plan["text"]


def test_a_machine_that_is_not_in_the_table_leaves_its_reason(monkeypatch):
    def unknown(*_):
        raise RequestError("this machine's GPU is not in the table")

    monkeypatch.setattr("pyrosome.plan.hardware.machine", unknown)
    found = advise(["flash"], Measured(0, 0))
    assert (
        found["plans"] == [] and "not in the table" in found["why_not"] and found["calibration"]["state"] == "unknown"
    )


def test_a_container_s_share_is_what_is_planned_with(monkeypatch):
    monkeypatch.setattr("pyrosome.plan.hardware.machine", lambda _: cpu("512G"))
    assert advice.this_machine(Measured(64 * GIB, 0)).ram_bytes == 64 * GIB
    assert advice.this_machine(Measured(0, 0)).ram_bytes == 512 * GIB
    assert advice.this_machine(Measured(1024 * GIB, 0)).ram_bytes == 512 * GIB
    assert shutil.disk_usage is machine.shutil.disk_usage
