"""Measure every variant of every kernel on a device, and write which is fastest where: pyrosome/ops/tuned/DEVICE.json.

    python -m bench.tune --device cuda [--only NAME ...] [--quick] [--out FOLDER] [--no-save]

Each call of `pyrosome.testing.calls` is made with each variant that its kernels have, one kernel at a time, timed as
`bench.kernels --device` times it, and held to the bits of the default.  For a class of shapes the variant is taken
whose times are least in the geometric mean over the calls of the class, where that is by 2% or more.  With `--only`
other kernels keep what the file has.  Exit status 1 where a variant gives other bits.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pyrosome
from bench import records
from bench.device_clock import Clock, about, clock_of, device_name, median
from bench.kernels_gpu import FULL, LIKE_BITS, QUICK, TINY, Size, add_arguments, calls_of, device_of, version
from pyrosome.ops import gpu, tuned
from pyrosome.testing.calls import Call
from pyrosome.testing.equal import alike

GAIN = 0.02  # less than this is what times differ by from run to run


@dataclasses.dataclass
class Trial:
    """The variants of one kernel for one class of shapes."""

    default: str
    ratios: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # to the default's time, one for each call
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # variants that cannot be taken, and why

    def best(self) -> str:
        """The variant to take."""
        means = {
            name: math.exp(sum(map(math.log, found)) / len(found))
            for name, found in self.ratios.items()
            if name not in self.failed
        }
        fastest = min(means, key=lambda name: means[name], default=self.default)
        return fastest if means.get(fastest, 1.0) <= 1 - GAIN else self.default


Trials = dict[tuple[str, str], Trial]


def tried(calls: Sequence[Call], device: torch.device, clock: Clock, size: Size) -> tuple[Trials, list[str]]:
    """Every variant of every choice that calls make, printed as they come; and what is wrong."""
    trials: Trials = {}
    problems: list[str] = []
    for call in calls:
        arguments, options = call.make(device)
        try:
            run = version(call, "triton", arguments)
            with gpu.telling() as told, torch.no_grad():
                wanted = run(*copy.deepcopy(arguments), **copy.deepcopy(options))
        except Exception as error:  # whatever a kernel raises on a device is the result
            problems.append(f"{call.title}: {type(error).__name__}: {str(error)[:300]}")
            continue
        made = {(choice.kernel, choice.key): choice for choice in told if len(choice.variants) > 1}
        for place, choice in made.items():
            trial = trials.setdefault(place, Trial(choice.default))
            times = {}
            for name in (choice.default, *(v for v in choice.variants if v != choice.default)):
                with gpu.forced(**{choice.kernel: name}), torch.no_grad():
                    try:
                        found = run(*copy.deepcopy(arguments), **copy.deepcopy(options))
                        again = clock.captured(lambda: run(*arguments, **options))  # noqa: B023  # called here alone
                        times[name] = median(clock, again, size.samples, size.seconds)[0]
                    except Exception as error:  # more shared memory or registers than there are
                        trial.failed[name] = f"{type(error).__name__}: {str(error).strip()[:100]}"
                        continue
                if not alike(found, wanted, LIKE_BITS[clock.exact]):
                    trial.failed[name] = "other bits"
                    problems.append(f"{call.title}: {choice.kernel} gives other bits as {name} than by default")
            for name, seconds in times.items():
                if choice.default in times:
                    trial.ratios.setdefault(name, []).append(seconds / times[choice.default])
            print(_line(call, choice, times, trial), flush=True)
    return trials, problems


def _line(call: Call, choice: gpu.Choice, times: dict[str, float], trial: Trial) -> str:
    parts = [f"{name} {seconds * 1e6:,.1f} us" for name, seconds in times.items() if name not in trial.failed]
    parts += [f"{name}: {why}" for name, why in trial.failed.items()]
    return f"{call.title:52s} {choice.kernel} ({choice.key}): {', '.join(parts)}"


def choices(trials: Trials) -> dict[str, dict[str, str]]:
    """What is to be taken instead of a default, by kernel and class of shapes."""
    found: dict[str, dict[str, str]] = {}
    for (kernel, key), trial in trials.items():
        of_kernel = found.setdefault(kernel, {})
        if (best := trial.best()) != trial.default:
            of_kernel[key] = best
    return found


def write(folder: Path, record: dict[str, Any]) -> Path:
    """Write a device's file.  Kernels that were not tried keep what it had, of this device and capability."""
    path = folder / f"{tuned.slug(record['device'])}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["choices"] if path.exists() else {}
    merged = {**before, **record["choices"]}
    kept = {kernel: dict(sorted(merged[kernel].items())) for kernel in sorted(merged) if merged[kernel]}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, "choices": kept}, indent=1) + "\n", encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=tuned.FOLDER, help="folder of the file (default: the package's)")
    parser.add_argument("--no-save", action="store_true", help="write no file")
    given = parser.parse_args(argv)
    device = device_of(given.device, given.calls, parser.prog)
    size = TINY if given.calls == "tiny" else QUICK if given.quick else FULL
    trials, problems = tried(calls_of(given, parser), device, clock_of(device), size)
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    taken = choices(trials)
    changed = sum(map(len, taken.values()))
    print(f"{device_name(device)}: {changed} of {len(trials)} choices are not the default")
    if not (given.no_save or given.quick or (device.type == "cpu" and given.out == tuned.FOLDER)):
        here = records.machine()
        path = write(given.out, {
            **about(device), "capability": gpu.target(device).capability, "pyrosome": pyrosome.__version__,
            "command": " ".join(["python -m bench.tune", *argv]), "date": here["date"], "commit": here["commit"],
            "choices": taken,
        })  # fmt: skip
        print(f"written: {path}; `python -m pyrosome.testing.ahead --table docs/kernels.md` has its variants too")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
