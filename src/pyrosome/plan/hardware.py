"""Machines: so many devices of one kind, and what the host has.  Devices themselves are `devices`."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pyrosome.errors import RequestError
from pyrosome.plan import here as this_machine
from pyrosome.plan import quantities
from pyrosome.plan.devices import Device as Device  # part of this module too
from pyrosome.plan.devices import Kind as Kind
from pyrosome.plan.devices import device as device
from pyrosome.plan.devices import devices as devices
from pyrosome.plan.devices import plain_name, sockets, vector_rates

MAX_DEVICES = 1024
NVME_READ_BYTES_S = 5e9  # a drive of PCIe 4, large reads
UNKNOWN_CORE_BYTES_S, UNKNOWN_BYTES_S = 12e9, 80e9  # what a core draws, and two channels of DDR5 bring
UNKNOWN_GHZ = 2.5

_FORMS = "a machine is written h200:2 or 2xh200 or h200, as a processor epyc-9654 with --ram, or here"
_COUNTED = (re.compile(r"(?P<name>.+?)\s*:\s*(?P<count>\S+)"), re.compile(r"(?P<count>\d+)\s*[xX×*]\s*(?P<name>.+)"))


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What a plan is made for: `count` alike devices, and what the host has."""

    device: Device
    count: int
    host: Device | None  # its processor, which may compute experts that do not fit
    ram_bytes: int  # 0: not known, so that nothing may be put there
    nvme_bytes: int
    nvme_read_bytes_s: float
    price_usd_hour: float | None = None
    is_here: bool = False  # this very machine
    assumed: tuple[str, ...] = ()  # what was not said and is taken to be so


def machine(
    gpu: str = "here",
    cpu: str | None = None,
    ram: str | int | None = None,
    nvme: str | int | None = None,
    price: str | float | None = None,
    hardware: str | Path | None = None,
) -> Machine:
    """A machine by what a user says of it.

    Args:
        gpu: "h200:2", "2xh200", "h200"; "cpu" or "none": `cpu` alone; a processor's name; "here": this machine.
        cpu: the host's processor, "2x" before it for two of them; None: one that is usual beside such devices.
        ram: the host's memory, as `quantities.memory_bytes`; None: not known (of a machine of one memory: what it has).
        nvme: room on its drive, as `quantities.drive_bytes`; None: none.
        price: dollars an hour.
        hardware: a file of devices beside those that are known.

    Raises:
        RequestError: a form or a name that is not understood; the message names the flag.
    """
    known = devices(hardware)
    if not isinstance(gpu, str) or not gpu.strip():
        raise RequestError(f"--gpu is {gpu!r}; {_FORMS}")
    given_ram = None if ram is None else quantities.memory_bytes(ram, "--ram")
    given_nvme = None if nvme is None else quantities.drive_bytes(nvme, "--nvme")
    dollars = None if price is None else quantities.dollars(price, "--price")
    named = gpu.strip().lower()
    if named == "here":
        found = _here(known)
    elif named in ("cpu", "none"):
        if cpu is None:
            raise RequestError(f"--gpu is {gpu!r} and no --cpu was given; name one, as --cpu epyc-9654, or say here")
        found = _named(cpu, None, known)
    else:
        found = _named(gpu, cpu, known)
    if named == "here" and cpu is not None:
        raise RequestError(f"--cpu is {cpu!r} and --gpu is here, whose processor is known; leave one of them out")
    return _with(found, given_ram, given_nvme, dollars)


def _with(found: Machine, ram: int | None, nvme: int | None, dollars: float | None) -> Machine:
    """The machine with what was said of its memory, drive and price."""
    device, assumed = found.device, list(found.assumed)
    if device.kind == "unified" and ram is not None:
        lent = device.memory_bytes / (device.vendor_gb * 2**30)  # the share of it that the GPU gets
        device = dataclasses.replace(device, memory_bytes=int(ram * lent), vendor_gb=ram / 2**30)
        ram = 0  # it is the device's
    if device.kind == "cpu" and not (ram or found.ram_bytes):
        raise RequestError(f"--gpu is a processor ({device.name}) and no --ram was given; say how much, as --ram 512G")
    if nvme is not None:
        assumed = [a for a in assumed if "drive" not in a]
        assumed.append(f"a drive that is read at {NVME_READ_BYTES_S / 1e9:g} GB/s")
    return dataclasses.replace(
        found,
        device=device,
        host=device if found.host is found.device else found.host,
        ram_bytes=found.ram_bytes if ram is None else ram,
        nvme_bytes=found.nvme_bytes if nvme is None else nvme,
        nvme_read_bytes_s=found.nvme_read_bytes_s if nvme is None else NVME_READ_BYTES_S,
        price_usd_hour=dollars,
        assumed=tuple(assumed),
    )


def _named(gpu: str, cpu: str | None, known: Mapping[str, Device]) -> Machine:
    name, count = _counted(gpu, "--gpu")
    found = device(name, known)
    if found.kind == "cpu":
        if cpu is not None:
            raise RequestError(f"--gpu is {gpu!r}, a processor, and --cpu is {cpu!r}; give one of them")
        both = sockets(found, count)
        return Machine(both, 1, both, 0, 0, 0.0)
    if cpu is not None:
        processor, num = _counted(cpu, "--cpu")
        host = device(processor, known)
        if host.kind != "cpu":
            raise RequestError(f"--cpu is {cpu!r}, which is no processor but {host.title}; name one, as epyc-9654")
        return Machine(found, count, sockets(host, num), 0, 0, 0.0)
    if not found.host:
        return Machine(found, count, None, 0, 0, 0.0)
    host = device(found.host, known)
    return Machine(found, count, host, 0, 0, 0.0, assumed=(f"a host with {host.title}, usual beside {found.title}",))


def _counted(text: str, flag: str) -> tuple[str, int]:
    """Name and number of "h200:2" or "2xh200"; 1 where there is none."""
    for form in _COUNTED:
        if match := form.fullmatch(text.strip()):
            num = quantities.count(match["count"], f"{flag} {text!r}: the number")
            if num > MAX_DEVICES:
                raise RequestError(f"{flag} is {text!r}; up to {MAX_DEVICES:,} devices can be planned for")
            return match["name"], num
    if ":" in text:
        raise RequestError(f"{flag} is {text!r}; {_FORMS}")
    return text.strip(), 1


def _here(known: Mapping[str, Device]) -> Machine:
    found = this_machine.look()
    if apple := [d for d in known.values() if d.kind == "unified" and _called(d, found.cpu)]:
        return _mac_here(found, apple)
    host, assumed = _processor_here(found, known)
    disk = f"a drive with {found.disk_bytes / 1e9:,.0f} GB free that is read at {NVME_READ_BYTES_S / 1e9:g} GB/s"
    if not found.gpus:
        return Machine(
            host, 1, host, found.ram_bytes, found.disk_bytes, NVME_READ_BYTES_S, is_here=True, assumed=(*assumed, disk)
        )
    kinds = Counter(found.gpus)
    gpu, count = max(kinds.items(), key=lambda item: (item[1] * item[0].memory_bytes, item[0].name))
    if len(kinds) > 1:
        assumed = (*assumed, f"of {len(found.gpus)} GPUs the {count} alike ones of most memory, {gpu.name}")
    try:
        listed = device(gpu.name, known)
    except RequestError as error:
        raise RequestError(f"this machine's GPU is not in the table: {error}") from None
    if listed.kind == "unified":  # whose memory the driver does not tell
        return Machine(listed, count, None, 0, found.disk_bytes, NVME_READ_BYTES_S, is_here=True, assumed=(disk,))
    reported = dataclasses.replace(listed, memory_bytes=gpu.memory_bytes, capability=gpu.capability)
    return Machine(
        reported, count, host, found.ram_bytes, found.disk_bytes, NVME_READ_BYTES_S, is_here=True,
        assumed=(*assumed, disk),
    )  # fmt: skip


def _mac_here(found: this_machine.Here, sizes: list[Device]) -> Machine:
    """A Mac: the entry of its size, or the nearest one with the memory there is."""
    nearest = min(sizes, key=lambda d: abs(d.vendor_gb * 2**30 - found.ram_bytes))
    there = Machine(nearest, 1, None, 0, found.disk_bytes, NVME_READ_BYTES_S, is_here=True)
    return _with(there, found.ram_bytes or None, None, None)


def _processor_here(found: this_machine.Here, known: Mapping[str, Device]) -> tuple[Device, tuple[str, ...]]:
    """This machine's processor with the cores this process may use, and what is assumed of it."""
    named = [d for d in known.values() if d.kind == "cpu" and _called(d, found.cpu)]
    listed = max(named, key=lambda d: len(d.name), default=None)
    drawn, brought = found.cores * UNKNOWN_CORE_BYTES_S, listed.read_bytes_s if listed else UNKNOWN_BYTES_S
    read = min(drawn, brought)
    kind = this_machine.vectors(found.flags, found.cpu)
    per_cycle, how = vector_rates(kind)
    ghz = found.ghz or UNKNOWN_GHZ
    title = f"{found.cpu or found.architecture}, {found.cores} core{'s' * (found.cores != 1)}"
    by = f"{UNKNOWN_CORE_BYTES_S / 1e9:g} GB/s a core" if drawn <= brought else "two channels of DDR5"
    if listed and drawn > brought:
        by = f"as {listed.title} has"
    assumed = (f"memory is read at {read / 1e9:,.0f} GB/s, {by}; `pyrosome calibrate` measures it",)
    cpu = Device(
        name=listed.name if listed else "here",
        title=title,
        kind="cpu",
        memory_bytes=0,
        read_bytes_s=read,
        flops={k: v * found.cores * ghz * 1e9 for k, v in per_cycle.items()},
        peer_bytes_s=0.0,
        host_bytes_s=0.0,
        vendor_gb=0.0,
        capability="",
        source=f"this machine: {found.cores} cores x {ghz:.2f} GHz x {how}; {assumed[0]}",
    )
    return cpu, assumed


def _called(listed: Device, model: str) -> bool:
    """Whether the system's name for a processor holds one of the table's names for it, whole words alone."""
    words = re.sub(r"[^a-z0-9+]+", " ", re.sub(r"\(r\)|\(tm\)", " ", model.lower())).split()
    runs = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    names = (re.sub(r"-\d+$", "", listed.name) if listed.kind == "unified" else listed.name, *listed.aliases)
    return any(plain_name(n) in {plain_name(r) for r in runs} for n in names if len(n) > 2)
