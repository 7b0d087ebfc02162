"""Grammars (by llguidance) and the rules of reasoning, compiled into a `Guide` for each completion.

V is the number of ids the network has logits for.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrosome.engine.guide import Guide as Guide
from pyrosome.engine.guide import fault_of, workers
from pyrosome.engine.tool_grammar import SPACE, tool_grammar
from pyrosome.engine.vocabulary import DSML, Vocabulary
from pyrosome.errors import RequestError
from pyrosome.options import Constraint, SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CACHED = 64  # compiled grammars


class Grammars:
    """Compiles constraints for one tokenizer; what was compiled is kept for the next request with the same text.

    Args:
        tokenizer_path: a tokenizer.json; None where there is none: then no grammar can be asked for.
        vocab_size: V; the tokenizer may know fewer.
    """

    def __init__(self, tokenizer_path: Path | None, vocab_size: int, eos_id: int) -> None:
        self._path, self.vocab_size, self.eos_id = tokenizer_path, vocab_size, eos_id
        self._lock = threading.RLock()
        self._vocabulary: Vocabulary | None = None
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[Any, ...], LLMatcher] = OrderedDict()

    def compile(
        self,
        constraint: Constraint | None,
        think_end: int | None,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        never_empty: bool | None = None,
    ) -> Guide:
        """The rules of one completion.

        Args:
            think_end: the id that closes reasoning, where the prompt leaves it open.
            prompt: its ids, which tell whether a required tool call is open already.  Without them it is, unless
                reasoning comes first.
            never_empty: it may not end by itself before it has said something; None: where there is a constraint or
                reasoning.

        Raises:
            RequestError: the schema, expression or grammar cannot be read; or there is no tokenizer to read it with.
        """
        if think_end is not None and not 0 <= think_end < self.vocab_size:
            raise RequestError(f"think_end is {think_end}; an id from 0 to {self.vocab_size - 1} was expected")
        if constraint is None:
            if think_end is not None and self._path is not None:
                workers.submit(self.vocabulary)  # by the time that the answer begins it is there
            return Guide(self, None, None, think_end, params, prompt, never_empty)
        if constraint.after_reasoning and think_end is None:
            raise RequestError(
                "the constraint begins after reasoning and the prompt leaves none open; give think_end, or set "
                "after_reasoning to false"
            )
        if not constraint.after_reasoning:
            think_end = None  # it binds from the first token on, so there can be no reasoning
        matcher = self._matcher(constraint, self._opening(constraint, think_end, prompt))
        return Guide(self, constraint, matcher, think_end, params, prompt, never_empty)

    def vocabulary(self) -> Vocabulary:
        """What each id stands for, read once.

        Raises:
            RequestError: there is no tokenizer.
        """
        with self._lock:
            if self._vocabulary is None:
                if self._path is None:
                    raise RequestError(
                        "a constraint was asked for and this checkpoint has no tokenizer.json; put it beside its "
                        "weights"
                    )
                self._vocabulary = Vocabulary(self._path, self.vocab_size, self.eos_id)
            return self._vocabulary

    def is_blank(self, token: int) -> bool:
        """Whether a token alone says nothing."""
        return self._path is not None and self.vocabulary().is_blank(token)

    def _opening(self, constraint: Constraint, think_end: int | None, prompt: Sequence[int]) -> str:
        """How much of a block of tool calls is there when the grammar begins to hold."""
        if constraint.kind != "tool_call_required":
            return "tag" if constraint.answer is None else "whole"
        if think_end is not None:
            return "whole"
        vocabulary = self.vocabulary()
        last = next((t for t in reversed(prompt) if t in vocabulary.control), vocabulary.dsml)
        return "inside" if last == vocabulary.dsml else "whole"

    def _matcher(self, constraint: Constraint, opening: str) -> LLMatcher:
        key = (constraint.kind, constraint.schema, constraint.parallel, opening, constraint.answer)
        with self._lock:
            if key not in self._compiled:
                matcher = self._build(constraint, opening)
                if fault := fault_of(matcher):
                    raise RequestError(f"the {constraint.kind} constraint cannot be used: {fault}")
                self._compiled[key] = matcher
                if len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return self._compiled[key]

    def _build(self, constraint: Constraint, opening: str) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise RequestError(
                "a constraint was asked for and llguidance is not installed; pip install llguidance"
            ) from None
        if self._tokenizer is None:
            vocabulary: Any = self.vocabulary()  # has what a wrapper needs
            vocabulary("")  # its encoder is made here, where a request arrives, and not in the middle of a step
            self._tokenizer = LLTokenizer(vocabulary, n_vocab=self.vocab_size, eos_token=self.eos_id)
        made: Callable[[str], LLMatcher] = functools.partial(LLMatcher, self._tokenizer, log_level=0)
        kind, schema = constraint.kind, constraint.schema
        try:
            if kind == "json":
                form = _schema(schema)
                options: Any = {"whitespace_pattern": SPACE}
                return made(LLMatcher.grammar_from_json_schema(form, defaults=options))
            if kind == "regex":
                return made(LLMatcher.grammar_from_regex(schema))
            if kind == "lark":
                return made(LLMatcher.grammar_from_lark(schema))
            answer = None if constraint.answer is None else _schema(constraint.answer)
        except ValueError as error:  # no JSON, no object, or text that has no UTF-8 form
            raise RequestError(f"the {kind} constraint cannot be used: {error}") from None
        if kind not in ("tool_call", "tool_call_required"):
            raise RequestError(
                f"constraint kind {kind!r} is unknown; it is json, regex, lark, tool_call or tool_call_required"
            )
        dsml = self.vocabulary().dsml
        if dsml < 0:
            raise RequestError(f"tool calls are written with {DSML} and this tokenizer has no such token")

        def lark(text: str) -> LLMatcher:
            return made(LLMatcher.grammar_from_lark(text))

        write = functools.partial(
            tool_grammar, schema, dsml, opening=opening, parallel=constraint.parallel, answer=answer
        )
        matcher = lark(write())
        return lark(write(fault=lambda text: fault_of(lark(text)))) if matcher.is_error() else matcher


def _schema(text: str) -> dict[str, Any]:
    """A JSON Schema; of any object for "".

    Raises:
        ValueError: it is none.
    """
    schema = json.loads(text) if text else {"type": "object"}
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON Schema is an object, or true; it is {text}")
    return schema
