"""The C++ beside the ops, called by a C interface: one library for each level of vector instructions.

A library holds all ops.  It is built on first use (`ops.toolchain`) or came with the wheel; which level runs is decided
once, by what the processor has, and the same source gives the same bits at every level.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import errno
import functools
import importlib
import logging
import math
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyrosome import env
from pyrosome.ops import toolchain
from pyrosome.ops.seam import Op, Place
from pyrosome.ops.toolchain import LEVELS as LEVELS
from pyrosome.quant import QuantTensor
from pyrosome.quant.mapped import MappedStack
from pyrosome.quant.tiles import TiledWeight, tile, tiled_bytes

log = logging.getLogger(__name__)
FORMATS = {"": 0, "fp8": 1, "fp4": 2}
_BF16 = 3

_P, _I, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "tile": (_P, _I, _P, _N),
    "huge_pages": (_P, _I),
    "lock": (_P, _I),
    "interleave": (_P, _I, _I),
    "numa_nodes": (),
    "linear": (_P, _I, _I, _P, _I, _N, _P, _F, _N),
    "rms_norm": (_P, _P, _P, _I, _I, _F, _N),
    "norm_rope": (_P, _P, _P, _P, _I, _I, _I, _I, _F, _N, _N),
    "index_rows": (_P, _P, _P, _I, _I, _I, _I, _N, _N),
    "store_rows": (_P, _P, _I, _I, _N, _I, _P, _I, _P, _I),
    "round_trip": (_P, _P, _I, _I, _N, _I),
    "route": (_P, _I, _P, _P, _P, _P, _I, _F, _P, _P, _N),
    "grouped_linear": (_P, _I, _I, _P, _I, _P, _N),
    "routed_experts": (_P, _I, _I, _P, _I, _I, _I, _P, _P, _P, _P, _P, _F, _N, _N),
    "shared_expert": (_P, _I, _P, _P, _P, _P, _P, _F, _N, _N),
    "scale": (_P, _P, _I, _F),
    "hyper_connection_in": (_P,) * 8 + (_I, _N, _I, _F, _F, _N, _N),
    "hyper_connection_turn": (_P,) * 12 + (_I, _N, _I, _F, _F, _N, _N),
    "hyper_connection_out": (_P, _P, _P, _P, _P, _I, _N, _I, _N),
    "hyper_connection_head": (_P, _P, _P, _P, _P, _I, _N, _I, _F, _F),
    "swiglu": (_P, _P, _P, _I, _F),
    "affinity": (_P, _P, _I),
    "derive": (_P, _P, _I, _P, _I),
    "rotation": (_P, _P, _P, _I, _I),
    "rope": (_P, _P, _P, _I, _I, _I, _I, _F, _N),
    "sparse_attention": (_P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _F, _N),
    "attention": (_P, _P, _I, _P, _P, _P, _I, _I, _I, _I, _F, _N),
    "finish_attention": (_P, _P, _N, _P, _P, _P, _I, _I, _I, _I, _N),
    "attention_train": (_P, _P, _I, _P, _P, _P, _P, _I, _I, _I, _I, _F, _N),
    "attention_train_back": (_P, _P, _P, _P, _P, _I, _P, _P, _P, _I, _I, _I, _I, _F, _I),
    "hyper_connection_train": (_P,) * 10 + (_I, _I, _F, _F, _N, _N),
    "hyper_connection_train_back": (_P, _P, _I, _I, _F, _F, _N, _I),
    "hyper_connection_out_back": (_P, _P, _I, _I, _N),
    "norm_rope_back": (_P,) * 6 + (_I,) * 4 + (_F, _I),
    "compress_back": (_P,) * 14 + (_I,) * 7,
    "swiglu_train": (_P, _P, _P, _P, _I, _I, _F, _N),
    "swiglu_train_back": (_P,) * 7 + (_I, _I, _F, _N),
    "sum_rows": (_P, _P, _P, _I, _I, _I, _N),
    "index_choose": (_P,) * 7 + (_I,) * 6 + (_N,),
    "index_choose_back": (_P,) * 9 + (_I,) * 6,
    "compress": (_P,) * 10 + (_I,) * 6 + (_P, _P, _I, _F, _N, _N),
    "index_scores": (_P, _P, _P, _P, _I, _I, _I, _I, _N),
    "index_topk": (_P, _P, _P, _I, _I, _P, _I, _P, _P, _P, _I, _I, _I, _I, _I, _P, _P, _N),
}
_RESULTS = {"routed_experts": _I, "lock": _I, "interleave": _I, "numa_nodes": _I}


def why_not(place: Place) -> str:
    """Why no native kernel runs at `place`; "" where they do.  Whether a library can be had is told by `library`."""
    if place.device != "cpu":
        return f"it is for cpu, and this is {place.device}"
    if place.dtype != "float32":
        return f"it is for float32, and this is {place.dtype}"
    return "" if place.format in FORMATS else f"it does not read {place.format}"


def kernel(op: Op, *, any_format: bool = False) -> None:
    """Register the native kernel of an op: the function of its name in the `cpu.py` beside its definition.

    Args:
        any_format: the kernel asks its second argument for float rows, whatever they are stored in.
    """

    when = (lambda place: why_not(place._replace(format=""))) if any_format else why_not
    op.kernel("cpu", when)(lambda: _loaded(op, "cpu"))


def _loaded(op: Op, file: str) -> Callable[..., Any]:
    """The function of an op's name in a file beside its definition."""
    library()  # an op that cannot have it learns so when it chooses, not in a step
    run: Callable[..., Any] = getattr(importlib.import_module(f"{op.definition.__module__}.{file}"), op.name)
    return run


def training_kernel(op: Op) -> None:
    """Register the native version of an op that has gradients: the function of its name in the `train.py` beside it."""

    def when(place: Place) -> str:
        return why_not(place._replace(format="")) if place.grad else "it is for training, and gradients are off"

    op.kernel("cpu-train", when, has_backward=True)(lambda: _loaded(op, "train"))


_forced: str | None = None
_recorder: Recorder | None = None


class Recorder:
    """Stands for the library while calls are kept as they are made: (function, arguments), to be made again."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib, self.calls = lib, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.lib, name)

        def call(*arguments: Any) -> Any:
            self.calls.append((function, arguments))
            return function(*arguments)

        return call


def bare(function: Any, arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The same call with its arguments converted once, for one that is made again and again."""
    if not hasattr(function, "argtypes"):  # somebody's own, in the library's place
        return function, arguments
    plain = type(function)(ctypes.cast(function, _P).value)
    plain.__name__, plain.restype = function.__name__, function.restype
    # No types of arguments: each of them would be looked at every time.
    given = zip(function.argtypes, arguments, strict=True)
    made = [kind(a) if isinstance(a, (int, float)) else a for kind, a in given]
    return plain, tuple(made)


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Keep the calls that are made inside a block.  Whoever makes them again sees to it that their memory lasts.

    Raises:
        OSError: there is no library.
    """
    global _recorder
    _recorder = Recorder(library())
    try:
        yield _recorder
    finally:
        _recorder = None


def library() -> ctypes.CDLL:
    """The library in use, built if need be; tried once per process and level.

    Raises:
        OSError: there is no compiler, or it failed; the message says what to do.
    """
    if _recorder is not None:
        return _recorder  # type: ignore[return-value]
    return _in_use()[1]


def level() -> str:
    """The vector instructions in use: "portable", "avx2" or "avx512".

    Raises:
        OSError: as `library`.
    """
    return _in_use()[0]


def _in_use() -> tuple[str, ctypes.CDLL]:
    found = _best() if _forced is None else _opened(_forced)
    if isinstance(found, tuple):
        return found
    raise OSError(found)


@contextlib.contextmanager
def use_level(name: str) -> Iterator[None]:
    """Run kernels of one level inside a block.

    Raises:
        OSError: this processor has not got it, or it cannot be built.
    """
    global _forced
    before, _forced = _forced, name
    try:
        library()
        yield
    finally:
        _forced = before


def available() -> bool:
    """Whether native kernels run here."""
    return isinstance(_best(), tuple)


@functools.cache
def _best() -> tuple[str, ctypes.CDLL] | str:
    asked = env.CPU.get()
    if asked not in ("auto", *LEVELS):
        return f"{env.CPU.name} is {asked!r}; it is auto, {', '.join(LEVELS)}"
    if asked != "auto":
        return _opened(asked)
    found: tuple[str, ctypes.CDLL] | str = "there is no level to try"
    for name in reversed(toolchain.supported()):
        found = _opened(name)
        if isinstance(found, tuple):
            return found
        log.info("native kernels for %s: %s", name, found)
    return found


@functools.cache
def _opened(name: str) -> tuple[str, ctypes.CDLL] | str:
    """(level, library), or why there is none."""
    have = toolchain.supported()
    if name not in have:
        return f"{name} was asked for and this processor has {have[-1]} at most; {env.CPU.name}=auto takes what it has"
    try:
        lib = ctypes.CDLL(str(toolchain.library(name)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        return str(error)
    for function, arguments in _SIGNATURES.items():
        found = getattr(lib, f"pyrosome_{function}")
        found.argtypes, found.restype = arguments, _RESULTS.get(function)
        setattr(lib, function, found)
    if not lib.pyrosome_check():
        return f"this processor's {name} instructions for bfloat16 add in another order than the kernels are held to"
    return name, lib


def threads() -> int:
    """As many as torch was told to use: one setting for both."""
    return _lent or torch.get_num_threads()


_lent = 0  # threads that torch has given up for the time being


@contextlib.contextmanager
def one_pool() -> Iterator[None]:
    """Within, only the kernels use several threads.

    torch's own would go on spinning for a while after each of its small operations, on the cores the kernels' threads
    are waiting for: two pools that share two cores made a step five times slower than one thread alone.
    """
    global _lent
    count = torch.get_num_threads()
    if _lent or count == 1:
        yield
        return
    _lent = count
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _lent = 0


class Weight(ctypes.Structure):
    """A weight as the kernels are given it: `Weight` of native.h."""

    _fields_ = [
        ("format", _I), ("tiled", _I), ("data", _P), ("scale", _P), ("num_rows", _I), ("num_inputs", _I),
        ("stride", _I), ("scale_stride", _I), ("row", _I), ("row_stride", _I), ("table", _P),
    ]  # fmt: skip


class _Kept:
    """A weight's `Weight`, kept beside it: never copied or stored with it, as it holds addresses."""

    __slots__ = ("held", "parts", "reference", "spec")

    def __init__(self, parts: int, spec: Weight, held: Any) -> None:
        self.parts, self.spec, self.reference, self.held = parts, spec, ctypes.byref(spec), held

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def weight(value: Tensor | QuantTensor, parts: int = 1) -> tuple[Any, _Kept]:
    """(reference to the `Weight` of a matrix or a stack of them, what must live as long as it is used).

    Args:
        parts: the matrix is read as a stack of so many groups of its rows.
    """
    kept = value.__dict__.get("_native")
    moved = kept is not None and not isinstance(value, MappedStack) and kept.spec.data != value.data.data_ptr()
    if kept is None or kept.parts != parts or moved:
        spec, held = _weight(value, parts)
        kept = _Kept(parts, spec, held)
        if held is None:  # else the kernels read a copy, which may be out of date by the next call
            value.__dict__["_native"] = kept
    return kept.reference, kept


def _weight(value: Tensor | QuantTensor, parts: int) -> tuple[Weight, Any]:
    N, K = value.shape[-2:]
    if isinstance(value, TiledWeight):
        if parts != value.parts:
            raise RuntimeError(f"a weight tiled in {value.parts} parts was to be read in {parts}")
        stride = tiled_bytes(value.format, N // parts, K)
        return Weight(FORMATS[value.format], 1, value.data.data_ptr(), None, N // parts, K, stride, 0, 0, 0), None
    if isinstance(value, MappedStack):  # which keeps its table, and so need not be held here
        if parts != 1:
            raise RuntimeError(f"a stack of mapped matrices was to be read in {parts} parts, and has no parts")
        return Weight(FORMATS[value.format], 0, None, None, N, K, 0, 0, 0, 0, value.table.data_ptr()), None
    if isinstance(value, QuantTensor):
        data, scale = value.data.contiguous(), value.scale.contiguous()
        held = None if data is value.data and scale is value.scale else (data, scale)
        row_bytes = data.shape[-1]
        if parts > 1:  # groups of one matrix share its blocks of scales
            stack = (N // parts * row_bytes, 0, 0, N // parts)
        else:
            stack = (N * row_bytes, scale.shape[-2] * scale.shape[-1], 0, 0)
        return Weight(FORMATS[value.format], 0, data.data_ptr(), scale.data_ptr(), N // parts, K, *stack), held
    plain = value if value.dtype == torch.bfloat16 else value.float()
    plain = plain.contiguous()
    copied = None if plain is value else plain
    kind = _BF16 if plain.dtype == torch.bfloat16 else 0
    return Weight(
        kind, 0, plain.data_ptr(), None, N // parts, K, N // parts * K * plain.element_size(), 0, 0, 0
    ), copied


def at_rest(value: Tensor | QuantTensor, parts: int = 1) -> Tensor | QuantTensor:
    """A weight on the CPU as its kernels like it: a quantised one in tiles, anything else as it is.

    The result is a copy; without a library it is a plain copy of what was given.
    """
    if isinstance(value, QuantTensor) and not isinstance(value, TiledWeight) and available():
        return tiled(value, parts)
    if isinstance(value, QuantTensor):
        return QuantTensor(value.format, value.data.clone(), value.scale.clone())
    return empty_like_on_pages(value).copy_(value)


def tiled(value: QuantTensor, parts: int = 1, out: Tensor | None = None) -> TiledWeight:
    """`quant.tiles.tile`, by the library, on several threads, on huge pages where the system has them.

    Args:
        out: uint8 [..., bytes] to fill.
    """
    *lead, N, K = value.shape
    if not available():
        made = tile(value, parts)
        if out is None:
            return made
        out.copy_(made.data)
    else:
        spec, held = _weight(value, parts)
        if out is None:
            out = empty_pages(*lead, parts * tiled_bytes(value.format, N // parts, K))
        count = parts * functools.reduce(lambda a, b: a * b, lead, 1)
        library().tile(ctypes.byref(spec), count, out.data_ptr(), threads())
        del held
    return TiledWeight(value.format, out, out.new_empty(0), num_rows=N, num_inputs=K, parts=parts)


def empty_pages(*shape: int) -> Tensor:
    """Bytes on huge pages, where the system has them: fewer misses of address translation while weights stream.

    Inside `spread`, their pages will come from the machine's nodes in turn.
    """
    out = torch.empty(shape, dtype=torch.uint8)
    if available():
        library().huge_pages(out.data_ptr(), out.nbytes)
        nodes = _nodes.get()
        if nodes > 1 and (error := library().interleave(out.data_ptr(), out.nbytes, nodes)):
            _tell_not_spread(nodes, error)
    return out


_nodes: contextvars.ContextVar[int] = contextvars.ContextVar("nodes", default=1)


@contextlib.contextmanager
def spread() -> Iterator[None]:
    """Spread over all nodes of this machine what `empty_pages` gives in a block; one node has nothing to spread over.

    The kernels' threads read weights from every core.  Written by one thread, they would lie on its node alone, whose
    memory would then have to serve all.
    """
    token = _nodes.set(library().numa_nodes() if available() else 1)
    try:
        yield
    finally:
        _nodes.reset(token)


@functools.cache  # said once: every region fails alike
def _tell_not_spread(nodes: int, error: int) -> None:
    log.warning(
        "weights were to be spread over %d memory nodes and the system refused (%s): they lie where they were loaded, "
        "and are read more slowly; in a container allow mbind (CAP_SYS_NICE), or choose numa=off to leave this out",
        nodes,
        os.strerror(error),
    )


def lock(tensors: Iterable[Tensor]) -> str:
    """Hold tensors in memory, so that they are never swapped out.  "" when done, else why not and what to do.

    What was held until one failed stays so; a tensor's memory is let go when it is freed.
    """
    regions = [(t.data_ptr(), t.nbytes) for t in tensors if t.nbytes]
    total, held = sum(size for _, size in regions), 0
    if not available():
        return f"{total:,} bytes were to be held and there are no native kernels, which do it; see `pyrosome doctor`"
    for begin, size in regions:
        if error := library().lock(begin, size):
            found = f"{held:,} of {total:,} bytes are held; the system refused more ({os.strerror(error)})"
            if error not in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
                return found
            return (
                f"{found}, and RLIMIT_MEMLOCK is {_memlock()}: raise it (`ulimit -l unlimited`, LimitMEMLOCK=infinity "
                "in a systemd unit, --ulimit memlock=-1 for a container), or see that memory is free"
            )
        held += size
    return ""


def _memlock() -> str:
    try:
        import resource  # not on every system
    except ImportError:
        return "unknown"
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,} bytes"


def empty_like_on_pages(value: Tensor, *lead: int) -> Tensor:
    """Room for a plain tensor, or for a stack of such, as `empty_pages` gives it."""
    shape = (*lead, *value.shape)
    return empty_pages(math.prod(shape) * value.element_size()).view(value.dtype).view(shape)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's values are; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


if __name__ == "__main__":  # build ahead of first use, and say what was built
    try:
        print(f"native kernels for {level()}: {toolchain.library(level())}")
    except OSError as error:
        print(f"no native kernels, so the torch definitions will run: {error}")
