"""Decode steps captured once and run again: the trunk's layers as a list of native calls, no Python between them.

A step of single tokens calls the same kernels with the same shapes every time.  Its second occurrence is captured:
every call of the native library that the layers make, with the memory they work in kept; what they read of the step
(ids, positions, where rows lie and go) is read from buffers.  A later step of the same shape fills the buffers and
makes the calls.  Bits are those of the step run plainly, since they are the same calls on the same values.
Nothing is captured that does not run wholly by native kernels: an operation of torch that computes is noticed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyrosome.cache.pool import CachePool
from pyrosome.errors import EngineError
from pyrosome.model.deepseek_v4 import DeepseekV4, Rotations
from pyrosome.model.layers import Weight
from pyrosome.model.step import Step
from pyrosome.ops import native
from pyrosome.quant import QuantTensor

log = logging.getLogger(__name__)
_I, _P = ctypes.c_int64, ctypes.c_void_p
MOST_TOKENS = 64  # of a step that is captured
MOST_KEPT = 48  # captures; the one not used for longest goes
MOST_BYTES = 1 << 30  # that captures hold together
# Of one.  Rows of four tokens end in one step of four, so batches go round four shapes: a capture of which not four are
# kept would be gone when its shape comes again.
MOST_BYTES_EACH = MOST_BYTES // 4
CONTEXT_GRAIN = 512  # tokens: the bound on contexts is rounded up, so that it is the same for many steps


class Uncapturable(Exception):
    """An operation that is no native call was met; its name is the argument."""


class StepGraphs:
    """Captured steps of one network over one pool."""

    def __init__(self, model: DeepseekV4, pool: CachePool) -> None:
        self.model, self.pool = model, pool
        self.ratios = sorted({r for r in model.config.layer_ratios if r})
        self.kept: OrderedDict[tuple[Any, ...], Graph | Step] = OrderedDict()  # a step: seen once, and run plainly
        self.refused: set[tuple[Any, ...]] = set()
        self.num_run = 0
        self._hooks = [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def context_of(self, step_context: int) -> int:
        """The bound on positions to give a step of single tokens, so that many steps share it."""
        return min(-(-step_context // CONTEXT_GRAIN) * CONTEXT_GRAIN, self.pool.max_context)

    def run(self, step: Step) -> tuple[Tensor, Tensor] | None:
        """(streams [T, J, D] after the last layer, logits [T, V]); None where the step is to be run plainly."""
        if self.model.bank.mesh.size > 1:  # ranks talk to one another between calls
            return None
        if len(step.layout) > MOST_TOKENS or step.ids_T.shape[0] != len(step.layout) or self._is_watched():
            return None
        emits = tuple(step.num_emits(r) for r in self.ratios)
        key = (len(step.layout), step.context, emits, native.threads(), native.level())
        if key in self.refused:
            return None
        known = self.kept.get(key)
        if isinstance(known, Graph):
            self.kept.move_to_end(key)
            self.num_run += 1
            return known.run(step)
        if known is None:
            self._keep(key, step)
            return None
        try:
            graph, results = capture(self.model, self.pool, step, known)
        except Uncapturable as error:  # the step is run again, plainly: it writes the same rows to the same places
            log.info("steps of %d tokens are not captured: %s computes", len(step.layout), error)
            self.refused.add(key)
            del self.kept[key]
            return None
        if graph.num_bytes > MOST_BYTES_EACH:
            log.info("steps of %d tokens are not captured: one holds %d bytes", len(step.layout), graph.num_bytes)
            self.refused.add(key)
            del self.kept[key]
        else:
            self._keep(key, graph)
        return results

    def _keep(self, key: tuple[Any, ...], what: Graph | Step) -> None:
        self.kept[key] = what
        self.kept.move_to_end(key)
        while len(self.kept) > MOST_KEPT or self.num_bytes > MOST_BYTES:
            self.kept.popitem(last=False)

    @property
    def num_bytes(self) -> int:
        """Held by captures."""
        return sum(graph.num_bytes for graph in self.kept.values() if isinstance(graph, Graph))

    def _is_watched(self) -> bool:
        """Whether somebody hooked a module: hooks see a step that is run plainly, and no other."""
        return any(self._hooks)


class Derived(ctypes.Structure):
    """One thing that is derived of a step: `Derived` of ops/derive.cpp."""

    _fields_ = [("kind", _I), ("a", _I), ("b", _I), ("table", _P), ("width", _I), ("out", _P * 4), ("count", _I)]


EMIT, VISIBLE, ALL_ROWS, WINDOW_INDEX, RING_PLACE, FLAT_PLACE, PICKED, PAGE_PLACE, ROTATION = range(9)
_KINDS = {
    Step._emit: EMIT, Step._visible: VISIBLE, Step._all_rows: ALL_ROWS, Step._window_index: WINDOW_INDEX,
    Step._ring_place: RING_PLACE, Step._flat_place: FLAT_PLACE, Step._picked: PICKED, Step._page_place: PAGE_PLACE,
}  # fmt: skip


def _derived(make: Any, about: tuple[Any, ...], buffers: Any) -> Derived:
    """How the library fills the buffers of what `make` derives.

    Raises:
        Uncapturable: it does not know how.
    """
    outs: Any = [buffers] if isinstance(buffers, Tensor) else list(buffers)
    tables = [x for x in about if isinstance(x, Tensor)]
    if make not in _KINDS or not all(x.is_contiguous() for x in (*outs, *tables)):
        raise Uncapturable(f"{make.__name__} of a step")
    told = Derived(kind=_KINDS[make], width=outs[0].shape[-1], count=outs[0].shape[0])
    told.out[:] = [x.data_ptr() for x in outs] + [0] * (4 - len(outs))
    if tables:
        told.table, told.width = tables[0].data_ptr(), tables[0][0].numel()
    numbers = [int(x == "slot_B") if isinstance(x, str) else x for x in about if not isinstance(x, Tensor)]
    told.a, told.b = (*numbers, 0, 0)[:2]
    return told


@dataclasses.dataclass
class Graph:
    """One captured step: the calls, the buffers they read the step from, and all else they touch."""

    model: DeepseekV4
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]
    shadow: Step
    derived: Any  # array of Derived
    first: Tensor  # streams before the first layer
    last: Tensor
    logits: Tensor
    held: list[object]
    num_bytes: int  # of all that is held

    def run(self, step: Step) -> tuple[Tensor, Tensor]:
        """Fill the buffers and make the calls.

        Raises:
            EngineError: a kernel refused what it was given.
        """
        packed, kept = step.packed, self.shadow.packed
        assert packed is not None and kept is not None
        native.library().derive(packed.data_ptr(), kept.data_ptr(), len(step.layout), self.derived, len(self.derived))
        self.first.copy_(_first_streams(self.model, step))
        for function, arguments in self.calls:
            if function(*arguments):
                raise EngineError(f"{function.__name__} refused a step that it had run before")
        return self.last.clone(), self.logits.clone()


def capture(model: DeepseekV4, pool: CachePool, step: Step, seen: Step) -> tuple[Graph, tuple[Tensor, Tensor]]:
    """Run the trunk's layers and the head over a step, and keep how; `seen` is one of its shape that was run plainly.

    Raises:
        Uncapturable: an operation of torch computes; the step has to be run again.
    """
    layers = range(len(model.layers))
    ratios = {model.config.layer_ratios[i] for i in layers}
    step.derive_like(seen)  # before: there operations of torch may compute
    assert step.packed is not None
    packed = step.packed.clone()
    shadow = dataclasses.replace(
        step,
        derived={key: (_clone(value), about) for key, (value, about) in step.derived.items()},
        packed=packed,
        **dict(zip(_TENSORS, packed.split(len(step.layout)), strict=True)),
    )
    turns = {r: _clone(t) for r, t in model.rotary(step, ratios).items()}
    told = [_derived(key[0], about, value) for key, (value, about) in shadow.derived.items()]
    told += _rotations(model, turns)
    first = _first_streams(model, step).clone()
    known = set(shadow.derived)
    with native.recording() as recorder, _Watch() as watch:
        cache, streams, scores = pool.layers(shadow), first, []  # type: ignore[var-annotated]
        for i in layers:
            block = model.layers[i]
            streams = block(streams, shadow, turns[block.ratio], cache[i], model.bank, scores)  # type: ignore[index]
        logits = model.logits(streams)
    if set(shadow.derived) != known:
        raise Uncapturable("something of the step that was not foreseen")
    held = [*watch.held, turns]
    calls = [native.bare(*call) for call in recorder.calls]
    size = _bytes_beside(_lasting(model, pool), watch.held)
    graph = Graph(model, calls, shadow, (Derived * len(told))(*told), first, streams, logits, held, size)
    return graph, (streams.clone(), logits.clone())


_TENSORS = ("ids_T", "position_T", "span_T", "slot_B", "start_B", "stop_B", "floor_B")


def _first_streams(model: DeepseekV4, step: Step) -> Tensor:
    return model.embed_ids(step.ids_T)[:, None].expand(-1, model.config.hc_mult, -1)


def _rotations(model: DeepseekV4, turns: dict[int, Rotations]) -> list[Derived]:
    """How the library turns the step's tokens, and the rows that end in it, for the layers of each ratio."""
    out = []
    for ratio, (token, emitted) in turns.items():
        frequency: Any = model.rotary.far if ratio else model.rotary.near
        for at, turn in ((0, token), (ratio, emitted)):
            if turn is not None:
                told = Derived(
                    kind=ROTATION, a=at, table=frequency.data_ptr(), width=turn.shape[1], count=turn.shape[0]
                )
                told.out[0] = turn.data_ptr()
                out.append(told)
    return out


def _lasting(model: DeepseekV4, pool: CachePool) -> Iterator[Tensor]:
    """What is there with and without captures: weights, rows and tables."""
    yield from itertools.chain(model.parameters(), model.buffers(), model.bank.tiles(), *pool.planes.values())
    yield from pool._tables.values()
    for module in model.modules():
        if isinstance(module, Weight) and isinstance(module.value, QuantTensor):
            yield from (module.value.data, module.value.scale)


def _bytes_beside(lasting: Iterable[Tensor], held: list[object]) -> int:
    """Of the storages of what is held, each counted once, those that last anyway left out."""
    storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in held if isinstance(x, Tensor))}
    for x in lasting:
        storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _clone(value: Any) -> Any:
    if value is None or isinstance(value, Tensor):
        return value if value is None else value.clone()
    parts = [_clone(x) for x in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


class _Watch(TorchDispatchMode):
    """Keeps every tensor that is made, and lets nothing pass that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)]
        if func.overloadpacket.__name__ not in _MEMORY:
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            if func._schema.is_mutable or any(x.untyped_storage().data_ptr() not in given for x in made):
                raise Uncapturable(str(func))
        self.held += made
        return out


_MEMORY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
