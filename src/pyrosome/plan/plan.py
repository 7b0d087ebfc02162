"""A plan: resolved decisions with their consequences, printable and replayable.  Bytes, seconds and dollars."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec

from pyrosome.errors import PlanError
from pyrosome.plan.hardware import Machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import MODES

VERSION = 1
KINDS = ("weights", "kv", "state", "reserve", "workspace", "system")
# What a plan may say to `serve`: fields of EngineOptions, and of load_model.  A file is anybody's: no paths.
OPTIONS = (
    "max_sequences", "max_context", "cache_bytes", "snapshot_bytes", "host_bytes", "disk_bytes", "step_tokens",
    "drafter", "max_drafts", "numerics", "kv_format", "experts",
)  # fmt: skip
_AGAIN = "make it again: pyrosome plan ... --out PLAN.json"


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a plan is asked for.  Checked by `planner.make_plan`, which raises RequestError naming the field."""

    model: Model
    machine: Machine
    context: int = 131_072  # tokens of each session
    sessions: int = 1  # whose history is in the cache at once: they decode, or their prompts are computed
    prefilling: int = 1  # of them, prompts that are computed at once: each takes a reserve
    parked: int = 0  # idle sessions, kept in RAM, then on disk
    shared_prefix: int = 0  # tokens that all sessions begin with, held once
    prompt: int = 0  # tokens of a turn that are not in the cache yet; 0: the whole context
    output: int = 512  # tokens of an answer, for costs
    mode: str = "auto"
    kv_format: str = "fp8"
    csa_host: bool = False
    step_tokens: int = 0  # 0: 8,192 on a GPU, 2,048 on a CPU
    drafts: bool = True
    numerics: str = "trained"


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """Bytes of one sort at one place."""

    name: str  # "routed experts", "csa_kv", "prefill reserve"
    kind: str  # "weights", "kv", "state", "reserve", "workspace" or "system"
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Place:
    """One device or the host: what it has, and what goes there."""

    name: str  # "h200 0", "RAM", "NVMe"
    total_bytes: int  # 0: unknown or none
    items: tuple[Item, ...]

    @property
    def used_bytes(self) -> int:
        return sum(i.num_bytes for i in self.items)

    @property
    def free_bytes(self) -> int:
        """Negative where it does not fit."""
        return self.total_bytes - self.used_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Band:
    """A figure with the range it is believed in; never a bare number."""

    low: float
    mid: float
    high: float


@dataclasses.dataclass(frozen=True)
class Sessions:
    """How many sessions of the asked context there is room for, by state."""

    decoding: int
    prefilling: int  # of them, prompts that may be computed at once
    parked_ram: int  # beside those that were asked to decode
    parked_disk: int
    device_bytes: int  # of one decoding session, on all devices together
    parked_bytes: int  # of one parked session


@dataclasses.dataclass(frozen=True)
class Speed:
    """Rates at the asked load."""

    decode_tok_s: Band  # of one session
    total_tok_s: Band  # of all together
    prefill_tok_s: Band
    first_token_s: Band
    limit: str  # what decides: "memory bandwidth: routed experts", ...
    source: str  # "maker's peaks and efficiencies of ...", or "calibrated 2026-11-28 on ..."
    decode_parts_s: dict[str, float]  # of one step
    prefill_parts_s: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Cost:
    """In US dollars."""

    hour: float
    month: float  # 730 hours
    session_hour: float
    million_in: Band
    million_cached: Band
    million_out: Band


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run what was asked."""

    asked: dict[str, Any]
    mode: str
    fits: bool
    why_not: str  # "" where it fits; else which place lacks how many bytes
    change: str  # "" where it fits; else the smallest change that would make it fit, in units
    places: tuple[Place, ...]
    sessions: Sessions
    speed: Speed | None  # None where it does not fit
    cost: Cost | None
    options: dict[str, Any]  # what `serve --plan` replays: fields of EngineOptions and of load_model
    notes: tuple[str, ...] = ()
    version: int = VERSION

    def to_json(self) -> str:
        """The plan as one JSON object, which `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a plan back.  The text may be anybody's: types, names and signs are checked, figures are not.

        Raises:
            PlanError: it is none, or of another version.
        """
        try:
            found = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise PlanError(f"this is no plan: it is not JSON ({error}); {_AGAIN}") from None
        version = found.get("version") if isinstance(found, dict) else None
        if version is None:
            raise PlanError(f"this is no plan: a JSON object with a version was expected; {_AGAIN}")
        if version != VERSION:
            raise PlanError(f"this plan is of version {version!r} and version {VERSION} is read here; {_AGAIN}")
        try:
            plan = msgspec.convert(found, cls)
        except (msgspec.ValidationError, RecursionError) as error:
            raise PlanError(f"this is no plan of version {VERSION}: {error}; {_AGAIN}") from None
        if fault := plan._fault():
            raise PlanError(f"this is no plan of version {VERSION}: {fault}; {_AGAIN}")
        return plan

    def _fault(self) -> str:
        """What of it no planner writes."""
        if self.mode not in MODES:
            return f"its mode is {self.mode!r}, which is none of {', '.join(MODES)}"
        if unknown := sorted(set(self.options) - set(OPTIONS)):
            return f"its options name {', '.join(unknown)}, which a plan does not set"
        machine = self.asked.get("machine")
        devices = machine.get("count") if isinstance(machine, dict) else None
        counts = {"sessions": self.asked.get("sessions"), "context": self.asked.get("context"), "devices": devices}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                return f"what was asked has {name} {value!r}, where an integer from 1 was expected"
        if min(dataclasses.astuple(self.sessions)) < 0:
            return "its sessions have a number below 0"
        for figures in (self.speed, self.cost):
            for f in dataclasses.fields(figures) if figures else ():
                band = getattr(figures, f.name)
                if isinstance(band, Band) and not 0 <= band.low <= band.mid <= band.high:
                    return f"{f.name} goes from {band.low:g} over {band.mid:g} to {band.high:g}"
        for place in self.places:
            if place.total_bytes < 0 or any(i.num_bytes < 0 or i.kind not in KINDS for i in place.items):
                return f"{place.name} holds what has no size or no sort"
        return ""
