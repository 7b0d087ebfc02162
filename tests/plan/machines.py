"""Machines of round and of published sizes, and a speed that no device has."""

from __future__ import annotations

from pyrosome.plan.hardware import Device, Machine
from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.plan import Asked, Band, Speed

MIB, GIB = 1 << 20, 1 << 30
H200, A100, H100 = 143_771, 81_920, 81_559  # MiB that their drivers report


def device(kind: str = "gpu", mib: int = H200, name: str = "card") -> Device:
    flops = {"bf16": 1e15, "fp8": 2e15}
    return Device(name, name.title(), kind, mib * MIB, 4e12, flops, 4e11, 5e10, mib * MIB / 1e9, "9.0", "a test")


def gpus(count: int, mib: int = H200, *, ram: int = 0, nvme: int = 0, price: float | None = None) -> Machine:
    return Machine(device("gpu", mib), count, None, ram, nvme, 3e9, price)


def processor(ram: int, nvme: int = 0) -> Machine:
    return Machine(device("cpu", 0, "processor"), 1, None, ram, nvme, 3e9)


def unified(mib: int, count: int = 1) -> Machine:
    return Machine(device("unified", mib, "one"), count, None, 0, 0, 3e9)


def even(asked: Asked, layout: Layout, placement: Placement) -> Speed:
    """Ten tokens per second of each session, whatever the machine; a prompt token takes a millisecond."""
    n, prompt = asked.sessions, asked.prompt or asked.context
    return Speed(
        Band(5.0, 10.0, 20.0), Band(5.0 * n, 10.0 * n, 20.0 * n), Band(500.0, 1000.0, 2000.0),
        Band(prompt / 2000, prompt / 1000, prompt / 500), "memory bandwidth: experts", "a test", {}, {},
    )  # fmt: skip
