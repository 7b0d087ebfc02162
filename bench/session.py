"""Sessions at V4-Flash's own row shapes: forks, and files against what the disk can do.

    python -m bench.session [--tokens N] [--rounds N] [--folder PATH] [--quick] [--no-save]

A cache of all 43 layers and the draft stage, rows in the production format, filled with random bytes.  A fork of it is
timed, and what it takes of the cache counted.  A save is compared with a write and fsync of as many bytes, and a
restore with a cold read of such a file, by turns.  Exit status 1 where a fork takes 5 ms or more or anything of the
cache, or where a save or a restore is below 70% of the disk's own rate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import records
from pyrosome.cache.pool import CachePool, Holding
from pyrosome.cache.state import put_snapshot, take_snapshot
from pyrosome.cache.store import open_session, save_session
from pyrosome.config import ModelConfig

TOKENS, ROUNDS, FORKS = 262_144, 5, 50
PIECE = 32 << 20
FORK_MS, SHARE = 5.0, 0.7  # promised: less than this; at least this much of the disk's rate
FINGERPRINT = "0" * 64


def filled(tokens: int, seed: int = 0) -> tuple[CachePool, Holding]:
    """A pool with room for two sequences of so many tokens, and one such sequence of random bytes."""
    pool = CachePool(ModelConfig.preset("flash"), "fp8", 2, tokens, num_drafts=3, drafts=True, cache_tokens=2 * tokens)
    generator = torch.Generator().manual_seed(seed)
    for planes in pool.planes.values():
        for plane in planes:
            raw = plane.view(torch.uint8).view(-1)
            for at in range(0, raw.numel(), PIECE):
                part = raw[at : at + PIECE]
                part.random_(0, 256, generator=generator)
    holding = pool.open()
    pool.prepare(holding, 0, tokens)
    return pool, holding


def forks(pool: CachePool, holding: Holding, tokens: int, count: int = FORKS) -> dict[str, Any]:
    """Milliseconds of a fork, and pages and slots that one takes before either side writes."""
    before = pool.num_free_slots, sum(pool.num_free_pages(r) for r in pool.ratios)
    spent, twins = [], []
    for _ in range(count):
        began = time.perf_counter()
        twins.append(pool.fork(holding, tokens))
        spent.append(1000 * (time.perf_counter() - began))
    after = pool.num_free_slots, sum(pool.num_free_pages(r) for r in pool.ratios)
    for twin in twins:
        pool.release(twin)
    return {"median_ms": statistics.median(spent), "worst_ms": max(spent), "slots": before[0] - after[0],
            "pages": before[1] - after[1]}  # fmt: skip


def files(pool: CachePool, holding: Holding, tokens: int, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each way to write and to read, by turns; and the medians of the rounds' ratios."""
    path, plain = folder / "a.session", folder / "plain"
    ids = [t % 129_280 for t in range(tokens)]
    times: dict[str, list[float]] = {"save": [], "write": [], "restore": [], "read": []}
    size = 0

    def timed(name: str, run: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        out = run()
        times[name].append(time.perf_counter() - began)
        return out

    def save() -> int:
        return save_session(path, pool, holding.pages, ids, take_snapshot(pool, holding, tokens),
                            fingerprint=FINGERPRINT)  # fmt: skip

    def restore() -> None:
        there = pool.open()
        put_snapshot(pool, there, open_session(path, fingerprint=FINGERPRINT).load(pool, there))
        pool.release(there)

    save()
    buffer = bytearray(path.read_bytes())
    write(plain, buffer)
    for _ in range(rounds):
        # Each has the memory that its own older file leaves: memory that is new to the system costs more than a disk.
        plain.unlink()
        timed("write", lambda: write(plain, buffer))
        path.unlink()
        size = timed("save", save)
        make_cold(plain)
        timed("read", lambda: read(plain, buffer))
        make_cold(path)
        timed("restore", restore)
    save_share = statistics.median(w / s for w, s in zip(times["write"], times["save"], strict=True))
    restore_share = statistics.median(r / s for r, s in zip(times["read"], times["restore"], strict=True))
    gb_per_s = {name: size / 1e9 / statistics.median(each) for name, each in times.items()}
    return {"bytes": size, "seconds": times, "gb_per_s": gb_per_s, "save_share": save_share,
            "restore_share": restore_share}  # fmt: skip


def write(path: Path, data: bytearray) -> None:
    """Write and sync, as plainly as can be."""
    view = memoryview(data)
    with open(path, "wb", buffering=0) as f:
        for at in range(0, len(view), PIECE):
            f.write(view[at : at + PIECE])
        os.fsync(f.fileno())


def read(path: Path, data: bytearray) -> None:
    """Read all of a file into memory that is there already."""
    view = memoryview(data)
    with open(path, "rb", buffering=0) as f:
        for at in range(0, len(view), PIECE):
            f.readinto(view[at : at + PIECE])


def make_cold(path: Path) -> None:
    """Let the system forget a file's pages; it is synced, so that it can."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> int:
    """Measure, print, and keep a record; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: a temporary folder's")
    parser.add_argument("--quick", action="store_true", help="2,048 tokens, one round, nothing promised")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/session.jsonl alone")
    args = parser.parse_args()
    tokens, rounds = (2048, 1) if args.quick else (args.tokens, args.rounds)
    torch.set_num_threads(1)
    where = records.machine()
    pool, holding = filled(tokens)
    fork = forks(pool, holding, tokens)
    print(f"fork of {tokens:,} tokens: median {fork['median_ms']:.3f} ms, worst {fork['worst_ms']:.3f} ms; "
          f"{fork['slots']} slots and {fork['pages']} pages taken by {FORKS}")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        disk = files(pool, holding, tokens, Path(scratch), rounds)
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in disk["gb_per_s"].items())
    print(f"{disk['bytes']:,} bytes, GB/s: {rates}; save at {disk['save_share']:.0%} of a write and fsync, "
          f"restore at {disk['restore_share']:.0%} of a cold read")  # fmt: skip
    if not args.no_save:
        record = {**where, "bench": "session", "tokens": tokens, "fork": fork, "disk": disk}
        records.append(Path(__file__).parent / "results" / "session.jsonl", record)
    kept = fork["median_ms"] < FORK_MS and not fork["slots"] and not fork["pages"]
    kept = kept and min(disk["save_share"], disk["restore_share"]) >= SHARE
    return 0 if args.quick or kept else 1


if __name__ == "__main__":
    sys.exit(main())
