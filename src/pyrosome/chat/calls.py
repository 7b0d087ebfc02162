"""One block of tool calls in the DSML markup, read as it grows.

Text comes in with the control token `｜DSML｜` as the single character `MARK`, which no text can contain, so what the
model spells out letter by letter is never taken for it.  The block decides when it is sure of being one:

- In a **canonical** place (the start of a line outside a code fence, in the answer) and written as trained, the calls
  are sure from the first parameter on, and are streamed from there.
- Anywhere else (in prose, in thoughts, without the outer tag, with other bars) it is a **near miss**: it is held back
  until it closes, and counts only if every call names a declared tool and fits its schema.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping
from typing import Any

from pyrosome.chat.arguments import Arguments
from pyrosome.chat.events import Event, ToolCallDelta, ToolCallStart
from pyrosome.chat.schema import fits

MARK = "\ud800"  # the token ｜DSML｜; a lone surrogate, which no decoded text holds
MARK_TEXT = "｜DSML｜"
# Bars seen in place of the token: doubled, ASCII, spaced.  The exact spelling letter by letter is a quotation.
_BAR = r"[｜‖|]"
_LOOSE = (
    rf"(?:[ ]?{_BAR}?[ ]?{MARK}{_BAR}?+[ ]?+|[ ]?(?!｜DSML｜(?!{_BAR})){_BAR}{{1,2}}[ ]?DSML[ ]?{_BAR}{{1,2}}+[ ]?+)"
)
_MAX_TAG = 1024  # characters of one tag
_DROPPED = "text between the tags of a tool call was dropped"
_MAX_PROSE = 64  # characters between tags, beyond which a near miss is prose

OPENER = re.compile(rf"<{_LOOSE}")
_HELD_BACK = re.compile(rf"<(?:[ ]?{_BAR}{{0,2}}[ ]?(?:D(?:S(?:M(?:L[ ]?{_BAR}?)?)?)?)?)?$")


def new_call_id(index: int) -> str:
    """An id as the official API writes them."""
    letters = string.ascii_letters + string.digits
    return f"call_{index:02d}_" + "".join(secrets.choice(letters) for _ in range(20))


def held_back(text: str) -> int:
    """How many characters at the end of `text` may be the beginning of a tag, newlines before it included."""
    found = _HELD_BACK.search(text, max(0, len(text) - 12))
    rest = text[: found.start()] if found else text
    return len(text) - len(rest.rstrip("\n"))


class _Tags:
    """The patterns of one manner of writing the mark."""

    def __init__(self, mark: str, mark_start: str) -> None:
        name = r"\s*([A-Za-z_][\w.-]*)"
        attribute = r'\s+[\w-]+\s*=\s*(?:"[^"]*"|[^\s">]+)'
        self.opener = re.compile(rf"<{mark}{name}((?:{attribute})*)\s*/?>")
        self.closer = re.compile(rf"</{mark}{name}?\s*(?:>|(?=[^\s\w.>-]))")
        self.last_closer = re.compile(rf"</{mark}{name}?\s*>?")  # where no more text will come
        self.any = re.compile(rf"</?{mark}")
        self.start = re.compile(mark_start + "$")


_STRICT = _Tags(MARK, "</?")
_ANY_BARS = _Tags(_LOOSE, rf"<(?:/?[ ]?{_BAR}{{0,2}}[ ]?(?:D(?:S(?:M(?:L[ ]?{_BAR}?)?)?)?)?)?")
_ATTRIBUTE = re.compile(r'([\w-]+)\s*=\s*(?:"([^"]*)"|([^\s">]+))')


class ToolBlock:
    """Reads one block; `feed` until `outcome` is set, or `finish` where the text ends.

    Attributes:
        outcome: None while undecided or streaming; "closed" (a block, and over) or "rejected" (text after all).
        sure: the calls have begun to be given out, and can no longer be rejected.
        raw: all text taken; of a rejected block, `text_until` says up to where it is text, to be read anew from there.
        rest: what follows the block's end.
    """

    def __init__(
        self,
        tools: Mapping[str, Any] | None,
        emit: Callable[[Event], None],
        call_id: Callable[[int], str],
        *,
        canonical: bool,
        strict: bool,
        opened: bool = False,
    ) -> None:
        self._tools, self._emit, self._call_id = tools, emit, call_id
        self._in_place = self.canonical = canonical
        self._tags = _STRICT if strict else _ANY_BARS
        self.raw, self.rest = "", ""
        self.text_until = 0
        self.outcome: str | None = None
        self.sure = False
        self.num_calls = 0
        self.notes: list[str] = []
        self._held: list[Event] = []
        self._at = 0  # of raw: what is before it has been read
        self._wrapped = self._implied = opened  # an outer tag was seen; it was the prompt's
        self._call: Arguments | None = None
        self._all_fit = True
        self._in_value = False
        self._prose = 0
        self._body, self._prose_in_call = "", False

    def feed(self, text: str) -> None:
        """Take more text and read as far as is certain."""
        if self.sure:  # what has been read will not be asked for again
            self.raw, self._at = self.raw[self._at :], 0
        self.raw += text
        while self.outcome is None and self._step(final=False):
            pass

    def finish(self, reason: str) -> None:
        """The text ends, by itself ("stop") or cut short ("length"): decide."""
        while self.outcome is None and self._step(final=True):
            pass
        if self.outcome is not None:
            return
        if reason == "length" and (self.sure or self.canonical):
            self._cut_short()
            return
        unclosed = self._wrapped or self._call is not None
        if self._call is not None and not self.sure and not self.canonical:
            self.reject()
            return
        if not self._in_value:  # half a value is left as it is, so that nobody acts on it
            self._end_call(commit=self.sure)
        if not self.sure and self.num_calls and self._all_fit and not self._in_value:
            self._commit()
        if not self.sure:
            self.reject()
            return
        self.outcome = "closed"
        if unclosed:
            self.notes.append("the tool calls were not closed")

    def reject(self, at: int | None = None) -> None:
        """It was text, up to `at` or to its end."""
        self.outcome, self.text_until = "rejected", len(self.raw) if at is None else at

    # Reading

    def _step(self, *, final: bool) -> bool:
        """Read one tag or stretch of text; False where more text is needed."""
        if self._in_value:
            return self._read_value(final)
        tag = self._tags.any.search(self.raw, self._at)
        end = tag.start() if tag else len(self.raw)
        if not tag:  # what may begin a tag is not text between tags, even where nothing follows it
            partial = self._tags.start.search(self.raw, max(self._at, end - 12))
            end = partial.start() if partial else end
        begin, self._at = self._at, end
        self._between(begin, end)
        return self.outcome is None and tag is not None and self._read_tag(final)

    def _read_tag(self, final: bool) -> bool:
        if self.raw.startswith("</", self._at):
            found = (self._tags.last_closer if final else self._tags.closer).match(self.raw, self._at)
            if found:
                self._at = found.end()
                self._closed(found.group(1) or "")
                return True
        elif found := self._tags.opener.match(self.raw, self._at):
            begin, self._at = self._at, found.end()
            values = {m[1]: m[2] if m[2] is not None else m[3] for m in _ATTRIBUTE.finditer(found.group(2))}
            self._opened(found.group(1), values, begin)
            return True
        if len(self.raw) - self._at > _MAX_TAG or ">" in re.sub(r'"[^"]*"?', "", self.raw[self._at :]):
            self._at += 1  # not a tag after all
            self._between(self._at - 1, self._at)
            return True
        return False

    def _read_value(self, final: bool) -> bool:
        """Pass on a value up to the next tag, whatever it is; a suffix that may begin one waits."""
        assert self._call is not None
        tag = self._tags.any.search(self.raw, self._at)
        end = tag.start() if tag else len(self.raw)
        if not tag and not final:
            partial = self._tags.start.search(self.raw, max(self._at, end - 12))
            end = partial.start() if partial else end
        if end > self._at:
            self._call.add(self.raw[self._at : end])
            self._at = end
        if tag:
            if not tag.group().startswith("</"):
                if not self.sure:
                    self.reject(end)
                    return False
                self.notes.append(f"a value of {self._call.name} was not closed")
            self._call.end_value()
            self._in_value = False
        self._flush()
        return tag is not None

    def _opened(self, name: str, values: dict[str, str], at: int) -> None:
        if name == "invoke" or (name != "parameter" and "name" in values):
            if self._call is not None and not self.sure and not self.canonical:
                self.reject(at)
                return
            self._end_call()
            self._begin_call(values.get("name", ""))
        elif name == "parameter" and self._call is not None:
            self._begin_value(values)
        elif name != "parameter" and (self._implied or not self._wrapped) and not self.num_calls:
            self._wrapped, self._implied = True, False
        elif name != "parameter" and not self.sure:
            self.reject(at)  # another block begins: this one was only mentioned
        else:
            self._between(at, self._at)

    def _closed(self, name: str) -> None:
        if name == "parameter":
            return
        had_call = self._call is not None
        self._end_call()
        if name == "invoke":
            return
        if had_call:
            self.notes.append("an invoke tag was not closed")
        if self.outcome is None:
            self._end_block()

    def _between(self, begin: int, end: int) -> None:
        """Text where only white space or a tag belongs."""
        text = self.raw[begin:end]
        bodiless = self._call is not None and not self._call.num_values and not self._prose_in_call
        if bodiless and (self._body or text.lstrip().startswith("{")):
            self._body += text  # arguments written as one JSON object
            return
        letters = [n for n, c in enumerate(text) if not c.isspace()]
        if not letters:
            return
        self._prose_in_call = True
        if not self.sure:
            self.canonical = False
            left = (_MAX_PROSE if self._in_place and self._wrapped else 0) - self._prose
            self._prose += len(letters)
            if len(letters) > left:
                self.reject(begin + letters[left] + 1)
        elif not self._wrapped and self._call is None:
            self._end_block(text)
        elif _DROPPED not in self.notes:
            self.notes.append(_DROPPED)

    # Calls

    def _begin_call(self, name: str) -> None:
        schema = None if self._tools is None else self._tools.get(name)
        self._call = Arguments(name, schema, known=self._tools is not None and name in self._tools)
        self._body, self._prose_in_call = "", False
        if not self._wrapped:
            self.canonical = False
        if self._tools is not None and name not in self._tools:
            self.notes.append(f"the tool {name!r} was not declared")
            self._all_fit = False
        self._held.append(ToolCallStart(self.num_calls, self._call_id(self.num_calls), name))
        self.num_calls += 1

    def _begin_value(self, values: dict[str, str]) -> None:
        assert self._call is not None
        self._call.begin_value(values.get("name", ""), values.get("string"))
        self._in_value = True
        if self.canonical and self._wrapped:
            self._commit()

    def _end_call(self, *, commit: bool = True) -> None:
        """Close the call that is open, if one is; this makes it sure in a canonical place, or alone and fitting."""
        if self._call is None:
            return
        call, self._call = self._call, None
        call.close(self._body)
        self.notes += call.notes
        fragment = call.take()
        if fragment:
            self._held.append(ToolCallDelta(self.num_calls - 1, fragment))
        if not self._fits(call):
            self._all_fit = False
        if self.sure:
            self._release()
        elif commit and (self.canonical if self._wrapped else self._all_fit):
            self._commit()

    def _fits(self, call: Arguments) -> bool:
        try:
            value = json.loads(call.text)
        except ValueError:
            return self._tools is None
        return self._tools is None or (call.name in self._tools and fits(value, self._tools[call.name]))

    def _end_block(self, rest: str = "") -> None:
        self.rest = rest + self.raw[self._at :]
        if self.sure:
            self.outcome = "closed"
        elif self.num_calls and self._all_fit:
            self._commit()
            self.outcome = "closed"
        elif self.canonical and not self.num_calls:
            self.notes.append("a block of tool calls held no call")
            self.outcome = "closed"
        else:
            self.reject(self._at)

    def _cut_short(self) -> None:
        self.notes.append("cut short within a tool call")
        if self._call is not None:
            self._call.cut()
            self._commit()
        self.outcome = "closed"

    def _commit(self) -> None:
        self.sure = True
        self._flush()
        self._release()

    def _flush(self) -> None:
        if self._call is not None and (fragment := self._call.take()):
            self._held.append(ToolCallDelta(self.num_calls - 1, fragment))
        if self.sure:
            self._release()

    def _release(self) -> None:
        for event in self._held:
            self._emit(event)
        self._held.clear()
