"""Bytes on each device and on the host: weights, history, state, reserves, by mode.

What is counted is what an engine allocates: weights as they are held once loaded, whole pages and rings, a step's own
numbers.  The reserve of a prefill is counted for each prompt that is computed at once, not for each session.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from pyrosome.plan.inventory import Form
from pyrosome.plan.layout import Layout, Placement, share
from pyrosome.plan.plan import Asked, Item, Place
from pyrosome.plan.reserve import (
    CpuStep,
    cpu_captured_bytes,
    cpu_decode_bytes,
    cpu_prompt_bytes,
    device_system_bytes,
    host_system_bytes,
    logit_bytes,
    step_bytes,
)
from pyrosome.plan.rows import Cache, Parked, parked, snapshot_bytes
from pyrosome.plan.shards import Ledger, ledger, stages, weight_bytes

GPU_STEP_TOKENS, CPU_STEP_TOKENS = 8192, 2048
ELEMENT_BYTES = 4  # of an activation on an accelerator: kernels keep float32 between operations
MAX_DRAFTS = 3  # tokens drafted at once, where the checkpoint has a head that is loaded
CSA_ROWS = "csa_kv"
SNAPSHOTS = 4  # copies of its state that a session keeps: the ends of its last turns
LEAST_SNAPSHOT_BYTES = 256 << 20  # what an engine takes where nobody says


def places(asked: Asked, layout: Layout, placement: Placement, sessions: int) -> tuple[Place, ...]:
    """Every device in order of rank, then RAM, then NVMe, for so many decoding sessions.

    RAM and NVMe are left out where the machine's are unknown and nothing is meant to be there.

    Raises:
        PlanError: weights of a sort that this kind of device does not hold.
    """
    return Site(asked, layout, placement, sessions).places()


def fits(where: Iterable[Place]) -> bool:
    """Whether no place holds more than it has."""
    return all(place.free_bytes >= 0 for place in where)


def step_tokens(asked: Asked) -> int:
    """Tokens of one prompt that are computed in one step: no more than its context has."""
    usual = CPU_STEP_TOKENS if asked.machine.device.kind == "cpu" else GPU_STEP_TOKENS
    return min(asked.step_tokens or usual, asked.context)


def num_drafts(asked: Asked) -> int:
    """Tokens that are drafted for a sequence at once, at most."""
    return MAX_DRAFTS if asked.drafts and asked.model.num_stages else 0


@dataclasses.dataclass(frozen=True)
class Site:
    """One way to put a model and so many sessions on a machine."""

    asked: Asked
    layout: Layout
    placement: Placement
    sessions: int

    # What there is

    @property
    def is_cpu(self) -> bool:
        """No accelerator: the only device is the host's memory."""
        return self.asked.machine.device.kind == "cpu"

    @property
    def has_one_memory(self) -> bool:
        """What would be in RAM is in the device's own memory."""
        return self.asked.machine.device.kind in ("cpu", "unified")

    @functools.cached_property
    def counts(self) -> tuple[int, int, int]:
        """Experts of each layer on the devices, in RAM and on NVMe."""
        return self.placement.counts(self.asked.model.config.n_routed_experts)

    @functools.cached_property
    def books(self) -> tuple[Ledger, Ledger]:
        """The weights in the form they are held in, and in the form the routed experts are."""
        form: Form = "tiles" if self.is_cpu else "stored"
        is_mapped = self.is_cpu and self.counts[2] > 0  # experts are read in the checkpoint's files
        return ledger(self.asked.model, form), ledger(self.asked.model, "stored" if is_mapped else form)

    @functools.cached_property
    def stages(self) -> list[range]:
        """Layers of each pipeline stage, balanced by weights and rows together; one stage: all layers."""
        layers = range(self.asked.model.config.num_hidden_layers)
        if self.layout.layers == 1:
            return [layers]
        cache, near = self.cache(0), range(self.counts[0])
        costs = []
        for i in layers:
            one = range(i, i + 1)
            held = (self.books[0].part_bytes(one), self.books[1].experts(one, near), self._history(cache, one, 0))
            costs.append(sum(sum(h.values()) for h in (*held, cache.state_bytes(one))))
        return stages(costs, self.layout.layers)

    def layers(self, rank: int) -> range:
        """Layers that a rank computes."""
        return self.stages[rank if self.layout.layers > 1 else 0]

    def sequences(self, rank: int) -> int:
        """Sessions whose rows are on a rank."""
        return len(share(self.sessions, rank, self.layout.replicas)) if self.layout.replicas > 1 else self.sessions

    def cache(self, rank: int) -> Cache:
        """The pool of a rank, before layers or pages are dealt out."""
        a = self.asked
        return Cache.of(
            a.model.config, a.kv_format, self.sequences(rank), a.context, a.shared_prefix, num_drafts(a),
            a.model.num_stages > 0,
        )  # fmt: skip

    def pool_bytes(self, rank: int = 0) -> int:
        """Bytes of rings, pages and tables that a rank's pool allocates on its device."""
        return sum(i.num_bytes for i in self._rows(rank))

    # What goes where

    def places(self) -> tuple[Place, ...]:
        """Every device, then RAM, then NVMe."""
        machine = self.asked.machine
        alike: dict[object, Place] = {}
        devices = []
        for rank in range(self.layout.ranks):
            if (sort := self._sort(rank)) not in alike:
                alike[sort] = self._device(rank)
            place = alike[sort]
            devices.append(place if self.is_cpu else dataclasses.replace(place, name=f"{machine.device.name} {rank}"))
        return (*devices, *self.hosts())

    def hosts(self) -> tuple[Place, ...]:
        """RAM that is not a device's own, then NVMe."""
        machine, found = self.asked.machine, []
        if on_host := [] if self.has_one_memory else self._on_host():
            found.append(Place("RAM", machine.ram_bytes, _items(on_host)))
        if (on_disk := self._on_disk()) or machine.nvme_bytes:
            found.append(Place("NVMe", machine.nvme_bytes, _items(on_disk)))
        return tuple(found)

    def _sort(self, rank: int) -> object:
        """Ranks of one sort hold as much as another."""
        layout = self.layout
        if layout.tensor > 1 or layout.context > 1 or not self.books[1].is_even:
            return rank
        held = share(self.counts[0], rank if layout.experts > 1 else 0, layout.experts)
        return self.sequences(rank), self.layers(rank), len(held)

    def _device(self, rank: int) -> Place:
        machine = self.asked.machine
        items = [Item(part, "weights", n) for part, n in self.weights(rank).items()]
        items += [*self._rows(rank), *self._step(rank)]
        total = machine.ram_bytes if self.is_cpu else machine.device.memory_bytes
        if self.has_one_memory:
            ranks = machine.count
            for item in self._kept_on_host():
                items.append(Item(item.name, item.kind, -(-item.num_bytes // ranks)))
            if not self.is_cpu:
                items.append(Item("driver and allocator", "system", device_system_bytes(machine.count)))
            items.append(Item("operating system", "system", host_system_bytes(0)))
        else:
            items.append(Item("driver and allocator", "system", device_system_bytes(machine.count)))
        return Place("RAM" if self.is_cpu else f"{machine.device.name} {rank}", total, _items(items))

    def weights(self, rank: int) -> dict[str, int]:
        """Bytes by part of what is on a rank's device."""
        book, experts = self.books
        return weight_bytes(book, self.layout, rank, self.layers(rank), self.counts[0], experts)

    def _history(self, cache: Cache, layers: range, rank: int) -> dict[str, int]:
        """History on a rank's device."""
        ranks = self.layout.context
        found = cache.history_bytes(layers, rank if ranks > 1 else 0, ranks)
        return {n: b for n, b in found.items() if not (self.placement.csa_on_host and n == CSA_ROWS)}

    def _rows(self, rank: int) -> list[Item]:
        cache, layers = self.cache(rank), self.layers(rank)
        items = [Item(name, "kv", n) for name, n in self._history(cache, layers, rank).items()]
        items += [Item(name, "state", n) for name, n in cache.state_bytes(layers).items()]
        return [*items, Item("page tables", "state", cache.table_bytes())]

    def _step(self, rank: int) -> list[Item]:
        prefill, decode = self._cpu_step() if self.is_cpu else self._gpu_step(rank)
        items = [Item("prefill reserve", "reserve", prefill), Item("decode workspace", "workspace", decode)]
        return [*items, Item("captured steps", "workspace", self._captured())] if self.is_cpu else items

    def _captured(self) -> int:
        return cpu_captured_bytes(self.asked.model.config, self.sessions, self.asked.context, self._about)

    @property
    def _about(self) -> CpuStep:
        a = self.asked
        return CpuStep(a.kv_format, a.numerics, num_drafts(a), a.model.num_stages > 0)

    def _gpu_step(self, rank: int) -> tuple[int, int]:
        a, config, tensor = self.asked, self.asked.model.config, self.layout.tensor
        prompts = -(-a.prefilling // self.layout.replicas)  # any device may get them
        prefill = step_bytes(config, prompts * step_tokens(a), a.context, ELEMENT_BYTES, tensor) if prompts else 0
        rows = self.sequences(rank) * (1 + num_drafts(a))
        decode = step_bytes(config, rows, a.context, ELEMENT_BYTES, tensor) + logit_bytes(config, rows, tensor)
        return prefill, decode if rows else 0

    def _cpu_step(self) -> tuple[int, int]:
        a, config = self.asked, self.asked.model.config
        prefill = a.prefilling * cpu_prompt_bytes(config, step_tokens(a), a.context, self._about)
        return prefill, cpu_decode_bytes(config, self.sessions, a.context, self._about)

    def _on_host(self) -> list[Item]:
        """What is in the memory of a host with accelerators."""
        machine, (on_device, in_ram, _) = self.asked.machine, self.counts
        layers = range(self.asked.model.config.num_hidden_layers)
        items = []
        if in_ram:  # one copy, whatever the number of devices
            held = self.books[1].experts(layers, range(on_device, on_device + in_ram))
            items += [Item(part, "weights", n) for part, n in held.items()]
        if self.placement.csa_on_host:
            items.append(Item(CSA_ROWS, "kv", self.csa_bytes))
        kept = self._kept_on_host()
        if not items and not machine.ram_bytes and not any(i.name == "parked sessions" for i in kept):
            return []
        return [*items, *kept, Item("operating system", "system", host_system_bytes(machine.count))]

    @functools.cached_property
    def csa_bytes(self) -> int:
        """Bytes of all sessions' CSA rows: one copy, whatever the mode."""
        layers = range(self.asked.model.config.num_hidden_layers)
        pools = range(self.layout.replicas)
        return sum(self.cache(rank).history_bytes(layers).get(CSA_ROWS, 0) for rank in pools)

    @property
    def snapshot_bytes(self) -> int:
        """Budget for copies of state at boundaries."""
        a = self.asked
        one = snapshot_bytes(a.model.config, a.kv_format, a.context, a.model.num_stages > 0)
        return max(LEAST_SNAPSHOT_BYTES, SNAPSHOTS * self.sessions * one)

    @property
    def parked(self) -> Parked:
        """Bytes of one parked session."""
        a = self.asked
        return parked(a.model.config, a.kv_format, a.context, a.shared_prefix, a.model.num_stages > 0)

    def _kept_on_host(self) -> list[Item]:
        items = [Item("snapshots", "reserve", self.snapshot_bytes)]
        if self.parked_in_ram:
            items.append(Item("parked sessions", "kv", self.parked_in_ram * self.parked.ram_bytes))
        return items

    @functools.cached_property
    def parked_in_ram(self) -> int:
        """How many of the parked sessions are in memory: what it holds, or all of them where there is no disk."""
        wanted, machine = self.asked.parked, self.asked.machine
        if not wanted or not machine.nvme_bytes:
            return wanted
        return min(wanted, self.parked_room)

    @functools.cached_property
    def parked_room(self) -> int:
        """How many parked sessions memory holds beside everything else."""
        bare = Site(dataclasses.replace(self.asked, parked=0), self.layout, self.placement, self.sessions)
        if self.has_one_memory:
            least = min(p.free_bytes for p in bare.places()[: self.layout.ranks])  # each keeps as much as another
            return max(0, least) * self.layout.ranks // self.parked.ram_bytes
        free = sum(p.free_bytes for p in bare.hosts() if p.name == "RAM")
        return max(0, free) // self.parked.ram_bytes

    @property
    def disk_room(self) -> int:
        """Bytes of the disk that parked sessions may have."""
        held = sum(i.num_bytes for i in self._on_disk() if i.kind == "weights")
        return self.asked.machine.nvme_bytes - held

    def _on_disk(self) -> list[Item]:
        on_device, in_ram, on_nvme = self.counts
        items = []
        if on_nvme:
            layers = range(self.asked.model.config.num_hidden_layers)
            first = on_device + in_ram
            held = ledger(self.asked.model, "stored").experts(layers, range(first, first + on_nvme))
            items += [Item(part, "weights", n) for part, n in held.items()]
        if waiting := self.asked.parked - self.parked_in_ram:
            items.append(Item("parked sessions", "kv", waiting * self.parked.disk_bytes))
        return items


def _items(items: Iterable[Item]) -> tuple[Item, ...]:
    """Without those of no bytes."""
    return tuple(i for i in items if i.num_bytes)
