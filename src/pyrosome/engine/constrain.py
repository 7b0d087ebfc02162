"""What may come next: grammars (by llguidance), and the rules of reasoning.

Masks are computed by a worker thread while the network computes; they hold for drafts as they do without.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyrosome.engine.tool_grammar import tool_grammar
from pyrosome.errors import EngineError, RequestError
from pyrosome.options import Constraint, SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CACHED = 64  # compiled grammars
DSML = "｜DSML｜"
_ANY_OBJECT = '{"type": "object"}'
_SPACE = r"[\x20\x0A\x0D\x09]{0,32}"  # between JSON's parts: room for indentation, none for running on for ever
_workers = ThreadPoolExecutor(2, thread_name_prefix="pyrosome-grammar")


class Grammars:
    """Compiles constraints for one tokenizer; what was compiled is kept for the next request with the same text.

    Args:
        tokenizer_path: a tokenizer.json; None where there is none: then no grammar can be asked for.
        vocab_size: ids the network has logits for.
    """

    def __init__(self, tokenizer_path: Path | None, vocab_size: int, eos_id: int) -> None:
        self._path, self.vocab_size, self.eos_id = tokenizer_path, vocab_size, eos_id
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[Any, ...], LLMatcher] = OrderedDict()
        self.dsml = -1

    def compile(self, constraint: Constraint | None, think_end: int | None, params: SamplingParams) -> Guide:
        """The rules of one completion.

        Args:
            think_end: the id that closes reasoning, where the prompt leaves it open.

        Raises:
            RequestError: the schema, expression or grammar cannot be read; or there is no tokenizer to read it with.
        """
        start: LLMatcher | None = None
        if constraint is not None:
            if constraint.after_reasoning and think_end is None:
                raise RequestError(
                    "the constraint begins after reasoning and the prompt leaves none open; give think_end, or set "
                    "after_reasoning to false"
                )
            start = self._matcher(constraint, think_end is not None)
        return Guide(self, constraint, start, think_end, params)

    def tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance knows it, made once.

        Raises:
            RequestError: there is none, or llguidance is not installed.
        """
        with self._lock:
            if self._tokenizer is None:
                if self._path is None:
                    raise RequestError("a constraint was asked for and this checkpoint has no tokenizer.json")
                try:
                    from llguidance import LLTokenizer
                except ImportError:
                    raise RequestError(
                        "a constraint was asked for and llguidance is not installed; pip install llguidance"
                    ) from None
                self._tokenizer = LLTokenizer(str(self._path), n_vocab=self.vocab_size, eos_token=self.eos_id)
                found = self._tokenizer.tokenize_str(DSML, parse_special=True)
                self.dsml = found[0] if len(found) == 1 else -1
            return self._tokenizer

    def _matcher(self, constraint: Constraint, thinking: bool) -> LLMatcher:
        from_inside = constraint.kind == "tool_call_required" and not thinking
        key = (constraint.kind, constraint.schema, constraint.parallel, from_inside)
        tokenizer = self.tokenizer()
        with self._lock:
            if key not in self._compiled:
                from llguidance import LLMatcher

                text = self._grammar(constraint, from_inside)
                matcher = LLMatcher(tokenizer, text, log_level=0)
                if matcher.is_error():
                    first = str(matcher.get_error()).strip().splitlines()[0]
                    raise RequestError(f"the {constraint.kind} constraint cannot be used: {first}")
                self._compiled[key] = matcher
                if len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return self._compiled[key].deep_copy()

    def _grammar(self, constraint: Constraint, from_inside: bool) -> str:
        from llguidance import LLMatcher

        kind, schema = constraint.kind, constraint.schema
        if kind == "json":
            return str(
                LLMatcher.grammar_from_json_schema(schema or _ANY_OBJECT, defaults={"whitespace_pattern": _SPACE})
            )
        if kind == "regex":
            return str(LLMatcher.grammar_from_regex(schema))
        if kind == "lark":
            return str(LLMatcher.grammar_from_lark(schema))
        if kind in ("tool_call", "tool_call_required"):
            if self.dsml < 0:
                raise RequestError(f"tool calls are written with {DSML} and this tokenizer has no such token")
            opening = "tag" if kind == "tool_call" else "inside" if from_inside else "whole"
            text = tool_grammar(schema, self.dsml, opening=opening, parallel=constraint.parallel)
            return str(LLMatcher.grammar_from_lark(text))
        raise RequestError(
            f"constraint kind {kind!r} is unknown; it is json, regex, lark, tool_call or tool_call_required"
        )


class Guide:
    """What one completion may say next: made by `Grammars.compile`, advanced by every token of its output."""

    def __init__(
        self,
        grammars: Grammars,
        constraint: Constraint | None,
        matcher: LLMatcher | None,
        think_end: int | None,
        params: SamplingParams,
    ) -> None:
        self._grammars, self._constraint, self._think_end, self._params = grammars, constraint, think_end, params
        self._start = matcher  # as compiled: begins to hold later, or now
        self._matcher: LLMatcher | None = None
        self._in_reasoning = think_end is not None
        self._reasoning_tokens = 0
        self._answer_tokens = 0
        self._last = -1
        self._masks: Future[list[Tensor | None]] | list[Tensor | None] = []
        # Text completions may end at once: only an answer is never empty.
        self._never_empty = think_end is not None or constraint is not None
        self._ends = {*params.stop_token_ids, *([] if params.ignore_eos else [grammars.eos_id])}
        if constraint is not None and not self._in_reasoning and constraint.kind != "tool_call":
            self._matcher = matcher

    @property
    def is_free(self) -> bool:
        """Whether nothing is ruled out from here on."""
        return not self._in_reasoning and self._start is None and not (self._never_empty and not self._answer_tokens)

    @property
    def is_finished(self) -> bool:
        """Whether the grammar is complete, and nothing may follow but the end."""
        return self._matcher is not None and bool(self._matcher.is_stopped())

    def prepare(self, drafts: Sequence[int]) -> None:
        """Begin to compute what is allowed after each of the drafts, in a worker thread where it takes a grammar."""
        if self._matcher is None:
            self._masks = self._masks_after(drafts)
        else:
            self._masks = _workers.submit(self._masks_after, list(drafts))

    def usable(self, drafts: Sequence[int]) -> int:
        """How many of the drafts are allowed, one after the other."""
        if self.is_free:
            return len(drafts)
        probe = self.fork()
        for i, draft in enumerate(drafts):
            mask = probe._mask_now()
            if mask is not None and not mask[draft]:
                return i
            probe.accept(draft)
            if draft in self._ends:
                return i + 1
        return len(drafts)

    def mask(self, at: int) -> Tensor | None:
        """Ids allowed after `at` accepted drafts of those prepared, bool [V]; None: all.

        Raises:
            EngineError: nothing is allowed: the grammar is stuck.
        """
        if isinstance(self._masks, Future):
            self._masks = self._masks.result()
        mask = self._masks[at]
        if mask is not None and not bool(mask.any()):
            kind = self._constraint.kind if self._constraint else "reasoning"
            raise EngineError(f"the {kind} constraint allows no token after {self._answer_tokens} tokens of the answer")
        return mask

    def accept(self, token: int) -> None:
        """Take a token of the output.

        Raises:
            EngineError: the grammar does not allow it.
        """
        if self._in_reasoning:
            self._reasoning_tokens += 1
            if token == self._think_end:
                self._in_reasoning = False
                if self._start is not None and self._constraint and self._constraint.kind != "tool_call":
                    self._matcher = self._start
        elif self._matcher is not None:
            if token not in self._ends or not self._matcher.is_stopped():
                self._consume(token)
            self._answer_tokens += 1
        else:
            self._answer_tokens += 1
            if self._opens_call(token):
                self._matcher = self._start
        self._last = token

    def forced(self) -> list[int]:
        """Ids that must come next, as far as that is certain; empty where there is a choice."""
        if self._in_reasoning:
            return [self._think_end] if self._must_close() else []  # type: ignore[list-item]
        if self._matcher is None or self._matcher.is_stopped():
            return []
        return [int(t) for t in self._matcher.compute_ff_tokens()]

    def fork(self) -> Guide:
        """A second guide in the same state."""
        twin = Guide.__new__(Guide)
        twin.__dict__.update(self.__dict__)
        if self._start is not None:
            twin._start = self._start.deep_copy()
        if self._matcher is not None:
            twin._matcher = self._matcher.deep_copy()
        return twin

    def _must_close(self) -> bool:
        most = self._params.max_thinking_tokens
        return self._in_reasoning and most is not None and self._reasoning_tokens >= most

    def _opens_call(self, token: int) -> bool:
        """Whether a call opens here: the control token, just after a `<`."""
        if self._start is None or token != self._grammars.dsml or self._last < 0:
            return False
        return bool(self._grammars.tokenizer().decode_bytes([self._last]).endswith(b"<"))

    def _consume(self, token: int) -> None:
        assert self._matcher is not None
        if not self._matcher.consume_token(token) or self._matcher.is_error():
            raise EngineError(
                f"token {token} does not fit the grammar: {self._matcher.get_error() or 'it is complete'}"
            )

    def _masks_after(self, drafts: Sequence[int]) -> list[Tensor | None]:
        if not drafts:
            return [self._mask_now()]
        if self.is_free:
            return [None] * (len(drafts) + 1)
        probe = self.fork()
        masks = [probe._mask_now()]
        for draft in drafts:
            if draft in self._ends:
                break
            probe.accept(draft)
            masks.append(probe._mask_now())
        return masks + [None] * (len(drafts) + 1 - len(masks))

    def _mask_now(self) -> Tensor | None:
        size = self._grammars.vocab_size
        if self._must_close():
            return torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor([self._think_end]), True)
        if self._in_reasoning or (self._never_empty and not self._answer_tokens and self._matcher is None):
            return self._all_but_ends()
        if self._matcher is None:
            return None
        if self._matcher.is_stopped():
            return self._only_ends()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise EngineError(f"the grammar failed: {self._matcher.get_error()}")
        mask = torch.from_numpy(np.unpackbits(bits, bitorder="little")[:size].astype(bool))
        if len(mask) < size:
            mask = torch.cat([mask, mask.new_zeros(size - len(mask))])
        if self._matcher.is_accepting():
            for token in self._ends:
                mask[token] = True
        return mask

    def _all_but_ends(self) -> Tensor | None:
        if not self._ends:
            return None
        mask = torch.ones(self._grammars.vocab_size, dtype=torch.bool)
        return mask.index_fill_(0, torch.tensor(sorted(self._ends)), False)

    def _only_ends(self) -> Tensor:
        ends = self._ends or {self._grammars.eos_id}
        return torch.zeros(self._grammars.vocab_size, dtype=torch.bool).index_fill_(0, torch.tensor(sorted(ends)), True)
