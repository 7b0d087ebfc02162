"""What holds for any answer whatever, however its ids arrive."""

import json
import re

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.chat.cases import END, NANO, OFFICIAL, TOOLS, prompt_for, read, tokenizer

PIECES = st.sampled_from(
    [
        *(
            "<｜DSML｜tool_calls>",
            "</｜DSML｜tool_calls>",
            "</｜DSML｜invoke>",
            "</｜DSML｜parameter>",
            "｜DSML｜",
            "<",
            "</",
        ),
        *(
            '<｜DSML｜invoke name="read">',
            '<｜DSML｜invoke name="no">',
            '<｜DSML｜parameter name="path" string="true">',
        ),
        *('<｜DSML｜parameter name="lines" string="false">', '<｜DSML｜parameter name="input">', "</think>", "<think>"),
        *("\n", "\n\n", " ", "x", "5", '{"path": "p"}', "[1", '"', "\\", "```", "STOP", "<‖DSML‖tool_calls>", "é", "🌤️"),
        *(
            "<|DSML|invoke",
            ' name="read">',
            "</|DSML|invoke>",
            "parameter>",
            "tool_calls",
            "思考",
            "<｜User｜>",
            "\x00",
        ),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=14).map("".join)
WAYS = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
MARKUP = re.compile(r"<[/ ]*[｜‖|]{1,2} ?DSML")


@st.composite
def answers(draw):
    ended = draw(st.booleans())
    prompt = prompt_for(
        tools=draw(st.sampled_from([TOOLS, None, ()])),
        start=draw(st.sampled_from(["content", "reasoning", "tools"])),
        continues=draw(st.booleans()),
        stop=draw(st.sampled_from([(), ("STOP",), ("x", "STOPx")])),
        json_only=draw(st.booleans()),
    )
    return draw(TEXTS) + (END if ended else ""), prompt


@WAYS
@given(answers(), st.randoms(use_true_random=False))
def test_no_chunking_changes_an_answer(case, rng):
    text, prompt = case
    for home in (OFFICIAL, NANO):
        ids = tokenizer(home).encode(text.encode("utf-8", "replace").decode(), allow_special=True)
        whole = read(ids, prompt, (), home)[0]
        assert read(ids, prompt, range(1, len(ids)), home)[0] == whole
        for at in range(1, min(len(ids), 40)):
            assert read(ids, prompt, (at,), home)[0] == whole
        if len(ids) > 2:
            cuts = sorted(rng.sample(range(1, len(ids)), rng.randrange(1, len(ids) - 1)))
            assert read(ids, prompt, cuts, home)[0] == whole


@WAYS
@given(answers())
def test_text_is_never_lost_without_a_word(case):
    """Without calls and notes, every letter written is in the thoughts or in the answer."""
    text, prompt = case
    text = text.encode("utf-8", "replace").decode()
    if prompt.stop or prompt.json_only:
        return
    message = read(tokenizer().encode(text, allow_special=True), prompt)[0]
    written = text.split(END)[0].replace("</think>", "").replace("\n", "")
    kept = (message.reasoning + message.content).replace("\n", "")
    if not message.tool_calls and not message.malformed:
        assert kept.replace("</think>", "") == written
    if message.finish_reason == "stop" and not message.content.strip() and not message.tool_calls:
        assert message.malformed


@WAYS
@given(answers())
def test_arguments_never_hold_markup_and_are_json_when_the_call_was_closed(case):
    text, prompt = case
    ids = tokenizer().encode(text.encode("utf-8", "replace").decode(), allow_special=True)
    message, events, _ = read(ids, prompt, range(1, len(ids)))
    spelled = "｜DSML｜" in text.replace("<｜DSML｜", "").replace("</｜DSML｜", "") or re.search("[|‖]DSML", text)
    for event in events:
        if hasattr(event, "arguments") and not spelled:
            assert not MARKUP.search(event.arguments)
    unclosed = any("closed" in n or "cut" in n or "not JSON" in n for n in message.malformed)
    for call in message.tool_calls:
        if not unclosed:
            assert isinstance(json.loads(call.arguments), dict)


@WAYS
@given(answers(), answers())
def test_one_answer_never_touches_another(first, second):
    """Two parsers fed in turns give what each gives alone."""
    from tests.chat.cases import Parser

    parsers, ids = [], []
    for text, prompt in (first, second):
        ids.append(tokenizer().encode(text.encode("utf-8", "replace").decode(), allow_special=True))
        parsers.append(Parser(tokenizer(), prompt, call_id=lambda n: f"call_{n}"))
    for n in range(max(map(len, ids))):
        for parser, tokens in zip(parsers, ids, strict=True):
            parser.feed(tokens[n : n + 1])
    for parser, tokens, (_, prompt) in zip(parsers, ids, (first, second), strict=True):
        assert parser.close() == read(tokens, prompt)[0]
