"""Prompts as the reference code in the checkpoint makes them, both dialects."""

import pytest

from pyrosome.chat import InvalidRequest
from tests.chat.cases import END, chat, golden
from tests.chat.exceptions import REFERENCE

CASES = golden("reference_encode")
RAW = 'parameter name="arguments" string="true">'


def body_of(messages, kwargs, effort=None):
    """A reference case in the words of the API."""
    thinks = kwargs.get("thinking_mode") == "thinking"
    body = {"messages": [], "thinking": {"type": "enabled" if thinks else "disabled"}}
    body["reasoning_effort"] = effort or kwargs.get("reasoning_effort")
    body["chat_template_kwargs"] = {"drop_thinking": kwargs.get("drop_thinking", True)}
    for message in messages:
        message = {"content": "", **message}
        body["tools"] = [*body.get("tools", []), *message.pop("tools", [])]
        if "response_format" in message:
            schema = {"name": "reply", "schema": message.pop("response_format")}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        message["prefix"] = message.pop("wo_eos", False)
        body["messages"].append(message)
    # The reference opens the assistant's turn after a turn of the user's only.
    body["add_generation_prompt"] = messages[-1]["role"] in ("user", "tool", "developer")
    if messages[-1].get("wo_eos"):
        del body["add_generation_prompt"]
    return {k: v for k, v in body.items() if v not in (None, [])}


def rendered(dialect, case, effort=None):
    kwargs = case["kwargs"]
    context = kwargs.get("context") or []
    text = chat(dialect).render(body_of(context + case["messages"], kwargs, effort)).text
    if context:  # only what is new is wanted
        new = case["expected_prompt"]
        assert text.endswith(new)
        try:
            before = chat(dialect).render({**body_of(context, kwargs), "add_generation_prompt": False}).text
        except InvalidRequest:  # it ends in calls whose results are what is new
            before = text.removesuffix(new)
            assert before.endswith(END)
        return text.removeprefix(before)
    if kwargs.get("add_default_bos_token") is False:
        return text.removeprefix("<｜begin▁of▁sentence｜>")
    return text


def agrees(case):
    try:
        if "expected_error" in case:  # the reference code crashes: its raw text is one parameter instead
            return RAW in rendered("preview", case)
        return rendered("preview", case) == case["expected_prompt"] and all(
            rendered("0731", case, effort) == text for effort, text in case.get("expected_prompt_0731", {}).items()
        )
    except (InvalidRequest, AssertionError):
        return False


def test_prompts_differ_from_the_reference_exactly_where_listed():
    assert {c["id"] for c in CASES if not agrees(c)} == set(REFERENCE)


@pytest.mark.parametrize("case", [c for c in CASES if "tokens" in c], ids=lambda c: c["id"])
def test_ids_of_a_plain_prompt_are_those_of_the_whole_string(case):
    """Where no text spells a control token, encoding it piece by piece changes nothing."""
    if case["id"] in REFERENCE or case["category"] in ("hostile", "context") or case["kwargs"].get("context"):
        return
    kwargs = case["kwargs"]
    prompt = chat("preview").render(body_of(case["messages"], kwargs))
    skip = kwargs.get("add_default_bos_token") is False
    assert len(prompt.ids) - skip == case["tokens"]["count"]
    assert list(prompt.ids)[skip:] == case["tokens"].get("ids", list(prompt.ids)[skip:])
