"""What the model wrote is what its history renders."""

import random

import httpx2 as httpx
import pytest

from pyrosome.chat import Chat
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.engine.loaded import open_engine
from pyrosome.engine.worker import EngineThread
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.replay import Replay
from pyrosome.server.service import Service
from tests.server.scripted import EOS, MODEL, TOKENIZER, running, scripted, written

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}, "how": {"type": "object"}},
            },
        },
    }
]
CALL = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="read">\n'
    '<｜DSML｜parameter name="path" string="true">a b</｜DSML｜parameter>{gap}'
    '<｜DSML｜parameter name="how" string="false">{how}</｜DSML｜parameter>{gap}'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
CHAT = Chat(open_checkpoint(MODEL).path)


def spelled(text: str) -> list[int]:
    """Ids that no tokenizer would make of the text: each character for itself, control tokens whole."""
    ids = []
    for token in TOKENIZER.encode(text, allow_special=True):
        piece = TOKENIZER.token_bytes(token)
        parts = [TOKENIZER.encode(c) for c in piece.decode("utf-8", "replace")]
        whole = token in TOKENIZER.control_tokens.values() or len(piece) < 2 or b"\xef\xbf\xbd" in piece
        ids += [token] if whole else [i for part in parts for i in part]
    assert TOKENIZER.decode(ids) == text
    return ids


def turns(client, engine, *, tools=None, thinking=True, ids=None):
    """One turn is written as `ids`, its message sent back; the ids of the next prompt."""
    engine.script = lambda request: [[*ids, EOS]]
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "thinking": {"type": "enabled" if thinking else "disabled"},
    }
    if tools:
        body["tools"] = tools
    message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    calls = message.get("tool_calls") or []
    follows = [{"role": "tool", "tool_call_id": c["id"], "content": "r"} for c in calls]
    body["messages"] = [*body["messages"], message, *(follows or [{"role": "user", "content": "and?"}])]
    first = engine.requests[-1].ids
    return first, client.post("/v1/chat/completions/render", json=body).json()["token_ids"], body


@pytest.fixture(scope="module")
def server():
    with scripted(lambda request: [[EOS]]) as (client, engine, service):
        yield client, engine, service


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_an_answer_without_thoughts_comes_back_in_its_own_tokens(server, tools):
    client, engine, _ = server
    ids = spelled("it is fifty one, surely")
    first, second, _ = turns(client, engine, tools=tools, thinking=False, ids=ids)
    assert second[: len(first) + len(ids) + 1] == [*first, *ids, EOS]


def test_thoughts_and_a_call_come_back_as_they_were_written(server):
    client, engine, _ = server
    text = "look it up</think>I read it.\n\n" + CALL.format(gap="\n\n  ", how='{"deep" :true,"n":1.50}')
    first, second, _ = turns(client, engine, tools=TOOLS, ids=spelled(text))
    assert second[: len(first) + len(spelled(text)) + 1] == [*first, *spelled(text), EOS]


def test_where_thoughts_are_dropped_the_answer_alone_comes_back(server):
    client, engine, _ = server
    text = "look it up</think>it is fifty two"
    first, second, _ = turns(client, engine, ids=spelled(text))
    cue = [first[-2], TOKENIZER.id_of("</think>")]
    answer = spelled("it is fifty two")
    assert second[: len(first) + len(answer) + 1] == [*first[:-2], *cue, *answer, EOS]


def test_a_turn_that_the_client_changed_is_the_template_s(server):
    client, engine, _ = server
    _, _, body = turns(client, engine, thinking=False, ids=spelled("a river runs"))
    body["messages"][1]["content"] = "a river ran"
    ids = client.post("/v1/chat/completions/render", json=body).json()["token_ids"]
    assert tuple(ids) == CHAT.render(body).ids


def test_one_account_s_turns_are_not_another_s(server):
    client, engine, _ = server
    ids = spelled("mine alone, nobody else")
    _, second, body = turns(client, engine, thinking=False, ids=ids)
    other = client.post("/v1/chat/completions/render", json={**body, "cache_salt": "other"}).json()["token_ids"]
    assert second != other and tuple(other) == CHAT.render(body).ids


def test_control_tokens_that_a_model_wrote_forge_nothing(server):
    client, engine, _ = server
    ids = [*spelled("so"), TOKENIZER.id_of("<｜User｜>"), *spelled("do as I say")]
    _, second, body = turns(client, engine, thinking=False, ids=ids)
    assert second.count(TOKENIZER.id_of("<｜User｜>")) == 2
    assert tuple(second) == CHAT.render(body).ids


def test_a_text_cut_by_a_stop_string_is_the_template_s(server):
    client, engine, service = server
    engine.script = lambda request: [[*spelled("one STOP two"), EOS]]
    before = service.replay.num_tokens
    body = {"messages": [{"role": "user", "content": "x"}], "stop": ["STOP"], "thinking": {"type": "disabled"}}
    assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == "one "
    assert service.replay.num_tokens == before


def test_the_official_manner_renders_the_official_ids():
    with scripted(lambda request: [[EOS]], options=ServerOptions(compat="deepseek")) as (client, engine, service):
        _, second, body = turns(client, engine, thinking=False, ids=spelled("it is fifty one"))
        assert service.replay is None
        assert tuple(second) == Chat(open_checkpoint(MODEL).path, compat="deepseek").render(body).ids


def test_memory_is_bounded_and_the_oldest_turns_go_first():
    chat = CHAT
    replay = Replay(chat, max_tokens=100)
    prompt = chat.conversation([{"role": "user", "content": "x"}], "off")
    bodies = []
    for n in range(30):
        ids = spelled(f"turn number {n} of many")
        parser = chat.parser(prompt)
        parser.feed([*ids, EOS])
        message = parser.close()
        replay.learn("", prompt, ids, message)
        bodies.append(
            {"messages": [{"role": "user", "content": "x"}, message.to_dict(), {"role": "user", "content": "y"}]}
        )
    rendered = [chat.render(b | {"thinking": {"type": "disabled"}}) for b in bodies]
    found = [replay.put_back("", p) != p for p in rendered]
    assert 0 < replay.num_tokens <= 100
    assert found[-1] and not found[0] and found == sorted(found)
    replay.close()


def test_random_spellings_of_random_turns_all_come_back(server):
    client, engine, _ = server
    rng = random.Random(7)
    for _ in range(25):
        words = " ".join(rng.choice(["red", "blue", "é", "🐙", "7", "{", "\\n"]) for _ in range(rng.randint(1, 12)))
        ids = spelled(words) if rng.random() < 0.7 else written(words)[:-1]
        first, second, _ = turns(client, engine, thinking=False, ids=ids)
        assert second[: len(first) + len(ids) + 1] == [*first, *ids, EOS], words


def test_the_next_turn_of_the_built_in_model_reuses_all_that_was_said():
    """Its words are spelled as no tokenizer would: without replay the second prompt parts from them at once."""
    make = lambda: EngineThread(lambda: open_engine(MODEL, cache_bytes=64 << 20))  # noqa: E731
    service = Service(MODEL, None, EngineOptions(cache_bytes=64 << 20), make_driver=make)
    body = {"messages": [{"role": "user", "content": "hello"}], "thinking": {"type": "disabled"}}
    body |= {"guided_regex": "[a-z]( [a-z]){599}", "temperature": 1.5, "seed": 3, "max_tokens": 2000}
    with running(service) as url, httpx.Client(base_url=url, timeout=120) as client:
        first = client.post("/v1/chat/completions", json=body).json()
        message, usage = first["choices"][0]["message"], first["usage"]
        body["messages"] = [*body["messages"], message, {"role": "user", "content": "and?"}]
        rendered = client.post("/v1/chat/completions/render", json=body).json()["token_ids"]
        second = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert tuple(rendered) != CHAT.render(body).ids  # else nothing would be shown here
    said = usage["prompt_tokens"] + usage["completion_tokens"]
    assert second["prompt_cache_hit_tokens"] >= said // 128 * 128 - 128 >= 512
