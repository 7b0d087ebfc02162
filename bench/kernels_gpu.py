"""The Triton kernels one by one at V4-Flash's shapes, beside what the device can do and beside their definitions.

    python -m bench.kernels --device cuda [--only NAME ...] [--quick] [--no-compile] [--no-definitions] [--no-save]

The ceilings come first, in the same run: memory (a large buffer read, and copied), products in FP8, bfloat16 and
float32 by torch.  Then every call of `pyrosome.testing.calls`: captured as a graph, replayed with the device's cache
flushed between, timed by events; the definition beside it, as it is and, for the first call of each name, under
torch.compile; kernels of other packages where there are any.  Exit status 1 where a kernel fails, is farther from its
definition than the call allows, or gives a row other bits beside others than alone.  `--device cpu --calls tiny` does
the same in Triton's interpreter, in which no time means anything: it shows that all of this works.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import pyrosome
from bench import records
from bench.device_clock import Clock, about, ceilings, clock_of, device_name, median
from pyrosome.ops import accelerators, gpu
from pyrosome.ops.seam import place_of, use
from pyrosome.testing.calls import Call, all_calls
from pyrosome.testing.equal import from_definition
from pyrosome.testing.row_alone import same_alone

RESULTS = Path(__file__).parent / "results" / "kernels_gpu.jsonl"
LIKE_BITS = {True: 0.0, False: 1e-6}  # relative RMS: products in the interpreter are the host library's
SLOWEST = 2.0  # seconds: a definition that takes longer is not timed
QUICK_ROWS, QUICK_BYTES = 16, 1 << 30


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is done."""

    samples: int = 20  # of each call, at least
    seconds: float = 0.2  # of each call, about
    buffer: int = 4 << 30  # bytes, whose reading is the ceiling of memory
    side: int = 8192  # of the products that are the ceilings of computing
    definitions: bool = True
    compile: Callable[[Any], Any] | None = torch.compile


FULL = Size()
QUICK = Size(samples=5, seconds=0.02, buffer=1 << 30, side=4096, compile=None)
TINY = Size(samples=2, seconds=0.0, buffer=1 << 16, side=64, compile=None)


def measured(call: Call, device: torch.device, clock: Clock, most: dict[str, float], size: Size) -> dict[str, Any]:
    """One call: its time and rates, their shares of what there is at most, and whether it is right."""
    arguments, options = call.make(device)
    row: dict[str, Any] = {
        "title": call.title, "op": call.op.name, "name": call.name, "rows": call.rows, "context": call.context,
        "bytes": call.num_bytes, "flops": call.flops, "kind": call.kind, "tolerance": call.tolerance,
        "us": None, "range_us": [], "variants": {}, "difference": None, "same_alone": None, "definition": {},
        "accelerators": {}, "problems": [],
    }  # fmt: skip
    try:
        run = version(call, "triton", arguments)
        with gpu.telling() as told:
            run(*arguments, **options)
        row["variants"] = {choice.kernel: choice.taken for choice in told}
        row |= _timed(clock, lambda: run(*arguments, **options), size)
    except Exception as error:  # whatever a kernel raises on a device is the result
        row["problems"].append(f"{call.title}: {_short(error)}")
        return row
    row |= shares(row, most)
    if size.definitions:
        _beside(call, run, arguments, options, row, clock, size)
    for name in [k.name for k in accelerators.kernels(call.op)]:
        try:
            other = version(call, name, arguments)
            row["accelerators"][name] = _timed(clock, lambda f=other: f(*arguments, **options), size)
        except Exception as error:  # of others, as above
            row["accelerators"][name] = {"why_not": _short(error)}
    return row


def version(call: Call, name: str, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """The version of that name that runs the call.

    Raises:
        KernelUnavailable: it cannot run there.
    """
    with use(call.op, name), torch.no_grad():
        return call.op.pick(place_of(*arguments[:2])).run


def _timed(clock: Clock, run: Callable[[], Any], size: Size) -> dict[str, Any]:
    with torch.no_grad():
        middle, (least, longest) = median(clock, clock.captured(run), size.samples, size.seconds)
    return {"us": middle * 1e6, "range_us": [least * 1e6, longest * 1e6]}


def shares(row: dict[str, Any], most: dict[str, float]) -> dict[str, float]:
    """Of the ceilings: memory, products, and of the time that is the least possible by both."""
    seconds = row["us"] / 1e6
    memory = row["bytes"] / most["memory"]
    products = row["flops"] / most[row["kind"] or "f32"]
    return {
        "memory_share": memory / seconds, "products_share": products / seconds, "share": max(memory, products) / seconds
    }  # fmt: skip


def _beside(
    call: Call, run: Callable[..., Any], arguments: Any, options: Any, row: dict[str, Any], clock: Clock, size: Size
) -> None:
    """The definition: whether the kernel equals it, whether its rows do not depend on others, and what it takes."""
    definition = call.op.definition
    try:
        row["difference"] = from_definition(run, definition, arguments, options)
        if not row["difference"] <= call.tolerance:
            row["problems"].append(
                f"{call.title}: {row['difference']:.1e} from the definition, and {call.tolerance:g} is allowed"
            )
        row["same_alone"] = same_alone(run, definition, call.rows, arguments, options, LIKE_BITS[clock.exact])
        if row["same_alone"] is False:
            row["problems"].append(f"{call.title}: a row alone has other bits than among others")
    except torch.OutOfMemoryError as error:
        row["definition"]["eager"] = {"why_not": _short(error)}
        return
    ways = {"eager": lambda f: f, **({"compiled": functools.partial(_compiled, size.compile)} if size.compile else {})}
    for name, way in ways.items():
        row["definition"][name] = _definition_timed(way, definition, arguments, options, clock, size)


def _compiled(compile: Callable[[Any], Any], definition: Any) -> Any:
    torch._dynamo.reset()  # each call is compiled for its own shape, whatever was compiled before
    return compile(definition)


def _definition_timed(
    way: Callable[[Any], Any], definition: Any, arguments: Any, options: Any, clock: Clock, size: Size
) -> dict[str, Any]:
    try:
        run = way(definition)
        with torch.no_grad():
            run(*arguments, **options)
            (once,) = clock.seconds(lambda: run(*arguments, **options), 1)
        if once > SLOWEST:
            return {"us": once * 1e6, "range_us": [once * 1e6] * 2}
        try:
            return _timed(clock, lambda: run(*arguments, **options), size)
        except RuntimeError:  # it reads values back, which no graph can
            with torch.no_grad():
                middle, ends = median(clock, lambda: run(*arguments, **options), size.samples, size.seconds)
            return {"us": middle * 1e6, "range_us": [end * 1e6 for end in ends], "captured": False}
    except Exception as error:  # a compiler's errors, too little memory: not the kernel's fault
        return {"why_not": _short(error)}


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


HEAD = (
    f"{'':52s}{'us':>11s}{'GB/s':>9s}{'share':>7s}{'TFLOP/s':>9s}{'share':>7s}{'eager':>8s}{'compiled':>9s}"
    f"{'apart':>9s}{'alone':>7s}  others"
)


def line(row: dict[str, Any]) -> str:
    """A row as text; the definition's times are multiples of the kernel's."""
    if row["us"] is None:
        return f"{row['title']:52s}{'-':>11s}  {row['problems'][0]}"
    seconds = row["us"] / 1e6
    rates = [
        (row["bytes"] / seconds / 1e9, row["memory_share"]),
        (row["flops"] / seconds / 1e12, row["products_share"]),
    ]
    text = "".join(f"{rate:9,.1f}{share:7.2f}" if share else f"{'-':>9s}{'-':>7s}" for rate, share in rates)
    eager, compiled = (row["definition"].get(way, {}).get("us") for way in ("eager", "compiled"))
    text += f"{eager / row['us']:8.1f}" if eager else f"{'-':>8s}"
    text += f"{compiled / row['us']:9.1f}" if compiled else f"{'-':>9s}"
    text += f"{'-':>9s}" if row["difference"] is None else f"{row['difference']:9.1e}"
    text += f"{ {None: '-', True: 'same', False: 'OTHER'}[row['same_alone']]:>7s}"
    others = [f"{name} {_other(told, row['us'])}" for name, told in row["accelerators"].items()]
    return f"{row['title']:52s}{row['us']:11,.1f}{text}  {', '.join(others)}".rstrip()


def _other(told: dict[str, Any], us: float) -> str:
    return f"{told['us'] / us:.2f}" if "us" in told else f"({told['why_not']})"


def run(calls: Sequence[Call], device: torch.device, clock: Clock, size: Size) -> dict[str, Any]:
    """All calls, printed as they come; the record to keep."""
    capability = gpu.target(device).capability
    most = ceilings(device, clock, size.buffer, size.side, capability)
    print(f"{device_name(device)}: memory {most['memory'] / 1e9:,.0f} GB/s; " + ", ".join(
        f"{kind} {most[kind] / 1e12:,.1f} TFLOP/s" for kind in ("fp8", "bf16", "f32")))  # fmt: skip
    print(HEAD)
    rows, compiled = [], set()
    for call in calls:
        again = (call.op.name, call.name) in compiled  # compiling takes longer than all else: one call of each name
        rows.append(measured(call, device, clock, most, dataclasses.replace(size, compile=None) if again else size))
        compiled.add((call.op.name, call.name))
        print(line(rows[-1]), flush=True)
        torch.cuda.empty_cache()  # the next call's arguments may need what this one's took
    problems = [problem for row in rows for problem in row["problems"]]
    return {"ceilings": most, "capability": capability, "rows": rows, "problems": problems}


def selected(calls: Iterator[Call], only: Sequence[str] | None, quick: bool) -> list[Call]:
    """Those whose titles begin so; in a quick run only small ones."""
    found = [call for call in calls if not only or call.title.startswith(tuple(only))]
    return [c for c in found if c.rows <= QUICK_ROWS and c.num_bytes <= QUICK_BYTES] if quick else found


def device_of(text: str, calls: str, tool: str) -> torch.device:
    """The device that was named.

    Raises:
        SystemExit: with status 2, where it cannot be used.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return torch.device("cuda", device.index or 0)
    if device.type == "cpu" and calls == "tiny":
        if "triton" not in sys.modules:
            os.environ["TRITON_INTERPRET"] = "1"
        if gpu.interpreted():
            return device
    there = torch.cuda.device_count() or "no"
    why = {
        "cuda": f"torch finds {there} GPU; `--device cpu --calls tiny` shows that all of it works",
        "cpu": "kernels run in Triton's interpreter there (TRITON_INTERPRET=1), for which only --calls tiny will do",
    }.get(device.type, "it is cuda, cuda:1 or cpu")
    print(f"{tool}: --device {text}: {why}", file=sys.stderr)
    raise SystemExit(2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `bench.tune` takes too."""
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for --calls tiny (default: cuda)")
    parser.add_argument("--calls", choices=("flash", "tiny"), default="flash", help="whose shapes (default: flash)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="calls whose titles begin so")
    parser.add_argument("--quick", action="store_true", help="fewer samples of small calls, no record")


def calls_of(given: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Call]:
    """The calls that were asked for."""
    if given.calls == "tiny":
        from bench import tiny_calls

        found = selected(tiny_calls.all_calls(), given.only, given.quick)
    else:
        found = selected(all_calls(), given.only, given.quick)
    if not found:
        parser.error(f"no call's title begins with {' or '.join(given.only or [''])}; one is {_some(given.calls)!r}")
    return found


def _some(calls: str) -> str:
    from bench import tiny_calls

    return next(tiny_calls.all_calls() if calls == "tiny" else all_calls()).title


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--no-compile", action="store_true", help="definitions as they are, not under torch.compile")
    parser.add_argument("--no-definitions", action="store_true", help="only times of the kernels")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/kernels_gpu.jsonl alone")
    given = parser.parse_args(argv)
    device = device_of(given.device, given.calls, parser.prog)
    size = TINY if given.calls == "tiny" else QUICK if given.quick else FULL
    if given.no_compile:
        size = dataclasses.replace(size, compile=None)
    if given.no_definitions:
        size = dataclasses.replace(size, definitions=False)
    found = run(calls_of(given, parser), device, clock_of(device), size)
    for problem in found["problems"]:
        print(f"FAILED {problem}", file=sys.stderr)
    if not (given.no_save or given.quick or given.only or given.no_definitions or given.calls == "tiny"):
        records.append(RESULTS, {
            **records.machine(), **about(device), "bench": "kernels_gpu", "torch": torch.__version__,
            "engine": f"pyrosome {pyrosome.__version__}", "command": " ".join([parser.prog, *argv]), **found,
        })  # fmt: skip
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
