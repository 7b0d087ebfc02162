"""What one completion may say next, token by token: its grammar, and the rules of reasoning.

Masks are computed by a worker thread while the network computes; they hold for drafts as they do without.  V is the
number of ids the network has logits for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyrosome.errors import EngineError
from pyrosome.options import Constraint, SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from pyrosome.engine.constrain import Grammars

workers = ThreadPoolExecutor(2, thread_name_prefix="pyrosome-grammar")


class Guide:
    """What one completion may say next: made by `Grammars.compile`, advanced by every token of its output."""

    def __init__(
        self,
        grammars: Grammars,
        constraint: Constraint | None,
        start: LLMatcher | None,
        think_end: int | None,
        params: SamplingParams,
        prompt: Sequence[int],
        never_empty: bool | None,
    ) -> None:
        self._grammars, self._start, self._think_end = grammars, start, think_end
        self._kind = constraint.kind if constraint else ""
        self._waits = self._kind == "tool_call" and constraint is not None and constraint.answer is None
        self._thinking_limit, self._min_tokens = params.max_thinking_tokens, params.min_tokens
        # Text completions may end at once: only an answer is never empty.
        self._never_empty = (think_end is not None or start is not None) if never_empty is None else never_empty
        stops = {t for t in params.stop_token_ids if 0 <= t < grammars.vocab_size}
        self._ends = stops if params.ignore_eos else {*stops, grammars.eos_id}
        self._end_ids = {*stops, grammars.eos_id}  # out of place wherever the answer may not end
        self._in_reasoning = think_end is not None
        self._reasoning_tokens = self._answer_tokens = 0
        self._is_blank = True  # the answer, so far
        self._has_ended = False
        self._recent: tuple[int, ...] = tuple(prompt[-4:])
        self._matcher: LLMatcher | None = None  # the grammar, while it holds
        self._pending: tuple[int, ...] | None = None  # what is forced from here on; None: not worked out
        self._masks: Future[list[Mask]] | list[Mask] = []
        if not self._in_reasoning:
            self._begin_answer()

    @property
    def is_free(self) -> bool:
        """Whether nothing is ruled out from here on."""
        return not self._in_reasoning and self._start is None and not self._must_go_on

    @property
    def is_finished(self) -> bool:
        """Whether the grammar is complete, and nothing may follow but the end."""
        return self._has_ended or (self._matcher is not None and bool(self._matcher.is_stopped()))

    def prepare(self, drafts: Sequence[int]) -> None:
        """Begin to compute what is allowed after each of the drafts, in a worker thread where it takes a grammar."""
        if self.is_free:
            self._masks = [None] * (len(drafts) + 1)
        elif self._matcher is None and (self._start is None or not self._begins_within(drafts)):
            self._masks = self.fork()._masks_after(drafts)
        else:
            self._masks = workers.submit(self.fork()._masks_after, list(drafts))

    def usable(self, drafts: Sequence[int]) -> int:
        """How many of the drafts are allowed, one after the other."""
        if self.is_free:
            return len(drafts)
        probe = self.fork()
        for i, draft in enumerate(drafts):
            if not probe._allows(draft):
                return i
            probe.accept(draft)
            if draft in self._ends:
                return i + 1
        return len(drafts)

    def mask(self, at: int) -> Tensor | None:
        """Ids allowed after `at` accepted drafts of those prepared, bool [V]; None: all.

        Raises:
            EngineError: nothing is allowed: the grammar is stuck; or a draft before that one was not allowed.
        """
        if isinstance(self._masks, Future):
            self._masks = self._masks.result()
        if at >= len(self._masks):
            raise EngineError(f"no mask was prepared for position {at}: a draft before it does not fit the rules")
        mask = self._masks[at]
        if isinstance(mask, Exception):
            raise mask
        return mask

    def accept(self, token: int) -> None:
        """Take a token of the output.

        Raises:
            EngineError: the grammar does not allow it.
        """
        pending, self._pending = self._pending, None
        if pending and pending[0] == token and len(pending) > 1:
            self._pending = pending[1:]
        if self._in_reasoning:
            self._reasoning_tokens += 1
            if token == self._think_end:
                self._in_reasoning, self._recent = False, ()
                self._begin_answer()
            return
        self._answer_tokens += 1
        if token in self._end_ids and self._may_end(token):
            self._has_ended = True
        elif self._matcher is not None:
            if not self._matcher.consume_token(token):
                raise EngineError(f"token {token} does not fit the {self._kind} constraint: {fault_of(self._matcher)}")
        else:
            self._is_blank = self._is_blank and (token == self._think_end or self._grammars.is_blank(token))
            if self._start is not None:
                if self._opens_call(token):
                    self._matcher = self._start.deep_copy()
                self._recent = (*self._recent[-3:], token)

    def forced(self) -> list[int]:
        """Ids that must come next, as far as that is certain; empty where there is a choice."""
        return list(self._forced())

    def fork(self) -> Guide:
        """A second guide in the same state."""
        twin = copy.copy(self)
        if self._matcher is not None:
            twin._matcher = self._matcher.deep_copy()
        return twin

    def _begin_answer(self) -> None:
        if self._start is not None and not self._waits:  # for a call to open
            self._matcher = self._start.deep_copy()

    @property
    def _must_go_on(self) -> bool:
        """Whether an answer that ended here would be empty, or too short."""
        if self._reasoning_tokens + self._answer_tokens < self._min_tokens:
            return True
        return self._never_empty and (self._is_blank if self._matcher is None else not self._answer_tokens)

    def _may_end(self, token: int) -> bool:
        if self._matcher is None:
            return token in self._ends
        return bool(self._matcher.is_stopped() or self._matcher.is_accepting())

    def _begins_within(self, drafts: Sequence[int]) -> bool:
        """Whether the grammar may begin to hold there."""
        return self._think_end in drafts or self._grammars.vocabulary().dsml in drafts

    def _opens_call(self, token: int) -> bool:
        """Whether a call opens here: the control token just after a `<` that is not quoted as code."""
        vocabulary = self._grammars.vocabulary()
        if token != vocabulary.dsml or not vocabulary.ends_with(self._recent, b"<"):
            return False
        return not vocabulary.ends_with(self._recent, b"`<")

    def _forced(self) -> tuple[int, ...]:
        # Masks keep to what was forced too: the answer is cut into the same tokens whether or not it is jumped.
        if self._pending is None:
            self._pending = tuple(self._work_out_forced())
        return self._pending

    def _work_out_forced(self) -> list[int]:
        if self._in_reasoning:
            limit = self._thinking_limit
            return [self._think_end] if limit is not None and self._reasoning_tokens >= limit else []  # type: ignore[list-item]
        if self._matcher is None or self.is_finished:
            return []
        found = [int(t) for t in self._matcher.compute_ff_tokens()]
        return found[: next((i for i, t in enumerate(found) if t in self._end_ids), None)]

    def _allows(self, token: int) -> bool:
        """`_mask_now()[token]`, without the rest of the mask where that can be."""
        if self._forced() or self._matcher is None or self.is_finished or token in self._end_ids:
            mask = self._mask_now()
            return mask is None or bool(mask[token])
        return bool(self._matcher.validate_tokens([token]) == 1)

    def _masks_after(self, drafts: Sequence[int]) -> list[Mask]:
        """The mask now and after each draft, up to one that is not allowed, or is the end; advances this guide."""
        masks: list[Mask] = []
        try:
            masks.append(self._mask_now())
            for draft in drafts:
                mask = masks[-1]
                if self._has_ended or (isinstance(mask, Tensor) and not mask[draft]):
                    break
                self.accept(draft)
                masks.append(self._mask_now())
        except Exception as error:  # of that position, which may never be reached
            masks.append(error)
        return masks

    def _mask_now(self) -> Tensor | None:
        size = self._grammars.vocab_size
        if forced := self._forced():
            return _only(forced[:1], size)
        if self._in_reasoning:
            return ~_only(self._end_ids - {self._think_end}, size)
        if self._matcher is None:
            return ~_only(self._end_ids, size) if self._must_go_on else None
        if self.is_finished:
            return _only(self._ends or self._end_ids, size)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise EngineError(f"the {self._kind} constraint failed: {fault_of(self._matcher)}")
        mask = torch.from_numpy(np.unpackbits(bits, count=size, bitorder="little").view(np.bool_))
        mask[list(self._end_ids)] = False
        can_go_on = bool(mask.any())
        if self._matcher.is_accepting() and not (self._must_go_on and can_go_on):
            mask[list(self._ends if can_go_on else self._ends or self._end_ids)] = True
        elif not can_go_on:
            raise EngineError(f"the {self._kind} constraint allows no token after {self._answer_tokens} of its answer")
        return mask


Mask = Tensor | Exception | None


def _only(ids: Iterable[int], size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor(list(ids), dtype=torch.long), True)


def fault_of(matcher: LLMatcher) -> str:
    """What is wrong with it in one line; "" for nothing."""
    lines = str(matcher.get_error()).strip().splitlines() if matcher.is_error() else []
    causes = [line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")]
    return ": ".join([line.removesuffix(":") for line in lines[:1]] + causes)
