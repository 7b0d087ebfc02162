"""How long a step takes: its parts, each by what it reads and computes, then what layers, links and offloading cost.

    step = sum over parts of (bytes / read and FLOPs / rate) + layers x (layer_s + tokens x token_s) + step_s + links

Reading and computing go on at once on a GPU, so that the slower of them counts; one core does one after the other.
Source: planner.md section 3 (its formula, taken part by part) and model.md section 12 for FLOPs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from pyrosome.cache.streams import kv_row_bytes
from pyrosome.config import CSA_RATIO
from pyrosome.errors import PlanError
from pyrosome.plan import assumed
from pyrosome.plan.calibration import Calibration, latest
from pyrosome.plan.hardware import Device, Machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.work import GROUPS, Work, weights_of, work_of
from pyrosome.plan.work import Load as Load

ACTIVATION_BYTES = 2  # of what devices send one another, bfloat16
FEW_TOKENS = 16  # of a span: up to so many, a step decodes or verifies and passes the ranks of a pipeline one by one
CALIBRATED_ERROR = 0.25  # what a prediction by calibration is believed to, unless its own steps are met less well
SAMPLES = 16  # steps of a long prompt that are computed; those between them lie on straight lines


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """What a device reaches, in units per second: assumed shares of the maker's peaks, or fitted on this machine."""

    read: float  # bytes per second that weights stream at
    rows: float  # bytes per second that cached rows are read at
    streams: float  # bytes per second that residual streams are read and written at
    compute: Mapping[str, float]  # FLOPs per second by kind of arithmetic: `work.GROUPS`
    layer_s: float  # what a layer costs beside its bytes and FLOPs
    token_s: float  # what a token costs in a layer beside them
    step_s: float  # what a step costs beside its layers
    link: float  # share of a link's bandwidth that is reached
    hop_s: float  # what a message between devices costs beside its bytes
    overlaps: bool  # reading goes on while it computes
    band: tuple[float, float]  # what times lie between, as factors
    source: str
    nvme_bytes_s: float = 0.0  # that the drive was measured to read; 0: as the machine says
    host: Coefficients | None = None  # of the host's processor, where they were measured

    def seconds(self, work: Work) -> tuple[float, float]:
        """(reading, computing) of one part."""
        read = work.weight_bytes / self.read + work.row_bytes / self.rows + work.stream_bytes / self.streams
        return read, work.flops / self.compute[work.group]


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and of what."""

    seconds: float
    parts: dict[str, float]
    limit: str  # the part and the resource that take longest


def coefficients_for(machine: Machine) -> Coefficients:
    """What was fitted on this machine, where the plan is for it and it was calibrated; else what is assumed.

    Raises:
        PlanError: a device of unknown bandwidth or arithmetic.
    """
    found = _measured_here(machine)
    if found is None:
        return _assumed(machine.device)
    if found.outdated:
        base = _assumed(machine.device)
        about = f"the calibration of {found.when[:10]} does not count, since {found.outdated}: run `pyrosome calibrate`"
        return dataclasses.replace(base, source=f"{base.source}; {about}")
    if machine.device.kind == "cpu":
        return coefficients_of(found)
    base = _assumed(machine.device)
    link = found.link_bytes_s / machine.device.host_bytes_s if machine.device.host_bytes_s else 0.0
    host = coefficients_of(found) if machine.host else None
    return dataclasses.replace(base, link=link or base.link, nvme_bytes_s=found.disk_bytes_s, host=host)


def _measured_here(machine: Machine) -> Calibration | None:
    """The calibration of this machine's processor, if the plan is for this machine."""
    processor = machine.device if machine.device.kind == "cpu" else machine.host
    return latest(processor.title) if machine.is_here and processor is not None else None


def coefficients_of(found: Calibration) -> Coefficients:
    """What was fitted, as rates."""
    rate = {term: 1 / seconds if seconds else math.inf for term, seconds in found.seconds.items()}
    spread = 1 + max(CALIBRATED_ERROR, found.worst)
    s = "s" * (found.threads != 1)
    return Coefficients(
        read=rate["read"], rows=rate["rows"], streams=math.inf, compute={g: rate[g] for g in GROUPS},
        layer_s=found.seconds["layer"], token_s=found.seconds["token"], step_s=found.seconds["step"],
        link=assumed.SHARES["cpu"].link, hop_s=assumed.SHARES["cpu"].hop_s, overlaps=False,
        band=(1 / spread, spread), nvme_bytes_s=found.disk_bytes_s,
        source=f"calibrated {found.when[:10]} on {found.processor}, {found.threads} thread{s}: the steps timed there "
        f"are met within {found.residual:.0%} (median), {found.worst:.0%} (most)",
    )  # fmt: skip


def _assumed(device: Device) -> Coefficients:
    shares = assumed.SHARES[device.kind]
    if not device.read_bytes_s > 0:
        raise PlanError(f"{device.title}: its memory bandwidth is unknown, so nothing can be said of its speed")
    compute = {group: share * _peak(device, group) for group, share in shares.compute.items()}
    return Coefficients(
        read=shares.read * device.read_bytes_s, rows=shares.rows * device.read_bytes_s,
        streams=shares.read * device.read_bytes_s, compute=compute,
        layer_s=shares.layer_s, token_s=shares.token_s, step_s=shares.step_s, link=shares.link,
        hop_s=shares.hop_s if device.peer_bytes_s else shares.far_hop_s, overlaps=shares.overlaps, band=assumed.BAND,
        source=f"{device.title}: {shares.source}",
    )  # fmt: skip


def _peak(device: Device, group: str) -> float:
    """FLOPs per second of the type that a kind of arithmetic runs in."""
    for kind in assumed.TYPES[group]:
        if device.flops.get(kind, 0) > 0:
            # The CPU kernels multiply pairs of bfloat16 in vectors: twice the rate of float32, without Intel's tiles.
            most = 2 * device.flops.get("f32", math.inf) if device.kind == "cpu" else math.inf
            return min(device.flops[kind], most)
    raise PlanError(
        f"{device.title}: of the types {', '.join(assumed.TYPES[group])} its table has no rate, and {group} need one"
    )


def step_time(
    model: Model, machine: Machine, layout: Layout, placement: Placement, load: Load, coefficients: Coefficients
) -> StepTime:
    """Seconds of one step of the whole deployment.

    Raises:
        PlanError: experts are placed where this machine has no way to.
    """
    c = coefficients
    parts: dict[str, float] = {}
    limits: dict[str, str] = {}
    for work in work_of(model, layout, load):
        if work.part == "routed experts":
            parts |= _experts(work, machine, placement, c, limits)
            continue
        read, compute = c.seconds(work)
        _add(parts, limits, work.part, _together(c, work), read >= compute)
    for name, seconds in _beside(model, machine, layout, placement, load, c).items():
        if seconds:
            parts[name] = seconds
    if load.tokens > FEW_TOKENS:  # steps of a prompt follow one another through the pipeline
        parts = {name: seconds / layout.layers for name, seconds in parts.items()}
    longest = max(parts, key=lambda name: parts[name])
    return StepTime(sum(parts.values()), parts, f"{limits.get(longest, 'overhead')}: {longest}")


def _together(c: Coefficients, work: Work) -> float:
    """Seconds of reading and computing one part."""
    return max(c.seconds(work)) if c.overlaps else sum(c.seconds(work))


def _add(parts: dict[str, float], limits: dict[str, str], part: str, seconds: float, is_read: bool) -> None:
    parts[part] = parts.get(part, 0.0) + seconds
    limits[part] = "memory bandwidth" if is_read else "arithmetic"


def _experts(
    work: Work, machine: Machine, placement: Placement, c: Coefficients, limits: dict[str, str]
) -> dict[str, float]:
    """Routed experts, by where they are.  Those in host memory go by the faster way, which their name tells."""
    parts: dict[str, float] = {}
    in_ram = 0.0 if machine.device.kind == "cpu" else placement.experts_in_ram  # a CPU's own memory is that
    near, far = 1 - in_ram - placement.experts_on_nvme, placement.experts_on_nvme
    if near > 0:
        read, compute = c.seconds(work)
        _add(parts, limits, "routed experts", near * _together(c, work), read >= compute)
    if in_ram:
        name, seconds = _from_ram(work, machine, in_ram, c)
        parts[name], limits[name] = seconds, "host link" if "link" in name else "host memory and processor"
    if far:
        if not machine.nvme_read_bytes_s > 0:
            raise PlanError("experts are placed on NVMe, and this machine has none; give --nvme, or more RAM")
        name = "routed experts from NVMe"
        parts[name] = far * work.weight_bytes / (c.nvme_bytes_s or machine.nvme_read_bytes_s)
        limits[name] = "NVMe"
    return parts


def _from_ram(work: Work, machine: Machine, share: float, c: Coefficients) -> tuple[str, float]:
    ways: dict[str, float] = {}
    if machine.device.host_bytes_s > 0:
        moved = share * work.weight_bytes / (machine.device.host_bytes_s * c.link)
        ways["routed experts over the host link"] = moved + share * c.seconds(work)[1]
    if machine.host is not None:  # it serves all devices
        host = c.host or _assumed(machine.host)
        all_of_it = dataclasses.replace(
            work, weight_bytes=machine.count * share * work.weight_bytes, flops=machine.count * share * work.flops
        )
        ways["routed experts by the host's processor"] = _together(host, all_of_it)
    if not ways:
        raise PlanError("experts are placed in RAM, and this machine has neither a link to it nor a host processor")
    name = min(ways, key=lambda way: ways[way])
    return name, ways[name]


def _beside(
    model: Model, machine: Machine, layout: Layout, placement: Placement, load: Load, c: Coefficients
) -> dict[str, float]:
    """What is neither read from the device's memory nor computed there."""
    layers = model.config.num_hidden_layers
    own = -(-load.sequences // (layout.replicas * layout.layers))
    per_layer = c.layer_s + own * load.tokens * c.token_s
    found = {"layers": layers * per_layer, "step": c.step_s}
    if load.drafts:
        found["draft head, overhead"] = load.drafts * (weights_of(model).draft_layers * per_layer + c.step_s / 2)
    found["links"] = _links(model, machine, layout, own * load.tokens, c)
    if placement.csa_on_host:
        found["CSA rows over the host link"] = _host_rows(model, machine, load, own, c)
    return found


def _links(model: Model, machine: Machine, layout: Layout, T: int, c: Coefficients) -> float:
    """Seconds in which devices wait for one another: messages, and the bytes of T tokens."""
    config, n = model.config, layout.ranks
    if n == 1 or layout.mode == "dp":
        return 0.0
    bandwidth = (machine.device.peer_bytes_s or machine.device.host_bytes_s) * c.link
    if not bandwidth > 0:
        raise PlanError(f"{machine.device.title}: no link between devices is known, and mode {layout.mode} needs one")
    row = T * config.hidden_size * ACTIVATION_BYTES
    if layout.layers > 1:
        return (n - 1) * (c.hop_s + config.hc_mult * row / bandwidth)
    outside = (n - 1) / n  # of what is sent, the share that does not stay
    if layout.tensor > 1:
        each = 2 * outside * row  # an all-reduce; attention and experts have one each
        return config.num_hidden_layers * 2 * (c.hop_s + each / bandwidth)
    sent = outside * row * config.num_experts_per_tok * 2  # to the experts and back
    if layout.context > 1:  # partial attention of every head is merged
        sent += outside * T * config.num_attention_heads * config.head_dim * ACTIVATION_BYTES
    return config.num_hidden_layers * (2 + (layout.context > 1)) * c.hop_s + config.num_hidden_layers * sent / bandwidth


def _host_rows(model: Model, machine: Machine, load: Load, own: int, c: Coefficients) -> float:
    """CSA rows that stay in host memory: those chosen are read over the link, row by row."""
    config = model.config
    if not machine.device.host_bytes_s > 0:
        raise PlanError(f"{machine.device.title}: CSA rows are placed on the host, and no link to it is known")
    layers = sum(r == CSA_RATIO for r in config.layer_ratios)
    chosen = min(config.index_topk, (load.context + load.tokens) / CSA_RATIO)
    moved = own * load.tokens * layers * chosen * kv_row_bytes(config, load.kv_format)
    return moved / (machine.device.host_bytes_s * c.link)


def prompt_time(
    model: Model,
    machine: Machine,
    layout: Layout,
    placement: Placement,
    tokens: int,
    coefficients: Coefficients,
    *,
    cached: int = 0,
    step_tokens: int = 8192,
    kv_format: str = "fp8",
) -> StepTime:
    """Seconds until a prompt of `tokens` beyond `cached` ones is computed, in steps of `step_tokens`; and of what."""
    whole, rest = divmod(tokens, step_tokens)
    parts: dict[str, float] = {}
    seconds, limit = 0.0, ""

    def add(at: int, count: int, times: float) -> None:
        nonlocal seconds, limit
        load = Load(1, count, at, kv_format, with_head=at + count >= cached + tokens)
        step = step_time(model, machine, layout, placement, load, coefficients)
        seconds, limit = seconds + times * step.seconds, step.limit
        for name, s in step.parts.items():
            parts[name] = parts.get(name, 0.0) + times * s

    groups = min(whole, SAMPLES)
    for i in range(groups):  # the step in the middle of each group stands for it
        low, high = whole * i // groups, whole * (i + 1) // groups
        add(cached + (low + high - 1) * step_tokens // 2, step_tokens, high - low)
    if rest or not whole:
        add(cached + whole * step_tokens, max(rest, 1), 1)
    if parts:
        limit = _longest(parts, limit)
    return StepTime(seconds, parts, limit)


def _longest(parts: dict[str, float], last: str) -> str:
    """The last step's limit where it is the whole prompt's; else the part that took longest."""
    longest = max(parts, key=lambda name: parts[name])
    return last if last.endswith(f": {longest}") else f"arithmetic: {longest}"
