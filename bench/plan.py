"""The planner's predictions beside measurements, on networks and at contexts that calibration was not fitted to.

    python -m bench.plan [--quick] [--no-save] [--threads N] [--calibration FILE] [--seconds S]

Calibrates this machine first, unless a calibration is given.  Four networks that differ in width, layers, experts,
heads and ratios decode over filled caches of three contexts, and read parts of prompts at three more.  Exit status 1
where a prediction is off by more than 25%.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

from bench import records
from pyrosome.errors import PyrosomeError
from pyrosome.measure.calibrate import calibrate
from pyrosome.measure.steps import Sample, Shape, measured
from pyrosome.plan import calibration
from pyrosome.plan.hardware import machine
from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.speed import coefficients_of, step_time
from pyrosome.plan.work import Load

RESULTS = Path(__file__).parent / "results" / "plan.jsonl"
MOST_ERROR = 0.25
SECONDS = 90.0  # for the rounds over the networks here, with making them

CONTEXTS = (4096, 65536, 262144)
PROMPTS = ((256, 0), (768, 0), (192, 24576), (128, 196608))  # (tokens, over so many)
LOADS = (*(Load(1, 1, context) for context in CONTEXTS), *(Load(1, tokens, over) for tokens, over in PROMPTS))
SHAPES = (
    Shape("3,072 wide", 3072, 1536, 48, 768, 8, 512, 32, 12, 4, (0, 4, 128), loads=LOADS),
    Shape("4,096 wide, 20 experts", 4096, 1024, 64, 1024, 8, 1024, 64, 20, 6, (4, 128), 16384, loads=LOADS),
    Shape("1,536 wide", 1536, 768, 24, 512, 4, 512, 24, 32, 6, (0, 4, 4, 128, 128), loads=LOADS),
    Shape("896 wide, rows of 64", 896, 640, 16, 384, 2, 384, 8, 48, 6, (0, 0, 4, 64, 4, 64, 4, 64), loads=LOADS),
)
QUICK = (
    Shape(
        "128 wide", 128, 128, 4, 64, 2, 64, 4, 8, 2, (0, 4, 128), 512,
        loads=(Load(1, 1, 512), Load(1, 1, 1024), Load(1, 64, 0), Load(1, 64, 512)),
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Line:
    """One prediction."""

    shape: str
    kind: str  # "decode" or "prefill"
    context: int
    tokens: int
    predicted: float  # tokens per second
    measured: float
    spread: float

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted / self.measured - 1


def lines(samples: list[Sample], found: calibration.Calibration) -> list[Line]:
    """Rates of all samples, predicted as `pyrosome plan` does for this machine."""
    here, one = machine("here"), Layout.of("tp", 1)
    coefficients, models = coefficients_of(found), {s.shape.name: s.shape.model for s in samples}
    out = []
    for s in samples:
        step = step_time(models[s.shape.name], here, one, Placement(), s.load, coefficients)
        tokens = s.load.sequences * s.load.tokens
        kind = "decode" if s.load.tokens == 1 else "prefill"
        rates = tokens / step.seconds, tokens / s.seconds
        out.append(Line(s.shape.name, kind, s.load.context, s.load.tokens, *rates, s.spread))
    return out


def problems(found: list[Line]) -> list[str]:
    """Which predictions are off by too much, in words."""
    return [
        f"{x.shape}, {x.kind} of {x.tokens:,} at {x.context:,}: {x.predicted:,.1f} tok/s are predicted and "
        f"{x.measured:,.1f} measured, {x.error:+.0%}; {MOST_ERROR:.0%} is the most"
        for x in found
        if abs(x.error) > MOST_ERROR
    ]


def table(found: list[Line]) -> str:
    """Predicted beside measured, as text."""
    head = f"{'network':24s}{'':9s}{'tokens':>7s}{'at context':>12s}{'predicted':>12s}{'measured':>12s}{'error':>8s}"
    rows = [
        f"{x.shape:24s}{x.kind:9s}{x.tokens:7,d}{x.context:12,d}{x.predicted:12,.1f}{x.measured:12,.1f}{x.error:+8.1%}"
        for x in found
    ]
    return "\n".join([head + "  (tok/s)", *rows])


def _asked(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small network; promises nothing, no record")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/plan.jsonl alone")
    parser.add_argument("--threads", type=int, default=1, help="of the engine (default: 1)")
    parser.add_argument("--calibration", type=Path, help="a file of `pyrosome calibrate`, instead of calibrating first")
    parser.add_argument("--seconds", type=float, default=120.0, help="for calibrating (default: 120)")
    return parser.parse_args(argv)


def _calibrated(args: argparse.Namespace) -> calibration.Calibration:
    if args.calibration:
        found = calibration.load(args.calibration)
        if why := found.outdated:
            print(f"note: {args.calibration}: {why}", file=sys.stderr)
        return found
    print("calibrating", flush=True)
    found, _ = calibrate(args.seconds, args.threads, Path.cwd(), lambda text: print(f"  {text}", flush=True))
    print(f"  steps fitted to are off by {found.residual:.1%} (median), {found.worst:.1%} (most)\n", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status."""
    args = _asked(argv)
    where = records.machine()
    try:
        used = _calibrated(args)
        until = time.monotonic() + (0 if args.quick else SECONDS)
        samples = measured(
            QUICK if args.quick else SHAPES, used.threads, until, lambda text: print(f"  {text}", flush=True)
        )
    except PyrosomeError as error:
        print(f"bench.plan: {error}", file=sys.stderr)
        return 2
    found = lines(samples, used)
    print(table(found))
    missed = [] if args.quick else problems(found)
    for problem in missed:
        print(f"FAILED {problem}", file=sys.stderr)
    worst = max(abs(x.error) for x in found)
    print(f"\n{len(found)} predictions on {used.processor}, {used.threads} thread(s): the largest error is {worst:.1%}")
    if not args.no_save and not args.quick:
        record = {
            "bench": "plan", "threads": used.threads, "engine": f"pyrosome {used.engine}", "torch": torch.__version__,
            "level": used.level, "calibration": dataclasses.asdict(used),
            "lines": [{**dataclasses.asdict(x), "error": x.error} for x in found], "problems": missed,
        }  # fmt: skip
        records.append(RESULTS, {**where, **record})
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
