"""Plans made by hand, for what prints and chooses them: no planner is asked."""

from __future__ import annotations

import dataclasses
from typing import Any

from pyrosome.config import ModelConfig
from pyrosome.plan.hardware import Device, Machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.plan import Asked, Band, Cost, Item, Place, Plan, Sessions, Speed

GIB = 1 << 30
H200 = Device(
    "h200", "NVIDIA H200 SXM", "gpu", 143_771 << 20, 4.8e12, {"bf16": 989e12, "fp8": 1979e12}, 450e9, 64e9, 141, "9.0",
    "a data sheet",
)  # fmt: skip
ITEMS = (
    Item("routed experts", "weights", 64 * GIB),
    Item("attention", "weights", 4 * GIB),
    Item("csa_kv", "kv", 9 * GIB),
    Item("window_kv", "state", 50 << 20),
    Item("prefill reserve", "reserve", 2 * GIB),
    Item("driver and allocator", "system", GIB),
)


ASKED = {
    "model": {"name": "flash", "layers": 43, "stored_bytes": 159_609_485_896},
    "machine": {"title": "NVIDIA H200 SXM", "kind": "gpu", "count": 2},
}


def machine(count: int = 2, price: float | None = 9.42, device: Device = H200) -> Machine:
    return Machine(device, count, None, 512 * GIB, 0, 0.0, price)


def asked(**changes: Any) -> Asked:
    model = Model("flash", ModelConfig.preset("flash"), 1, ())
    return dataclasses.replace(Asked(model, machine(), 1_048_576, 7), **changes)


def band(mid: float) -> Band:
    return Band(mid / 2, mid, mid * 2)


def plan(
    mode: str = "ep", *, fits: bool = True, room: int = 48, tok_s: float = 60.0, hour: float | None = 9.42,
    sessions: int = 7, first_token_s: float = 100.0, context: int = 1_048_576,
    places: tuple[Place, ...] | None = None,
) -> Plan:  # fmt: skip
    """Two H200 with a plan whose figures can be told from each other; speeds are bands of a factor 2 each way."""
    places = places or (
        Place("h200 0", 143_771 << 20, ITEMS),
        Place("h200 1", 143_771 << 20, ITEMS),
        Place("RAM", 512 * GIB, (Item("snapshots", "state", 3 * GIB),)),
    )
    speed = Speed(
        band(tok_s), band(tok_s * sessions), band(6000.0), band(first_token_s), "memory bandwidth: routed experts",
        "maker's peaks", {"experts": 0.01}, {"experts": 0.1},
    )  # fmt: skip
    cost = None if hour is None else Cost(hour, hour * 730, hour / sessions, band(0.43), band(0.021), band(6.5))
    lacking = ("h200 0 lacks 3.20 GiB of 140.40 GiB", "5 sessions instead of 7 fit")
    return Plan(
        {**ASKED, "context": context, "sessions": sessions}, mode, fits,
        "" if fits else lacking[0], "" if fits else lacking[1], places,
        Sessions(room, 1, 90, 0, 4_052_700_160, 3_700_378_624), speed if fits else None, cost if fits else None,
        {"max_sequences": sessions}, ("this engine runs ep today",),
    )  # fmt: skip
