"""What both sides of a comparison share: the shape, the prompt, how time and memory are read.

This file imports neither side, so that each child process holds one engine alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# 44M parameters; the layer pattern and ratios of V4-Flash, narrow.
SMALL: dict[str, Any] = {
    "hidden_size": 320, "moe_intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
    "head_dim": 128, "q_lora_rank": 160, "o_groups": 4, "o_lora_rank": 64, "n_routed_experts": 16,
    "index_n_heads": 16, "index_head_dim": 64, "index_topk": 256, "vocab_size": 8192, "num_experts_per_tok": 6,
    "num_hash_layers": 3, "qk_rope_head_dim": 64, "sliding_window": 128, "max_position_embeddings": 1048576,
}  # fmt: skip
RATIOS = (0, 0, 4, 128, 4, 128, 4, 128)
# V4-Flash's own widths, as far as both sides fit a small machine: three layers of eight experts.
WIDE: dict[str, Any] = {"num_hidden_layers": 3, "n_routed_experts": 8, "num_hash_layers": 1, "vocab_size": 4096}


class Shape(NamedTuple):
    """A network that both sides run, and the prompts it is given."""

    config: dict[str, Any]
    ratios: tuple[int, ...]
    prefills: tuple[int, ...]
    quick: tuple[int, ...]
    whole: int  # tokens of the longest prompt that the other side takes in one call; longer ones in parts of `PART`


PART = 512
SHAPES = {
    "small": Shape(SMALL, RATIOS, (128, 1024, 4096, 16384), (128, 1024), 4096),
    "wide": Shape(WIDE, (0, 4, 128), (1024, 4096), (256,), 0),
}
CHECKED_TOKENS = 1500  # past index_topk x 4, and past eleven HCA windows
DECODED_AFTER, DECODED = 1024, 32
ENOUGH_CPU_S = 20.0  # a run that took this long is not repeated: its noise is small already


def prompt(length: int, vocab_size: int = SMALL["vocab_size"]) -> list[int]:
    """The same ids on both sides, from a small generator of our own: no library's stream of numbers is involved."""
    state, ids = 12345, []
    for _ in range(length):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocab_size)
    return ids


class PeakMemory(threading.Thread):
    """Peak resident bytes above those at entry: the kernel's own mark where it can be reset, and samples.

    Samples alone miss what is held and freed within one call that keeps the interpreter to itself.  What
    earlier work freed is given back to the system first: heap that an allocator keeps would otherwise count
    as already there, and hide as much of this peak.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        gc.collect()
        give_back_heap()
        self.marked = reset_high_water()
        self.base = self.peak = resident_bytes()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, resident_bytes())

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()
        self.peak = max(self.peak, high_water_bytes() if self.marked else resident_bytes())

    @property
    def extra_mb(self) -> float:
        """Peak above the base, in megabytes (10^6 bytes)."""
        return (self.peak - self.base) / 1e6


def resident_bytes() -> int:
    """Resident set size of this process, in bytes."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_high_water() -> bool:
    """Set the kernel's mark of peak resident memory down to the present; False where that is not allowed."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        return False
    return True


def high_water_bytes() -> int:
    """Peak resident set size since the mark was last reset, in bytes."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024


KEEPERS: list[Callable[[], None]] = []  # what an engine calls to return memory that it keeps for later


def give_back_heap() -> None:
    """Return freed heap to the system, where the C library can (glibc), and what an engine keeps."""
    for give_back in KEEPERS:
        give_back()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def rates(run: Callable[[], Any], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of this thread's CPU time ("cpu") and of the clock ("wall"), once per repeat.

    This thread's, not the process's: one that samples memory beside it would count too.

    Stops early once `ENOUGH_CPU_S` seconds of CPU time are spent; one repeat is always made.
    """
    out: dict[str, list[float]] = {"cpu": [], "wall": []}
    spent = 0.0
    while len(out["cpu"]) < repeats and spent < ENOUGH_CPU_S:
        began, cpu_began = time.perf_counter(), time.thread_time()
        run()
        cpu, wall = time.thread_time() - cpu_began, time.perf_counter() - began
        spent += cpu
        out["cpu"].append(tokens / cpu)
        out["wall"].append(tokens / wall)
    return out


def with_peak(run: Callable[[], Any], tokens: int, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Rates of `run`, and the peak memory of one run in megabytes.

    The run that is watched for memory starts from a heap just given back and pays to get it again, so its
    time counts only where it took `ENOUGH_CPU_S` seconds and there is no other.
    """
    with PeakMemory() as memory:
        first = rates(run, tokens, 1)
    if tokens / first["cpu"][0] >= ENOUGH_CPU_S:
        return first, memory.extra_mb
    return rates(run, tokens, repeats), memory.extra_mb


def measure(
    prefill: Callable[[int, int], Any],
    decode: Callable[[Any, int], list[int]],
    repeats: int,
    quick: bool = False,
    shape: Shape = SHAPES["small"],
) -> dict[str, Any]:
    """Rates, peak memory and greedy tokens of one engine.

    Args:
        prefill: runs a prompt of so many tokens on an empty cache with room for so many more, and returns
            whatever `decode` goes on from.
        decode: goes on greedily for so many tokens, one at a time, and returns the tokens it fed.
        quick: short prompts alone.
    """
    out: dict[str, Any] = {"prefill": {}, "prefill_peak_mb": {}}
    prefill(64, 0)  # first calls allocate and choose kernels
    for length in shape.quick if quick else shape.prefills:
        found, peak = with_peak(lambda n=length: prefill(n, 0), length, repeats)  # type: ignore[misc]
        out["prefill"][length], out["prefill_peak_mb"][length] = found, peak
    state = prefill(DECODED_AFTER, DECODED * (1 + repeats))
    tokens: list[int] = []
    out["decode"], out["decode_peak_mb"] = with_peak(lambda: tokens.extend(decode(state, DECODED)), DECODED, repeats)
    out["tokens"] = tokens
    return out


def arguments() -> tuple[str, str, str, int, bool, Shape]:
    """A child's command line: checkpoint, where to put the answer and the logits, repeats, "quick" or "full", shape."""
    checkpoint, answer_path, logits_path, repeats, extent, shape = sys.argv[1:]
    return checkpoint, answer_path, logits_path, int(repeats), extent == "quick", SHAPES[shape]


def answer(path: str, values: dict[str, Any]) -> None:
    """A child's result, for the parent to read."""
    with open(path, "w", encoding="utf-8") as f:
        json.dump(values, f)
