"""What is read of a machine: files of systems that are not this one, tools that say anything, and nothing at all."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys

import pytest

from pyrosome.cli import accelerators, machine, own_folders

KB, GIB = 1024, 1 << 30
MEMINFO = """MemTotal:       {total} kB
MemFree:         1000000 kB
MemAvailable:   {available} kB
SwapTotal:       8388608 kB
SwapFree:        2097152 kB
"""


def system(root, **files):
    """A machine's files: names with __ for / and ___ for a dot."""
    for name, content in files.items():
        path = root / name.replace("___", ".").replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_a_machine_that_tells_nothing_is_described_without_what_it_does_not_tell(tmp_path):
    cpu, memory = machine.cpu(tmp_path), machine.memory(tmp_path)
    assert cpu["model"] and cpu["cores"] >= 1 and cpu["usable_cores"] >= 1
    assert (cpu["flags"], cpu["sockets"], cpu["nodes"], cpu["quota"], cpu["load"]) == (None,) * 5
    assert (memory["available"], memory["limit"], memory["swap"], memory["huge_pages"]) == (0, 0, 0, "")
    assert memory["total"] > 0  # from the C library
    assert machine.memory_here(memory) == memory["total"] and machine.memory_free(memory) == 0
    assert accelerators.links(tmp_path) == [] and machine.lacking_flags("portable", tmp_path) == []


def test_a_server_of_two_sockets_is_counted(tmp_path):
    system(
        tmp_path,
        proc__cpuinfo="".join(f"model name\t: Big\nphysical id\t: {i % 2}\nflags\t: avx2 fma f16c\n" for i in range(8)),
        proc__loadavg="12.50 3.00 1.00 2/900 4711\n",
        sys__devices__system__node__node0__cpulist="0-3",
        sys__devices__system__node__node1__cpulist="4-7",
        sys__devices__system__node__possible="0-1",
    )
    cpu = machine.cpu(tmp_path)
    assert (cpu["model"], cpu["sockets"], cpu["nodes"], cpu["load"]) == ("Big", 2, 2, 12.5)
    assert machine.lacking_flags("avx2", tmp_path) == []
    assert "avx512_bf16" in machine.lacking_flags("avx512", tmp_path) and "fma" not in machine.lacking_flags(
        "avx512", tmp_path
    )


def test_memory_swap_and_huge_pages_are_read(tmp_path):
    system(
        tmp_path,
        proc__meminfo=MEMINFO.format(total=64 << 20, available=32 << 20),
        sys__kernel__mm__transparent_hugepage__enabled="always madvise [never]\n",
    )
    memory = machine.memory(tmp_path)
    assert (memory["total"], memory["available"]) == (64 * GIB, 32 * GIB)
    assert (memory["swap"], memory["swap_used"], memory["huge_pages"]) == (8 * GIB, 6 * GIB, "never")


CONTAINERS = {
    "of version 2, in a namespace": (
        "0::/\n",
        {"": {"cpu.max": "150000 100000\n", "memory.max": f"{8 * GIB}\n", "memory.current": f"{5 * GIB}\n",
              "memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file {GIB}\n"}},
    ),
    "of version 2, below a tighter one": (
        "0::/a/b\n",
        {"a": {"cpu.max": "150000 100000\n", "memory.max": f"{8 * GIB}\n", "memory.current": f"{5 * GIB}\n",
               "memory.stat": f"inactive_file {2 * GIB}\n"},
         "a/b": {"cpu.max": "max 100000\n", "memory.max": "max\n", "memory.current": "1\n"}},
    ),
    "of version 1": (
        "9:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
        {"cpu/x": {"cpu.cfs_quota_us": "150000\n", "cpu.cfs_period_us": "100000\n"},
         "memory/x": {"memory.limit_in_bytes": f"{8 * GIB}\n", "memory.usage_in_bytes": f"{5 * GIB}\n",
                      "memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n"},
         "memory": {"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": "1\n"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("sort", CONTAINERS)
def test_a_container_s_share_is_read(tmp_path, sort):
    groups, folders = CONTAINERS[sort]
    system(tmp_path, proc__meminfo=MEMINFO.format(total=64 << 20, available=32 << 20), proc__self__cgroup=groups)
    for folder, files in folders.items():
        place = tmp_path / "sys/fs/cgroup" / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (place / name).write_text(content)
    cpu, memory = machine.cpu(tmp_path), machine.memory(tmp_path)
    assert cpu["quota"] == 1.5 and machine.allowed_cores(cpu | {"usable_cores": 8}) == 2
    assert (memory["limit"], memory["limit_used"]) == (8 * GIB, 3 * GIB)  # files that were read are given up
    assert machine.memory_here(memory) == 8 * GIB and machine.memory_free(memory) == 5 * GIB


def test_a_container_without_limits_has_none(tmp_path):
    system(tmp_path, proc__meminfo=MEMINFO.format(total=64 << 20, available=32 << 20))
    place = tmp_path / "sys/fs/cgroup"
    place.mkdir(parents=True)
    for name, content in {"cpu.max": "max 100000", "memory.max": "max", "memory.current": "5"}.items():
        (place / name).write_text(content)
    memory = machine.memory(tmp_path)
    assert machine.cpu(tmp_path)["quota"] is None and memory["limit"] == 0
    assert machine.memory_free(memory) == 32 * GIB


def test_a_quota_of_no_time_or_nonsense_is_none(tmp_path):
    place = tmp_path / "sys/fs/cgroup"
    place.mkdir(parents=True)
    for content in ("0 100000", "100000 0", "-1 100000", "1e5 1e5", "many"):
        (place / "cpu.max").write_text(content)
        assert machine.cpu(tmp_path)["quota"] is None, content


SMI = (
    "NVIDIA H100 80GB HBM3, 535.104.05, 81559, 81000, 9.0, 00000000:81:00.0\n"
    "NVIDIA GB10, 535.104.05, [N/A], [N/A], 12.1, 0000000F:01:00.0\n"
    "a line that nobody expects\n"
)


def test_what_the_driver_says_of_its_gpus_is_read():
    asked = []
    told = accelerators.driver(lambda *command: asked.append(command) or SMI)
    assert told["version"] == "535.104.05" and asked[0][0] == "nvidia-smi"
    h100, gb10 = told["gpus"]
    assert h100 == {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "bus": "0000:81:00.0",
                    "memory": 81559 << 20, "memory_free": 81000 << 20}  # fmt: skip
    assert (gb10["memory"], gb10["memory_free"], gb10["bus"]) == (0, 0, "000f:01:00.0")
    assert accelerators.driver(lambda *_: "") == {"version": "", "gpus": []}


def test_a_tool_that_is_not_there_fails_or_hangs_says_nothing(monkeypatch):
    assert accelerators.run_tool("no-such-tool-anywhere") == ""
    assert accelerators.run_tool(sys.executable, "-c", "print('half'); raise SystemExit(9)") == ""
    monkeypatch.setattr(accelerators, "TOOL_SECONDS", 0.1)
    assert accelerators.run_tool(sys.executable, "-c", "import time; time.sleep(30)") == ""
    assert accelerators.run_tool("echo", "there") == "there\n" or platform.system() == "Windows"


def test_links_of_gpus_are_read_and_those_of_other_devices_are_not(tmp_path):
    def device(bus, vendor, kind, lanes, most, speed="16.0 GT/s PCIe"):
        folder = tmp_path / "sys/bus/pci/devices" / bus
        folder.mkdir(parents=True)
        for name, content in {"vendor": vendor, "class": kind, "current_link_width": lanes, "max_link_width": most,
                              "current_link_speed": speed, "max_link_speed": "32.0 GT/s PCIe"}.items():  # fmt: skip
            (folder / name).write_text(content + "\n")

    device("0000:81:00.0", "0x10de", "0x030200", "8", "16")
    device("0000:82:00.0", "0x1002", "0x030000", "16", "16", "Unknown")
    device("0000:83:00.0", "0x10de", "0x040300", "8", "16")  # its sound
    device("0000:84:00.0", "0x8086", "0x030000", "1", "1")
    device("0000:85:00.0", "0x10de", "0x030200", "255", "255")  # not told
    narrow, other = accelerators.links(tmp_path)
    assert narrow == {"bus": "0000:81:00.0", "vendor": "NVIDIA", "lanes": 8, "max_lanes": 16, "generation": 4,
                      "max_generation": 5}  # fmt: skip
    assert (other["vendor"], other["generation"]) == ("AMD", None)


@pytest.mark.parametrize(
    ("driver", "cuda", "least"),
    [
        ("535.104.05", "13.0", 580), ("580.65.06", "13.0", 0), ("535.104.05", "12.9", 0), ("470.57.02", "12.1", 525),
        ("", "12.1", 0), ("535.1", "", 0), ("535.1", "99.0", 0), ("N/A", "12.1", 0),
    ],
)  # fmt: skip
def test_a_driver_older_than_what_torch_was_built_for_is_too_old(driver, cuda, least):
    assert accelerators.too_old(driver, cuda) == least


def test_what_an_extra_lacks_is_told(monkeypatch):
    needed = ["torch>=2", 'fastapi>=0.1; extra == "serve"', "no-such-thing[binary]>=3 ; extra == 'bench'",
              'other; extra == "dev"']  # fmt: skip
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda _: needed)
    assert machine.extras() == {"serve": [], "train": [], "bench": ["no-such-thing"]}

    def not_installed(_):
        raise machine.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(machine.importlib.metadata, "requires", not_installed)
    assert machine.extras() == {}


def test_limits_are_told_or_none(monkeypatch):
    found = machine.limits()
    assert set(found) == {"open_files", "locked_bytes"} and (found["open_files"] or 1) > 0
    monkeypatch.setitem(sys.modules, "resource", None)  # a system without it
    assert machine.limits() == {"open_files": None, "locked_bytes": None}


def test_a_folder_that_is_not_there_yet_is_judged_by_what_it_would_be_in(tmp_path):
    found = own_folders.state_of(tmp_path / "a" / "b", is_private=True)
    assert found["free"] > 0 and not found["is_there"] and not found["why_not"] and not found["open_to"]
    assert not (tmp_path / "a").exists()


def test_a_file_in_a_folder_s_place_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    found = own_folders.state_of(tmp_path / "file" / "pyrosome", is_private=True)
    assert "is a file, where a folder is needed" in found["why_not"]


def test_a_folder_of_another_user_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"{tmp_path} cannot be written" in own_folders.state_of(tmp_path / "new", is_private=True)["why_not"]


@pytest.mark.parametrize(("mode", "open_to"), [(0o700, ""), (0o750, "its group"), (0o705, "everybody")])
def test_a_private_folder_that_others_may_look_into_is_told(tmp_path, mode, open_to):
    tmp_path.chmod(mode)
    assert own_folders.state_of(tmp_path, is_private=True)["open_to"] == open_to
    assert own_folders.state_of(tmp_path, is_private=False)["open_to"] == ""
    tmp_path.chmod(stat.S_IRWXU)


def test_a_user_without_a_home_has_no_folders_and_no_traceback(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    for name in ("XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    found = own_folders.own_folders()
    assert set(found) == {"state", "models", "kernels"}
    assert all("set HOME" in f["why_not"] and f["path"] == "" for f in found.values())


def test_nothing_of_this_needs_torch():
    code = (
        "import sys; from pyrosome.cli.doctor import basics, expected_native, short; "
        "basics(); expected_native(); short(); raise SystemExit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
