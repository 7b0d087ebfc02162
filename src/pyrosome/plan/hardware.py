"""Devices and machines: memory as drivers report it, bandwidths, peak rates and links, each with its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Kind = Literal["gpu", "cpu", "unified"]  # unified: one memory for CPU and GPU (Apple, GB10)


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or the processor of one machine.  Rates are the maker's peaks; what is reached is measured."""

    name: str  # how it is asked for: "h200"
    title: str
    kind: Kind
    memory_bytes: int  # as the driver reports it; of a CPU 0, since its memory is the machine's
    read_bytes_s: float  # memory bandwidth
    flops: Mapping[str, float]  # dense peak per second by type: bf16, fp8, fp4, int8; absent: not in hardware
    peer_bytes_s: float  # to another device of the machine, one direction; 0: only over the host
    host_bytes_s: float  # to host memory, one direction
    vendor_gb: float  # the number in its name or data sheet, in GB
    capability: str  # of CUDA, "9.0"; "": none
    source: str  # where the figures are from


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What a plan is made for: `count` alike devices, and what the host has."""

    device: Device
    count: int
    host: Device | None  # its processor, which may compute experts that do not fit
    ram_bytes: int
    nvme_bytes: int
    nvme_read_bytes_s: float
    price_usd_hour: float | None = None
