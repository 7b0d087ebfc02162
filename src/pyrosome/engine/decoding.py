"""From logits to tokens: choices, checks of drafts, tokens a grammar forces, and why a completion ends."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from pyrosome.engine.request import Event, News, TokenEvent
from pyrosome.engine.sampler import Choice, Row, choose_all
from pyrosome.engine.stats import Stats
from pyrosome.engine.track import Completion, Span

End = Callable[[Completion, str, list[Event | News]], None]
Fail = Callable[[Completion, Exception, list[Event | News]], None]


class Decoding:
    """Takes what a step computed and makes each completion's next tokens of it.

    Args:
        eos_id: ends a completion, where it does not ask to go on.
        max_context: ids a completion may have before it ends for its length.
        end: called for a completion that has ended, with the reason.
        fail: called for one that cannot go on; the others do.
    """

    def __init__(self, eos_id: int, max_context: int, stats: Stats, end: End, fail: Fail) -> None:
        self._eos_id, self._max_context, self._stats = eos_id, max_context, stats
        self._end, self._fail = end, fail

    def choose(self, active: list[tuple[Completion, Span, Tensor]], events: list[Event | News]) -> None:
        """Choose tokens and check drafts: row after row, all completions together, while drafts agree.

        Args:
            active: (completion, its span, float32 logits [1 + drafts, V] after its last known id and each draft).
        """
        at = 0
        while active:
            rows: list[Row | Exception] = []
            for c, _, rows_RV in active:
                try:
                    rows.append(Row(rows_RV[at], c.sampler, c.guide.mask(at), len(c.track.ids)))
                except Exception as error:
                    rows.append(error)
            choices = iter(choose_all([r for r in rows if isinstance(r, Row)]))
            agreed = []
            for (c, span, rows_RV), row in zip(active, rows, strict=True):
                choice = next(choices) if isinstance(row, Row) else row
                if self._take(c, span, at, choice, events):
                    agreed.append((c, span, rows_RV))
            active, at = agreed, at + 1

    def _take(self, c: Completion, span: Span, at: int, choice: Choice | Exception, events: list[Event | News]) -> bool:
        """Take one choice; whether it was the draft that the next row stands after."""
        if isinstance(choice, Exception):
            self._fail(c, choice, events)
            return False
        agrees = at < len(span.drafts) and choice.token == span.drafts[at]
        try:
            reason = self._commit(c, choice, events)
            if agrees and not reason:  # an end leaves its id to be computed: a session goes on from its logits
                c.sequence.length += 1
            elif not reason:
                reason = self._jump(c, events)
        except Exception as error:
            self._fail(c, error, events)
            return False
        if span.drafts and (reason or not agrees):  # once: the row after the last draft agrees with none
            c.depth.observe(len(span.drafts), at + agrees)
            self._stats.drafts_checked(len(span.drafts), at + agrees)
        if reason:
            self._end(c, reason, events)
        return not reason and agrees

    def _commit(self, c: Completion, choice: Choice, events: list[Event | News]) -> str:
        """Take one token; why the completion ends with it, or "" where it goes on."""
        token, params = choice.token, c.request.params
        reuse = None if c.output_tokens else c.reuse
        if reuse:
            c.first_token = time.monotonic()
        c.guide.accept(token)
        c.sampler.accept(token)
        c.track.append([token])
        self._stats.output_tokens += 1
        ends = token in params.stop_token_ids or (token == self._eos_id and not params.ignore_eos)
        events.append(TokenEvent(c.request.id, c.index, token, choice.logprobs, ends, reuse))
        if ends:
            return "stop"
        if c.sampler.is_repeating:
            return "repetition"
        if c.output_tokens >= params.max_tokens or len(c.track.ids) > self._max_context:
            return "length"
        return ""

    def _jump(self, c: Completion, events: list[Event | News]) -> str:
        """Take the tokens a grammar leaves no choice about; why the completion ends with them, or "".

        Log-probabilities, where they are wanted, need their rows: then nothing is jumped.
        """
        if c.request.params.logprobs is not None:
            return ""
        reasons = (self._commit(c, Choice(token, {}), events) for token in c.guide.forced())
        return next(filter(None, reasons), "")
