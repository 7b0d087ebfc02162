"""Model output to messages, against the golden cases, at every chunking and with both tokenizers."""

import pytest

from tests.chat.cases import NANO, OFFICIAL, answer, chunkings, golden, prompt_for, read, tokenizer
from tests.chat.exceptions import PARSE

CASES = golden("parse")
BETTER = {"m_json_body": ("", [("f", '{"a": 1}')]), "m_eos_mid_block": ("", [("f", "{}")])}


def prompt_of(case):
    options, thinking = case["options"], case["mode"] == "thinking"
    stage = options.get("stage", "ReasoningStart")
    start = "reasoning" if thinking and stage != "ContentContinuation" else "content"
    return prompt_for(
        tools=None,
        start="tools" if options.get("starts_in_tool_calls") else start,
        continues=thinking and stage != "ReasoningStart",
        parse_tools=options.get("parse_tool_calls", True),
        json_only=options.get("parse_json_output", False),
        stop=tuple(options.get("stop_sequences", ())),
    )


def outcome(message, case):
    json_only = case["options"].get("parse_json_output")
    content = message.content.strip() if json_only else message.content
    return message.reasoning, content, [(c.name, c.arguments) for c in message.tool_calls], message.finish_reason


@pytest.mark.parametrize("home", [OFFICIAL, NANO], ids=["official", "nano"])
@pytest.mark.parametrize("case", CASES, ids=[c["id"] for c in CASES])
def test_an_answer_is_read_as_the_official_api_reads_it(case, home):
    expected = case["expected"]
    calls = [(c["name"], c["arguments"]) for c in expected["tool_calls"]]
    content = expected["content"].strip() if case["options"].get("parse_json_output") else expected["content"]
    want = (expected["reasoning_content"] or "", content, calls, expected["finish_reason"])
    if case["id"] in PARSE:
        want = (want[0], *BETTER[case["id"]], want[3])
    ids = tokenizer(home).encode(case["text"], allow_special=True)
    for cuts in chunkings(len(ids)) if home is OFFICIAL else ((), range(1, len(ids))):
        assert outcome(read(ids, prompt_of(case), cuts, home)[0], case) == want


@pytest.mark.parametrize(
    ("stops", "content"), [(("abc", "b"), "xa"), (("b", "abc"), "xa"), (("ab", "abc"), "x"), (("cd", "bcd"), "xa")]
)
def test_the_stop_string_that_is_complete_first_ends_the_answer(stops, content):
    message = answer("xabcde", stop=stops)
    assert (message.content, message.finish_reason) == (content, "stop")
    assert "xabcde".startswith(content + message.stop_sequence)


def test_every_improvement_is_listed():
    assert set(PARSE) == set(BETTER)


@pytest.mark.parametrize("case", CASES, ids=[c["id"] for c in CASES])
def test_tokens_are_counted_as_the_official_api_counts_them(case):
    ids = tokenizer().encode(case["text"], allow_special=True)
    details = case["expected_usage"].get("completion_tokens_details") or {}
    for cuts in ((), range(1, len(ids))):
        parser = read(ids, prompt_of(case), cuts)[2]
        assert parser.completion_tokens == case["expected_usage"]["completion_tokens"]
        assert parser.reasoning_tokens == details.get("reasoning_tokens", 0)
