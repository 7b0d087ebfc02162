"""Triton kernels beside the ops: where they run, and how one is launched, or only recorded.

Every kernel is launched by `launch`.  So what a device will run can be asked without a device: under `tracing`, a call
on tensors without values records the kernels it would start, and `ops.ahead` compiles exactly those.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrosome.errors import KernelUnavailable
from pyrosome.ops import tuned
from pyrosome.ops.seam import Op, Place

FORMATS = ("", "fp8", "fp4", "f32", "bf16")
LEAST_CAPABILITY = 80  # bfloat16 products on matrix units; A100 and later
# Bytes of shared memory that one program may take (CUDA programming guide, by compute capability).
_SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


class Target(NamedTuple):
    """What a kernel is made for: the part of a device that decides about its constants."""

    capability: int  # 90 for compute capability 9.0
    interpreted: bool = False  # by Triton's interpreter, on the CPU
    device: str = ""  # its name, where choices were measured for it; "" where nothing runs

    @property
    def has_fp8(self) -> bool:
        """Whether matrix units multiply e4m3 codes; else they are decoded to bfloat16, which holds them exactly."""
        return self.capability >= 89

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one program may take."""
        return _SHARED_BYTES[max(c for c in _SHARED_BYTES if c <= self.capability)]


class Variant(NamedTuple):
    """One way to compile a kernel: tile sizes by the names of its constants, and what surrounds them."""

    name: str
    constants: Mapping[str, int]
    warps: int = 4
    stages: int = 3


class Launch(NamedTuple):
    """A launch that was recorded."""

    kernel: Any
    signature: tuple[str, ...]  # Triton's type of each argument, "constexpr" for None
    constants: tuple[tuple[str, Any], ...]
    variant: Variant
    matrix: str
    grid: tuple[int, ...]


_traced: contextvars.ContextVar[tuple[Target, list[Launch]] | None] = contextvars.ContextVar("traced", default=None)
_pretended: contextvars.ContextVar[int] = contextvars.ContextVar("pretended", default=90)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: decided by the environment when Triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def missing() -> str:
    """Why there is no Triton; "" where there is."""
    found = importlib.util.find_spec("triton")
    return "" if found and found.origin else "triton is not installed; it comes with torch for CUDA"


def kernel(op: Op, *, any_format: bool = False) -> None:
    """Register the Triton kernel of an op: the function of its name in the `triton.py` beside its definition.

    In the interpreter, on the CPU, it runs where it is asked for by name: it is for tests.

    Args:
        any_format: the kernel asks its second argument for float rows, whatever they are stored in.
    """

    def when(place: Place) -> str:
        if place.device == "cpu" and interpreted() and op.choice == "triton":
            return missing() or _not_read(place, any_format)
        if place.device == "meta" and _traced.get():
            return ""
        if place.device != "cuda":
            return f"it is for cuda, and this is {place.device}"
        major, minor = place.capability
        if 10 * major + minor < LEAST_CAPABILITY:
            return f"it needs compute capability 8.0, and this device has {major}.{minor}"
        return missing() or _not_read(place, any_format)

    op.kernel("triton", when)(lambda: of(op))


def _not_read(place: Place, any_format: bool) -> str:
    if place.dtype != "float32":
        return f"it is for float32, and this is {place.dtype}"
    return "" if any_format or place.format in FORMATS else f"it does not read {place.format}"


def of(op: Op) -> Callable[..., Any]:
    """The Triton kernel of an op.

    Raises:
        ImportError: Triton is not there.
    """
    run: Callable[..., Any] = getattr(importlib.import_module(f"{op.definition.__module__}.triton"), op.name)
    return run


def target(device: torch.device) -> Target:
    """What kernels on `device` are made for; where nothing runs on it, what is traced or pretended."""
    if traced := _traced.get():
        return traced[0]
    if device.type == "cuda":
        return _target_of(device.index or 0)
    return Target(_pretended.get(), interpreted=True)


@functools.cache
def _target_of(index: int) -> Target:
    major, minor = torch.cuda.get_device_capability(index)
    return Target(10 * major + minor, device=torch.cuda.get_device_name(index))


@contextlib.contextmanager
def pretend(capability: int) -> Iterator[None]:
    """Take the branches of a device of this capability while kernels are interpreted."""
    token = _pretended.set(capability)
    try:
        yield
    finally:
        _pretended.reset(token)


@contextlib.contextmanager
def tracing(capability: int, device: str = "") -> Iterator[list[Launch]]:
    """Record launches instead of making them: call kernels on meta tensors in the block.

    Args:
        device: takes the variants that were measured to be fastest on it, where there are such.
    """
    launches: list[Launch] = []
    token = _traced.set((Target(capability, device=device), launches))
    try:
        yield launches
    finally:
        _traced.reset(token)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` for a kernel that is launched here: numbers among its arguments do not make it compile again.

    Pointers are named `..._ptr`, constants are annotated `tl.constexpr`, anything else is such a number.
    """
    import triton

    if interpreted():
        _mend_interpreter()
    numbers = [
        name
        for name, p in inspect.signature(function).parameters.items()
        if "constexpr" not in str(p.annotation) and not name.endswith("_ptr")
    ]
    return triton.jit(function, do_not_specialize=numbers)


@functools.cache
def _mend_interpreter() -> None:
    """Let loops run to numbers that a kernel has computed, and spare every call of a helper a look through Triton.

    Such numbers are arrays of one to the interpreter, by which numpy 2.4 does not count.  And for every call of a
    helper it replaces the language's functions by its own again, which takes longer than most helpers do.
    """
    from triton.runtime import interpreter

    patch_tensor, patch_language, run = (
        interpreter._patch_lang_tensor, interpreter._patch_lang, interpreter.GridExecutor.__call__
    )  # fmt: skip
    replaced: set[str] = set()  # modules, in the launch that runs

    def tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def language(function: Any) -> Any:
        needed = {x.__name__ for x in function.__globals__.values() if inspect.ismodule(x)}
        needed &= {"triton.language", "triton.language.core"}
        if needed <= replaced:
            return interpreter._LangPatchScope()
        replaced.update(needed)
        return patch_language(function)

    def launched(self: Any, *args: Any, **options: Any) -> None:
        replaced.clear()
        try:
            run(self, *args, **options)
        finally:
            replaced.clear()

    interpreter._patch_lang_tensor, interpreter._patch_lang = tensor, language
    interpreter.GridExecutor.__call__ = launched


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, variant: Variant, matrix: str = "", **constants: Any
) -> None:
    """Start `kernel` on `grid` with its arguments in order, then its constants; an empty grid starts nothing.

    Args:
        matrix: whose products its matrix instructions are, "fp8" or "bf16"; "" where it has none.  It is what is
            expected of the compiled kernel.
    """
    if 0 in grid:
        return
    if traced := _traced.get():
        kinds = tuple(_kind(a) for a in args)
        traced[1].append(Launch(kernel, kinds, tuple(sorted(constants.items())), variant, matrix, grid))
        return
    where = next(a.device for a in args if isinstance(a, Tensor))
    if where.type != "cuda":
        kernel[grid](*args, **variant.constants, **constants)
        return
    elsewhere = where.index not in (None, torch.cuda.current_device())
    with torch.cuda.device(where) if elsewhere else contextlib.nullcontext():
        kernel[grid](*args, **variant.constants, **constants, num_warps=variant.warps, num_stages=variant.stages)


class Choice(NamedTuple):
    """A choice that was made: for which class of shapes, among what."""

    kernel: str
    key: str
    variants: tuple[str, ...]
    default: str
    taken: str


_forced: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("forced", default={})  # noqa: B039
_told: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("told", default=None)


def chosen(kernel: str, key: str, variants: Mapping[str, Variant], default: str, target: Target) -> Variant:
    """The variant of a kernel for calls of one class of shapes: forced, or measured on the device, or the default.

    Args:
        key: the class, "N=4096,K=1024,M<=16": few of them, by shapes alone.

    Raises:
        KernelUnavailable: there is no variant of the name that was forced, or that the device's file has.
    """
    forced_name = _forced.get().get(kernel, "")
    name = forced_name or tuned.choices(target.device).get(kernel, {}).get(key, default)
    if (told := _told.get()) is not None:
        told.append(Choice(kernel, key, tuple(variants), default, name))
    if name not in variants:
        asked = "asked for" if forced_name else f"what {tuned.path_of(target.device)} has for {key}"
        hint = "" if forced_name else f"; {tuned.AGAIN}"
        raise KernelUnavailable(f"{kernel}: variant {name!r} is {asked}, and there are {', '.join(variants)}{hint}")
    return variants[name]


@contextlib.contextmanager
def forced(**variants: str) -> Iterator[None]:
    """Take these variants, by kernel, in a block: for tests, and for measuring one beside another."""
    token = _forced.set({**_forced.get(), **variants})
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def telling() -> Iterator[list[Choice]]:
    """The choices that are made in the block, in order."""
    told: list[Choice] = []
    token = _told.set(told)
    try:
        yield told
    finally:
        _told.reset(token)


_KINDS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip


def _kind(argument: Any) -> str:
    if argument is None:
        return "constexpr"
    if isinstance(argument, Tensor):
        return _KINDS[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(1 << 31) <= argument < 1 << 31 else "i64"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def pow2(n: int, least: int = 1) -> int:
    """The least power of two that is at least `n` and `least`: tiles have such sides."""
    return 1 << max(n - 1, least - 1, 0).bit_length()
