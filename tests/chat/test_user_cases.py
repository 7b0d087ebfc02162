"""What has gone wrong for users of other servers: one test for each weight-free case, named by its id."""

import itertools
import json
import pickle
import re

import pytest

from pyrosome.chat import Chat, InvalidRequest, Parser
from pyrosome.chat.calls import ToolBlock
from pyrosome.chat.events import ContentDelta, ToolCallDelta, ToolCallStart
from tests.chat.cases import (
    DATA,
    END,
    NANO,
    READ,
    TOOLS,
    WEATHER,
    answer,
    block,
    called,
    chat,
    invoke,
    prompt_for,
    read,
    tokenizer,
)

ASK = {"role": "user", "content": "q"}
OPENAI_TOOLS = [{"type": "function", "function": t} for t in TOOLS]
RESPONSE_TOOLS = [{"type": "function", **t} for t in TOOLS]
ANTHROPIC_TOOLS = [{"name": t["name"], "description": "", "input_schema": t["parameters"]} for t in TOOLS]
PARIS = {"city": "Paris"}
DSML = re.compile(r"[<｜‖|]\s?DSML|DSML\s?[｜‖|]|｜DSML")


def test_every_weight_free_case_has_its_test():
    lines = (DATA / "user_cases.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [c for c in map(json.loads, lines) if re.match(r"(TOOL|REAS|ENC)-", c["id"]) and c["tier"] == "cpu-unit"]
    tests = [name for name in globals() if name.startswith("test_")]
    missing = [c["id"] for c in cases if not any(t.startswith(f"test_{c['id'].replace('-', '_')}_") for t in tests)]
    assert len(cases) >= 26 and not missing


# Tool calls in what the model writes


def test_TOOL_01_a_closing_tag_that_is_not_complete_is_not_part_of_the_value():
    text = block(("get_weather", PARIS)) + END
    message = answer(text, tools=TOOLS)
    assert message.tool_calls[0].arguments == '{"city": "Paris"}'
    for home in (None, NANO):
        ids = tokenizer(*[home] if home else []).encode(text, allow_special=True)
        parser = Parser(tokenizer(*[home] if home else []), prompt_for(tools=TOOLS))
        for token in ids:
            for event in parser.feed([token]):
                assert not DSML.search(getattr(event, "arguments", "") + getattr(event, "text", ""))
    cut = text[: text.index("</｜DSML｜parameter") + len("</｜DSML｜para")]
    assert answer(cut, tools=TOOLS).tool_calls[0].arguments in ('{"city": "Paris"', '{"city": "Paris"}')


MENTIONS = [
    'Write `<｜DSML｜invoke name="read"><｜DSML｜parameter name="path" string="true">` and then the path.',
    'Write `<｜DSML｜invoke name="read">` to read a file.',
    "The block starts with <｜DSML｜tool_calls> and ends with </｜DSML｜tool_calls>.",
    'Use this:\n```\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="read">\n```\nand so on.',
    'Write `<｜DSML｜parameter name="path" string="true">` for the path.',
    'For example:\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="read">\n',
    'Inline <｜DSML｜tool_calls><｜DSML｜invoke name="read"><｜DSML｜parameter name="path" string="true">a'
    "</｜DSML｜parameter>",
    'A fence:\n```\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="read">\n<｜DSML｜parameter name="page" string="true">1'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>\n```\n",
    'Then `<｜DSML｜invoke name="read">` and `</｜DSML｜invoke>` close it.',
    'Try:\n```xml\n<｜DSML｜invoke name="$TOOL"></｜DSML｜invoke>\n```',
    'Inline <｜DSML｜tool_calls><｜DSML｜invoke name="read"><｜DSML｜parameter name="page" string="true">1'
    "</｜DSML｜parameter></｜DSML｜invoke></｜DSML｜tool_calls> is wrong: there is no page.",
]


@pytest.mark.parametrize("prose", MENTIONS)
def test_TOOL_05_prose_that_mentions_a_tag_stays_the_answer(prose):
    message = answer(prose + END, tools=TOOLS)
    assert (message.content, message.tool_calls, message.finish_reason) == (prose, (), "stop")
    assert "parameter name" in prose or message.malformed


def test_TOOL_05_a_real_call_after_a_mention_is_made():
    for prose in (*MENTIONS[:3], "Type\n<｜DSML｜tool_calls> first."):
        message = answer(prose + block(("read", {"path": "a"})) + END, tools=TOOLS)
        assert (message.content, called(message)) == (prose, [("read", {"path": "a"})])


@pytest.mark.parametrize("tail", ["", "<", "</", "\n  <｜DSML｜", "<｜DSML｜parameter name=", "<｜DSML｜parameter"])
def test_TOOL_01_an_answer_cut_short_within_a_tag_shows_none_of_it(tail):
    message = answer('Look.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="read">\n' + tail, tools=TOOLS)
    assert (message.content, message.finish_reason) == ("Look.", "length") and message.malformed
    assert [(c.name, c.arguments) for c in message.tool_calls] == [("read", "")]


def test_TOOL_05_a_mention_does_not_hold_up_what_follows_it():
    for prose in (*MENTIONS[:3], "\n\n<｜DSML｜tool_calls>"):
        text = prose + " It goes on for many words." * 9
        parser = Parser(tokenizer(), prompt_for(tools=TOOLS))
        ids = tokenizer().encode(text, allow_special=True)
        said = "".join(e.text for token in ids for e in parser.feed([token]))
        assert said.strip() == text.strip()


def test_TOOL_06_without_tools_the_tool_parser_is_not_entered():
    text = "Like so:" + block(("read", {"path": "a"})) + "\nDone."
    for start in ("content", "reasoning"):
        lead = "thought</think>" if start == "reasoning" else ""
        message = answer(lead + text + END, tools=(), start=start)
        assert (message.content, message.tool_calls, message.finish_reason) == (text, (), "stop")
    body = {"messages": [ASK], "thinking": {"type": "disabled"}}
    assert not chat().render(body).parse_tools
    assert not chat().render({**body, "tools": OPENAI_TOOLS, "tool_choice": "none"}).parse_tools


def test_TOOL_08_values_have_the_type_the_model_wrote():
    values = {"b": True, "i": 5, "f": -0.25, "n": None, "a": [1, "two"], "o": {"k": []}, "s": "5", "t": "true"}
    message = answer(block(("task", values)) + END, tools=None)
    assert called(message) == [("task", values)]
    schema = {"type": "object", "properties": {"run_in_background": {"type": "boolean"}}}
    message = answer(
        block(("agent", {"run_in_background": True})) + END, tools=[{"name": "agent", "parameters": schema}]
    )
    assert called(message) == [("agent", {"run_in_background": True})]


WRAPPED = json.dumps({"path": "a.txt", "lines": 3})


@pytest.mark.parametrize("name", ["arguments", "input"])
@pytest.mark.parametrize("kind", ["true", "false"])
def test_TOOL_09_a_wrapper_that_is_not_declared_is_taken_off(name, kind):
    parameter = f'<｜DSML｜parameter name="{name}" string="{kind}">'
    text = block(("read", {"X": ""})).replace('<｜DSML｜parameter name="X" string="true">', parameter + WRAPPED)
    assert called(answer(text + END, tools=TOOLS)) == [("read", json.loads(WRAPPED))]


def test_TOOL_09_a_declared_parameter_of_that_name_stays():
    tool = {"name": "run", "parameters": {"type": "object", "properties": {"arguments": {"type": "object"}}}}
    tool["parameters"]["properties"]["path"] = {"type": "string"}
    values = {"arguments": {"path": "a"}}
    assert called(answer(block(("run", values)) + END, tools=[tool])) == [("run", values)]


@pytest.mark.parametrize(
    "values", [{"input": {"nonsense": 1}}, {"input": "hello"}, {"input": {"path": "a"}, "lines": 1}]
)
def test_TOOL_09_what_does_not_fit_or_is_not_alone_is_no_wrapper(values):
    assert called(answer(block(("read", values)) + END, tools=TOOLS)) == [("read", values)]


def test_TOOL_11_a_long_value_streams_from_its_first_character():
    lines = "".join(f'line {n}: äöü "quoted" \\ tab\t\n' for n in range(2000))
    text = block(("read", {"path": lines, "lines": 3}))
    ids = tokenizer().encode(text, allow_special=True)
    parser = Parser(tokenizer(), prompt_for(tools=TOOLS))
    begins = len(tokenizer().encode(text[: text.index("line 0")], allow_special=True))
    silent, longest, seen = 0, 0, []
    for n, token in enumerate(ids):
        events = parser.feed([token])
        seen += events
        silent = 0 if events else silent + 1
        if begins < n < len(ids) - 60:
            longest = max(longest, silent)
        if n == begins + 2:
            assert isinstance(seen[0], ToolCallStart)
            assert "".join(e.arguments for e in seen[1:]).startswith('{"path": "line')
    assert longest <= 3
    message = parser.close()
    assert called(message) == [("read", {"path": lines, "lines": 3})]
    assert "".join(e.arguments for e in seen if isinstance(e, ToolCallDelta)) == message.tool_calls[0].arguments


def test_TOOL_11_a_list_streams_too():
    text = block(("read", {"lines": list(range(2000))}))
    parser = Parser(tokenizer(), prompt_for(tools=TOOLS))
    parser.feed(tokenizer().encode(text[:60] + text[60:].split("0, 1, ")[0], allow_special=True))
    for n in range(50):
        events = parser.feed(tokenizer().encode(f"{n}, "))
        assert [e.arguments for e in events] == [f"{n}, "]


@pytest.mark.parametrize("value", ["find /tmp", "</parameter", "ends in parameter", "a<", "</", "<｜", "x\n", " "])
def test_TOOL_12_only_the_exact_closing_tag_is_taken_from_a_value(value):
    message = answer(block(("read", {"path": value})) + END, tools=TOOLS)
    assert called(message) == [("read", {"path": value})]


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("at", [1, 5, 20, 30, 40])
def test_TOOL_13_an_error_in_the_middle_loses_nothing(at, size, monkeypatch):
    text = "First this." + block(("read", {"path": "a b c"})) + END
    ids = tokenizer().encode(text, allow_special=True)
    want, _, _ = read(ids, prompt_for(tools=TOOLS))
    calls = itertools.count()
    step = ToolBlock._step

    def failing(self, **kwargs):
        if next(calls) == at:
            raise MemoryError("once")
        return step(self, **kwargs)

    monkeypatch.setattr(ToolBlock, "_step", failing)
    parser = Parser(tokenizer(), prompt_for(tools=TOOLS), call_id=lambda n: f"call_{n}")
    events, failures = [], 0
    for first in range(0, len(ids), size):
        try:
            events += parser.feed(ids[first : first + size])
        except MemoryError:
            failures += 1
    events += parser.flush()
    assert failures == 1 and parser.close() == want
    assert "".join(e.text for e in events if isinstance(e, ContentDelta)) == "First this."


def test_TOOL_14_a_block_in_two_pieces_is_the_same_call():
    text = block(("get_weather", {"city": "Paris", "unit": "c"}), ("read", {"path": "x", "lines": 2})) + END
    ids = tokenizer().encode(text, allow_special=True)
    whole = read(ids, prompt_for(tools=TOOLS))[0]
    assert len(whole.tool_calls) == 2
    for at in range(1, len(ids)):
        assert read(ids, prompt_for(tools=TOOLS), (at,))[0] == whole


def test_TOOL_15_a_block_the_prompt_opened_may_be_opened_again():
    text = block(("read", {"path": "x"}), head="") + END
    message = answer(text, tools=TOOLS, start="tools")
    assert called(message) == [("read", {"path": "x"})] and not message.malformed
    message = answer("I would rather not." + END, tools=TOOLS, start="tools")
    assert (message.content, message.finish_reason) == ("I would rather not.", "stop")


def test_TOOL_15_auto_and_required_whole_and_streamed_agree():
    calls = block(("get_weather", PARIS), ("read", {"path": "x"}))
    auto = "Let me see." + calls + END
    required = calls.split("tool_calls>\n", 1)[1] + END
    results = []
    for text, start in ((auto, "content"), (required, "tools")):
        ids = tokenizer().encode(text, allow_special=True)
        for cuts in ((), range(1, len(ids))):
            results.append(read(ids, prompt_for(tools=TOOLS, start=start), cuts)[0])
    assert len({m.tool_calls for m in results}) == 1 and len(results[0].tool_calls) == 2
    assert [m.content for m in results] == ["Let me see."] * 2 + [""] * 2
    # Requests that run at the same time on one Chat share nothing.
    ids = tokenizer().encode(auto, allow_special=True)
    parsers = [Parser(tokenizer(), prompt_for(tools=TOOLS), call_id=lambda n: f"call_{n}") for _ in range(3)]
    for offset, parser in enumerate(parsers):
        parser.feed(ids[: 7 * (offset + 1)])
    for offset, parser in enumerate(parsers):
        parser.feed(ids[7 * (offset + 1) :])
    assert {p.close() for p in parsers} == {results[0]}


@pytest.mark.parametrize(
    "mark", ["‖DSML‖", "｜｜DSML｜｜", "||DSML||", "|DSML|", " | DSML | ", "｜｜DSML｜", "‖ DSML ‖"], ids=repr
)
def test_TOOL_16_other_bars_are_read_as_calls_when_they_fit(mark):
    text = "Looking." + block(("read", {"path": "a|b", "lines": 2})).replace("｜DSML｜", mark)
    message = answer(text + END, tools=TOOLS)
    assert (message.content, called(message)) == ("Looking.", [("read", {"path": "a|b", "lines": 2})])
    assert message.finish_reason == "tool_calls"
    # What fits no tool is given out as it is, and marked.
    prose = f"hello<{mark}tool_calls>world"
    message = answer(prose + END, tools=TOOLS)
    assert message.content == prose and message.malformed


def test_TOOL_16_a_quotation_spelled_letter_by_letter_stays_text():
    ids = tokenizer().encode(block(("read", {"path": "a"})))  # as a user's text would be encoded
    message = read([*ids, 1], prompt_for(tools=TOOLS))[0]
    assert "｜DSML｜" in message.content and message.malformed and not message.tool_calls


@pytest.mark.parametrize("after", ["", "</think>", "\n</think>\n"])
def test_TOOL_17_a_closed_block_within_the_thoughts_is_a_call(after):
    text = "I need the file." + block(("read", {"path": "a"})) + after + END
    message = answer(text, tools=TOOLS, start="reasoning")
    assert (message.reasoning, message.content) == ("I need the file.", "")
    assert called(message) == [("read", {"path": "a"})] and message.finish_reason == "tool_calls"


def test_TOOL_17_thoughts_that_end_first_win_and_drafts_stay_thoughts():
    message = answer("t</think>Answer" + block(("read", {"path": "a"})) + END, tools=TOOLS, start="reasoning")
    assert (message.reasoning, message.content, called(message)) == ("t", "Answer", [("read", {"path": "a"})])
    unclosed = block(("read", {"path": "a"})).removesuffix("</｜DSML｜tool_calls>")
    for draft in (block(("read", {"page": 1})), unclosed, '\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="read">\n'):
        message = answer("Maybe" + draft + "no.</think>Done." + END, tools=TOOLS, start="reasoning")
        assert (message.reasoning, message.content, message.tool_calls) == ("Maybe" + draft + "no.", "Done.", ())


def test_TOOL_17_a_block_that_the_end_of_the_thoughts_leaves_open_was_a_draft():
    draft = block(("read", {"path": "a"})).removesuffix("\n</｜DSML｜tool_calls>")
    message = answer("Maybe" + draft + "\n</think>Done." + END, tools=TOOLS, start="reasoning")
    assert (message.reasoning, message.content, message.tool_calls) == ("Maybe" + draft, "Done.", ())


# Thoughts and modes


def test_REAS_02_four_spellings_of_returned_thoughts_render_the_same():
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(PARIS)}}
    result = {"role": "tool", "tool_call_id": "c", "content": "18"}
    prompts = [
        chat().render(
            {
                "messages": [ASK, {"role": "assistant", "content": "", field: "R", "tool_calls": [call]}, result],
                "tools": OPENAI_TOOLS,
            }
        )
        for field in ("reasoning_content", "reasoning")
    ]
    use = {"type": "tool_use", "id": "c", "name": "get_weather", "input": PARIS}
    thought = {"type": "thinking", "thinking": "R", "signature": ""}
    answer = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "18"}]}
    described = [{"name": t["name"], "description": t["description"], "input_schema": t["parameters"]} for t in TOOLS]
    turns = [ASK, {"role": "assistant", "content": [thought, use]}, answer]
    prompts.append(chat().render({"messages": turns, "max_tokens": 9, "tools": described}, "messages"))
    for text in ({"summary": [], "content": [{"type": "reasoning_text", "text": "R"}]},
                 {"summary": [{"type": "summary_text", "text": "R"}]}):  # fmt: skip
        items = [ASK, {"type": "reasoning", **text}]
        items.append({"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": json.dumps(PARIS)})
        items.append({"type": "function_call_output", "call_id": "c", "output": "18"})
        prompts.append(chat().render({"input": items, "tools": RESPONSE_TOOLS}, "responses"))
    assert len({p.ids for p in prompts}) == 1
    assert "<think>R</think>" in prompts[0].text


def test_REAS_04_the_parser_starts_where_the_prompt_ends():
    for thinking, start in (("enabled", "reasoning"), ("disabled", "content")):
        prompt = chat().render({"messages": [ASK], "thinking": {"type": thinking}})
        assert prompt.start == start
        parser = chat().parser(prompt)
        parser.feed(tokenizer().encode("thought</think>answer" + END, allow_special=True))
        message = parser.close()
        assert (message.reasoning, message.content) == (
            ("thought", "answer") if start == "reasoning" else ("", "thoughtanswer")
        )
    final = {"role": "assistant", "content": "", "reasoning_content": "I think", "prefix": True}
    assert chat().render({"messages": [ASK, final]}).start == "reasoning"
    assert chat().render({"messages": [ASK, {**final, "content": "So"}]}).start == "content"


def test_REAS_04_half_a_character_before_the_closing_tag_stays_with_the_thoughts():
    tokens = tokenizer(NANO)
    ids = [tokens.encode("é")[0], tokens.id_of("</think>"), *tokens.encode("a"), 1]
    message = read(ids, prompt_for(start="reasoning"), range(1, len(ids)), NANO)[0]
    assert (message.reasoning, message.content) == ("\ufffd", "a")


ABSOLUTE, BEYOND = "Reasoning Effort: Absolute maximum", "Reasoning Effort: Beyond maximum"


@pytest.mark.parametrize(
    ("dialect", "effort", "text"),
    [
        ("preview", "low", ""),
        ("preview", "high", ""),
        ("preview", "max", ABSOLUTE),
        ("0731", "low", ""),
        ("0731", "high", ABSOLUTE),
        ("0731", "max", BEYOND),
    ],
)
def test_REAS_12_each_release_gets_its_own_effort_text(dialect, effort, text):
    prompt = chat(dialect).render({"messages": [ASK], "reasoning_effort": effort})
    assert prompt.text.removeprefix("<｜begin▁of▁sentence｜>").startswith(text or "<｜User｜>")
    assert prompt.effort == effort


def test_REAS_12_the_release_is_read_from_the_checkpoint_not_from_its_name(tmp_path):
    def dialect(name, files):
        home = tmp_path / name
        for file, text in files.items():
            (home / file).parent.mkdir(parents=True, exist_ok=True)
            (home / file).write_text(text, encoding="utf-8")
        return Chat(home, tokenizer=tokenizer()).dialect

    first, later = f'A = "{ABSOLUTE} with"', f'A = "{ABSOLUTE} with"\nB = "{BEYOND} —"'
    assert dialect("DeepSeek-V4-Flash-0731", {"encoding/encoding_dsv4.py": first}) == "preview"
    assert dialect("DeepSeek-V4-Flash", {"encoding/encoding_dsv4.py": later}) == "0731"
    assert dialect("a", {"config.json": '{"dspark_block_size": 7}'}) == "0731"
    assert dialect("b-0731", {"config.json": '{"dspark_block_size": null}'}) == "preview"
    assert dialect("c", {"config.json": "not json"}) == "preview"
    assert dialect("d", {"encoding/encoding_dsv4.py": first, "config.json": '{"dspark_block_size": 7}'}) == "preview"


@pytest.mark.parametrize("by_default", [True, False])
def test_REAS_13_the_default_mode_is_the_servers_and_a_request_overrides_it(by_default):
    server = chat(default_thinking=by_default)

    def thinks(protocol="chat_completions", **fields):
        key = "input" if protocol == "responses" else "messages"
        return server.render({key: [ASK], "max_tokens": 5, **fields}, protocol).thinking

    assert thinks() == thinks("messages") == thinks("responses") == by_default
    assert thinks(reasoning_effort="high") and not thinks(reasoning_effort="none")
    assert thinks(thinking={"type": "enabled"}) and not thinks(thinking={"type": "disabled"})
    for name in ("thinking", "enable_thinking"):
        assert thinks(chat_template_kwargs={name: True}) and not thinks(chat_template_kwargs={name: False})
    assert thinks("messages", thinking={"type": "enabled"}) and not thinks("messages", thinking={"type": "disabled"})
    assert thinks("messages", output_config={"effort": "high"})
    assert thinks("responses", reasoning={"effort": "low"}) and not thinks("responses", reasoning={"effort": "none"})


# Prompts


@pytest.mark.parametrize("home", [None, NANO], ids=["official", "nano"])
def test_ENC_02_each_run_of_text_between_control_tokens_is_encoded_whole(home):
    tokens = tokenizer(*[home] if home else [])
    server = chat(directory=home) if home else chat()
    body = {"messages": [{"role": "user", "content": ["Hel", "lo wor", "ld 12", "34 思", "考"]}], "tools": OPENAI_TOOLS}
    body["messages"][0]["content"] = [{"type": "text", "text": t} for t in body["messages"][0]["content"]]
    prompt = server.render({**body, "messages": [*body["messages"], {"role": "user", "content": "more"}]})
    control = "|".join(map(re.escape, sorted(tokens.control_tokens, key=len, reverse=True)))
    ids = []
    for run in re.split(f"({control})", prompt.text):
        ids += [tokens.id_of(run)] if run in tokens.control_tokens else tokens.encode(run)
    assert list(prompt.ids) == ids
    assert tokens.decode(prompt.ids) == prompt.text


def call(call_id, name="get_weather", arguments='{"city": "A"}'):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id, content):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


OFF = {"thinking": {"type": "disabled"}}


def test_ENC_03_results_stand_in_the_users_turn_in_the_order_of_the_calls():
    turn = {"role": "assistant", "content": "", "tool_calls": [call("a"), call("b")]}
    messages = [ASK, turn, result("b", "B"), result("a", "A"), {"role": "user", "content": "and?"}, ASK]
    text = chat().render({"messages": messages, "tools": OPENAI_TOOLS, **OFF}).text
    results = "<tool_result>A</tool_result>\n\n<tool_result>B</tool_result>"
    assert f"<｜User｜>{results}\n\nand?\n\nq<｜Assistant｜>" in text
    late = [ASK, turn, result("b", "B"), {"role": "system", "content": "now"}, result("a", "A")]
    assert f"<｜User｜>{results}<｜Assistant｜>" in chat().render({"messages": late, "tools": OPENAI_TOOLS, **OFF}).text


def test_ENC_04_earlier_thoughts_are_kept_with_tools_and_dropped_without():
    messages = [ASK, {"role": "assistant", "content": "A", "reasoning_content": "R"}, {"role": "user", "content": "B"}]
    assert "<think>R</think>A" in chat().render({"messages": messages, "tools": OPENAI_TOOLS}).text
    assert "<｜Assistant｜></think>A" in chat().render({"messages": messages}).text
    without = {"messages": messages, "tools": OPENAI_TOOLS, "tool_choice": "none"}
    assert "<｜Assistant｜></think>A" in chat().render(without).text
    kept = chat().render({"messages": messages, "chat_template_kwargs": {"drop_thinking": False}}).text
    assert "<think>R</think>A" in kept and "Tools" not in kept


def test_ENC_05_a_final_assistant_turn_is_followed_ended_or_continued_as_asked():
    final = {"role": "assistant", "content": "So", "reasoning_content": "R"}
    body = {"messages": [ASK, final]}
    tail = {k: chat().render({**body, **f}).text.split("<｜User｜>q")[1] for k, f in {
        "open": {"add_generation_prompt": True}, "default": {}, "none": {"add_generation_prompt": False},
        "continue": {"continue_final_message": True},
    }.items()}  # fmt: skip
    assert tail["open"] == tail["default"] == f"<｜Assistant｜></think>So{END}<｜Assistant｜><think>"
    assert tail["none"] == f"<｜Assistant｜><think>R</think>So{END}"
    assert tail["continue"] == "<｜Assistant｜><think>R</think>So"
    thought = {"role": "assistant", "content": "", "reasoning_content": "R"}
    prompt = chat().render({"messages": [ASK, thought], "continue_final_message": True})
    assert prompt.text.endswith("<｜Assistant｜><think>R") and (prompt.start, prompt.continues) == ("reasoning", True)
    for bad in ({"messages": [ASK]}, {**body, "add_generation_prompt": True}):
        with pytest.raises(InvalidRequest) as refused:
            chat().render({**bad, "continue_final_message": True})
        assert refused.value.status == 400
    cue = chat().render({"messages": [ASK], "add_generation_prompt": False}).text
    assert cue.endswith("<｜User｜>q")


def test_ENC_06_a_trailing_system_message_still_opens_the_answer():
    for last in ({"role": "system", "content": "12:00"}, {"role": "developer", "content": "12:00"}):
        prompt = chat().render({"messages": [ASK, last], **OFF})
        assert prompt.text.endswith("q<｜Assistant｜></think>") and "12:00" in prompt.text


@pytest.mark.parametrize("values", [{}, PARIS, {"city": 'a "b" \n</x>', "unit": None}, {"n": [1, {"x": 1e5}]}])
def test_ENC_10_replaying_a_call_changes_nothing(values):
    def render(arguments):
        turn = {"role": "assistant", "content": "", "tool_calls": [call("a", "read", arguments)]}
        body = {"messages": [ASK, turn, result("a", "ok")], "tools": OPENAI_TOOLS, **OFF}
        return chat().render(body).text

    first = render(values)
    assert render(json.dumps(values)) == first
    written = first[first.rindex("<｜Assistant｜></think>\n\n", 0, first.rindex("<tool_result>")) :]
    written = written.removeprefix("<｜Assistant｜></think>").split(END)[0]
    (replayed,) = answer(written + END, tools=None).tool_calls
    assert render(replayed.arguments) == first


@pytest.mark.parametrize("broken", ['{"city": "Par', "hello", "[1, 2]", "{'city': 1}", '"text"'])
def test_ENC_11_broken_arguments_in_the_history_do_not_wedge_the_session(broken):
    turn = {"role": "assistant", "content": "", "tool_calls": [call("a", "read", broken)]}
    body = {"messages": [ASK, turn, result("a", "ok")], "tools": OPENAI_TOOLS, **OFF}
    assert f'<｜DSML｜parameter name="arguments" string="true">{broken}</｜DSML｜parameter>' in chat().render(body).text


def test_ENC_12_calls_and_outputs_are_paired_wherever_they_stand():
    def item(n):
        return {"type": "function_call", "call_id": n, "name": "read", "arguments": '{"path": "p"}'}

    def output(n):
        return {"type": "function_call_output", "call_id": n, "output": "out " + n}

    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "R"}]}
    between = [ASK, item("a"), {"role": "developer", "content": "D"}, output("a")]
    text = chat().render({"input": between, "tools": RESPONSE_TOOLS}, "responses").text
    assert "<tool_result>out a</tool_result>" in text and "D" in text.split("out a")[1]
    shared = [ASK, thought, item("a"), item("b"), output("a"), output("b")]
    text = chat().render({"input": shared, "tools": RESPONSE_TOOLS}, "responses").text
    turn = text.split("<｜User｜>q<｜Assistant｜>")[1].split(END)[0]
    assert turn.startswith("<think>R</think>") and turn.count("<｜DSML｜invoke") == 2
    late = [ASK, thought, item("a"), item("b"), output("b"), ASK, output("a")]
    text = chat().render({"input": late, "tools": RESPONSE_TOOLS}, "responses").text
    assert "<tool_result>out a</tool_result>\n\n<tool_result>out b</tool_result>\n\nq" in text


def test_ENC_13_a_tool_turn_without_its_thoughts_is_rendered():
    items = [ASK, {"type": "function_call", "call_id": "a", "name": "read", "arguments": "{}"}]
    items.append({"type": "function_call_output", "call_id": "a", "output": "o"})
    text = chat().render({"input": items, "tools": RESPONSE_TOOLS}, "responses").text
    assert "<｜Assistant｜><think></think>\n\n<｜DSML｜tool_calls>" in text
    turn = {"role": "assistant", "content": None, "tool_calls": [call("a")]}
    body = {"messages": [ASK, turn, result("a", "o")], "tools": OPENAI_TOOLS}
    assert "<｜Assistant｜><think></think>\n\n<｜DSML｜tool_calls>" in chat().render(body).text


def test_ENC_14_a_stream_has_no_empty_piece_one_end_and_its_usage_last(noise_checkpoint):
    from pyrosome.chat.events import Done
    from pyrosome.llm import LLM
    from pyrosome.options import SamplingParams

    llm = LLM(noise_checkpoint)
    events = list(llm.chat_stream([ASK], "max", params=SamplingParams(max_tokens=12, seed=3)))
    assert [isinstance(e, Done) for e in events] == [False] * (len(events) - 1) + [True]
    assert all(getattr(e, "text", "x") for e in events)
    usage = events[-1].usage
    assert usage.completion_tokens == 12 and usage.reasoning_tokens <= 12
    assert usage.prompt_tokens == len(llm.chat_template.conversation([ASK], "max").ids)
    assert events[-1].message.finish_reason == "length"


def test_prompts_and_messages_are_plain_data():
    prompt = chat().render({"messages": [ASK], "tools": OPENAI_TOOLS, "tool_choice": "required"})
    assert pickle.loads(pickle.dumps(prompt)) == prompt
    assert (prompt.constraint.kind, prompt.constraint.after_reasoning) == ("tool_call_required", True)
    assert {t.name for t in prompt.tools} == {WEATHER["name"], READ["name"]}
    message = answer(block(("read", {"path": "a"})), tools=TOOLS)
    assert pickle.loads(pickle.dumps(message)) == message
    assert invoke(("read", {})).count("invoke") == 2
