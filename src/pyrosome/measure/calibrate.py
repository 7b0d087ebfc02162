"""Calibration: steps of a few networks timed on this machine, and coefficients fitted to them."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pyrosome.cgroups import available_memory
from pyrosome.errors import RequestError
from pyrosome.measure import ceilings
from pyrosome.measure.steps import Sample, Shape, measured
from pyrosome.ops import native
from pyrosome.plan.calibration import Calibration, Point, fitted, median_and_worst
from pyrosome.plan.hardware import machine
from pyrosome.plan.history import installed
from pyrosome.plan.work import Load

LEAST_SECONDS, MOST_SECONDS = 60.0, 3600.0
NEEDED_BYTES = 4 << 30  # weights, caches and what building them takes


def _decode(sequences: int, context: int) -> Load:
    return Load(sequences, 1, context)


def _prompt(tokens: int, context: int = 0) -> Load:
    return Load(1, tokens, context)


# Each of them is heavy in something else: matrices and experts; batches; long histories of few heads; many narrow
# layers; what layers and steps cost whatever their size.  But for the last two, what a token reads of the weights is
# more than last-level caches hold.
SHAPES = (
    Shape(
        "4,096 wide", 4096, 2048, 64, 1024, 8, 1024, 64, 8, 3, (0, 4, 128),
        loads=(_decode(1, 2048), _decode(1, 32768), _decode(1, 131072), _decode(4, 8192), _prompt(64), _prompt(384),
               _prompt(128, 98304)),
    ),
    Shape(
        "2,048 wide", 2048, 1024, 32, 512, 4, 512, 32, 16, 6, (0, 4, 128, 4),
        loads=(_decode(1, 2048), _decode(1, 49152), _decode(8, 6144), _prompt(96), _prompt(512), _prompt(128, 32768)),
    ),
    Shape(
        "1,024 wide", 1024, 512, 16, 512, 4, 256, 16, 16, 4, (0, 4, 16, 4, 128, 4),
        loads=(_decode(1, 2048), _decode(1, 131072), _decode(4, 16384), _prompt(96), _prompt(512),
               _prompt(128, 98304)),
    ),
    Shape(
        "768 wide", 768, 768, 32, 256, 4, 256, 64, 24, 2, (0, 0, 0, 128, 128, 4, 0, 0, 128), 8192,
        loads=(_decode(1, 1024), _decode(1, 393216), _decode(2, 32768), _prompt(64), _prompt(512),
               _prompt(128, 98304)),
    ),
    Shape(
        "256 wide", 256, 128, 8, 128, 2, 128, 8, 8, 3, (0, 0, *(4, 128) * 8),
        loads=(_decode(1, 2048), _decode(1, 49152), _decode(8, 2048), _prompt(64), _prompt(384), _prompt(128, 16384)),
    ),
    Shape(
        "128 wide", 128, 128, 4, 64, 2, 64, 4, 8, 2, (0, 4), 512,
        loads=(_decode(1, 1024), _decode(1, 32768), _prompt(128)),
    ),
)  # fmt: skip


def calibrate(
    seconds: float,
    threads: int,
    place: Path,
    say: Callable[[str], None] = lambda _: None,
    shapes: Sequence[Shape] = SHAPES,
) -> tuple[Calibration, list[Sample]]:
    """Measure this machine for about so many seconds, and fit coefficients; what was found, and the steps timed.

    Args:
        threads: that the engine is to run with.
        place: a file or folder on the drive whose reading is measured.

    Raises:
        RequestError: more threads than cores, too little time or memory, or a drive that cannot be read.
    """
    _check(seconds, threads)
    began = time.monotonic()
    read, product = ceilings.read_rate(threads), ceilings.product_rate(threads)
    say(f"memory is read at {read / 1e9:.1f} GB/s; a bfloat16 product reaches {product / 1e9:,.0f} GFLOP/s")
    disk, link = ceilings.disk_rate(place), ceilings.link_rate()
    if disk:
        say(f"the drive of {place} is read at {disk / 1e9:.2f} GB/s")
    if link:
        say(f"the link to the GPU carries {link / 1e9:.1f} GB/s")
    samples = measured(shapes, threads, began + seconds, say)
    models = {s.name: s.model for s in shapes}
    points = [Point(models[s.shape.name], s.load, s.seconds) for s in samples]
    found = fitted(points, read, product)
    middle, worst = median_and_worst(points, found)
    here = machine("here")
    processor = here.device if here.device.kind == "cpu" else here.host
    return Calibration(
        processor=processor.title if processor else here.device.title, threads=threads,
        level=native.level() if native.available() else "", engine=installed("pyrosome"),
        torch=installed("torch"),
        when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), seconds=found, read_bytes_s=read,
        flops_s=product, disk_bytes_s=disk, link_bytes_s=link, residual=middle, worst=worst, points=len(points),
    ), samples  # fmt: skip


def _check(seconds: float, threads: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise RequestError(f"{threads} threads were asked for; this process may use 1 to {cores}")
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        raise RequestError(
            f"{seconds:g} seconds were asked for; the networks alone take most of {LEAST_SECONDS:g}, and "
            f"{MOST_SECONDS:,g} are the most"
        )
    free = available_memory()
    if 0 < free < NEEDED_BYTES:
        raise RequestError(
            f"{free / 2**30:.1f} GiB of memory are available and calibrating takes {NEEDED_BYTES / 2**30:.1f} GiB; end "
            "what else runs"
        )
