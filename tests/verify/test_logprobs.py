"""Stored log probabilities: every form they come in, files that are none, and weights that are others."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from pyrosome import LLM, SamplingParams, tasks
from pyrosome.errors import RequestError
from pyrosome.server.logprobs import TextLogprobs, token_entries
from pyrosome.verify import logprobs, subject
from pyrosome.verify.finding import Wanted
from pyrosome.verify.recorded import Step, read_vectors

NANO = "builtin:nano"


@pytest.fixture(scope="module")
def llm():
    with LLM(NANO, drafter="off", cache_bytes=32 << 20) as one:
        yield one


@pytest.fixture(autouse=True)
def _nothing_is_held():
    yield
    subject.release()


def conversations(count=4):
    rng = random.Random(0)
    return [list(tasks.make("ledger", rng, 120, True, asks=2).messages[:-1]) for _ in range(count)]


def answered(llm, ids, tokens=12):
    params = SamplingParams(tokens, temperature=1.0, seed=3, logprobs=4, ignore_eos=True)
    (output,) = llm.generate([list(ids)], params)
    return output.token_ids, output.logprobs


def by_ids(llm, messages):
    ids = llm.chat_template.conversation(messages, "off").ids
    tokens, logs = answered(llm, ids)
    tops = [{str(t): p for t, p in log.items()} for log in logs]
    return {"ids": list(ids), "tokens": list(tokens), "logprobs": [log[t] for t, log in zip(tokens, logs, strict=True)],
            "top_logprobs": tops}  # fmt: skip


@pytest.fixture(scope="module")
def records(llm):
    return [by_ids(llm, m) for m in conversations()]


def written(tmp_path, lines, name="vectors.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, lines)) if name.endswith("l") else json.dumps(lines))
    return path


def found(path, **changes):
    return {f.what: f for f in logprobs.check(Wanted(NANO, logprobs=path, **changes))}


def test_what_this_model_said_is_what_it_says(tmp_path, records):
    findings = found(written(tmp_path, records))
    assert list(findings) == ["chosen tokens", "best tokens", "distributions"]
    assert all(f.ok for f in findings.values())
    chosen = findings["chosen tokens"].figures
    assert (
        chosen["tokens"] == 48
        and chosen["mean"] < 1e-6
        and list(chosen["by_record"]) == [f"line {n}" for n in range(1, 5)]
    )
    best = findings["best tokens"].figures
    assert best["all_agreeing"] == 48 and 20 < best["clear"] <= best["agreeing"]
    assert abs(findings["distributions"].figures["mean"]) < 1e-6


def test_other_arithmetic_is_close_and_not_equal(tmp_path, records):
    findings = found(written(tmp_path, records), numerics="exact")
    assert all(f.ok for f in findings.values()), [f.detail for f in findings.values()]
    assert findings["chosen tokens"].figures["mean"] > 1e-3


@pytest.mark.parametrize("fault", ["head", "layer"])
def test_other_weights_fail(tmp_path, records, fault):
    path, network = written(tmp_path, records), subject.subject(Wanted(NANO)).model.network
    with torch.inference_mode():
        if fault == "head":  # as a temperature would
            network.norm.weight *= 0.6
        else:
            network.layers[1].attn_norm.weight[::2] *= 0.0
    findings = found(path)
    assert findings["chosen tokens"].ok is False and findings["distributions"].ok is False
    assert findings["chosen tokens"].figures["mean"] > logprobs.MEAN_NATS
    assert "0.1 allowed" in findings["chosen tokens"].detail
    if fault == "layer":
        assert findings["best tokens"].ok is False


def chat_record(llm, messages, thinking, **usage):
    prompt = llm.chat_template.conversation(messages, thinking)
    tokens, logs = answered(llm, prompt.ids, 24)
    logged = [type("Log", (), {"token": t, "logprobs": log}) for t, log in zip(tokens, logs, strict=True)]
    end = llm.tokenizer.id_of("</think>")
    parts = {"content": token_entries(llm.tokenizer, logged, 3)}
    if thinking != "off":
        at = tokens.index(end)
        parts = {"reasoning_content": token_entries(llm.tokenizer, logged[:at], 3),
                 "content": token_entries(llm.tokenizer, logged[at + 1 :], 3)}  # fmt: skip
    body = {"messages": messages, "thinking": {"type": "disabled" if thinking == "off" else "enabled"}}
    response = {"object": "chat.completion", "choices": [{"index": 0, "logprobs": parts}],
                "usage": {"prompt_tokens": len(prompt.ids), **usage}}  # fmt: skip
    return {"request": body, "response": response}


def test_answers_of_the_chat_api_are_followed_thoughts_included(tmp_path, llm):
    sums = [{"role": "user", "content": "37 + 25"}]
    lines = [chat_record(llm, conversations(1)[0], "off"), chat_record(llm, sums, "high")]
    findings = found(written(tmp_path, lines))
    assert list(findings) == ["prompts", "chosen tokens", "best tokens", "distributions"]
    assert all(f.ok for f in findings.values()), [f.detail for f in findings.values()]
    assert findings["chosen tokens"].figures["mean"] < 1e-6
    assert findings["chosen tokens"].figures["tokens"] == 24 + 24 - 1  # what closes the thoughts is in neither list


def test_an_answer_with_its_messages_beside_it_is_a_record_too(tmp_path, llm):
    record = chat_record(llm, conversations(1)[0], "off")
    flat = {"messages": record["request"]["messages"], "thinking": "off", **record["response"]}
    assert found(written(tmp_path, flat, "one.json"))["chosen tokens"].figures["mean"] < 1e-6


def test_completions_of_text_are_followed(tmp_path, llm):
    text = " road falcon 37 ; river old ? falcon"
    tokens, logs = answered(llm, llm.encode(text))
    logged = [type("Log", (), {"token": t, "logprobs": log}) for t, log in zip(tokens, logs, strict=True)]
    lists = TextLogprobs(llm.tokenizer).answer(logged)
    record = {"request": {"prompt": text}, "response": {"choices": [{"logprobs": lists}]}}
    assert found(written(tmp_path, [record]))["chosen tokens"].figures["mean"] < 1e-6


def test_a_prompt_that_was_counted_otherwise_is_told(tmp_path, llm):
    record = chat_record(llm, conversations(1)[0], "off", prompt_tokens=7)
    findings = found(written(tmp_path, [record]))
    assert findings["prompts"].ok is False and "here and 7 there" in findings["prompts"].detail


def test_thoughts_that_were_not_recorded_cannot_be_followed(tmp_path, llm):
    record = chat_record(llm, [{"role": "user", "content": "37 + 25"}], "high")
    del record["response"]["choices"][0]["logprobs"]["reasoning_content"]
    with pytest.raises(RequestError, match="line 1: the request thinks"):
        found(written(tmp_path, [record]))


def test_a_token_of_another_tokenizer_is_a_finding(tmp_path, records):
    strange = {"prompt": "a", "tokens": ["quetzalcoatlus"], "logprobs": [-1.0]}
    findings = found(written(tmp_path, [records[0], strange]))
    assert (
        findings["vectors.jsonl, line 2"].ok is False and "quetzalcoatlus" in findings["vectors.jsonl, line 2"].detail
    )
    assert findings["chosen tokens"].ok is True


def test_without_others_only_what_is_sure_is_the_best(tmp_path, records):
    alone = [{k: v for k, v in r.items() if k != "top_logprobs"} for r in records]
    findings = found(written(tmp_path, alone))
    assert findings["distributions"].ok is None and "no top_logprobs" in findings["distributions"].detail
    clear = 1 / (1 + math.exp(-logprobs.CLEAR))  # its odds against all others together
    likely = sum(math.exp(p) >= clear for r in records for p in r["logprobs"])
    assert findings["best tokens"].figures["clear"] == findings["best tokens"].figures["agreeing"] == likely > 0


def test_nothing_given_is_left_out():
    (only,) = logprobs.check(Wanted(NANO))
    assert only.ok is None and "--logprobs FILE" in only.detail


GOOD = {"ids": [0], "tokens": [5], "logprobs": [-1.0]}
MALFORMED = [
    ("not json", "no JSON"),
    ([1], "where an object was expected"),
    ({**GOOD, "prompt": "a"}, "ids and prompt"),
    ({"tokens": [5], "logprobs": [-1.0]}, "no prompt"),
    ({**GOOD, "ids": []}, "at least one"),
    ({**GOOD, "ids": [True]}, "token ids"),
    ({**GOOD, "ids": [-1]}, "token ids"),
    ({**GOOD, "tokens": [5, 6]}, "2 tokens and 1 logprobs"),
    ({**GOOD, "tokens": []}, "0 tokens"),
    ({**GOOD, "tokens": None}, "tokens is missing"),
    ({**GOOD, "tokens": [1.5]}, "a token is 1.5"),
    ({**GOOD, "logprobs": [0.5]}, "a number of 0 or less"),
    ({**GOOD, "logprobs": [float("nan")]}, "a logprob is nan"),
    ({**GOOD, "logprobs": [True]}, "a logprob is True"),
    ({**GOOD, "logprobs": ["-1"]}, "a logprob is '-1'"),
    ({**GOOD, "top_logprobs": [{"5": -0.1, "6": -0.1}]}, "sum to 1.8"),
    ({**GOOD, "top_logprobs": {}}, "an item for each of 1"),
    ({**GOOD, "top_logprobs": [[{"token": "a"}]]}, "a token with its logprob"),
    ({**GOOD, "top_logprobs": ["a"]}, "among top_logprobs"),
    ({"messages": "hello", "tokens": [5], "logprobs": [-1.0]}, "messages is 'hello'"),
    ({"request": 5, "response": {}}, "request is 5"),
    ({"request": {"prompt": "a"}, "response": {"choices": []}}, "a list of answers"),
    ({"request": {"prompt": "a"}, "response": {"choices": [{"logprobs": None}]}}, "logprobs is missing"),
    ({"request": {"prompt": "a"}, "response": {"choices": [{"logprobs": {}}]}}, "no list content"),
    ({"prompt": "a", "choices": [{"logprobs": {"content": [{"token": "a", "logprob": 0, "bytes": [256]}]}}]}, "to 255"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "says"), MALFORMED, ids=[str(n) for n in range(len(MALFORMED))])
def test_a_malformed_line_is_refused_by_its_number(tmp_path, record, says):
    path = tmp_path / "vectors.jsonl"
    line = record if isinstance(record, str) else json.dumps(record)
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(RequestError) as refused:
        found(path)
    assert "vectors.jsonl, line 3: " in str(refused.value) and says in str(refused.value)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), ("", "holds no log"), ("\n\n", "holds no log")]
)
def test_a_file_that_is_none_is_refused(tmp_path, content, says):
    path = tmp_path / "vectors.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RequestError, match=says):
        read_vectors(path)


def test_ids_and_lengths_the_model_does_not_have_are_refused(tmp_path):
    with pytest.raises(RequestError, match="line 1: token 1280 is outside"):
        found(written(tmp_path, [{**GOOD, "tokens": [1280]}]))
    with pytest.raises(RequestError, match="line 1: token 99999 is outside"):
        found(written(tmp_path, [{**GOOD, "top_logprobs": [{"99999": -3.0}]}]))


def test_tokens_are_read_as_they_are_spelled(tmp_path):
    tokens = [7, " a", "\\xe6\\xb7", "bytes:\\xb1", "7"]
    tops = [{"8": -1.0}, {"8": -1.0}, [["x", -3]], [{"token": "y", "logprob": -4, "bytes": [255]}], None]
    logs = [None, -1, -2, -9999, float("-inf")]
    record = {"prompt": [0], "tokens": tokens, "logprobs": logs, "top_logprobs": tops}
    (vector,) = read_vectors(written(tmp_path, [record], "one.json"))
    assert vector.where == "record 1" and vector.ids == (0,)
    assert vector.steps == (
        Step(7, None, ((8, -1.0),)),
        Step(b" a", -1.0, ((b"8", -1.0),)),
        Step(b"\xe6\xb7", -2.0, ((b"x", -3.0),)),
        Step(b"\xb1", -9999.0, ((b"\xff", -4.0),)),
        Step(b"7", -9999.0),
    )


def test_a_gap_is_what_it_says():
    row = torch.tensor([math.log(0.5), math.log(0.3), math.log(0.2)])
    same = logprobs.gap(row, 0, math.log(0.5), {1: math.log(0.3)})
    assert abs(same.apart) < 1e-6 and abs(same.kl) < 1e-6 and same.is_clear and same.agrees
    other = logprobs.gap(row, 1, math.log(0.6), {1: math.log(0.6), 0: math.log(0.4)})
    assert other.apart == pytest.approx(math.log(0.5)) and not other.is_clear and not other.agrees
    assert other.kl == pytest.approx(0.6 * math.log(0.6 / 0.3) + 0.4 * math.log(0.4 / 0.5), abs=1e-6)
    rest = logprobs.gap(row, 0, math.log(0.5), {1: math.log(0.1)})  # 0.4 for all others, of which there are 0.2 here
    assert rest.kl == pytest.approx(0.1 * math.log(0.1 / 0.3) + 0.4 * math.log(0.4 / 0.2), abs=1e-6)
    rare = logprobs.gap(row, 2, -9999.0, {})
    assert rare.apart == pytest.approx(math.log(0.2) - logprobs.LEAST) and rare.kl is None and not rare.is_clear
