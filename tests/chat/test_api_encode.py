"""Requests to prompts as DeepSeek's API makes them."""

import hashlib
import json

import pytest

from pyrosome.chat import InvalidRequest
from tests.chat.cases import chat, golden
from tests.chat.exceptions import DEFAULT_MANNER

CASES = golden("api_encode")
STAGES = {"ReasoningStart": ("reasoning", False), "ReasoningContinuation": ("reasoning", True)}
STAGES["ContentContinuation"] = ("content", True)


def digest(ids):
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def seen(body, protocol, compat):
    """All that a case fixes, of a prompt or of an error."""
    try:
        prompt = chat("0731", compat).render(body, protocol)
    except InvalidRequest as error:
        return {"status": error.status, "body": json.loads(error.body)}
    s, c = prompt.sampling, prompt.constraint
    return {
        "prompt": prompt.text,
        "ids": digest(prompt.ids),
        "inference": {
            "max_tokens": s.max_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "seed": s.seed,
            "logprobs": s.logprobs,
            "top_logprobs": s.top_logprobs,
            "output_constraint": c and {"kind": c.kind, "schema": c.schema},
        },
        "penalties": (s.presence_penalty, s.frequency_penalty),
        "parsing": (prompt.parse_tools, prompt.json_only, list(prompt.stop)),
        "start": (prompt.start, prompt.continues),
    }


def wanted(case):
    expected = case["expected"]["v4"]
    if "error" in expected:
        return {"status": expected["error"]["status"], "body": expected["error"].get("body")}
    p = expected["parsing"]
    stage = STAGES.get(p["thinking_initial_stage"])
    if p["starts_in_tool_calls"]:
        stage = ("tools", False)
    elif stage is None:
        final = case["body"].get("messages", [{}])[-1]
        stage = ("content", bool(final.get("prefix") and final.get("content")))
    return {
        "prompt": expected["prompt"],
        "ids": expected["tokens"]["sha256"],
        "inference": expected["inference"],
        "penalties": (0.0, 0.0),
        "parsing": (p["parse_tool_calls"], p["parse_json_output"], p["stop_sequences"]),
        "start": stage,
    }


def same(got, want):
    if want.get("body", "") is None:  # refused while the body was read: only the status is fixed
        return got.get("status") == want["status"]
    return got == want


@pytest.mark.parametrize("case", CASES, ids=[c["id"] for c in CASES])
def test_the_official_manner_is_the_official_api(case):
    got, want = seen(case["body"], case["protocol"], "deepseek"), wanted(case)
    assert same(got, want), (got, want)


def test_the_default_manner_differs_exactly_where_it_says():
    different = {c["id"] for c in CASES if not same(seen(c["body"], c["protocol"], None), wanted(c))}
    assert different == set(DEFAULT_MANNER)


def test_default_max_tokens_are_those_of_the_mode():
    for case in CASES:
        default = case["expected"]["v4"].get("default_max_tokens_1M_context")
        if default is not None:
            assert chat("0731", "deepseek").render(case["body"], case["protocol"]).max_tokens == default, case["id"]


def test_a_body_is_not_changed():
    for case in CASES:
        before = json.dumps(case["body"])
        seen(case["body"], case["protocol"], None)
        assert json.dumps(case["body"]) == before
