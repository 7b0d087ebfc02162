"""What a conversation over HTTP becomes: prompts by the render path, and the same to the engine."""

import contextlib
import re

import httpx2 as httpx
import pytest

from pyrosome.chat import Chat
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.engine.worker import EngineThread
from pyrosome.server.service import Service
from tests.server.answers import ASK, TOOLS
from tests.server.assembled import serving
from tests.server.scripted import MODEL, TOKENIZER, ScriptedEngine, running, saying

PATH = "/v1/chat/completions"
DECLARED = [{"type": "function", "function": {"name": n, "description": "", "parameters": s}} for n, s in TOOLS.items()]
OFF = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def server():
    with serving(saying("")) as (client, engine):
        yield client, engine


def prompt_of(server, messages, **fields):
    client, _ = server
    reply = client.post(PATH + "/render", json={"messages": messages, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_render_shows_what_the_engine_is_given(server):
    client, engine = server
    engine.script = saying("</think>b")
    body = {"messages": ASK, "tools": DECLARED, "max_tokens": 9, "seed": 3, "stop": ["x"]}
    count = len(engine.requests)
    shown = client.post(PATH + "/render", json=body).json()
    assert len(engine.requests) == count, "nothing is generated"
    client.post(PATH, json=body)
    request = engine.requests[-1]
    assert tuple(shown["token_ids"]) == request.ids
    assert TOKENIZER.decode(shown["token_ids"]) == shown["prompt"]
    assert (shown["sampling"]["max_tokens"], shown["sampling"]["seed"], shown["sampling"]["stop"]) == (9, 3, ["x"])
    assert shown["constraint"]["kind"] == request.constraint.kind
    assert (shown["mode"], shown["starts_in"]) == ("high", "reasoning")


def test_thoughts_in_a_history_render_the_same_in_each_spelling(server):
    """REAS-02."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    prompts = [
        prompt_of(server, [turns[0], {**turns[1], **thought}, turns[2]], tools=DECLARED)["token_ids"]
        for thought in ({"reasoning_content": "because"}, {"reasoning": "because"})
    ]
    assert prompts[0] == prompts[1]
    assert "because" in TOKENIZER.decode(prompts[0])


def test_a_final_answer_is_gone_on_with_ended_or_answered(server):
    """ENC-05."""
    turns = [*ASK, {"role": "assistant", "content": "It is"}]
    opened = prompt_of(server, turns, **OFF)["prompt"]
    assert opened.endswith("It is<｜end▁of▁sentence｜><｜Assistant｜></think>")
    assert prompt_of(server, turns, **OFF, add_generation_prompt=False)["prompt"].endswith("It is<｜end▁of▁sentence｜>")
    assert prompt_of(server, turns, **OFF, continue_final_message=True)["prompt"].endswith("</think>It is")
    client, engine = server
    reply = client.post(PATH, json={"messages": ASK, "continue_final_message": True})
    assert reply.status_code == 400
    assert "final assistant message" in reply.json()["error"]["message"]
    engine.script = saying(" 51")
    reply = client.post(PATH, json={"messages": turns, "continue_final_message": True, **OFF})
    assert reply.json()["choices"][0]["message"]["content"] == " 51"


def test_a_trailing_system_message_opens_an_answer(server):
    """ENC-06."""
    assert prompt_of(server, [*ASK, {"role": "system", "content": "now"}])["prompt"].endswith("<｜Assistant｜><think>")


def test_replayed_arguments_render_the_same_as_text_and_as_an_object(server):
    """ENC-10, ENC-11: whole or broken, they never fail."""

    def prompt(arguments):
        called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [*ASK, {"role": "assistant", "content": "", "tool_calls": [called]},
                 {"role": "tool", "tool_call_id": "1", "content": "ok"}]  # fmt: skip
        return prompt_of(server, turns, tools=DECLARED)["prompt"]

    assert prompt({"a": "x"}) == prompt('{"a": "x"}')
    assert '<｜DSML｜parameter name="arguments" string="true">{"a": "x</｜DSML｜parameter>' in prompt('{"a": "x')


def test_results_go_behind_their_calls_in_the_calls_order(server):
    """ENC-03."""
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in "ab"]
    results = [{"role": "tool", "tool_call_id": i, "content": f"of {i}"} for i in "ba"]
    turns = [
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": calls},
        *results,
        {"role": "user", "content": "so?"},
    ]
    assert "<｜User｜><tool_result>of a</tool_result>\n\n<tool_result>of b</tool_result>\n\nso?" in prompt_of(
        server, turns, tools=DECLARED
    )["prompt"]  # fmt: skip


def test_earlier_thoughts_are_kept_with_tools_and_dropped_without(server):
    """ENC-04."""
    turns = [
        *ASK,
        {"role": "assistant", "content": "a", "reasoning_content": "because"},
        {"role": "user", "content": "r"},
    ]
    assert "because" not in prompt_of(server, turns)["prompt"]
    assert "because" in prompt_of(server, turns, tools=DECLARED)["prompt"]
    assert "because" in prompt_of(server, turns, chat_template_kwargs={"drop_thinking": False})["prompt"]


def test_each_run_of_text_between_control_tokens_is_encoded_in_one_piece(server):
    """ENC-02."""
    parts = [{"type": "text", "text": t} for t in ("wor", "ld", "\n", "\n and", " on")]
    shown = prompt_of(server, [{"role": "system", "content": "be\n"}, {"role": "user", "content": parts}])
    ids = []
    for piece in re.split(r"(<｜begin▁of▁sentence｜>|<｜User｜>|<｜Assistant｜>|<think>$)", shown["prompt"]):
        token = TOKENIZER.id_of(piece)
        ids += TOKENIZER.encode(piece) if token is None else [token]
    assert ids == shown["token_ids"]
    assert "wor\n\nld\n\n\n\n\n\n and\n\n on" in shown["prompt"]


def test_the_effort_texts_are_the_checkpoints_own():
    """REAS-12: the same request at two releases of the model."""
    texts = {}
    for dialect in ("preview", "0731"):
        chat = Chat(open_checkpoint(MODEL).path, dialect=dialect)
        with scripted_with(chat) as client:
            for effort in ("low", "high", "max"):
                body = {"messages": ASK, "reasoning_effort": effort}
                texts[dialect, effort] = client.post(PATH + "/render", json=body).json()["prompt"]
    assert texts["preview", "low"] == texts["preview", "high"] == texts["0731", "low"]
    assert texts["preview", "max"] == texts["0731", "high"]
    assert "Absolute maximum" in texts["0731", "high"]
    assert "Beyond maximum" in texts["0731", "max"]


@contextlib.contextmanager
def scripted_with(chat):
    service = Service(MODEL, make_driver=lambda: EngineThread(ScriptedEngine(saying("x"))), chat=chat)
    with running(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client
