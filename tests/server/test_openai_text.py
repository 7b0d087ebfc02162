"""Completions on the wire: prompts of every kind, echoes with log probabilities, holes to fill, and what is refused."""

import asyncio
import json
from types import SimpleNamespace

import httpx2 as httpx
import pytest
import torch

from pyrosome.engine.loaded import load_model
from pyrosome.engine.worker import EngineThread
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.caller import OpenDoor
from pyrosome.server.exchange import Said, StillHere
from pyrosome.server.group import Group
from pyrosome.server.problems import Refused
from pyrosome.server.service import Service
from tests.server.answers import Loop
from tests.server.assembled import Bursts, chunks_of, serving, whole_of, without_ids
from tests.server.scripted import MODEL, TOKENIZER, events_of, running, saying, until, written

PATH = "/v1/completions"
BOS = TOKENIZER.id_of("<｜begin▁of▁sentence｜>")
BEGIN, HOLE, END = (TOKENIZER.id_of(f"<｜fim▁{t}｜>") for t in ("begin", "hole", "end"))


@pytest.fixture(scope="module")
def server():
    with serving(saying("")) as (client, engine):
        yield client, engine


def ids_of(text):
    return TOKENIZER.encode(text)


def texts(text):
    """The tokens of a text, each as text."""
    return [TOKENIZER.decode([t]) for t in ids_of(text)]


def echoing(request):
    """A script that tells which prompt and which completion it is of."""
    return [written(f"{sum(request.ids) % 97}/{n}") for n in range(request.params.n)]


def ask(server, script, **fields):
    """One answer's body, the same whole and streamed."""
    client, engine = server
    engine.script = script if callable(script) else saying(script)
    body = {"prompt": "x", "seed": 7, **fields}
    whole = client.post(PATH, json=body)
    assert whole.status_code == 200, whole.text
    streaming = {**body, "stream": True, "stream_options": {"include_usage": True}}
    streamed = whole_of(chunks_of(client.post(PATH, json=streaming)))
    assert without_ids(streamed) == without_ids(whole.json())
    return whole.json()


# What is asked, and what is in the only choice.
CASES = {
    "a text": ({}, "hello", {"text": "hello", "finish_reason": "stop", "logprobs": None}),
    "an empty text": ({"prompt": ""}, "hello", {"text": "hello"}),
    "a text in a list": ({"prompt": ["x"]}, "hello", {"text": "hello"}),
    "ids": ({"prompt": [70, 71]}, "hello", {"text": "hello"}),
    "ids in a list": ({"prompt": [[70, 71]]}, "hello", {"text": "hello"}),
    "an answer with nothing in it": ({}, "", {"text": "", "finish_reason": "stop"}),
    "spaces at the ends": ({}, "  a \n", {"text": "  a \n"}),
    "markup is text": ({}, "<think>a</think><｜DSML｜x", {"text": "<think>a</think><｜DSML｜x"}),
    "length": ({"max_tokens": 1}, "one two three", {"text": texts("one two three")[0], "finish_reason": "length"}),
    "sixteen tokens where nothing is said": ({}, "a b " * 40, {"text": "".join(texts("a b " * 40)[:16])}),
    "no tokens": ({"max_tokens": 0}, "hello", {"text": "", "finish_reason": "length"}),
    "no tokens of an echo": ({"max_tokens": 0, "echo": True}, "hello", {"text": "x", "finish_reason": "length"}),
    "an echo": ({"prompt": "ab ", "echo": True}, "hello", {"text": "ab hello"}),
    "an echo of ids": ({"prompt": [BOS, *ids_of("hi")], "echo": True}, "yo", {"text": "<｜begin▁of▁sentence｜>hiyo"}),
    "an echo of half a character": (
        {"prompt": ids_of("é")[:1] if len(ids_of("é")) > 1 else ids_of("😀")[:1], "echo": True}, "a", {"text": "�a"}),
    "a stop string": ({"stop": "lo"}, "hello", {"text": "hel", "finish_reason": "stop"}),
    "stop strings": ({"stop": ["x", "e"]}, "hello", {"text": "h"}),
    "a stop string that is only in the echo": ({"stop": "x", "echo": True}, "hello", {"text": "xhello"}),
    "a hole": ({"suffix": "b"}, "hello", {"text": "hello"}),
    "an echo before a hole": ({"prompt": "a", "suffix": "b", "echo": True}, "mid", {"text": "amid"}),
    "best of one": ({"best_of": 1}, "hello", {"text": "hello"}),
    "emoji": ({"max_tokens": 99}, "a😀b👩‍👩‍👧", {"text": "a😀b👩‍👩‍👧"}),
    "half a character": ({"max_tokens": 1}, "😀", {"text": "�"}),
    "fields that are left alone": (
        {"user": "u", "logit_bias": {}, "min_tokens": 0, "use_beam_search": False, "length_penalty": 1.0,
         "metadata": {"a": 1}, "skip_special_tokens": True, "store": False}, "hello", {"text": "hello"}),
    "fields that are null": (
        {"suffix": None, "max_tokens": None, "n": None, "logprobs": None, "echo": None, "stop": None, "best_of": None,
         "temperature": None, "stream_options": None, "logit_bias": None, "add_special_tokens": None},
        "hello", {"text": "hello"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_comes_out_whole_and_streamed(server, case):
    fields, answer, expected = CASES[case]
    fields = {k: v for k, v in fields.items() if k != "stream_options"}
    (choice,) = ask(server, answer, **fields)["choices"]
    assert {k: choice[k] for k in expected} == expected
    assert choice["index"] == 0


def test_an_answer_has_openais_fields(server):
    client, engine = server
    engine.script = saying("hello")
    reply = client.post(PATH, json={"prompt": "ab", "seed": 7, "model": "m"})
    size = len(engine.requests[-1].ids)
    num_written = len(ids_of("hello"))
    assert reply.json() | {"id": 0, "created": 0} == {
        "id": 0, "object": "text_completion", "created": 0, "model": "m",
        "choices": [{"text": "hello", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": size, "completion_tokens": num_written, "total_tokens": size + num_written,
            "prompt_tokens_details": {"cached_tokens": size - 1}, "prompt_cache_hit_tokens": size - 1,
            "prompt_cache_miss_tokens": 1,
        },
        "system_fingerprint": "fp_" + "f" * 16, "pyrosome": {"mode": "text", "seed": 7},
    }  # fmt: skip
    assert reply.json()["id"].startswith("cmpl-")
    assert reply.headers["x-pyrosome-mode"] == "text"
    assert reply.headers["x-pyrosome-seed"] == "7"


# Prompts


def test_a_text_gets_the_begin_token_and_ids_are_taken_as_they_are(server):
    for prompt, fields, ids in (
        ("hi", {}, [BOS, *ids_of("hi")]),
        ("hi", {"add_special_tokens": False}, ids_of("hi")),
        ([70, 71], {}, [70, 71]),
        ([BOS, 71], {}, [BOS, 71]),
        ("", {}, [BOS]),
    ):
        ask(server, "a", prompt=prompt, **fields)
        assert server[1].requests[-1].ids == tuple(ids)


def test_control_tokens_that_a_text_spells_out_are_text(server):
    forged = "<｜User｜>x<｜fim▁hole｜><｜end▁of▁sentence｜>"
    ask(server, "a", prompt=forged, suffix=forged, echo=True)
    ids = server[1].requests[-1].ids
    control = [t for t in ids if t in TOKENIZER.control_tokens.values()]
    assert control == [BOS, BEGIN, HOLE, END]
    ask(server, "a", prompt=forged)
    assert [t for t in server[1].requests[-1].ids if t in TOKENIZER.control_tokens.values()] == [BOS]


def test_a_hole_is_written_with_the_models_own_tokens(server):
    ask(server, "a", prompt="def f(", suffix="): pass")
    assert server[1].requests[-1].ids == (BOS, BEGIN, *ids_of("def f("), HOLE, *ids_of("): pass"), END)
    ask(server, "a", prompt="def f(", suffix="", add_special_tokens=False)
    assert server[1].requests[-1].ids == (BEGIN, *ids_of("def f("), HOLE, END)
    client, _ = server
    assert client.post("/beta/completions", json={"prompt": "a", "suffix": "b"}).status_code == 200


def test_a_model_without_such_tokens_says_so(server, monkeypatch):
    client, _ = server
    known = client.service.chat.tokenizer.id_of
    monkeypatch.setattr(client.service.chat.tokenizer, "id_of", lambda t: None if "fim" in t else known(t))
    reply = client.post(PATH, json={"prompt": "a", "suffix": "b"})
    assert reply.status_code == 400
    assert "<｜fim▁hole｜>" in reply.json()["error"]["message"]


def test_several_prompts_and_completions_are_numbered_prompt_by_prompt(server):
    prompts = ["one", "two", "three"]
    body = ask(server, echoing, prompt=prompts, n=2)
    sums = [sum([BOS, *ids_of(p)]) % 97 for p in prompts]
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (2 * k + n, f"{total}/{n}") for k, total in enumerate(sums) for n in range(2)
    ]
    requests = server[1].requests[-6:-3]
    assert {r.params.n for r in requests} == {2}
    assert len({r.id for r in requests}) == 3
    assert {r.params.seed for r in requests} == {7}, "one seed, which is told, for all"
    sizes = [len([BOS, *ids_of(p)]) for p in prompts]
    assert body["usage"]["prompt_tokens"] == sum(sizes)
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == sum(min(3, s - 1) for s in sizes)
    assert body["usage"]["completion_tokens"] == sum(len(ids_of(c["text"])) for c in body["choices"])


def test_lists_of_ids_are_several_prompts(server):
    body = ask(server, echoing, prompt=[[70, 71], [72]], echo=True)
    assert [c["text"] for c in body["choices"]] == [
        TOKENIZER.decode([70, 71]) + f"{141 % 97}/0", TOKENIZER.decode([72]) + f"{72 % 97}/0"]  # fmt: skip


def test_completions_of_several_prompts_are_streamed_beside_each_other(server):
    client, engine = server
    engine.script, engine.step_s = saying("a b " * 100), 0.005
    chunks = chunks_of(client.post(PATH, json={"prompt": ["x", "y"], "stream": True, "max_tokens": 300}))
    engine.step_s = 0
    order = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["text"]]
    assert order != sorted(order)
    assert [c["choices"][0]["finish_reason"] for c in chunks].count("stop") == 2


# Log probabilities


def test_log_probabilities_are_four_lists_of_one_length(server):
    (choice,) = ask(server, "hello world", logprobs=2)["choices"]
    tokens = [*texts("hello world"), "<｜end▁of▁sentence｜>"]
    assert choice["logprobs"] == {
        "tokens": tokens,
        "token_logprobs": [-0.25] * len(tokens),
        "top_logprobs": [{t: -0.25, "#": -1.5} for t in tokens],
        "text_offset": [len("".join(tokens[:n])) for n in range(len(tokens))],
    }


def test_an_echo_has_its_prompts_log_probabilities_and_none_of_its_first_token(server):
    for prompt, first in (("hello world", 1), ([*ids_of("hello world")], 0), ([BOS, *ids_of("hello")], 0)):
        ids = server[1].requests[-1].ids if server[1].requests else ()
        (choice,) = ask(server, "!", prompt=prompt, echo=True, logprobs=1)["choices"]
        ids = server[1].requests[-1].ids
        lists = choice["logprobs"]
        shown = [TOKENIZER.decode([t]) for t in ids[first:]]
        assert lists["tokens"] == [*shown, "!", "<｜end▁of▁sentence｜>"]
        known = [-p / 8 for p in range(first + 1, len(ids))]
        assert lists["token_logprobs"] == [None, *known, -0.25, -0.25]
        assert lists["top_logprobs"][0] is None
        assert all("#" in top for top in lists["top_logprobs"][1:])
        assert lists["text_offset"] == [len("".join(lists["tokens"][:n])) for n in range(len(lists["tokens"]))]
        assert "".join(lists["tokens"][:-1]) == choice["text"]


@pytest.mark.parametrize("answer", ["", " 51", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")])
def test_lm_evals_arithmetic_holds_whatever_the_one_token_is(server, answer):
    """Echo, one token, log probabilities: the prompt's tokens and exactly one more, also where it is the end."""
    ids = [70, 71, 72, 73]
    (choice,) = ask(server, answer, prompt=[ids], echo=True, logprobs=1, max_tokens=1, temperature=0)["choices"]
    values = choice["logprobs"]["token_logprobs"]
    assert values[2:-1] == [-2 / 8, -3 / 8]
    assert len(values) == len(choice["logprobs"]["top_logprobs"]) == len(ids) + 1


def test_an_echo_of_nothing_more_has_the_prompts_lists_alone(server):
    (choice,) = ask(server, "never", prompt=[70, 71, 72], echo=True, logprobs=0, max_tokens=0)["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1 / 8, -2 / 8]
    assert choice["logprobs"]["top_logprobs"] == [
        None, {TOKENIZER.decode([71]): -1 / 8}, {TOKENIZER.decode([72]): -2 / 8}]  # fmt: skip
    assert server[1].requests[-1].params.max_tokens == 1, "the engine needs one, which nobody is given"


def test_the_log_probabilities_before_a_hole_are_of_the_text_before_it(server):
    (choice,) = ask(server, "m", prompt="ab cd", suffix="z", echo=True, logprobs=0)["choices"]
    size = len(ids_of("ab cd"))
    assert choice["logprobs"]["tokens"] == [*texts("ab cd"), "m", "<｜end▁of▁sentence｜>"]
    assert choice["logprobs"]["token_logprobs"][:size] == [None, *[-p / 8 for p in range(3, 2 + size)]]


def test_parts_of_a_character_are_written_by_their_bytes_and_share_its_place(server):
    (choice,) = ask(server, "a😀b", logprobs=0)["choices"]
    parts = [t for t in choice["logprobs"]["tokens"] if t.startswith("bytes:")]
    assert "".join(p.removeprefix("bytes:") for p in parts) == r"\xf0\x9f\x98\x80"
    assert choice["logprobs"]["text_offset"] == [0, *[1] * len(parts), 2, 3]


def test_vllms_list_of_a_prompts_log_probabilities(server):
    (choice,) = ask(server, "a", prompt=[70, 71], prompt_logprobs=0)["choices"]
    assert choice["prompt_logprobs"] == [None, {"71": {"logprob": -1 / 8, "decoded_token": TOKENIZER.decode([71])}}]


def test_raw_ids_of_prompt_and_completion(server):
    body = ask(server, "hello", prompt=["x", "y"], return_token_ids=True)
    for choice, prompt in zip(body["choices"], "xy", strict=True):
        assert choice["token_ids"] == ids_of("hello")
        assert choice["prompt_token_ids"] == [BOS, *ids_of(prompt)]


# How tokens are chosen


def test_sampling_reaches_the_engine(server):
    fields = {
        "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "repetition_penalty": 1.1, "seed": -3, "stop_token_ids": [9], "ignore_eos": False, "max_repeats": 4,
        "min_tokens": 2, "max_tokens": 9, "stop": ["zz"],
    }  # fmt: skip
    ask(server, "a", **fields, priority=-5, user_id="u", response_format={"type": "json_object"})
    request = server[1].requests[-1]
    given = {**fields, "stop_token_ids": (9,), "stop": ("zz",)}
    assert {name: getattr(request.params, name) for name in given} == given
    assert (request.priority, request.salt, request.constraint.kind) == (-5, "/u", "json")
    ask(server, "a", guided_regex="a+")
    constraint = server[1].requests[-1].constraint
    assert (constraint.kind, constraint.after_reasoning) == ("regex", False)
    client, engine = server
    first, second = (client.post(PATH, json={"prompt": "x"}).json()["pyrosome"]["seed"] for _ in range(2))
    assert first != second
    assert engine.requests[-1].params.seed == second
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "array"}}}
    ask(server, "a", response_format=schema)
    assert server[1].requests[-1].constraint.schema == '{"type":"array"}'


def test_a_loop_that_was_cut_is_told_of(server):
    _, engine = server
    ending = engine._end
    engine._end = lambda state, indexes, reason, error="": ending(state, indexes, "repetition", error)
    try:
        (choice,) = ask(server, "a a a", max_tokens=2)["choices"]
    finally:
        del engine._end
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "repetition")


# What is refused

REFUSED = {
    "no prompt": ({"prompt": None}, "prompt is None"),
    "an empty list": ({"prompt": []}, "none of the lists empty"),
    "an empty list of ids": ({"prompt": [[]]}, "none of the lists empty"),
    "text and ids": ({"prompt": ["a", [1]]}, "a list of texts"),
    "a number": ({"prompt": 5}, "prompt is 5"),
    "a flag for an id": ({"prompt": [True]}, "prompt is [True]"),
    "a fraction for an id": ({"prompt": [1.5]}, "prompt is [1.5]"),
    "an id below zero": ({"prompt": [-1]}, "the id -1"),
    "an id that is not there": ({"prompt": [[5], [1280]]}, "the id 1280; ids from 0 to 1279"),
    "an id of a hundred digits": ({"prompt": [10**99]}, "ids from 0 to 1279"),
    "nothing at all": ({"prompt": "", "add_special_tokens": False}, "empty"),
    "a suffix that is no text": ({"suffix": 5}, "suffix is 5"),
    "a suffix with ids": ({"prompt": [5], "suffix": "b"}, "it goes with text"),
    "tokens below zero": ({"max_tokens": -1}, "max_tokens is -1"),
    "half a token": ({"max_tokens": 1.5}, "max_tokens is 1.5"),
    "a flag for tokens": ({"max_tokens": True}, "max_tokens is True"),
    "no answers": ({"n": 0}, "n is 0"),
    "too many answers": ({"n": 129}, "n is 129"),
    "a flag for log probabilities": ({"logprobs": True}, "logprobs is True"),
    "too many log probabilities": ({"logprobs": 101, "echo": True}, "logprobs is 101"),
    "too many of the prompt's": ({"logprobs": 1, "prompt_logprobs": 101, "echo": True}, "prompt_logprobs is 101"),
    "an echo that is no flag": ({"echo": "yes"}, "echo is 'yes'"),
    "a stream that is no flag": ({"stream": 1}, "stream is 1"),
    "options that are none": ({"stream": True, "stream_options": 5}, "stream_options is 5"),
    "a usage that is no flag": ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage is 1"),
    "a temperature below zero": ({"temperature": -1}, "temperature is -1"),
    "an infinite temperature": ({"temperature": 1e308 * 10}, "temperature is"),
    "a stop string that is none": ({"stop": 5}, "stop is 5"),
    "an empty stop string": ({"stop": ""}, "stop holds an empty string"),
    "too many stop strings": ({"stop": ["a"] * 17}, "stop has 17 strings"),
    "the best of many": ({"best_of": 4, "n": 2}, "best_of is 4 and n 2"),
    "a bias": ({"logit_bias": {"5": -100}}, "logit_bias"),
    "beams": ({"use_beam_search": True}, "use_beam_search"),
    "a format that is none": ({"response_format": {"type": "xml"}}, "response_format is"),
    "two formats": ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "bound to one"),
    "a seed that is none": ({"seed": "x"}, "seed is 'x'"),
    "a priority that is none": ({"priority": 1.5}, "priority is 1.5"),
    "too many prompts": ({"prompt": ["a"] * 265}, "265 prompts were sent and 264 are taken at once"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_a_400_that_names_it(server, case):
    client, engine = server
    fields, named = REFUSED[case]
    count = len(engine.requests)
    content = json.dumps({"prompt": "x", **fields}).replace("Infinity", "1e999")
    reply = client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == error["code"] == "invalid_request_error"
    assert named in error["message"]
    assert len(engine.requests) == count, "nothing was computed"


def test_what_does_not_fit_the_context_is_refused_by_its_code(server):
    client, _ = server
    for body in ({"prompt": "x", "max_tokens": 1 << 20}, {"prompt": [5] * (1 << 20), "max_tokens": 0}):
        error = client.post(PATH, json=body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "1048576" in error["message"]
    assert client.post(PATH, json={"prompt": [5] * 1000, "max_tokens": (1 << 20) - 1000}).status_code == 200


# Several prompts that do not all go well


class Ledger(OpenDoor):
    """Writes down what is settled; refuses whoever comes `after` so many."""

    headers = {}  # noqa: RUF012 - a ticket's

    def __init__(self, after=1000):
        self.entries, self.entered, self.after = [], 0, after

    async def enter(self, caller, request, prompt_tokens, max_tokens):
        self.entered += 1
        if self.entered > self.after:
            raise Refused(429, "enough for now", headers={"Retry-After": "9"})
        return self

    async def settle(self, entry):
        self.entries.append(entry)

    @property
    def statuses(self):
        return sorted(e.status for e in self.entries)


@pytest.fixture
def watched():
    """A server whose ledger is seen: client, engine, ledger, and the loop it runs in."""
    engine, ledger, loop = Bursts(saying("a b c d e f g h")), Ledger(), Loop()
    options = ServerOptions(keep_alive_s=0.05)  # whoever waits is soon told that they do
    service = Service(MODEL, options, EngineOptions(), make_driver=lambda: EngineThread(engine), door=ledger)
    service.watchers.append(loop)
    with running(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.service = service
        yield client, engine, ledger, loop


def is_idle(client):
    return client.service.gate.num_inside == 0 and not client.service.exchanges


def test_each_prompt_has_a_line_in_the_ledger(watched):
    client, _, ledger, _ = watched
    body = client.post(PATH, json={"prompt": ["x", "y z", "w"]}).json()
    assert ledger.statuses == ["stop"] * 3
    assert {e.request for e in ledger.entries} == {body["id"], body["id"] + "-1", body["id"] + "-2"}
    assert sum(e.usage.prompt_tokens for e in ledger.entries) == body["usage"]["prompt_tokens"]
    assert sum(e.usage.completion_tokens for e in ledger.entries) == body["usage"]["completion_tokens"]
    assert {e.mode for e in ledger.entries} == {"text"}
    until(lambda: is_idle(client))


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_fails_fails_the_request_and_ends_the_others(watched, stream):
    client, engine, ledger, _ = watched
    engine.script, engine.step_s, advance = saying("a b " * 500), 0.02, engine._advance

    def second_fails(name, state):
        fails = name.endswith("-1") and state["at"] > 2
        return engine._end(state, {0}, "error", "a fault of one") if fails else advance(name, state)

    engine._advance = second_fails
    reply = client.post(PATH, json={"prompt": ["x", "y", "z"], "stream": stream, "max_tokens": 2000})
    if stream:
        assert events_of(reply.text)[-1] == ("", "[DONE]")
        error = json.loads(events_of(reply.text)[-2][1])["error"]
    else:
        assert reply.status_code == (200 if reply.content.startswith(b"\n") else 500)  # it may have begun by then
        error = reply.json()["error"]
    assert "a fault of one" in error["message"]
    until(lambda: len(ledger.entries) == 3)
    assert {e.request[-2:]: e.status for e in ledger.entries if e.status != "abort"} == {"-1": "error"}
    until(lambda: not engine.has_work)
    assert len(engine.aborted) == 2
    until(lambda: is_idle(client))


def test_one_that_is_not_let_in_keeps_the_others_out(watched):
    client, engine, ledger, _ = watched
    ledger.after = 2
    reply = client.post(PATH, json={"prompt": ["x", "y", "z"]})
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "9")
    assert ledger.statuses == ["abort", "abort"]
    until(lambda: not engine.has_work)
    until(lambda: is_idle(client))


def test_one_that_the_engine_refuses_keeps_the_others_out(watched):
    client, engine, ledger, _ = watched
    reply = client.post(PATH, json={"prompt": ["x", ""], "add_special_tokens": False})
    assert reply.status_code == 400
    assert ledger.statuses == ["abort", "error"]
    until(lambda: not engine.has_work)
    until(lambda: is_idle(client))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_all_its_prompts(watched, stream):
    client, engine, ledger, _ = watched
    engine.prompt_steps, engine.step_s = 10_000, 0.005
    with client.stream("POST", PATH, json={"prompt": ["x", "y", "z"], "stream": stream}) as reply:
        next(reply.iter_bytes())  # a sign of life
    until(lambda: len(engine.aborted) == 3 and not engine.has_work)
    until(lambda: ledger.statuses == ["abort"] * 3 and is_idle(client))


class Waits:
    """An exchange that is still there so often, and then done."""

    id, error_shape, outcome = "x", "openai", None

    def __init__(self, often):
        self.often, self.asked = often, SimpleNamespace(readers=[None])

    async def batches(self):
        for n in range(self.often):
            yield StillHere(None, n)
            await asyncio.sleep(0)
        yield [Said(0, self.often)]


def test_while_several_wait_one_says_so():
    async def batches():
        return [b async for b in Group([Waits(5), Waits(7), Waits(2)]).batches()]

    seen = asyncio.run(batches())
    assert [b[0].index for b in seen if isinstance(b, list)] == [2, 0, 1]
    assert sum(isinstance(b, StillHere) for b in seen) == 7, "the first that waits, then the next"


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_closes_tells_a_client_of_several_prompts(watched, stream):
    client, engine, ledger, loop = watched
    engine.prompt_steps, engine.step_s = 10_000, 0.005
    service = client.service
    with client.stream("POST", PATH, json={"prompt": ["x", "y"], "stream": stream}) as reply:
        parts = reply.iter_bytes()
        next(parts)
        for exchange in list(service.exchanges.values()):
            loop.loop.call_soon_threadsafe(exchange.cancel)
        text = b"".join(parts).decode()
    body = json.loads(events_of(text)[-2][1]) if stream else json.loads(text)
    assert "shutting down" in body["error"]["message"]
    until(lambda: len(ledger.entries) == 2 and is_idle(client))


def test_several_prompts_end_at_their_deadline(watched):
    client, engine, ledger, _ = watched
    engine.prompt_steps, engine.step_s = 10_000, 0.005
    reply = client.post(PATH, json={"prompt": ["x", "y", "z"]}, headers={"x-request-deadline": "1"})
    assert "1 s this request may take are over" in reply.json()["error"]["message"]
    until(lambda: not engine.has_work)
    until(lambda: is_idle(client))
    assert ledger.statuses == ["abort"] * 3


# The render path, and all paths


def test_render_shows_what_the_engine_is_given(server):
    client, engine = server
    engine.script = saying("a")
    body = {"prompt": "def f(", "suffix": "): pass", "max_tokens": 0, "seed": 3}
    count = len(engine.requests)
    shown = client.post(PATH + "/render", json=body).json()
    several = client.post(PATH + "/render", json={"prompt": ["a", "b"]}).json()
    assert client.post(PATH + "/render", json={"prompt": []}).status_code == 400
    assert len(engine.requests) == count, "nothing is generated"
    client.post(PATH, json=body)
    assert tuple(shown["token_ids"]) == engine.requests[-1].ids
    assert shown["prompt"] == "<｜begin▁of▁sentence｜><｜fim▁begin｜>def f(<｜fim▁hole｜>): pass<｜fim▁end｜>"
    assert (shown["sampling"]["max_tokens"], shown["sampling"]["seed"], shown["mode"]) == (0, 3, "text")
    assert [p["token_ids"] for p in several["data"]] == [[BOS, *ids_of("a")], [BOS, *ids_of("b")]]


def test_every_path_answers(server):
    client, engine = server
    engine.script = saying("b")
    for prefix in ("/v1", "", "/beta", "/beta/v1"):
        assert client.post(f"{prefix}/completions", json={"prompt": "a"}).json()["choices"][0]["text"] == "b"
        assert "token_ids" in client.post(f"{prefix}/completions/render", json={"prompt": "a"}).json()


def test_the_document_says_what_is_taken_and_answered(server):
    route = server[0].get("/openapi.json").json()["paths"][PATH]["post"]
    body = route["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["prompt"]
    assert {"suffix", "echo", "logprobs", "best_of", "guided_json"} <= body["properties"].keys()
    assert {"200", "400", "401", "429", "500", "503"} <= route["responses"].keys()


# The built-in model


def test_a_prompts_log_probabilities_are_the_models_own(nano):
    prompt = "The falcon is a bird.\n? falcon"
    body = {"prompt": prompt, "echo": True, "logprobs": 3, "max_tokens": 1, "temperature": 0}
    (choice,) = nano.post(PATH, json=body).json()["choices"]
    ids = [BOS, *ids_of(prompt)]
    logprobs = torch.log_softmax(torch.as_tensor(load_model(MODEL, numerics="trained").logits(ids)).float(), -1)
    lists = choice["logprobs"]
    assert lists["token_logprobs"][0] is None
    for at in range(2, len(ids)):
        row = logprobs[at - 1]
        assert lists["token_logprobs"][at - 1] == pytest.approx(row[ids[at]].item(), abs=1e-5)
        best = max(lists["top_logprobs"][at - 1].values())
        assert best == pytest.approx(row.max().item(), abs=1e-5)
        assert 3 <= len(lists["top_logprobs"][at - 1]) <= 4
    again = nano.post(PATH, json={**body, "prompt": ids}).json()["choices"][0]["logprobs"]
    assert again["token_logprobs"][2:] == lists["token_logprobs"][1:], "the same by ids, which are all shown"


def test_the_built_in_model_goes_on_with_several_prompts_at_once_as_with_each_alone(nano):
    prompts = ["? falcon", "1 + 2 =", [70, 71, 72]]
    body = {"max_tokens": 6, "temperature": 0, "echo": True}
    together = nano.post(PATH, json={"prompt": prompts[:2], **body}).json()["choices"]
    alone = [nano.post(PATH, json={"prompt": p, **body}).json()["choices"][0] for p in prompts]
    assert [c["text"] for c in together] == [c["text"] for c in alone[:2]]
    assert alone[2]["text"].startswith(TOKENIZER.decode([70, 71, 72]))
