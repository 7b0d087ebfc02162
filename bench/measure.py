"""What both sides of a comparison share: the shape, the prompt, how time and memory are read.

This file imports neither side, so that each child process holds one engine alone.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

# ~70M parameters; the layer pattern and ratios of V4-Flash, narrow.
SMALL: dict[str, Any] = {
    "hidden_size": 320, "moe_intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
    "head_dim": 128, "q_lora_rank": 160, "o_groups": 4, "o_lora_rank": 64, "n_routed_experts": 16,
    "index_n_heads": 16, "index_head_dim": 64, "index_topk": 256, "vocab_size": 8192, "num_experts_per_tok": 6,
    "num_hash_layers": 3, "qk_rope_head_dim": 64, "sliding_window": 128, "max_position_embeddings": 1048576,
}  # fmt: skip
RATIOS = (0, 0, 4, 128, 4, 128, 4, 128)
CHECKED_TOKENS = 1500  # past index_topk x 4, and past eleven HCA windows
PREFILLS = (128, 1024, 4096)
DECODED_AFTER, DECODED = 1024, 32


def prompt(length: int) -> list[int]:
    """The same ids on both sides, from a small generator of our own: no library's stream of numbers is involved."""
    state, ids = 12345, []
    for _ in range(length):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % SMALL["vocab_size"])
    return ids


class PeakMemory(threading.Thread):
    """Peak resident bytes above those at entry, sampled every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
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

    @property
    def extra_mb(self) -> float:
        return (self.peak - self.base) / 1e6


def resident_bytes() -> int:
    """Resident set size of this process, in bytes."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tokens_per_cpu_second(run: Callable[[], None], tokens: int, repeats: int) -> list[float]:
    """Tokens per second of this process's CPU time, once per repeat."""
    rates = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        rates.append(tokens / (time.process_time() - began))
    return rates


def measure(prefill: Callable[[int], Any], decode: Callable[[Any, int], None], repeats: int) -> dict[str, Any]:
    """Rates and peak memory of one engine.

    Args:
        prefill: runs a prompt of so many tokens on an empty cache and returns whatever `decode` goes on from.
        decode: goes on for so many tokens, one at a time.
    """
    out: dict[str, Any] = {"prefill": {}, "prefill_peak_mb": {}}
    prefill(64)  # first calls allocate and choose kernels
    for length in PREFILLS:
        with PeakMemory() as memory:
            rates = tokens_per_cpu_second(lambda n=length: prefill(n), length, repeats)  # type: ignore[misc]
        out["prefill"][length], out["prefill_peak_mb"][length] = rates, memory.extra_mb
    state = prefill(DECODED_AFTER)
    decode(state, 2)
    with PeakMemory() as memory:
        out["decode"] = tokens_per_cpu_second(lambda: decode(state, DECODED), DECODED, repeats)
    out["decode_peak_mb"] = memory.extra_mb
    return out


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def answer(path: str, values: dict[str, Any]) -> None:
    """A child's result, for the parent to read."""
    with open(path, "w", encoding="utf-8") as f:
        json.dump(values, f)
