"""Run as a module: every launch of the calls goes Triton's own way to a device that is not there.

    python -m tests.ops.gpu.as_launched

Prints, as JSON, what differs from what `pyrosome.testing.ahead` compiles, and what would be compiled more than once.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.testing.calls import all_calls

CAPABILITY = 90


class OnDevice(Tensor):
    """A tensor that says it is on a GPU, at an address of 16 bytes."""

    @staticmethod
    def __new__(cls, like: Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device="cuda")

    def data_ptr(self) -> int:
        return 1 << 20

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} on a device that is not there")


def there(argument: Any) -> Any:
    return OnDevice(argument) if isinstance(argument, Tensor) else argument


def other(argument: Any) -> Any:
    """The same kind of argument with other properties that a compiler may look at."""
    if isinstance(argument, float):
        return 1.0
    return 1 if isinstance(argument, int) and argument % 16 == 0 else 16 if isinstance(argument, int) else argument


def main() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[tuple[Any, ...]] = []
    arguments: list[tuple[Any, ...]] = []

    def compile(self, key, signature, device, constexprs, options, attrs, warmup):
        compiled.append((self, signature, constexprs, options, attrs))
        made = SimpleNamespace(
            launch_metadata=lambda *_: None,
            function=0,
            packed_metadata=None,
            run=lambda *given: arguments.append((given[:3], given[9:])),
        )
        self.device_caches[device][0][key] = made
        return made

    torch.cuda.current_device = lambda: 0
    JITFunction._do_compile = compile
    target = GPUTarget("cuda", CAPABILITY, 32)
    driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    )
    trace, tracing = gpu.launch, []
    wrong: list[str] = []
    seen: dict[Any, Any] = {}

    def launch(kernel, grid, *args, **options):
        trace(kernel, grid, *args, **options)
        if 0 in grid:
            return
        told = tracing[0][-1]
        with_values = [tuple(map(there, args)), tuple(other(there(a)) for a in args)]
        for given in with_values:
            token = gpu._traced.set(None)
            try:
                trace(kernel, grid, *given, **options)
            finally:
                gpu._traced.reset(token)
        where, passed = arguments[-2]
        names = [p.name for p in kernel.params]
        constants = {**told.variant.constants, **dict(told.constants)}
        if passed != (*with_values[0], *(constants[name] for name in names[len(args) :])):
            wrong.append(f"{kernel.__name__}: {names} got {passed}")
        if where != (*grid, 1, 1)[:3]:
            wrong.append(f"{kernel.__name__}: grid {grid} became {where}")
        key = (kernel.__name__, told.signature, told.constants, told.variant.name, *sorted(constants.items()))
        expected = dict(zip(names, told.signature, strict=False)) | dict.fromkeys(constants, "constexpr")
        seen[key] = kernel, names, expected, constants, told.variant

    gpu.launch = launch
    for call in all_calls():
        given, options = call.make(torch.device("meta"))
        with gpu.tracing(CAPABILITY) as launches, torch.no_grad():
            tracing[:] = [launches]
            gpu.of(call.op)(*given, **options)

    for kernel, names, signature, constants, variant in seen.values():
        found = [c for c in compiled if c[0] is kernel and dict(c[1]) == signature]
        found = [
            c for c in found
            if all(c[2].get((names.index(name),)) == value for name, value in constants.items())
            and (c[3].num_warps, c[3].num_stages) == (variant.warps, variant.stages)
        ]  # fmt: skip
        what = f"{kernel.__name__} ({variant.name}) {constants}"
        if len(found) != 1:
            near = [dict(c[1]) for c in compiled if c[0] is kernel]
            wrong.append(f"{what} was compiled {len(found)} times; expected {signature}, there are {near[:3]}")
            continue
        pointers = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
        attributes = {at: held for at, held in found[0][4].items() if held}
        if attributes != pointers:
            wrong.append(f"{what} is compiled for {attributes}, ahead of time for {pointers}")
    print(json.dumps({"kernels": len(seen), "compiled": len(compiled), "wrong": wrong}))


if __name__ == "__main__":
    main()
