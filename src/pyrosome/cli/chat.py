"""`pyrosome chat`: a conversation in the terminal.

At a terminal every message typed is a turn, and a line that begins with a slash is a command.  Piped in, the whole
input is one message and nothing in it is a command: a file can be asked about without obeying it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from pyrosome.cli.conversation import Conversation
from pyrosome.cli.engine_flags import (
    CACHE_GIB,
    CacheGiB,
    Device,
    Drafter,
    Experts,
    LockMemory,
    LogEvery,
    Numa,
    TracePath,
    engine_options,
    load_options,
)
from pyrosome.cli.first_contact import BUILTIN, MODEL_HELP, official_note
from pyrosome.cli.history import remembered, typed
from pyrosome.cli.terminal import INTERRUPTED, Screen, Stop, decoded, loading, size
from pyrosome.errors import PyrosomeError, RequestError
from pyrosome.options import SamplingParams

if TYPE_CHECKING:
    from pyrosome.llm import LLM

Thinking = Literal["off", "high", "max"]
MODES: tuple[Thinking, ...] = get_args(Thinking)
BUILTIN_TOKENS = 256  # its answers are short; asked what it was not taught, it may not come to an end


def chat(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=BUILTIN)] = None,
    think: Annotated[str, typer.Option(help=f"How much to think first: {', '.join(MODES)}.")] = "high",
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most, thoughts included; by default the mode's own.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most probable token each time.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the smallest set with this much probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    numerics: Annotated[str, typer.Option(help="trained or exact.")] = "trained",
    kv_format: Annotated[str | None, typer.Option(help="Stored cache rows: f32, bf16 or fp8.")] = None,
    cache_gib: CacheGiB = CACHE_GIB,
    drafter: Drafter = "auto",
    experts: Experts = "resident",
    lock_memory: LockMemory = False,
    numa: Numa = "auto",
    device: Device = "cpu",
    log_every: LogEvery = 0,
    trace: TracePath = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each answer.")] = False,
) -> None:
    """Talk with a model; /help lists what can be typed.

    Piped in, the whole standard input is one message.  Ctrl-C stops an answer; at the prompt, twice, it leaves.
    """
    mode = _mode(think)
    asked = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    if model in (None, BUILTIN) and max_tokens is None:
        asked["max_tokens"] = BUILTIN_TOKENS
    given = {k: v for k, v in asked.items() if v is not None}
    SamplingParams(**given)  # type: ignore[arg-type]  # what is out of range is refused before the load
    options = engine_options(cache_gib, drafter, log_every, trace)
    held = load_options(experts, lock_memory, numa, device)
    screen = Screen()
    interactive = sys.stdin.isatty()
    question = "" if interactive else decoded(sys.stdin.buffer.read(), "standard input").rstrip("\n")
    if not interactive and not question.strip():
        raise RequestError("standard input is empty; pipe a message in, or run this at a terminal")
    from pyrosome.llm import LLM  # torch is loaded only now: `--help` stays quick

    with loading(screen) as progress:
        llm = LLM(model or BUILTIN, numerics=numerics, kv_format=kv_format, options=options, progress=progress, **held)
    with llm:  # its end writes the trace
        session = Session(llm, model or BUILTIN, screen, mode, given, as_json)
        if interactive:
            if model is None:
                screen.notice(official_note("chat /path/to/DeepSeek-V4-Flash"))
            _converse(session)
        else:
            session.turn(question)
    if session.interrupted and not interactive:
        raise typer.Exit(INTERRUPTED)


def _converse(session: Session) -> None:
    session.greet()
    with remembered() if session.screen.out_is_terminal else contextlib.nullcontext():
        session.talk(typed(session.screen))


def _mode(name: str) -> Thinking:
    for mode in MODES:
        if name == mode:
            return mode
    raise RequestError(f"{name!r} is no way of thinking; there are {', '.join(MODES)}")


class Session:
    """One conversation with one model on one screen."""

    def __init__(
        self, llm: LLM, name: str, screen: Screen, thinking: Thinking, given: dict[str, Any], as_json: bool
    ) -> None:
        self.llm, self.name, self.screen, self.thinking, self.given = llm, name, screen, thinking, given
        self.as_json = as_json
        self.conversation = Conversation()
        self.folded = False
        self.interrupted = False
        self.context_tokens = 0
        self.thoughts = ""  # of the last answer
        self._hidden = False  # whether they were folded away when they came

    @property
    def max_context(self) -> int:
        return self.llm.model.config.max_position_embeddings

    def greet(self) -> None:
        """Say who answers, and how to get out."""
        self.screen.notice(
            f"{self.name}, thinking {self.thinking}, context {self.max_context:,} tokens.\n"
            "/help lists commands. Ctrl-C stops an answer, Ctrl-D leaves."
        )

    def talk(self, messages: Iterator[str]) -> None:
        """Take messages and commands until they end or /quit; a failure costs its turn only."""
        for text in messages:
            try:
                if text.startswith("/"):
                    if self._command(text):
                        return
                else:
                    self.turn(text)
            except PyrosomeError as error:
                self.screen.notice(f"{error}", dim=False)
            except KeyboardInterrupt:  # a command that took long, or an answer that had just ended
                self.screen.notice("(stopped)")

    def turn(self, text: str) -> None:
        """Ask, and show the answer as it comes.  An answer stopped half-way is kept as far as it came."""
        messages = self.conversation.ask(text)
        answer = Answer(None if self.as_json else self.screen, self.folded)
        try:
            with Stop() as stop:
                stream = self.llm.chat_stream(messages, thinking=self.thinking, params=self._params(messages))
                for event in stream:
                    answer.take(event)
                    if stop.asked:
                        stream.close()  # type: ignore[attr-defined]
                        break
        except KeyboardInterrupt:  # the second one: it was the step that took long
            pass
        except BaseException:
            answer.end()
            self.conversation.take_back()
            raise
        answer.end()
        self._keep(answer)

    def _params(self, messages: list[dict[str, Any]]) -> SamplingParams | None:
        """The mode's own sampling, with what the command line asked for in its place."""
        if not self.given:
            return None
        prompt = self.llm.chat_template.conversation(messages, self.thinking)
        limit = min(prompt.max_tokens, max(1, self.max_context - len(prompt.ids)))
        return prompt.sampling_params(**{"max_tokens": limit, **self.given})

    def _keep(self, answer: Answer) -> None:
        self.thoughts, self._hidden = answer.reasoning, self.folded
        self.interrupted = answer.finish_reason == "interrupted"
        self.context_tokens = answer.context_tokens or self._tokens_so_far(answer)
        if self.as_json:
            self.screen.text(json.dumps(answer.report(), ensure_ascii=False) + "\n")
        if self.interrupted and not answer.content:
            self.conversation.take_back()
            self.screen.notice("(stopped before an answer; the message was taken back)")
            return
        self.conversation.answer(answer.content, answer.reasoning, answer.tool_calls)
        if self.interrupted:
            self.screen.notice("(stopped)")
        for fault in answer.malformed:
            self.screen.notice(f"(malformed: {fault})")
        if answer.finish_reason == "length":
            self.screen.notice("(cut: the limit of tokens was reached; --max-tokens sets it)")

    def _tokens_so_far(self, answer: Answer) -> int:
        """Tokens of an exchange whose end, and with it the count, did not come."""
        prompt = self.llm.chat_template.conversation(self.conversation.messages, self.thinking)
        return len(prompt.ids) + len(self.llm.tokenizer.encode(answer.reasoning + answer.content))

    def _command(self, text: str) -> bool:
        """Run what was typed; True where it leaves."""
        name, _, rest = text[1:].partition(" ")
        known = COMMANDS.get(name)
        if known is None:
            raise RequestError(
                f"/{name} is no command; /help lists them (a message may begin with a slash after a blank)"
            )
        return bool(known.run(self, rest.strip()))

    def think(self, mode: str) -> None:
        if mode:
            self.thinking = _mode(mode)
        self.screen.notice(f"thinking {self.thinking}")

    def fold(self, _: str) -> None:
        self.folded = not self.folded
        self.screen.notice("thoughts are hidden" if self.folded else "thoughts are shown")
        if not self.folded and self._hidden and self.thoughts:
            self._hidden = False
            self.screen.text(self.thoughts, dim=True)
            self.screen.end_line()

    def file(self, name: str) -> None:
        if not name:
            waiting = ", ".join(n for n, _ in self.conversation.files) or "none"
            self.screen.notice(f"files for the next message: {waiting}")
            return
        if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
            name = name[1:-1]
        left = self.max_context - self.context_tokens
        num_tokens = self.conversation.attach(name, lambda text: len(self.llm.tokenizer.encode(text)), left)
        self.screen.notice(f"{self.conversation.files[-1][0]}: {num_tokens:,} tokens, sent with the next message")

    def save(self, name: str) -> None:
        if not name:
            raise RequestError("/save needs a path")
        path = self.conversation.save(name, model=self.name, thinking=self.thinking)
        self.screen.notice(f"{len(self.conversation.messages)} messages saved in {path}")

    def tokens(self, _: str) -> None:
        kv = self.llm.kv_bytes(self.context_tokens)
        num_bytes = int(kv["sequence"]) if self.context_tokens else 0
        self.screen.notice(
            f"{self.context_tokens:,} of {self.max_context:,} tokens; KV cache {num_bytes:,} bytes "
            f"({size(num_bytes)}), {kv['per_token']:,.2f} bytes more per token"
        )

    def reset(self, _: str) -> None:
        self.conversation.reset()
        self.context_tokens, self.thoughts = 0, ""
        self.screen.notice("everything is forgotten")

    def help(self, _: str) -> None:
        self.screen.notice("\n".join(f" {c.usage:<20} {c.help}" for c in COMMANDS.values()))


class Answer:
    """One answer as its events come: shown (with a screen), and kept."""

    def __init__(self, screen: Screen | None, folded: bool) -> None:
        self.screen, self.folded = screen, folded
        self.reasoning, self.content = "", ""
        self.tool_calls: list[dict[str, Any]] = []
        self.finish_reason = "interrupted"
        self.usage: dict[str, Any] = {}
        self.malformed: tuple[str, ...] = ()

    @property
    def context_tokens(self) -> int:
        """Tokens of prompt and answer together; 0 where the end did not come."""
        return int(self.usage.get("prompt_tokens", 0)) + int(self.usage.get("completion_tokens", 0))

    def take(self, event: Any) -> None:
        """Take one event of `LLM.chat_stream`."""
        from pyrosome.chat.events import ContentDelta, Done, ReasoningDelta, ToolCallDelta, ToolCallStart

        if isinstance(event, ReasoningDelta):
            self._think(event.text)
        elif isinstance(event, ContentDelta):
            self._say(event.text)
        elif isinstance(event, ToolCallStart):
            call = {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}
            self.tool_calls.append(call)
            if self.screen:
                self.screen.end_line()
                self.screen.text(f"[call of {event.name}] ")
        elif isinstance(event, ToolCallDelta):
            self.tool_calls[event.index]["function"]["arguments"] += event.arguments
            if self.screen:
                self.screen.text(event.arguments)
        elif isinstance(event, Done):
            self.finish_reason, self.malformed = event.message.finish_reason, event.message.malformed
            self.usage = dataclasses.asdict(event.usage)

    def _think(self, text: str) -> None:
        first, self.reasoning = not self.reasoning, self.reasoning + text
        if not self.screen or not self.screen.out_is_terminal or not text:
            return  # among answers in a file, thoughts would be taken for answers
        if self.folded:
            self.screen.status(f"thinking: {len(self.reasoning)}")
            return
        if first and not self.screen.styled:
            self.screen.text("[thoughts]\n")
        self.screen.text(text, dim=True)

    def _say(self, text: str) -> None:
        first, self.content = not self.content, self.content + text
        if not self.screen or not text:
            return
        if first and self.reasoning and self.screen.out_is_terminal:
            self.screen.end_line()
            self.screen.text("" if self.folded else "\n" if self.screen.styled else "[answer]\n")
        self.screen.text(text)

    def end(self) -> None:
        """Close the last line."""
        if self.screen:
            self.screen.end_line()

    def report(self) -> dict[str, Any]:
        """What `--json` prints."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return {"message": message, "finish_reason": self.finish_reason, "usage": self.usage}


@dataclasses.dataclass(frozen=True)
class Command:
    """One thing that can be typed instead of a message; `run` returns True to leave."""

    usage: str
    help: str
    run: Callable[[Session, str], Any]


COMMANDS = {
    c.usage[1:].partition(" ")[0]: c
    for c in (
        Command(f"/think {'|'.join(MODES)}", "how much to think before an answer", Session.think),
        Command("/fold", "hide thoughts, or show them again", Session.fold),
        Command("/file PATH", "add a text file to the next message", Session.file),
        Command("/save PATH", "write the conversation as JSON", Session.save),
        Command("/tokens", "tokens and KV bytes so far", Session.tokens),
        Command("/reset", "forget everything", Session.reset),
        Command("/help", "this list", Session.help),
        Command("/quit", "leave", lambda session, rest: True),
    )
}
