"""What one server on one machine needs before anything is loaded, held against the memory there is."""

from __future__ import annotations

import dataclasses
import math

from pyrosome.cache.streams import BLOCK_TOKENS, PAGE_ROWS, CachePlan, cache_tokens_in, plan_cache
from pyrosome.config import ModelConfig
from pyrosome.errors import DoesNotFit
from pyrosome.options import EngineOptions
from pyrosome.plan.inventory import Model, add_up, buffer_bytes
from pyrosome.plan.plan import Item
from pyrosome.plan.quantities import show_bytes
from pyrosome.plan.reserve import CpuStep, cpu_captured_bytes, cpu_decode_bytes, cpu_prompt_bytes

# Two Python processes, one of them with torch, take 0.22 GiB of their own and 0.1 GiB of libraries on Linux; and the
# requests that run have theirs.
PROCESS_BYTES = 512 << 20
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Room:
    """A server's needs, its cache's capacity, and the memory there is."""

    items: tuple[Item, ...]
    cache_tokens: int  # of history, of all sessions together
    max_context: int  # tokens of one sequence that the engine will take
    available_bytes: int  # 0: not known

    @property
    def needed_bytes(self) -> int:
        return sum(i.num_bytes for i in self.items)

    @property
    def parts(self) -> str:
        """What is needed, item by item."""
        return ", ".join(f"{i.name} {show_bytes(i.num_bytes)}" for i in self.items)

    def __str__(self) -> str:
        """One line: what goes where, and what is left."""
        if not self.available_bytes:
            return f"It needs {show_bytes(self.needed_bytes)} of memory: {self.parts}; what there is, is not known."
        left = show_bytes(self.available_bytes - self.needed_bytes)
        return (
            f"It needs {show_bytes(self.needed_bytes)} of {show_bytes(self.available_bytes)} available: {self.parts}; "
            f"{left} are left."
        )


@dataclasses.dataclass(frozen=True)
class Server:
    """What is to be served, and how."""

    config: ModelConfig
    has_drafts: bool
    expert_bytes: int  # of routed experts, as they are held
    other_bytes: int  # of all other weights
    kv_format: str
    numerics: str
    options: EngineOptions
    mapped: bool = False  # routed experts stay in their files and take no memory that others could not have

    @classmethod
    def of(
        cls, model: Model, kv_format: str, options: EngineOptions, *, numerics: str = "trained", mapped: bool = False
    ) -> Server:
        """For a model, as the CPU kernels hold it."""
        held = add_up(model.held, lambda t: t.expert >= 0, "tiles")
        other = held.get(False, 0) + buffer_bytes(model.config)
        drafts = model.num_stages > 0
        return cls(model.config, drafts, held.get(True, 0), other, kv_format, numerics, options, mapped)

    def room(self, available_bytes: int) -> Room:
        """What the engine allocates, and what its longest step takes besides.

        Args:
            available_bytes: of memory; 0: not known.
        """
        config, options = self.config, self.options
        tokens = cache_tokens_in(config, self.kv_format, options.cache_bytes, options.max_sequences)
        most = min(config.max_position_embeddings, tokens)
        context = min(options.max_context or most, most)
        cache = self._cache(tokens, context)
        items = (
            Item("weights", "weights", self.other_bytes + (0 if self.mapped else self.expert_bytes)),
            Item("cache", "kv", cache.total_bytes),
            Item("snapshots", "reserve", options.snapshot_bytes + options.host_bytes),
            Item(f"a step of {options.step_tokens:,} tokens", "workspace", self.step_bytes(max(1, context))),
            Item("captured steps", "workspace", self.captured_steps_bytes(max(1, context))),
            Item("processes", "system", PROCESS_BYTES),
        )
        return Room(items, tokens, context, available_bytes)

    def cache_bytes_for(self, context: int) -> int:
        """The smallest cache that takes a sequence of so many tokens."""
        ratios = self._cache(0, context).page_bytes
        unit = PAGE_ROWS * min(ratios, default=1)
        plan = self._cache(-(-context // unit) * unit, context)
        return max(1, sum(plan.page_bytes[r] * plan.num_pages[r] for r in ratios))

    def checked_room(self, available_bytes: int) -> Room:
        """The room, of a server that can hold what it promises.

        Raises:
            DoesNotFit: with what is needed, what there is, and the smallest change that makes it fit.
        """
        room, options = self.room(available_bytes), self.options
        if room.max_context < min(options.max_context, self.config.max_position_embeddings):
            least = self.cache_bytes_for(options.max_context)
            raise DoesNotFit(
                f"a sequence of {options.max_context:,} tokens (--context)", least, options.cache_bytes, "the cache",
                f"give it --cache-gib {math.ceil(100 * least / GIB) / 100:.2f}, or --context {room.max_context}",
            )  # fmt: skip
        over = room.needed_bytes - available_bytes
        if available_bytes and over > 0:
            raise DoesNotFit(
                "this server", room.needed_bytes, available_bytes, "this machine",
                f"{room.parts}; {self._change(available_bytes)}",
            )  # fmt: skip
        return room

    def step_bytes(self, context: int) -> int:
        """Of the largest step: the last one of the longest prompt, or one in which all sequences decode."""
        o = self.options
        about = CpuStep(self.kv_format, self.numerics, o.max_drafts, self.has_drafts)
        prompt = cpu_prompt_bytes(self.config, o.step_tokens, context, about)
        return max(prompt, cpu_decode_bytes(self.config, o.max_sequences, context, about))

    def captured_steps_bytes(self, context: int) -> int:
        """Of all captures that may be kept, at most."""
        o = self.options
        about = CpuStep(self.kv_format, self.numerics, o.max_drafts, self.has_drafts)
        return cpu_captured_bytes(self.config, o.max_sequences, context, about)

    def _cache(self, tokens: int, context: int) -> CachePlan:
        o = self.options
        return plan_cache(self.config, self.kv_format, o.max_sequences, context, o.max_drafts, self.has_drafts, tokens)

    def _change(self, available_bytes: int) -> str:
        """The smallest change that makes it fit: a smaller cache, experts in their files, or more memory."""
        least = self.cache_bytes_for(self.options.max_context or BLOCK_TOKENS)
        for server, also in ((self, ""), (dataclasses.replace(self, mapped=True), "--experts mapped and ")):
            if found := server._largest_cache(least, available_bytes):
                tokens = server._with_cache(found).room(0).cache_tokens
                return f"{also}--cache-gib {found / GIB:.2f} would fit, and holds {tokens:,} tokens"
        smallest = self._with_cache(least).room(0).needed_bytes
        return f"{show_bytes(smallest - available_bytes)} more memory is needed for the smallest cache"

    def _with_cache(self, num_bytes: int) -> Server:
        return dataclasses.replace(self, options=dataclasses.replace(self.options, cache_bytes=num_bytes))

    def _largest_cache(self, least: int, available_bytes: int) -> int:
        """Bytes of the largest cache that fits, in hundredths of a GiB; 0: not even the least one."""
        first = low = math.ceil(100 * least / GIB) - 1
        high = max(first, 100 * self.options.cache_bytes // GIB) + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._with_cache(_cache_bytes(middle)).room(0).needed_bytes <= available_bytes
            low, high = (middle, high) if fits else (low, middle)
        return _cache_bytes(low) if low > first else 0


def _cache_bytes(hundredths: int) -> int:
    """Bytes of so many hundredths of a GiB, as the command line reads them."""
    return int(hundredths / 100 * GIB)
