"""What is served, and its tokenizer, over HTTP."""

import pytest

from pyrosome.cache.streams import plan_cache
from pyrosome.options import ServerOptions
from tests.server.scripted import MODEL, TOKENIZER, saying, scripted


@pytest.fixture(scope="module")
def client():
    with scripted(saying("hi"), options=ServerOptions(names=("tiny", "small"))) as (client, _, _):
        yield client


def test_models_are_listed_for_both_kinds_of_clients(client):
    for path in ("/v1/models", "/models", "/beta/models", "/anthropic/v1/models"):
        found = client.get(path).json()
        assert [m["id"] for m in found["data"]] == ["tiny", "small"]
        assert (found["first_id"], found["last_id"], found["has_more"]) == ("tiny", "small", False)
    model = found["data"][0]
    assert (model["object"], model["type"], model["max_model_len"]) == ("model", "model", 1 << 20)
    assert (model["default_mode"], model["modes"]) == ("high", ["off", "low", "high", "max"])
    assert model["created_at"].endswith("Z")


def test_one_model_is_found_by_each_of_its_names_and_no_other(client):
    assert client.get("/v1/models/small").json()["root"] == "tiny"
    missing = client.get("/v1/models/org/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_the_tokens_that_begin_and_end_a_text_are_told(client):
    for path in ("/tokenizer_info", "/v1/tokenizer_info"):
        info = client.get(path).json()
    assert (info["bos_token"], info["bos_token_id"]) == ("<｜begin▁of▁sentence｜>", 0)
    assert (info["eos_token"], info["eos_token_id"]) == ("<｜end▁of▁sentence｜>", 1)
    assert (info["model_max_length"], info["vocab_size"]) == (1 << 20, TOKENIZER.vocab_size)


def test_text_is_encoded_and_decoded_again(client):
    text = "héllo <｜User｜> 🐙"
    plain = client.post("/tokenize", json={"prompt": text}).json()
    assert plain["tokens"] == TOKENIZER.encode(text) and plain["count"] == len(plain["tokens"])
    assert client.post("/v1/detokenize", json={"tokens": plain["tokens"]}).json() == {"prompt": text}
    special = client.post("/v1/tokenize", json={"text": text, "parse_special": True, "add_special_tokens": True}).json()
    assert special["tokens"] == [0, *TOKENIZER.encode(text, allow_special=True)]
    strings = client.post("/tokenize", json={"prompt": "a b", "return_token_strs": True}).json()["token_strs"]
    assert "".join(strings) == "a b"


def test_a_conversation_is_counted_as_its_prompt(client):
    body = {"messages": [{"role": "user", "content": "hi"}], "thinking": {"type": "disabled"}}
    rendered = client.post("/v1/chat/completions/render", json=body).json()
    assert client.post("/tokenize", json=body).json()["tokens"] == rendered["token_ids"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 3}),
        ("/tokenize", {"prompt": "a", "parse_special": "yes"}),
        ("/detokenize", {"tokens": [1, "2"]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": True}),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_words(client, path, body):
    answer = client.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_the_plan_is_what_the_engine_allocates(nano):
    plan = nano.get("/plan").json()
    service = nano.service
    engine = plan_cache(service.config, plan["kv_format"], 8, plan["max_context"], 3, cache_tokens=plan["cache_tokens"])
    assert plan["kv_bytes_per_token"] == engine.bytes_per_token
    assert plan["cache_tokens"] >= plan["max_context"] > 0
    assert plan["sequence_bytes"][str(plan["max_context"])] == engine.sequence_bytes(plan["max_context"])
    assert plan["model"] == MODEL
