"""The table of devices is sane entry by entry, and machines are read from what people write."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from pyrosome.errors import RequestError
from pyrosome.plan import hardware
from pyrosome.plan import here as this_machine
from pyrosome.plan.devices import FLOPS
from pyrosome.plan.hardware import Device, device, devices, machine

TABLE = devices()
GPUS = [d for d in TABLE.values() if d.kind == "gpu"]
CPUS = [d for d in TABLE.values() if d.kind == "cpu"]
UNIFIED = [d for d in TABLE.values() if d.kind == "unified"]


def refusal(*args, **values) -> str:
    with pytest.raises(RequestError) as caught:
        machine(*args, **values)
    return str(caught.value)


def named(entries: list[Device]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("d", entries, ids=lambda d: d.name)


@named(list(TABLE.values()))
def test_every_device_has_a_source_and_positive_figures(d):
    assert d.title and len(d.source) > 15
    assert d.flops["f32"] > 0 and set(d.flops) <= set(FLOPS)
    assert all(math.isfinite(v) and v > 0 for v in (d.read_bytes_s, *d.flops.values()))


@named(GPUS)
def test_a_driver_reports_what_the_name_says_less_what_it_keeps(d):
    assert 0.9 <= d.memory_bytes / (d.vendor_gb * 2**30) <= 1.0
    assert 280e9 < d.read_bytes_s <= 8e12
    assert 5 < d.read_bytes_s / d.memory_bytes < 75  # a memory is read through 5 to 75 times a second


@named(UNIFIED)
def test_of_a_shared_memory_the_gpu_gets_most(d):
    assert 0.65 <= d.memory_bytes / (d.vendor_gb * 2**30) <= 1.0
    assert d.host_bytes_s == 0


@named(GPUS + UNIFIED)
def test_peaks_are_dense_each_half_as_wide_type_twice_as_fast(d):
    f = d.flops
    assert f.get("bf16", f["fp16"]) == f["fp16"]
    if "fp8" in f:
        assert f["fp8"] == pytest.approx(2 * f["bf16"], rel=0.02)
    if "fp4" in f:
        assert f["fp4"] / f["fp8"] == pytest.approx(2, rel=0.01) or d.name in ("b300", "gb300") or "rtx" in d.name
    assert "fp4" not in f or not d.capability or d.capability >= "1"  # no card before Blackwell has it
    assert f["f32"] < f["fp16"] or d.title.startswith("Apple")


@named(GPUS)
def test_links_are_those_of_one_direction(d):
    assert 7 <= d.host_bytes_s / 1e9 <= 450
    assert 7 <= d.peer_bytes_s / 1e9 <= 900
    assert d.peer_bytes_s >= d.host_bytes_s or d.name.startswith("mi")


@named([d for d in TABLE.values() if d.host])
def test_the_usual_host_is_a_processor_of_the_table(d):
    assert TABLE[d.host].kind == "cpu"


@named(CPUS)
def test_a_processor_has_no_memory_of_its_own_and_rates_within_reason(d):
    assert d.memory_bytes == d.peer_bytes_s == d.vendor_gb == 0
    assert 50e9 < d.read_bytes_s < 900e9
    assert 0.5e12 < d.flops["f32"] < 50e12


@pytest.mark.parametrize(
    ("name", "mib", "gb_s", "bf16", "fp8"),
    [
        ("h200", 143_771, 4800, 989.5, 1979), ("h100", 81_559, 3350, 989.5, 1979), ("a100", 81_920, 2039, 312, None),
        ("b200", 183_359, 7700, 2250, 4500), ("rtx-4090", 24_564, 1008, 165.2, 330.3),
        ("l40s", 46_068, 864, 362.05, 733),
        ("rtx-5090", 32_607, 1792, 209.5, 419), ("mi300x", 196_592, 5300, 1307.4, 2614.9),
    ],
)  # fmt: skip
def test_figures_of_the_best_known(name, mib, gb_s, bf16, fp8):
    d = device(name)
    assert (d.memory_bytes, d.read_bytes_s) == (mib << 20, gb_s * 1e9)
    assert (d.flops["bf16"] / 1e12, d.flops.get("fp8", 0) / 1e12) == pytest.approx((bf16, fp8 or 0))


def test_a_processor_s_rates_are_counted():
    d = device("epyc-9654")
    assert d.read_bytes_s == 12 * 4800e6 * 8
    assert d.flops == pytest.approx({"f32": 96 * 3.55e9 * 32, "bf16": 96 * 3.55e9 * 64, "int8": 96 * 3.55e9 * 128})
    assert "12 channels x 4,800 MT/s" in d.source and "96 cores x 3.55 GHz" in d.source


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("H200", "h200"), ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("rtx 5090", "rtx-5090"), ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"), ("NVIDIA GB10", "gb10"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"), ("NVIDIA H100 NVL", "h100-nvl"),
        ("AMD Instinct MI300X", "mi300x"), ("m3-ultra", "m3-ultra-512"), ("teslaa100", "a100"), ("9B14", "epyc-9b14"),
        ("NVIDIA B300 SXM6 AC", "b300"), ("NVIDIA H200 NVL", "h200-nvl"), ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10"),
        ("Tesla V100-SXM2-32GB", "v100"), ("NVIDIA GH200 480GB", "gh200"), ("NVIDIA RTX A6000", "rtx-a6000"),
    ],
)  # fmt: skip
def test_a_device_answers_to_its_driver_s_name(asked, name):
    assert device(asked).name == name


def test_no_two_devices_answer_to_one_name():
    from pyrosome.plan.devices import plain_name

    owners: dict[str, set[str]] = {}
    for d in TABLE.values():
        for n in {d.name, *d.aliases}:
            owners.setdefault(plain_name(n), set()).add(d.name)
    assert {n: o for n, o in owners.items() if len(o) > 1} == {}


@pytest.mark.parametrize("asked", ["h2000", "rtx-409", "x" * 500, "", "  ", None, 7, "é"])
def test_an_unknown_device_is_refused_with_the_nearest_names(asked):
    with pytest.raises(RequestError) as caught:
        device(asked)
    assert len(str(caught.value)) < 300
    if asked == "h2000":
        assert re.search(r"nearest are .*h200\b", str(caught.value))


@pytest.mark.parametrize("asked", ["h200:2", "2xh200", "2 x H200", "NVIDIA H200 : 2", "2×h200"])
def test_a_number_of_devices_is_written_before_or_after(asked):
    found = machine(asked)
    assert (found.device.name, found.count) == ("h200", 2)


def test_of_a_host_nothing_is_invented():
    bare = machine("h200:2")
    assert (bare.ram_bytes, bare.nvme_bytes, bare.price_usd_hour) == (0, 0, None)
    assert bare.host is not None and any("Xeon Platinum 8480+" in a for a in bare.assumed)
    said = machine("h200:2", cpu="2xepyc-9b14", ram="512G", nvme="2T", price="9.42")
    assert (said.ram_bytes, said.nvme_bytes, said.price_usd_hour) == (512 << 30, 2 * 10**12, 9.42)
    assert said.host is not None and said.host.read_bytes_s == 2 * device("epyc-9b14").read_bytes_s
    assert not any("Xeon" in a for a in said.assumed) and any("5 GB/s" in a for a in said.assumed)


@pytest.mark.parametrize("asked", [{"gpu": "cpu", "cpu": "9v45"}, {"gpu": "none", "cpu": "9v45"}, {"gpu": "9v45"}])
def test_a_processor_alone_is_a_machine(asked):
    found = machine(**asked, ram="768G")
    assert found.device is found.host and found.device.kind == "cpu"
    assert (found.count, found.ram_bytes) == (1, 768 << 30)
    assert machine("2x9v45", ram="1T").device.flops["f32"] == 2 * found.device.flops["f32"]


def test_of_one_memory_the_ram_is_the_device_s():
    assert machine("m3-ultra").device.memory_bytes == 475_136 << 20
    small = machine("m3-ultra", ram="256G")
    assert small.ram_bytes == 0 and small.device.vendor_gb == 256
    assert small.device.memory_bytes == 237_568 << 20


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gpu": "h200:0"}, "from 1 to"),
        ({"gpu": "h200:-1"}, "a whole number is expected"),
        ({"gpu": "h200:1.5"}, "not whole"),
        ({"gpu": "h200:"}, "a machine is written h200:2"),
        ({"gpu": "h200:nan"}, "a whole number"),
        ({"gpu": "h200:100000"}, "up to 1,024"),
        ({"gpu": "0xh200"}, "from 1 to"),
        ({"gpu": ""}, "a machine is written h200:2"),
        ({"gpu": None}, "a machine is written h200:2"),
        ({"gpu": "gtx-9999:2"}, "no device is called 'gtx-9999'"),
        ({"gpu": "cpu"}, "no --cpu was given"),
        ({"gpu": "epyc-9654"}, "no --ram was given"),
        ({"gpu": "epyc-9654", "cpu": "9b14"}, "give one of them"),
        ({"gpu": "h200", "cpu": "h100"}, "which is no processor"),
        ({"gpu": "here", "cpu": "9b14"}, "leave one of them out"),
        ({"gpu": "h200", "ram": "-1G"}, "--ram is '-1G'"),
        ({"gpu": "h200", "nvme": "two"}, "--nvme is 'two'"),
        ({"gpu": "h200", "price": "nan"}, "--price is 'nan'"),
    ],
)
def test_nonsense_is_refused_with_the_flag(asked, said):
    assert said in refusal(**asked)


ENTRY = """
[[gpu]]
name = "mine"
title = "My own card"
memory = { gb = 40, mib = 40000, gb_s = 1000, from = "its driver" }
tflops = { bf16 = 100, fp16 = 100, f32 = 10 }
links = { peer = 30, host = 30 }
source = "measured by its owner"
"""


def test_a_user_s_file_joins_and_replaces_what_is_known(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(ENTRY + ENTRY.replace('"mine"', '"h200"'))
    assert machine("mine:3", hardware=file).device.memory_bytes == 40_000 << 20
    assert machine("h200", hardware=file).device.title == "My own card"
    assert machine("h100", hardware=file).device is device("h100")
    assert device("h200").title == "H200 SXM 141 GB"
    file.write_text(
        '[[cpu]]\nname="own"\ntitle="Own"\ncores=8\nghz=3.0\nchannels=2\nmt_s=6000\nvectors="zen4"\nsource="x"\n'
    )
    assert machine("own", ram="64G", hardware=file).device.read_bytes_s == 96e9


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("gb_s = 1000", "gb_s = -1", "mine.memory.gb_s is -1"),
        ("gb_s = 1000", "gb_s = nan", "mine.memory.gb_s is nan"),
        ("gb_s = 1000", "gb_s = true", "mine.memory.gb_s is True"),
        ("mib = 40000", "mib = 40000.5", "a whole number above 0"),
        ("mib = 40000", "mib = [1, 2]", "1 of gb and 2 of mib"),
        ("mib = 40000, ", "", "lacks 'mib'"),
        ("f32 = 10", "fp8 = 10", "lacks 'f32'"),
        ("f32 = 10", "f32 = 10, int2 = 4", "tflops has 'int2'"),
        ('title = "My own card"\n', "", "lacks title"),
        ('title = "My own card"', "title = 7", "title is 7; a text is expected"),
        ('source = "measured by its owner"', 'source = ""', "source is ''; a text is expected"),
        ("[[gpu]]", "[gpu]", "each entry begins with [[gpu]]"),
        ("[[gpu]]", "[[npu]]", "has 'npu'"),
        ("title", "colour = 1\ntitle", "has 'colour'"),
        ("links = { peer = 30, host = 30 }", "links = 30", "links is 30; a table is expected"),
        ('name = "mine"', 'name = "mine', "is not TOML"),
        ("title", "aliases = [1]\ntitle", "a list of names is expected"),
        ("[[gpu]]", ENTRY + "[[gpu]]", "is there twice"),
        ("gb_s = 1000", f"gb_s = {'9' * 400}", "a number above 0"),
        ("gb_s = 1000", f"gb_s = {'9' * 5000}", "is not TOML"),
        ("gb = 40, mib = 40000", 'gb = ["a", "b"], mib = [1, 2]', "mine.memory.gb is 'a'"),
        ('name = "mine"', 'name = "---"', "letters and digits"),
        ('name = "mine"', 'name = "mine:2"', "letters and digits"),
        (ENTRY, "gpu = [1]", "has gpu 1; each entry begins with [[gpu]]"),
        (ENTRY, "vectors = 5", "a table [vectors]"),
        (ENTRY, "[vectors]\nown = 5", "vectors.own is 5"),
        (ENTRY, '[vectors]\nown = { f32 = 2 }', "vectors.own is {'f32': 2}"),
        (ENTRY, '[vectors]\nown = { how = "x", f32 = -2 }', "vectors.own.f32 is -2"),
        (ENTRY, '[vectors]\nown = { how = "x", f32 = 2, int2 = 4 }', "vectors.own has 'int2'"),
    ],
)  # fmt: skip
def test_a_user_s_file_of_another_form_is_refused_with_the_field(tmp_path, old, new, said):
    file = tmp_path / "mine.toml"
    file.write_text(ENTRY.replace(old, new))
    with pytest.raises(RequestError) as caught:
        devices(file)
    assert said in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    for name in ("a.toml", "b.toml", "a\0b"):
        with pytest.raises(RequestError, match="cannot be read"):
            devices(tmp_path / name)


HERE = this_machine.Here(
    gpus=(), cpu="AMD EPYC 9B14 96-Core Processor", architecture="x86_64", cores=8, ghz=2.6,
    flags=frozenset({"avx2", "avx512_vnni", "avx512_bf16"}), ram_bytes=64 << 30, disk_bytes=10**12,
)  # fmt: skip


def stand_in(monkeypatch: pytest.MonkeyPatch, **values) -> None:
    monkeypatch.setattr(this_machine, "look", lambda: dataclasses.replace(HERE, **values))


def test_here_is_this_machine_with_the_cores_it_may_use(monkeypatch):
    stand_in(monkeypatch)
    found = machine()
    assert found.is_here and found.device is found.host
    assert found.device.name == "epyc-9b14" and "8 cores" in found.device.title
    assert found.device.flops["bf16"] == 8 * 2.6e9 * 64
    assert found.device.read_bytes_s == 8 * hardware.UNKNOWN_CORE_BYTES_S
    assert (found.ram_bytes, found.nvme_bytes) == (64 << 30, 10**12)
    stand_in(monkeypatch, cores=96)
    assert machine().device.read_bytes_s == device("9b14").read_bytes_s
    assert machine(ram="32G", nvme="500G").ram_bytes == 32 << 30


def test_here_with_gpus_takes_what_their_driver_reports(monkeypatch):
    h100 = this_machine.FoundGpu("NVIDIA H100 80GB HBM3", 81_000 << 20, "9.0")
    small = this_machine.FoundGpu("NVIDIA L4", 23_034 << 20, "8.9")
    stand_in(monkeypatch, gpus=(small, h100, h100))
    found = machine()
    assert (found.device.name, found.count, found.device.memory_bytes) == ("h100", 2, 81_000 << 20)
    assert found.host is not None and found.host.kind == "cpu"
    assert any("of 3 GPUs the 2 alike ones" in a for a in found.assumed)
    stand_in(monkeypatch, gpus=(h100, *[small] * 4))  # 81,000 MiB, and 92,136 MiB together
    assert (machine().device.name, machine().count) == ("l4", 4)
    stand_in(monkeypatch, gpus=(this_machine.FoundGpu("NVIDIA GB10", 0, "12.1"),))
    assert (machine().device, machine().ram_bytes) == (device("gb10"), 0)
    stand_in(monkeypatch, gpus=(dataclasses.replace(h100, name="NVIDIA X1"),))
    assert "this machine's GPU is not in the table" in refusal()


def test_here_on_a_mac_is_the_entry_of_its_memory(monkeypatch):
    stand_in(monkeypatch, cpu="Apple M3 Ultra", ram_bytes=256 << 30, flags=frozenset(), ghz=0.0)
    found = machine()
    assert (found.device.name, found.is_here, found.ram_bytes) == ("m3-ultra-256", True, 0)


def test_an_unknown_processor_is_said_to_be_assumed(monkeypatch):
    stand_in(monkeypatch, cpu="Unheard Of 9000", cores=16, flags=frozenset(), ghz=0.0)
    found = machine()
    assert found.device.name == "here" and found.device.read_bytes_s == hardware.UNKNOWN_BYTES_S
    assert any("two channels of DDR5" in a and "calibrate" in a for a in found.assumed)


@pytest.mark.parametrize(
    ("flags", "model", "kind"),
    [
        ("avx2 avx512_vnni avx512_bf16 amx_bf16", "Intel Xeon", "amx"),
        ("avx2 avx512_vnni avx512_bf16", "AMD EPYC", "zen4"),
        ("avx2 avx512_vnni avx512_bf16 avx_vnni", "AMD EPYC", "zen5"), ("avx2 avx512_vnni", "Intel", "avx512"),
        ("avx2 avx_vnni", "Intel Core", "avx_vnni"), ("avx2", "AMD", "avx2"), ("asimd i8mm bf16", "", "neoverse_v2"),
        ("asimd", "", "neon"), ("", "", "narrow"),
    ],
)  # fmt: skip
def test_instructions_name_the_kind_of_units(flags, model, kind):
    assert this_machine.vectors(frozenset(flags.split()), model) == kind


def test_what_the_driver_s_tool_prints_is_read_line_by_line(monkeypatch):
    told = (
        "NVIDIA H100 80GB HBM3, 81559, 9.0\nNVIDIA H200, 143771, 9.0\nNVIDIA GB10, [N/A], 12.1\n"
        "No devices were found\n[N/A], [N/A], [N/A]\n"
    )
    monkeypatch.setattr(this_machine, "_run", lambda *command: told if command[0] == "nvidia-smi" else "")
    assert [(g.name, g.memory_bytes >> 20, g.capability) for g in this_machine.look().gpus] == [
        ("NVIDIA H100 80GB HBM3", 81_559, "9.0"),
        ("NVIDIA H200", 143_771, "9.0"),
        ("NVIDIA GB10", 0, "12.1"),
    ]


def test_a_tool_that_is_not_there_or_fails_tells_nothing(monkeypatch):
    assert this_machine._run("no-such-tool-anywhere") == this_machine._run("false") == ""
    monkeypatch.setattr(this_machine, "TOOL_SECONDS", 0.05)
    assert this_machine._run("sleep", "5") == ""


def test_two_threads_of_a_core_are_one_core(monkeypatch, tmp_path):
    monkeypatch.setattr(this_machine, "_ROOT", tmp_path)
    monkeypatch.setattr(this_machine.os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    info = "model name\t: AMD EPYC 9B14\ncpu MHz\t\t: 2600.000\nsiblings\t: {}\ncpu cores\t: 8\nflags\t\t: avx2 fma\n"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       65536000 kB\n")
    (tmp_path / "proc/cpuinfo").write_text(info.format(16))
    found = this_machine.look()
    assert (found.cores, found.ghz, found.cpu, found.flags) == (6, 2.6, "AMD EPYC 9B14", {"avx2", "fma"})
    assert found.ram_bytes == 65_536_000 * 1024
    (tmp_path / "proc/cpuinfo").write_text(info.format(8))
    assert this_machine.look().cores == 12
    (tmp_path / "proc/cpuinfo").unlink()
    assert (this_machine.look().cores, this_machine.look().cpu, this_machine.look().ghz) == (12, "", 0.0)


@pytest.mark.parametrize("group", ["", "a.slice/b.scope"])
def test_a_container_s_limits_are_the_machine_s(monkeypatch, tmp_path, group):
    monkeypatch.setattr(this_machine, "_ROOT", tmp_path)
    monkeypatch.setattr(this_machine.os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    own = tmp_path / "sys/fs/cgroup" / group
    own.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       65536000 kB\n")
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_text(f"0::/{group}\n")
    (own / "memory.max").write_text("1048576\n")
    (own / "cpu.max").write_text("350000 100000\n")
    small = this_machine.look()
    assert (small.ram_bytes, small.cores) == (1 << 20, 3)
    (own / "memory.max").write_text("max\n")
    (own / "cpu.max").write_text("max 100000\n")
    whole = this_machine.look()
    assert (whole.ram_bytes, whole.cores) == (65_536_000 * 1024, 12)


def test_this_very_machine_can_be_planned_for():
    found = machine()
    assert found.is_here and found.device.flops["f32"] > 0 and found.device.read_bytes_s > 0
