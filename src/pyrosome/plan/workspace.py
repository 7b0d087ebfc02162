"""Transient bytes of one step on the native CPU kernels: what is alive at its peak, phase by phase.

A step is walked through as `Runner.step` runs it: every tensor is made and dropped in the code's own order, large ones
in blocks that are lent again (`walk.py`), and beside them is the scratch that the C++ takes (`scratch.py`).
"""

from __future__ import annotations

import dataclasses

from pyrosome.cache.streams import PAGE_ROWS, check_kv_format, pages_for
from pyrosome.config import ModelConfig
from pyrosome.errors import PlanError, RequestError
from pyrosome.plan.scratch import scratch_bytes
from pyrosome.plan.walk import Memory, Walk

CONTEXT_GRAIN = 512  # tokens that the bound of a step of single tokens is rounded up to (`engine.graphs`)
NUMERICS = ("exact", "trained")


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Bytes of one step beside weights and cache."""

    tensor_bytes: int  # at the peak, blocks that are kept for the next tensor included
    scratch_bytes: int  # of the C++, on all threads
    phases: dict[str, int]  # tensor bytes at the most, by what is computed

    @property
    def total_bytes(self) -> int:
        return self.tensor_bytes + self.scratch_bytes

    @property
    def peak(self) -> str:
        """What is computed when most is alive."""
        return max(self.phases, key=self.phases.__getitem__)


@dataclasses.dataclass(frozen=True)
class Spans:
    """A step: (first position, tokens) of each span, and what decides shapes beside them.

    Raises:
        RequestError: no span, one without a token, or a position beyond `max_context`.
        PlanError: a form or numerics that is not the native CPU kernels'.
        CheckpointError: the shape cannot be stored in `kv_format`.
    """

    config: ModelConfig
    spans: tuple[tuple[int, int], ...]
    max_context: int  # of the pool: its page tables are as wide
    kv_format: str = "fp8"
    numerics: str = "trained"
    form: str = "tiles"  # of the weights: "tiles" or "float32"
    quantised: bool = True  # whether what is held in tiles is FP8 and FP4; plain weights need no prepared inputs
    every_row: bool = False  # logits of every token, not of each span's last
    num_drafts: int = 0  # that one step may verify: rings are longer by so many
    has_drafts: bool = False  # an MTP stage stands beside the trunk
    is_drafting: bool = True  # and runs over the step's tokens after it
    ranks: int = 1  # that share the routed experts
    threads: int = 1

    def __post_init__(self) -> None:
        if self.form not in ("tiles", "float32"):
            raise PlanError(
                f"the workspace of form {self.form!r} was asked for; planned are those of the CPU kernels, tiles and "
                "float32: on other devices measure one step"
            )
        if self.numerics not in NUMERICS:
            raise PlanError(f"numerics {self.numerics!r} was asked for; planned are {', '.join(NUMERICS)}")
        check_kv_format(self.config, self.kv_format)
        for name in ("max_context", "ranks", "threads"):
            _at_least(name, getattr(self, name), 1)
        _at_least("num_drafts", self.num_drafts, 0)
        if not self.spans:
            raise RequestError("a step without spans was to be planned; give the first position and tokens of each")
        for start, tokens in self.spans:
            _at_least("a span's first position", start, 0)
            _at_least("a span's tokens", tokens, 1)
            if start + tokens > self.max_context:
                raise RequestError(
                    f"a span of {tokens} tokens at position {start} was to be planned, and the context has "
                    f"{self.max_context} tokens; raise it, or plan shorter spans"
                )

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens in self.spans)

    @property
    def context(self) -> int:
        """The bound on positions that the step's shapes follow."""
        bound = max(start + tokens for start, tokens in self.spans)
        if any(tokens > 1 for _, tokens in self.spans):
            return bound
        return min(-(-bound // CONTEXT_GRAIN) * CONTEXT_GRAIN, self.max_context)  # steps of one shape share a capture

    def num_emits(self, ratio: int) -> int:
        """Compressed rows that end in the step."""
        return sum((start + tokens) // ratio - start // ratio for start, tokens in self.spans)

    def num_rows(self, ratio: int) -> int:
        """Rows of one sequence that the step's shapes leave room for."""
        return min(self.context // ratio, pages_for(self.max_context, ratio) * PAGE_ROWS)


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RequestError(f"{name} is {value!r}; a whole number of at least {least} was expected")


def prompt_step(config: ModelConfig, tokens: int, context: int, **more: object) -> Workspace:
    """Workspace of the last step of one prompt of `context` tokens, computed `tokens` at a time."""
    _at_least("tokens", tokens, 1)
    _at_least("context", context, 1)
    count = min(tokens, context)
    return step_workspace(Spans(config, ((context - count, count),), context, **more))  # type: ignore[arg-type]


def decode_step(config: ModelConfig, sequences: int, context: int, **more: object) -> Workspace:
    """Workspace of a step of one token of each of so many sequences, the last of `context` tokens."""
    _at_least("sequences", sequences, 1)
    _at_least("context", context, 1)
    return step_workspace(Spans(config, ((context - 1, 1),) * sequences, context, **more))  # type: ignore[arg-type]


def step_workspace(spans: Spans) -> Workspace:
    """What a step takes once the engine has run others like it, whose blocks are kept."""
    memory = Memory()
    Walk(spans, memory).run()
    phases = dict(memory.phases)  # of a step without kept blocks: what each takes itself
    Walk(spans, memory).run()
    return Workspace(memory.peak, scratch_bytes(spans), phases)


def captured_bytes(spans: Spans) -> int:
    """What one captured step keeps (`engine.graphs`): everything that its layers and the head made, dropped or not.

    A step of up to 64 single tokens is captured when its shape comes a second time, and 48 captures are kept.
    """
    memory = Memory(keeps_all=True)
    Walk(spans, memory).capture()
    return memory.now
