"""What a model wrote, split into thoughts, answer and tool calls while it is being written.

One machine by token id, one object per request.  It starts in the state the rendered prompt leaves open.  Ids are
turned into text in which the two control tokens that matter are single characters no text can contain, so what the
model spells out letter by letter is text, and every way of cutting the ids into pieces gives the same result.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Sequence

from pyrosome.chat.calls import MARK, MARK_TEXT, OPENER, ToolBlock, held_back, new_call_id
from pyrosome.chat.detokenize import Detokenizer
from pyrosome.chat.events import (
    ContentDelta,
    Event,
    Message,
    ReasoningDelta,
    ToolCall,
    ToolCallDelta,
    ToolCallStart,
    joined,
)
from pyrosome.chat.json_output import JsonOutput
from pyrosome.chat.prompt import Prompt
from pyrosome.chat.tokenizer import Tokenizer

END, THINK_END = "<｜end▁of▁sentence｜>", "</think>"
_THINK_END_MARK = "\ud801"
_FENCE = re.compile(r"^ {0,3}(?:```|~~~)", re.MULTILINE)
_SPELLED = re.compile(r"<[ ]?/?[ ]?[｜‖|]{1,2}[ ]?DSML[ ]?[｜‖|]")


class Parser:
    """Reads one answer: `feed` ids (the end-of-sentence id included), `flush` where they end, `close` for the whole.

    Attributes:
        finish_reason: None while the answer goes on.
        calls_closed: the tool calls are complete; whatever follows them is dropped, so generation may stop.
        completion_tokens, reasoning_tokens: counted as in `Usage`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, call_id: Callable[[int], str] | None = None) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._end_id = tokenizer.id_of(END)
        self._marks = {tokenizer.id_of(MARK_TEXT): MARK, tokenizer.id_of(THINK_END): _THINK_END_MARK}
        self._tools = {t.name: t.parameters for t in prompt.tools} if prompt.tools else None
        self._parse_tools, self._stop = prompt.parse_tools, prompt.stop
        self._longest_stop = max(map(len, prompt.stop), default=0)
        self._json = JsonOutput() if prompt.json_only else None
        self._call_id = call_id or new_call_id
        self._waiting: collections.deque[int] = collections.deque()
        self._buffer = ""  # text not yet read
        self._unstopped = ""  # content in which a stop string may have begun
        self._state, self._fresh = prompt.start, not prompt.continues
        self._block: ToolBlock | None = None
        self._block_lead = self._last = ""  # newlines before a block; the piece said last
        self._block_from = "content"
        self._events: list[Event] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[tuple[ToolCallStart, list[str]]] = []
        self._notes: list[str] = []
        self._stop_sequence: str | None = None
        self.finish_reason: str | None = None
        self.completion_tokens = self.reasoning_tokens = 0
        self._num_thoughts = self._num_unsettled = 0
        if self._state == "tools":
            self._open_block(canonical=True, strict=True, opened=True)

    @property
    def finished(self) -> bool:
        """Whether the answer is over: its end was read, or a stop string."""
        return self.finish_reason is not None

    @property
    def calls_closed(self) -> bool:
        """Whether the tool calls are complete; see above."""
        return self._state == "after"

    def feed(self, ids: Sequence[int]) -> list[Event]:
        """Take ids; return what they settle.  Ids after the end are ignored.

        An error in the middle loses nothing: what was read stays, what was not is read by the next call.
        """
        self._waiting.extend(ids)
        self._read_waiting()
        return self._drain()

    def flush(self, reason: str = "length") -> list[Event]:
        """No more ids will come ("length": cut short; "stop": stopped from outside): give out what was held back."""
        self._read_waiting()
        self._end(reason)
        return self._drain()

    def close(self, reason: str = "length") -> Message:
        """The whole answer; flushes first, for callers that want no events."""
        self.flush(reason)
        return self._message()

    def _read_waiting(self) -> None:
        while self._waiting and not self.finished:
            self._take(self._waiting[0])
        self._waiting.clear()

    def _end(self, reason: str) -> None:
        if self.finished:
            return
        self._buffer += self._detokenizer.close()
        self._read(reason)
        self._count(0)
        if self._json and not self.finished:
            self._say_content(self._json.feed("", final=True))
        if not self.finished:  # else a stop string was found in what had been held back
            self._release_stop()
            self.finish_reason = "tool_calls" if self._calls and reason == "stop" else reason

    def _take(self, token: int) -> None:
        if token == self._end_id:
            self._waiting.clear()
            self._end("stop")
            return
        mark = self._marks.get(token)
        text = self._detokenizer.close() + mark if mark else self._detokenizer.feed([token])
        self._waiting.popleft()
        self._buffer += text
        self.completion_tokens += 1
        self._read(None)
        self._count(len(text))

    def _count(self, num_chars: int) -> None:
        """A token is a reasoning token once its text is given out as such, not while it may yet be dropped."""
        if len(self._reasoning) > self._num_thoughts:
            self.reasoning_tokens += self._num_unsettled + (self._state == "reasoning" and num_chars > 0)
            self._num_thoughts, self._num_unsettled = len(self._reasoning), 0
        elif self._state in ("reasoning", "tools") and (self._buffer or self._block or not num_chars):
            self._num_unsettled += 1

    def _drain(self) -> list[Event]:
        events, self._events = joined(self._events), []
        return events

    # The states.  Each reads from the buffer what is certain, and says whether another should go on.

    def _read(self, end: str | None) -> None:
        while not self.finished:
            if self._state == "tools":
                more = self._read_tools(end)
            elif self._state == "after":
                more = self._read_after()
            else:
                more = self._read_text(end)
            if not more:
                return

    def _read_text(self, end: str | None) -> bool:
        """Thoughts or answer, up to `</think>` or a block of tool calls."""
        if self._fresh:
            self._buffer = self._buffer.lstrip("\n")
            self._fresh = not self._buffer
        text, reasoning = self._buffer, self._state == "reasoning"
        close = text.find(_THINK_END_MARK)
        block = OPENER.search(text, 0, close if close >= 0 else len(text)) if self._parse_tools else None
        at = block.start() if block else close
        if at < 0:
            keep = 0 if end else held_back(text) if self._parse_tools else len(text) - len(text.rstrip("\n"))
            if not reasoning and not self._parse_tools:
                keep = 0
            self._say(text[: len(text) - keep])
            self._buffer = text[len(text) - keep :]
            return False
        before = text[:at]
        self._buffer = text[at:]
        if block:
            lead = before[len(before.rstrip("\n")) :]
            self._say(before[: len(before) - len(lead)])
            if not lead and self._last.endswith("`"):  # quoted, as code within a line
                self._leave("<", text[at + 1 :])
                return not self.finished
            strict = text.startswith("<" + MARK, at)
            self._open_block(canonical=strict and not reasoning and self._at_line_start(lead), strict=strict, lead=lead)
        else:
            self._say(before.rstrip("\n") if reasoning else before)
            self._buffer, self._last = text[at + 1 :], ""
            if reasoning:
                self._state, self._fresh = "content", True
        return not self.finished

    def _open_block(self, *, canonical: bool, strict: bool, opened: bool = False, lead: str = "") -> None:
        self._block_from = "content" if opened else self._state
        self._block_lead, self._state = lead, "tools"
        self._block = ToolBlock(
            self._tools, self._emit_call, self._call_id, canonical=canonical, strict=strict, opened=opened
        )

    def _read_tools(self, end: str | None) -> bool:
        block, text = self._block, self._buffer
        assert block is not None
        closed = text.find(_THINK_END_MARK) if self._block_from == "reasoning" else -1
        self._buffer = text[closed:] if closed >= 0 else ""
        block.feed((text if closed < 0 else text[:closed]).replace(_THINK_END_MARK, THINK_END))
        if block.outcome is None and closed >= 0:
            block.reject()  # the thoughts ended: it was part of them
        elif block.outcome is None and end:
            block.finish(end)
        if block.outcome is None:
            return False
        self._block = None
        if block.outcome == "closed":
            self._notes += block.notes
            self._state, self._buffer = "after", block.rest + self._buffer
        else:
            self._state = self._block_from
            until = len(block.raw[: block.text_until].rstrip("\n"))
            self._leave(self._block_lead + block.raw[:until], block.raw[until:] + self._buffer)
        return True

    def _leave(self, shown: str, rest: str) -> None:
        """It was text after all: give out what showed that, and read on behind it."""
        self._note("markup of tool calls was left in the text")
        self._say(shown)
        self._buffer = rest

    def _read_after(self) -> bool:
        if self._buffer.replace(_THINK_END_MARK, "").strip():
            self._note("text after the tool calls was dropped")
        self._buffer = ""
        return False

    # Giving out

    def _at_line_start(self, lead: str) -> bool:
        """Whether a block here stands at the start of a line of the answer, outside a code fence."""
        line = self._last.rstrip(" \t")
        if line and not line.endswith("\n") and not lead:
            return False  # spares counting the fences of all that was said, at each mention of a tag
        said = "".join(self._content) + self._unstopped
        line = said.rstrip(" \t")
        return (bool(lead) or not line or line.endswith("\n")) and len(_FENCE.findall(said)) % 2 == 0

    def _say(self, text: str) -> None:
        if not text:
            return
        text = self._last = text.replace(MARK, MARK_TEXT)
        if self._state == "reasoning":
            self._reasoning.append(text)
            self._events.append(ReasoningDelta(text))
        else:
            self._say_content(self._json.feed(text) if self._json else text)

    def _say_content(self, text: str) -> None:
        self._unstopped += text
        ends = [(at + len(s), at, s) for s in self._stop if (at := self._unstopped.find(s)) >= 0]
        if ends:  # the one that is complete first
            _, at, self._stop_sequence = min(ends)
            self._unstopped = self._unstopped[:at]
            self.finish_reason = "stop"
        keep = 0 if ends else max(0, self._longest_stop - 1)
        self._release_stop(keep)

    def _release_stop(self, keep: int = 0) -> None:
        end = max(0, len(self._unstopped) - keep)
        text, self._unstopped = self._unstopped[:end], self._unstopped[end:]
        if text:
            self._content.append(text)
            self._events.append(ContentDelta(text))

    def _emit_call(self, event: Event) -> None:
        if isinstance(event, ToolCallStart):
            self._release_stop()
            self._calls.append((event, []))
        elif isinstance(event, ToolCallDelta):
            self._calls[event.index][1].append(event.arguments)
        self._events.append(event)

    def _note(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)

    def _message(self) -> Message:
        content = "".join(self._content)
        calls = tuple(ToolCall(c.id, c.name, "".join(parts)) for c, parts in self._calls)
        notes = list(dict.fromkeys(self._notes))
        if _SPELLED.search(content) and self._parse_tools:
            notes.append("markup of tool calls was spelled out in the text")
        if not content.strip() and not calls and self.finish_reason == "stop" and not self._stop_sequence:
            notes.append("the answer is empty")
        return Message(
            "".join(self._reasoning), content, calls, self.finish_reason or "length", self._stop_sequence, tuple(notes)
        )
