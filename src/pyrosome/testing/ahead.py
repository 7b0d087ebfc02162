"""Triton kernels compiled without a device, exactly as calls at true shapes would launch them.

    python -m pyrosome.testing.ahead [--op NAME] [--capability 90] [--jobs 2] [--json | --table docs/kernels.md]

Where choices of variants were measured on a device, those are compiled beside the defaults.
A process of its own: whether Triton interprets or compiles is decided when it is imported.  Exit status 1 where a
kernel does not compile, takes more shared memory than a program may, spills registers, or lacks its matrix instruction.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pyrosome.ops import gpu, tuned
from pyrosome.ops.gpu import Launch, Target
from pyrosome.testing.calls import Call, all_calls

CAPABILITIES = (80, 89, 90, 100, 120)
# What PTX says where matrix units multiply.  Without FP8 units e4m3 codes are decoded and multiplied as bfloat16.
_INSTRUCTIONS = {
    (80, "fp8"): r"mma\.sync\S*bf16", (80, "bf16"): r"mma\.sync\S*bf16",
    (89, "fp8"): r"mma\.sync\S*e4m3", (89, "bf16"): r"mma\.sync\S*bf16",
    (90, "fp8"): r"wgmma\.mma_async\S*e4m3", (90, "bf16"): r"wgmma\.mma_async\S*bf16",
    (100, "fp8"): r"tcgen05\.mma\S*f8f6f4", (100, "bf16"): r"tcgen05\.mma\S*f16",
    (120, "fp8"): r"mma\.sync\S*e4m3", (120, "bf16"): r"mma\.sync\S*bf16",
}  # fmt: skip


@dataclasses.dataclass
class Compiled:
    """What one launch became for one capability."""

    op: str
    kernel: str
    variant: str
    constants: dict[str, Any]
    capability: int
    calls: list[str]  # titles of the calls that launch it
    matrix: str = ""
    shared: int = 0  # bytes
    registers: int = 0
    stack: int = 0  # bytes of a thread: what its registers could not hold
    instruction: str = ""  # the matrix instruction found
    seconds: float = 0.0
    error: str = ""

    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        what = f"{self.kernel} ({self.variant}) for sm_{self.capability}"
        if self.error:
            return [f"{what} does not compile: {self.error}"]
        found = []
        if self.shared > (most := Target(self.capability).shared_bytes):
            found.append(f"{what} takes {self.shared} bytes of shared memory, and a program may take {most}")
        if self.stack:
            found.append(f"{what} spills {self.stack} bytes a thread")
        if self.matrix and not self.instruction:
            found.append(f"{what} multiplies {self.matrix} without {_INSTRUCTIONS[self.capability, self.matrix]}")
        return found


def launches(calls: Sequence[Call], capability: int) -> list[tuple[Launch, list[str]]]:
    """The different launches of calls on devices of this capability, and the titles of the calls that make each."""
    found: dict[Any, tuple[Launch, list[str]]] = {}
    devices = ("", *tuned.devices(capability))
    for call in calls:
        arguments, options = call.make(torch.device("meta"))
        for device in devices:
            with gpu.tracing(capability, device) as made, torch.no_grad():
                gpu.of(call.op)(*arguments, **options)
            for launch in made:
                _, titles = found.setdefault(key_of(launch), (launch, []))
                if call.title not in titles:
                    titles.append(call.title)
    return list(found.values())


def key_of(launch: Launch) -> Any:
    """The same for launches of one compiled kernel."""
    v = launch.variant
    sizes = tuple(sorted(v.constants.items()))
    return launch.kernel.__name__, launch.signature, launch.constants, v.name, sizes, v.warps, v.stages


def name_of(launch: Launch) -> str:
    """A kernel's name as it is told."""
    return str(launch.kernel.__name__).strip("_")


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile one launch as it would be compiled on a device of this capability, pointers aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**launch.variant.constants, **dict(launch.constants)}
    result = Compiled("", name_of(launch), launch.variant.name, constants, capability, [], launch.matrix)
    names = [p.name for p in launch.kernel.params]
    signature = dict(zip(names, launch.signature, strict=False)) | dict.fromkeys(constants, "constexpr")
    fixed = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    start = time.perf_counter()
    try:
        source = ASTSource(launch.kernel, signature, fixed, aligned)
        options = {"num_warps": launch.variant.warps, "num_stages": launch.variant.stages}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # whatever the compiler's passes raise is the result
        result.error = f"{type(error).__name__}: {str(error).strip()[-300:]}"
        return result
    result.seconds = time.perf_counter() - start
    result.shared = made.metadata.shared
    usage = _resources(made.asm["cubin"])
    result.registers, result.stack = usage["REG"], usage["STACK"]
    if launch.matrix and (at := re.search(_INSTRUCTIONS[capability, launch.matrix], made.asm["ptx"])):
        result.instruction = at.group(0)
    return result


def _resources(cubin: bytes) -> dict[str, int]:
    """What the binary says of itself: registers and stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([_tool(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said.stdout)}


@functools.cache
def _tool() -> str:
    import triton.backends.nvidia as nvidia

    return str(Path(next(iter(nvidia.__path__))) / "bin" / "cuobjdump")


def everything(only: str = "", capabilities: Sequence[int] = CAPABILITIES, jobs: int = 1) -> Iterator[Compiled]:
    """Every launch of the calls, compiled by so many processes, in the order of the calls."""
    calls = list(all_calls(only))
    work = [(capability, *found) for capability in capabilities for found in launches(calls, capability)]
    if jobs <= 1:
        yield from map(_compiled, work)
        return
    _WORK[:] = work  # kernels are no values that could be sent: a child has them from the start
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_compiled_at, range(len(work)))


_WORK: list[tuple[int, Launch, list[str]]] = []


def _compiled_at(i: int) -> Compiled:
    return _compiled(_WORK[i])


def _compiled(work: tuple[int, Launch, list[str]]) -> Compiled:
    capability, launch, titles = work
    result = compiled(launch, capability)
    result.op, result.calls = titles[0].split()[0], titles
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyrosome.testing.ahead", description=__doc__)
    parser.add_argument("--op", default="", help="module of calls, all of them by default")
    parser.add_argument("--capability", type=int, action="append", help=f"of {CAPABILITIES}; all of them by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--json", action="store_true", help="print a list of what was compiled")
    parser.add_argument("--table", type=Path, help="write the table of all kernels into this page, between its marks")
    given = parser.parse_args(arguments)
    if given.table and (given.op or given.capability):
        parser.error("--table is of all kernels: it goes with neither --op nor --capability")
    results, bad = [], 0
    for result in everything(given.op, given.capability or CAPABILITIES, given.jobs):
        results.append(result)
        faults = result.faults()
        bad += bool(faults)
        if not given.json:
            print(
                f"sm_{result.capability} {result.op:20} {result.kernel:24} {result.variant:12} "
                f"{result.registers:4} registers {result.shared:7} bytes shared  {result.instruction[:40]}  "
                f"{result.seconds:.1f} s  {'; '.join(faults)}",
                flush=True,
            )
    if given.json:
        print(json.dumps([dataclasses.asdict(r) | {"faults": r.faults()} for r in results]))
    if given.table:
        from pyrosome.testing import ahead_table

        ahead_table.write(given.table, ahead_table.filled(results))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
