"""Requests to prompts: one checkpoint's template, dialect and tokenizer.

DeepSeek's own package turns a request into a prompt; this adds what it leaves to its caller: the checkpoint's dialect,
ids for any tokenizer, and the default manner, which does what the client asked where the official API would not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyrosome.chat.dialect import RENDERED_EFFORT, checked, dialect_of
from pyrosome.chat.parser import END, THINK_END, Parser
from pyrosome.chat.prompt import Constraint, Prompt, Sampling, Tool
from pyrosome.chat.request import InvalidRequest, Wishes, official
from pyrosome.chat.tokenizer import Tokenizer
from pyrosome.errors import CheckpointError, ContextTooLong, RequestError

THINK, ASSISTANT, DSML, BEGIN = "<think>", "<｜Assistant｜>", "｜DSML｜", "<｜begin▁of▁sentence｜>"
_NEEDED = (BEGIN, END, "<｜User｜>", ASSISTANT, THINK, THINK_END, DSML)
_MODEL = "DeepSeek-V4-Pro"  # the name under which the renderer knows the V4 template
_MAX_CONTEXT = 1 << 20
MODES = ("off", "low", "high", "max")
_PROTOCOLS = ("chat_completions", "messages", "responses")


class Chat:
    """Renders requests for one checkpoint and reads what it answers.  Holds no state of any conversation.

    Args:
        tokenizer_dir: the checkpoint's directory; its tokenizer, and where `dialect` is None its effort texts.
        dialect: "preview" or "0731".
        compat: "deepseek" answers as the official API does, its refusals and forced sampling included.
        default_thinking: whether a request that says nothing about it is thought about.
        tokenizer: the one of that directory, where it is loaded already.

    Raises:
        CheckpointError: no usable tokenizer, or one without the template's control tokens.
        RequestError: an unknown dialect or manner.
    """

    def __init__(
        self,
        tokenizer_dir: str | Path,
        dialect: str | None = None,
        compat: str | None = None,
        *,
        default_thinking: bool = True,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if compat not in (None, "deepseek"):
            raise RequestError(f"compat {compat!r} was asked for; there is 'deepseek', or None for the default manner")
        directory = Path(tokenizer_dir)
        self.tokenizer = tokenizer or Tokenizer.from_dir(directory)
        missing = [t for t in _NEEDED if self.tokenizer.id_of(t) is None]
        if missing:
            raise CheckpointError(
                f"the tokenizer in {directory} lacks {', '.join(missing)}, which every prompt needs; "
                "it is not one of DeepSeek-V4"
            )
        self.dialect = checked(dialect) if dialect else dialect_of(directory)
        self.compat, self.default_thinking = compat, default_thinking
        self.context_tokens = _context(directory)

    def render(self, body: dict[str, Any], protocol: str = "chat_completions") -> Prompt:
        """The prompt of a request body; see `Prompt` for what comes with it.

        Raises:
            InvalidRequest: as the official API answers 400, with its body.
            ContextTooLong: prompt and answer do not fit (in the official manner this too is an InvalidRequest).
            RequestError: a sampling field outside its range.
        """
        if protocol not in _PROTOCOLS:
            raise RequestError(f"protocol {protocol!r} was asked for; there are {', '.join(_PROTOCOLS)}")
        if not isinstance(body, dict):
            raise InvalidRequest(f"a request is a JSON object; {type(body).__name__} was sent")
        wishes = Wishes()
        if self.compat is None:
            body, wishes = official(body, protocol, thinks_by_default=self.default_thinking)
        try:
            body = _clean(body)
        except RecursionError:
            raise InvalidRequest("the request is nested too deep; 128 levels are read") from None
        return self._render(_Request(body, protocol, self.default_thinking, wishes), wishes)

    def conversation(
        self,
        messages: Sequence[dict[str, Any]],
        thinking: str = "high",
        tools: Sequence[dict[str, Any]] | None = None,
        stop: Sequence[str] = (),
    ) -> Prompt:
        """`render` for callers that have messages and no request; tools may be bare functions.

        Raises:
            RequestError: an unknown mode, or as `render`.
        """
        if thinking not in MODES:
            raise RequestError(f"thinking {thinking!r} was asked for; there are {', '.join(map(repr, MODES))}")
        body: dict[str, Any] = {"messages": list(messages), "stop": list(stop) or None}
        body["thinking"] = {"type": "disabled" if thinking == "off" else "enabled"}
        if thinking != "off":
            body["reasoning_effort"] = thinking
        if tools:
            body["tools"] = [t if "function" in t else {"type": "function", "function": t} for t in tools]
        return self.render(body)

    def stable(self, prompt: Prompt) -> int:
        """How many of a prompt's ids the next turn's prompt begins with, whatever is answered.

        The cue that opens an answer is written anew when the answer has become history: reasoning is left out of it.
        """
        assistant = self.tokenizer.id_of(ASSISTANT)
        for at in range(len(prompt.ids) - 1, 0, -1):
            if prompt.ids[at] == assistant:
                return at + 1
        return len(prompt.ids)

    def parser(self, prompt: Prompt, call_id: Callable[[int], str] | None = None) -> Parser:
        """A parser for the answer to `prompt`; `call_id` names tool calls by their index."""
        return Parser(self.tokenizer, prompt, call_id)

    def _render(self, request: _Request, wishes: Wishes) -> Prompt:
        text, spans = request.rendered(RENDERED_EFFORT[self.dialect], wishes)
        ids = self.tokenizer.encode_spans(text, spans)
        start, continues = _left_open(text, spans)
        parsing, thinking = request.parsing, request.thinking
        prompt = Prompt(
            text=text,
            ids=tuple(ids),
            sampling=request.sampling(wishes),
            constraint=request.constraint(wishes, after_reasoning=start == "reasoning"),
            max_tokens=request.max_tokens(len(ids), self.context_tokens, None if self.compat else wishes),
            stop=tuple(parsing.stop_sequences),
            thinking=thinking,
            effort=request.effort if thinking else None,
            tools=request.tools if parsing.parse_tool_calls else (),
            start=start,
            continues=continues,
            parse_tools=parsing.parse_tool_calls,
            json_only=parsing.parse_json_output or wishes.json_object,
            stream=request.stream,
            protocol=request.protocol,
            dialect=self.dialect,
        )
        if self.compat is None:
            prompt.sampling_params()  # a field outside its range is refused here, by name
        return prompt


class _Request:
    """One body converted by DeepSeek's package, and put right where the client's wishes differ."""

    def __init__(self, body: dict[str, Any], protocol: str, default_thinking: bool, wishes: Wishes) -> None:
        import deepseek_recipe as recipe  # 20 MB of native code: loaded when a request is first rendered

        self._recipe, self.protocol = recipe, protocol
        kinds: dict[str, Any] = {
            "chat_completions": recipe.ChatCompletionRequest,
            "messages": recipe.MessagesRequest,
            "responses": recipe.ResponsesRequest,
        }
        options = recipe.ConversionOptions(default_thinking_mode=default_thinking)

        def converted(body: dict[str, Any]) -> Any:
            try:
                return kinds[protocol]({**body, "model": _MODEL}).convert(options)
            except recipe.ConversionError as error:
                raise InvalidRequest(str(error), error.status_code, error.body) from None
            except (ValueError, TypeError, OverflowError, RecursionError) as error:  # the body could not be read
                raise InvalidRequest(f"invalid request: {error}") from None

        if wishes.forced_tools:
            # Whether it thinks is known once converted; the choice itself is then checked by asking without thinking.
            plain = {k: v for k, v in body.items() if k != "tool_choice"}
            self._converted = converted(plain)
            if not self._converted.conversation.tools:
                self._converted = converted(body)  # nothing to choose from: the official error says so
            elif wishes.forced_tools not in (True, *(t.name for t in self._converted.conversation.tools)):
                raise InvalidRequest(
                    f"Invalid value for 'tool_call': no function named '{wishes.forced_tools}' was specified in the "
                    "'tools' parameter."
                )
        else:
            self._converted = converted(body)
        conversation = self._converted.conversation
        self.thinking: bool = conversation.thinking_mode
        effort: str | None = conversation.reasoning_effort
        self.effort = "high" if effort == "xhigh" else effort
        self.parsing = self._converted.parsing_options
        self.stream: bool = self._converted.stream
        # A named tool is shown alone, as the official API does outside thinking.
        self._tools = [t for t in conversation.tools if wishes.forced_tools in (True, False, t.name)]
        self.tools = tuple(Tool(t.name, t.parameters) for t in self._tools)

    def rendered(self, efforts: dict[str, str], wishes: Wishes) -> tuple[str, list[tuple[int, int]]]:
        """The prompt's text, and the ranges of it that the template wrote as control tokens."""
        recipe, old = self._recipe, self._converted.conversation
        messages, tools, choice = list(old.messages), self._tools, old.tool_choice
        if wishes.forced_tools and not self.thinking:
            choice = "required"
        if not messages:
            raise InvalidRequest("the request holds no message to answer; send one")
        last = messages[-1]
        if wishes.continue_final and last.tool_calls:
            raise InvalidRequest("a turn that made tool calls is complete and cannot be continued")
        # A final answer that nothing follows keeps its thoughts: it is rendered as if to be continued, and then ended.
        ended = not wishes.generation_cue and last.role == "assistant" and not last.tool_calls
        if wishes.continue_final or ended:
            messages[-1] = recipe.AssistantMessage(last.content, last.reasoning_content, None, True)
        form: dict[str, Any] = {"response_format": "json_object" if wishes.json_object else old.response_format}
        if wishes.json_schema is not None:
            form = {"response_schema": wishes.json_schema}
        elif old.response_format == "json_schema":
            form = {"response_schema": old.response_schema}
        elif old.response_format == "regex":
            form = {"response_regex": old.response_regex}
        keep = wishes.keep_reasoning and self.thinking and not tools
        if keep:  # the template keeps all thoughts where there are tools: render with one, and take its text out
            tools = [recipe.ToolDefinition("t", "", {})]

        def render(messages: list[Any], tools: list[Any], form: dict[str, Any]) -> Any:
            return recipe.DeepseekV4Encoding().render_conversation(
                recipe.Conversation(
                    messages,
                    thinking_mode=self.thinking,
                    tools=tools,
                    tool_choice=choice,
                    reasoning_effort=efforts.get(self.effort or "", self.effort),
                    **form,
                )
            )

        out = render(messages, tools, form)
        text, spans = out.prompt, list(out.special_ranges)
        if keep:
            user = [recipe.UserMessage("")]
            section = _common_tail(render(user, tools, {}), render(user, [], {}))
            text, spans = _without(text, spans, section)
        if ended:
            text, spans = text + END, [*spans, (len(text), len(text) + len(END))]
        elif not wishes.generation_cue:
            text, spans = _without_cue(text, spans)
        return text, spans

    def sampling(self, wishes: Wishes) -> Sampling:
        options = self._converted.inference_options
        official = {"temperature": _shortest(options.temperature), "top_p": _shortest(options.top_p)}
        values = official | {"seed": options.seed} | wishes.sampling
        return Sampling(
            max_tokens=options.max_tokens,
            logprobs=options.logprobs,
            top_logprobs=options.top_logprobs,
            **values,
        )

    def constraint(self, wishes: Wishes, *, after_reasoning: bool) -> Constraint | None:
        given = self._converted.inference_options.output_constraint
        kind, schema = (given.kind, given.schema) if given else (None, "")
        answer = self._answer_schema(wishes)
        if answer is not None and kind is None:
            kind, schema = "json", answer
        if wishes.forced_tools and self.parsing.parse_tool_calls:
            kind = "tool_call_required"
            if isinstance(wishes.forced_tools, str):
                chosen = [t for t in json.loads(schema) if t["function"]["name"] == wishes.forced_tools]
                schema = json.dumps(chosen, ensure_ascii=False, separators=(",", ":"))
        if wishes.bound and kind is None:
            kind, schema = wishes.bound
        elif wishes.bound and (kind != "tool_call" or wishes.bound[0] != "json"):
            raise InvalidRequest(
                "an answer that may be a tool call can be bound to a JSON Schema, and a required call to nothing else; "
                "send tool_choice none, or no schema or grammar"
            )
        elif wishes.bound:
            answer = wishes.bound[1]
        if kind is None:
            return None
        return Constraint(kind, schema, after_reasoning, wishes.parallel, answer if kind == "tool_call" else None)

    def _answer_schema(self, wishes: Wishes) -> str | None:
        """The JSON Schema of the answer; "" for any object, None for no JSON."""
        if wishes.json_object:
            return ""
        old = self._converted.conversation
        schema = old.response_schema if old.response_format == "json_schema" else wishes.json_schema
        return None if schema is None else json.dumps(schema, ensure_ascii=False, separators=(",", ":"))

    def max_tokens(self, num_prompt: int, context: int, wishes: Wishes | None) -> int:
        room, asked = context - num_prompt, self._converted.inference_options.max_tokens or 0
        if wishes and room < max(1, asked):
            if room > 0 and wishes.lower_max_tokens:
                return room
            raise ContextTooLong(
                num_prompt + asked, context, f"the prompt has {num_prompt}; shorten it, or ask for less"
            )
        try:
            return int(self._converted.resolve_max_tokens(num_prompt, context))
        except self._recipe.ConversionError as error:
            raise InvalidRequest(str(error), error.status_code, error.body) from None


def _left_open(text: str, spans: list[tuple[int, int]]) -> tuple[str, bool]:
    """What the prompt's end leaves open, and whether text already stands there.  Only control tokens count."""
    tokens = [text[a:b] for a, b in spans]
    begin = len(tokens) - 1 - tokens[::-1].index(ASSISTANT) if ASSISTANT in tokens else len(tokens)
    tail = tokens[begin:]
    if END in tail:
        return "content", False
    if DSML in tail:
        return "tools", False
    state = "reasoning" if tail[-1:] == [THINK] else "content"
    return state, bool(spans) and spans[-1][1] < len(text)


def _without_cue(text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
    """The prompt up to the assistant's turn that it opens."""
    for n in range(len(spans) - 1, -1, -1):
        if text[slice(*spans[n])] == END:
            break
        if text[slice(*spans[n])] == ASSISTANT:
            return text[: spans[n][0]], spans[:n]
    return text, spans


def _common_tail(long: Any, short: Any) -> str:
    """What the first prompt has between the parts it shares with the second."""
    first = next(a for a, b in long.special_ranges if long.prompt[a:b] == "<｜User｜>")
    return str(long.prompt[len(short.prompt[: short.prompt.index("<｜User｜>")]) : first])


def _without(text: str, spans: list[tuple[int, int]], part: str) -> tuple[str, list[tuple[int, int]]]:
    """The prompt without `part`, which stands before its first turn."""
    roles = [a for a, b in spans if text[a:b].startswith("<｜") and text[a:b] != BEGIN]
    at = text.rindex(part, 0, roles[0] if roles else len(text))
    end, size = at + len(part), len(part)
    kept = [(a, b) if b <= at else (a - size, b - size) for a, b in spans if b <= at or a >= end]
    return text[:at] + text[end:], kept


def _shortest(value: float) -> float:
    """A number that went through 32 bits, as it was written."""
    return float(f"{value:.7g}")


def _context(directory: Path) -> int:
    """Tokens the model has positions for, by its files; the official model's where they do not say."""
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        try:
            value = json.loads((directory / name).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(value, int) and 0 < value <= _MAX_CONTEXT:
            return value
    return _MAX_CONTEXT


def _clean(value: Any) -> Any:
    """Lone surrogates, which have no UTF-8 form, as question marks."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    if isinstance(value, dict):
        return {_clean(k): _clean(v) for k, v in value.items()}
    return value
