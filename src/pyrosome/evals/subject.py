"""A model under evaluation: an engine made for each job, many greedy answers, and what became of its drafts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from pyrosome.cache.streams import plan_cache
from pyrosome.chat import Message, Prompt
from pyrosome.engine.request import Request
from pyrosome.engine.speculate import StepCost
from pyrosome.engine.worker import EngineThread, EventStream
from pyrosome.errors import ContextTooLong, EngineError
from pyrosome.evals.ablate import ablated
from pyrosome.evals.shares import Share
from pyrosome.llm import LLM
from pyrosome.options import EngineOptions, SamplingParams
from pyrosome.output import Output, collect

_GRAIN = 256  # tokens: what the cache holds is counted in pages of so many
_CONTEXTS = 32768  # tokens of all sequences that are computed at once, about
_MOST_SEQUENCES = 8
_STEP_ROWS = 1 << 23  # chosen rows of one step, in all its tokens: memory while every row is read


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer, as a client would see it."""

    message: Message
    thought_tokens: int = 0
    drafted: int = 0  # steps that checked a draft
    accepted: int = 0  # of those, in which the first draft stayed


def acceptance(answers: Iterable[Answer]) -> Share:
    """How often the first draft of a step was what the model said."""
    answers = list(answers)
    return Share(sum(a.accepted for a in answers), sum(a.drafted for a in answers))


class FreeDrafts(StepCost):
    """Every step costs the same: so each sequence drafts at every step, and none stops where drafts do badly."""

    def seconds(self, num_drafts: int) -> float:
        return 1.0


class Subject(LLM):
    """As `LLM`, for one job after the other.

        with Subject("builtin:nano") as subject, subject.opened(1024):
            answers = list(subject.answers(prompts, 16))

    It drafts one token in every step, where the checkpoint has a draft head.
    """

    reuse = False

    @functools.cached_property
    def engine(self) -> EngineThread:
        """The engine of the job that is open."""
        engine = self.model.engine(self.options)
        engine.drafter.cost = FreeDrafts()
        return EngineThread(engine)

    @contextlib.contextmanager
    def opened(self, context: int, *, ablation: str = "none", seed: int = 0, reuse: bool = False) -> Iterator[None]:
        """Within, answers come from an engine for sequences of up to `context` tokens, which then goes.

        Args:
            ablation, seed: as `ablated`.
            reuse: what prompts have in common is computed once.

        Raises:
            ContextTooLong: the model has no positions for so many tokens.
            RequestError: an ablation there is not.
        """
        self._check_context(context)
        self.close()
        self.options, self.reuse = self._options(context, ablation == "dense", reuse), reuse
        with ablated(self.model.network, ablation, seed):
            try:
                yield
            finally:
                self.close()

    def _check_context(self, context: int) -> None:
        most = self.model.config.max_position_embeddings
        if context > most:
            raise ContextTooLong(context, most, "ask for a shorter context (max_position_embeddings is the limit)")

    def _options(self, context: int, is_dense: bool, reuse: bool) -> EngineOptions:
        sequences = max(1, min(_MOST_SEQUENCES, _CONTEXTS // context))
        # One sequence more than are computed: what has ended is let go of only when its room is needed.
        tokens = (sequences + 1) * (-(-context // _GRAIN) + 1) * _GRAIN
        config = self.model.config
        plan = plan_cache(config, self.model.kv_format, sequences, context, cache_tokens=tokens)
        usual = EngineOptions()
        step_tokens = usual.step_tokens
        if is_dense:
            step_tokens = max(128, min(step_tokens, _STEP_ROWS // context))
        return EngineOptions(
            max_sequences=sequences,
            max_context=min(config.max_position_embeddings, tokens),
            cache_bytes=max(1, sum(plan.page_bytes[r] * n for r, n in plan.num_pages.items())),
            snapshot_bytes=usual.snapshot_bytes if reuse else 0,
            step_tokens=step_tokens,
            max_drafts=1,
        )

    def answers(
        self, prompts: Iterable[Prompt | Sequence[int]], max_tokens: int, **changes: Any
    ) -> Generator[Answer, None, None]:
        """Greedy answers of up to `max_tokens` tokens in the order of their prompts, several computed at once.

        Conversations are answered under their own constraints; `changes` are fields of `Request` instead.

        Raises:
            EngineError: an answer failed on the way.
        """
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        waiting: deque[tuple[Prompt | Sequence[int], EventStream]] = deque()
        try:
            for prompt in prompts:
                waiting.append((prompt, self.submit(self._asked(prompt, params, changes))))
                if len(waiting) > self.options.max_sequences:  # one more, so that there is always a next
                    yield self._read(*waiting[0], params)
                    waiting.popleft()
            while waiting:
                yield self._read(*waiting[0], params)
                waiting.popleft()
        finally:
            for _, events in waiting:
                events.close()

    def _asked(self, prompt: Prompt | Sequence[int], params: SamplingParams, changes: dict[str, Any]) -> Request:
        if isinstance(prompt, Prompt):
            request = self.request(prompt, params, **changes)
        else:
            (request,) = self._requests([prompt], params)
        return request if self.reuse else dataclasses.replace(request, salt=request.id)

    def _read(self, prompt: Prompt | Sequence[int], events: EventStream, params: SamplingParams) -> Answer:
        (output,) = collect(events, self.tokenizer, params)
        if output.finish_reason == "error":
            raise EngineError(output.error)
        drafted, accepted = _first_drafts(output)
        if not isinstance(prompt, Prompt):
            return Answer(Message("", output.text, (), output.finish_reason), 0, drafted, accepted)
        parser = self.chat_template.parser(prompt)
        for token in output.token_ids:
            parser.feed([token])
            if parser.finished or parser.calls_closed:  # whatever follows complete calls is dropped
                break
        message = parser.close("stop" if parser.calls_closed else output.finish_reason)
        return Answer(message, parser.reasoning_tokens, drafted, accepted)


def _first_drafts(output: Output) -> tuple[int, int]:
    """(steps that checked a draft, those in which the first stayed)."""
    if output.timeline is None or not output.timeline.drafted:
        return 0, 0
    return output.timeline.drafted[0], output.timeline.accepted[0]
