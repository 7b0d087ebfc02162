"""Weights of each rank: what tensor parallelism cuts, which layers a stage has, which experts are dealt to whom.

What is cut is what the official converted checkpoints cut: the embedding, the head, wq_b, the indexer's wq_b and
weights_proj, wo_a and the sinks by rows, wo_b by columns, experts by number; everything else is on every rank.
Attention is cut at its output groups and the indexer at its heads, so that counts which divide nothing are exact too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

from pyrosome.checkpoint.names import DTYPE_BYTES
from pyrosome.plan.inventory import INT4_GROUP, Form, Model, StoredTensor, buffer_bytes, held_bytes
from pyrosome.plan.layout import Layout, share

EXPERTS, BUFFERS = "routed experts", "rotations"
# What of a name tells that tensor parallelism cuts it: (end of the name, dimension, what it is cut by).
_CUTS = (
    (".attn.indexer.wq_b.weight", 0, "index heads"),
    (".attn.indexer.weights_proj.weight", 0, "index heads"),
    (".attn.wq_b.weight", 0, "groups"),
    (".attn.wo_a.weight", 0, "groups"),
    (".attn.attn_sink", 0, "groups"),
    (".attn.wo_b.weight", 1, "groups"),
)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A tensor that tensor parallelism cuts: along `dim`, at multiples of shape[dim] / units."""

    tensor: StoredTensor
    dim: int
    units: int

    def shard(self, rank: int, ranks: int) -> StoredTensor:
        """A rank's part of it, which may be empty."""
        t = self.tensor
        unit, mine = t.shape[self.dim] // self.units, len(share(self.units, rank, ranks))
        shape = tuple(unit * mine if d == self.dim else n for d, n in enumerate(t.shape))
        groups = mine if t.groups > 1 else t.groups
        return dataclasses.replace(t, shape=shape, groups=max(1, groups), stored_bytes=stored_bytes(shape, t.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Ledger:
    """Weights of a model in one form, added up as far as every layout allows.  Layers count from 0; the draft head is
    with the last, the embedding with the first."""

    num_experts: int
    whole: tuple[dict[str, int], ...]  # layer -> part -> bytes of tensors that are never cut
    cuts: tuple[tuple[Cut, ...], ...]  # layer -> tensors that may be
    expert_sums: tuple[tuple[int, ...], ...]  # layer -> bytes of its first n experts, by n
    draft_sums: tuple[int, ...]  # the same of the draft stages' experts
    form: Form
    _known: dict[tuple[range, int, int], dict[str, int]] = dataclasses.field(default_factory=dict, repr=False)
    _known_experts: dict[tuple[range, range], dict[str, int]] = dataclasses.field(default_factory=dict, repr=False)

    def layer_bytes(self, layer: int) -> int:
        """All of one layer, uncut, its experts included."""
        one = range(layer, layer + 1)
        return sum(self.part_bytes(one).values()) + sum(self.experts(one, range(self.num_experts)).values())

    def part_bytes(self, layers: range, rank: int = 0, ranks: int = 1) -> Mapping[str, int]:
        """Bytes by part of so many layers, experts aside, on one of the ranks that share every large matrix."""
        key = layers, rank, ranks
        if key not in self._known:
            found: dict[str, int] = {}
            for layer in layers:
                for part, num_bytes in self.whole[layer].items():
                    found[part] = found.get(part, 0) + num_bytes
                for cut in self.cuts[layer]:
                    num_bytes = held_bytes(cut.shard(rank, ranks), self.form)
                    found[cut.tensor.part] = found.get(cut.tensor.part, 0) + num_bytes
            self._known[key] = found
        return self._known[key]

    def experts(self, layers: range, held: range) -> Mapping[str, int]:
        """Bytes by part of a run of experts in so many layers; the draft stages' are with the last layer."""
        key = layers, held
        if key not in self._known_experts:
            found = {EXPERTS: sum(_between(self.expert_sums[layer], held) for layer in layers)}
            if len(self.expert_sums) - 1 in layers and self.draft_sums[-1]:
                found["draft head"] = _between(self.draft_sums, held)
            self._known_experts[key] = found
        return self._known_experts[key]

    @functools.cached_property
    def is_even(self) -> bool:
        """Whether all experts of a layer are as large as another."""
        sums = (*self.expert_sums, self.draft_sums)
        return all(s[n] * self.num_experts == s[-1] * n for s in sums for n in range(len(s)))


def _between(sums: Sequence[int], held: range) -> int:
    return sums[held.stop] - sums[held.start]


def ledger(model: Model, form: Form) -> Ledger:
    """The weights of a model as devices hold them in one form; what was added up once is kept.

    Raises:
        PlanError: as `inventory.held_bytes`.
    """
    return _ledger(_Same(model), form)


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """A model by its identity: comparing two by value would compare every tensor."""

    model: Model

    def __hash__(self) -> int:
        return id(self.model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.model is self.model


@functools.lru_cache(maxsize=16)
def _ledger(same: _Same, form: Form) -> Ledger:
    model = same.model
    last, E = model.config.num_hidden_layers - 1, model.config.n_routed_experts
    whole: list[dict[str, int]] = [{} for _ in range(last + 1)]
    cuts: list[list[Cut]] = [[] for _ in range(last + 1)]
    experts = [[0] * E for _ in range(last + 2)]  # the draft stages' come last
    for tensor in model.held:
        layer = min(tensor.layer, last) if tensor.layer >= 0 else 0 if tensor.part == "embedding" else last
        if tensor.expert >= 0:
            experts[min(tensor.layer, last + 1)][tensor.expert] += held_bytes(tensor, form)
        elif cut := _cut(model, tensor):
            cuts[layer].append(cut)
        else:
            whole[layer][tensor.part] = whole[layer].get(tensor.part, 0) + held_bytes(tensor, form)
    whole[0][BUFFERS] = buffer_bytes(model.config)
    *sums, draft = (tuple(itertools.accumulate(e, initial=0)) for e in experts)
    return Ledger(E, tuple(whole), tuple(tuple(c) for c in cuts), tuple(sums), draft, form)


def _cut(model: Model, tensor: StoredTensor) -> Cut | None:
    if tensor.name in ("embed.weight", "head.weight"):
        return Cut(tensor, 0, tensor.shape[0])
    units = {"groups": model.config.o_groups, "index heads": model.config.index_n_heads}
    return next((Cut(tensor, dim, units[by]) for end, dim, by in _CUTS if tensor.name.endswith(end)), None)


def stored_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a weight of this shape with its scales: FP8 in blocks of 128 x 128, FP4 and INT4 in groups of inputs."""
    *_, inputs = shape
    rows = 1
    for n in shape[:-1]:
        rows *= n
    if dtype == "F8_E4M3":
        return rows * inputs + -(-rows // 128) * -(-inputs // 128)
    if dtype == "I8":
        return rows * (inputs // 2 + -(-inputs // 32))
    if dtype == "I4":
        return rows * (-(-inputs // 2) + 2 * -(-inputs // INT4_GROUP))
    return rows * inputs * DTYPE_BYTES[dtype]


def stages(layer_bytes: Sequence[int], num_stages: int) -> list[range]:
    """Layers of each pipeline stage: runs whose largest is as small as it can be; of several ways the earliest cuts."""
    num = len(layer_bytes)
    before = list(itertools.accumulate(layer_bytes, initial=0))
    best = [[before[-1] + 1] * (num + 1) for _ in range(num_stages + 1)]
    start = [[0] * (num + 1) for _ in range(num_stages + 1)]
    best[0][0] = 0
    for s in range(1, num_stages + 1):
        for stop in range(s, num - (num_stages - s) + 1):
            for at in range(s - 1, stop):
                if best[s - 1][at] >= best[s][stop]:
                    break  # nor are later cuts better: what is before them only grows
                largest = max(best[s - 1][at], before[stop] - before[at])
                if largest < best[s][stop]:
                    best[s][stop], start[s][stop] = largest, at
    runs: list[range] = []
    stop = num
    for s in range(num_stages, 0, -1):
        runs.insert(0, range(start[s][stop], stop))
        stop = start[s][stop]
    return runs


def weight_bytes(
    book: Ledger,
    layout: Layout,
    rank: int,
    layers: range,
    experts_on_device: int,
    experts: Ledger | None = None,
) -> dict[str, int]:
    """Bytes by part of what one rank holds on its device.

    Args:
        experts: the ledger of the form that routed experts are held in, where it is another one.
    """
    found = dict(book.part_bytes(layers, rank if layout.tensor > 1 else 0, layout.tensor))
    mine = share(experts_on_device, rank if layout.experts > 1 else 0, layout.experts)
    for part, num_bytes in (experts or book).experts(layers, mine).items():
        found[part] = found.get(part, 0) + num_bytes
    return found
