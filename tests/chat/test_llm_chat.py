"""`LLM.chat`: a conversation in, a message out."""

import contextlib

import pytest

from pyrosome.chat import Message
from pyrosome.chat.events import Done
from pyrosome.engine.request import Ended, Reuse, TokenEvent
from pyrosome.errors import ContextTooLong, RequestError
from pyrosome.llm import LLM
from pyrosome.options import SamplingParams
from tests.chat.cases import block

ASK = [{"role": "user", "content": "hi"}]
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}


@pytest.fixture(scope="module")
def llm():
    return LLM("builtin:nano")


@pytest.fixture
def scripted(llm, monkeypatch):
    """The model says what it is told to; what was asked of the engine is kept."""
    seen = {"closed": 0, "given": 0}

    def say(text, ended=True):
        ids = llm.tokenizer.encode(text, allow_special=True) + [1] * ended

        @contextlib.contextmanager
        def submit(request):
            seen["request"] = request

            def events():
                for n, token in enumerate(ids):
                    seen["given"] = n + 1
                    yield TokenEvent("0", 0, token, {}, token == 1)
                yield Ended("0", 0, "stop" if ended else "length")

            try:
                yield events()
            finally:
                seen["closed"] += 1

        monkeypatch.setattr(llm, "submit", submit)
        return seen

    return say


def test_an_answer_comes_whole_or_in_pieces(noise_checkpoint):
    llm = LLM(noise_checkpoint)
    params = SamplingParams(max_tokens=10, seed=1)
    message = llm.chat(ASK, "off", params=params)
    assert isinstance(message, Message) and message.finish_reason == "length" and not message.reasoning
    *_, done = llm.chat_stream(ASK, "off", params=params)
    assert done.message == message
    assert llm.chat(ASK, "high", params=params).reasoning


def test_thoughts_answer_and_calls_are_told_apart(llm, scripted):
    text = 'hm</think>Look.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    text += '<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    seen = scripted(text + "never computed")
    message = llm.chat(ASK, "high", [TOOL])
    assert (message.reasoning, message.content, message.finish_reason) == ("hm", "Look.", "tool_calls")
    assert [(c.name, c.arguments) for c in message.tool_calls] == [("f", '{"a": "x"}')]
    assert seen["closed"] == 1 and seen["given"] == len(llm.tokenizer.encode(text, allow_special=True))


def test_closing_the_stream_stops_the_generation(llm, scripted):
    seen = scripted("answer " * 50)
    stream = llm.chat_stream(ASK, "off")
    next(stream)
    stream.close()
    assert seen["closed"] == 1 and seen["given"] < 5


def test_a_stop_string_ends_the_answer_and_not_the_thoughts(llm, scripted):
    seen = scripted("a STOP b</think>c STOP d")
    message = llm.chat(ASK, "high", params=SamplingParams(max_tokens=99, stop=("STOP",)))
    assert (message.reasoning, message.content, message.stop_sequence) == ("a STOP b", "c ", "STOP")
    assert seen["request"].params.stop == ()


def test_own_end_tokens_are_no_part_of_the_answer_and_an_ignored_end_is_none(llm, monkeypatch):
    x = llm.tokenizer.encode("x")[0]

    def content(*events):
        monkeypatch.setattr(llm, "submit", lambda request: contextlib.nullcontext(iter(events)))
        message = llm.chat(ASK, "off")
        return message.content, message.finish_reason

    said, own_end, ignored = TokenEvent("0", 0, x, {}), TokenEvent("0", 0, x, {}, True), TokenEvent("0", 0, 1, {})
    assert content(said, own_end, Ended("0", 0, "stop")) == ("x", "stop")
    assert content(said, ignored, said, Ended("0", 0, "length")) == ("xx", "length")


def test_what_was_reused_is_told_also_where_complete_calls_end_it(llm, monkeypatch):
    ids = llm.tokenizer.encode(block(("f", {"a": "1"})) + "more", allow_special=True)
    reuse = Reuse(300, 256, 256, 0, "all")
    events = [TokenEvent("0", 0, t, {}, reuse=None if at else reuse) for at, t in enumerate(ids)]
    monkeypatch.setattr(llm, "submit", lambda request: contextlib.nullcontext(iter(events)))
    *_, done = llm.chat_stream(ASK, "off", tools=[TOOL])
    assert done.message.finish_reason == "tool_calls" and done.usage.cached_tokens == 256


def test_defaults_are_those_of_the_mode(llm, scripted):
    for thinking, most in (("off", 8192), ("low", 65536), ("high", 65536), ("max", 131072)):
        seen = scripted("</think>x")
        done = list(llm.chat_stream(ASK, thinking))[-1]
        assert isinstance(done, Done) and seen["request"].params.max_tokens == most
        assert done.usage.prompt_tokens == len(seen["request"].ids)


def test_what_cannot_be_answered_is_refused_before_anything_runs(llm):
    with pytest.raises(RequestError, match="loud"):
        llm.chat_stream(ASK, "loud")
    with pytest.raises(RequestError, match="Empty input messages"):
        llm.chat([])
    with pytest.raises(RequestError):
        llm.chat([{"role": "robot", "content": "x"}])
    with pytest.raises((ContextTooLong, RequestError)):
        llm.chat([{"role": "user", "content": "x" * (1 << 20)}], params=SamplingParams(max_tokens=1))
