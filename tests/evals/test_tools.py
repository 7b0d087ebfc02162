"""Tool calls: what counts as made, well formed and right, and the exchange after them."""

from __future__ import annotations

import re

import pytest

from pyrosome.chat import Message, ToolCall
from pyrosome.errors import RequestError
from pyrosome.evals.subject import Subject
from pyrosome.evals.tools import judged, questions, tools
from pyrosome.tasks.heldout import KEPT
from pyrosome.tasks.words import NAMES
from tests.evals.subjects import CALL, Oracle, checkpoint
from tests.evals.test_modes import result
from tests.evals.test_recall import After


def knows(prompt: str) -> str:
    if found := re.search(r"<tool_result>(\d\d)</tool_result>", prompt):
        return found[1]
    if found := re.search(r"look up (\w+)<", prompt):
        return CALL.format(tool="lookup", key="name", value=found[1])
    return str(result(prompt))


def sample(name="falcon"):
    return next(s for s in questions(192, 0, calls=True) if s.about["name"] == name)


def message(*calls, finish="tool_calls", malformed=()):
    return Message("", "", tuple(ToolCall(f"c{i}", *c) for i, c in enumerate(calls)), finish, None, malformed)


GOOD = ("lookup", '{"name": "falcon"}')


@pytest.mark.parametrize(
    ("answer", "made", "well_formed", "right"),
    [
        (message(GOOD), True, True, True),
        (message(("lookup", '{"name": "otter"}')), True, True, False),
        (message(GOOD, GOOD), True, True, False),
        (message(("look", '{"name": "falcon"}')), True, False, False),
        (message(("lookup", '{"value": "falcon"}')), True, False, False),
        (message(("lookup", '{"name": 3}')), True, False, False),
        (message(("lookup", '{"name": "falcon", "more": 1}')), True, False, False),
        (message(("lookup", "{}")), True, False, False),
        (message(("lookup", '["falcon"]')), True, False, False),
        (message(("lookup", '{"name": "fal')), True, False, False),
        (message(GOOD, finish="length"), True, False, False),
        (message(GOOD, malformed=("an invoke tag was not closed",)), True, False, False),
        (message(finish="stop"), False, False, False),
    ],
    ids=str,
)
def test_what_counts(answer, made, well_formed, right):
    found = judged(sample(), answer)
    assert (found.is_made, found.is_well_formed, found.is_right) == (made, well_formed, right)


def test_each_name_is_looked_up_once_and_sums_need_no_tool():
    names = [s.about["name"] for s in questions(192, 0, calls=True)]
    assert set(names) == set(NAMES) and len(names) == 192
    assert all(s.about["expected"] in KEPT[s.about["name"]] for s in questions(192, 0, calls=True))
    sums = [s.messages[0]["content"] for s in questions(200, 0, calls=False)]
    assert len(set(sums)) == 200 and all(re.fullmatch(r"\d+ [+-] \d+", q) for q in sums)
    assert questions(9, 1, calls=True) == questions(9, 1, calls=True) != questions(9, 2, calls=True)


def test_one_who_knows_is_right_in_everything():
    oracle = Oracle(knows)
    found = tools(oracle, 6)
    assert [r["manner"] for r in found["results"]] == ["free", "grammar"]
    for r in found["results"]:
        shares = [r[k] for k in r if k not in ("manner", "drafts")]
        assert [s["share"] for s in shares] == [1] * 7 and all(s["n"] == 6 for s in shares)
        assert r["drafts"]["n"] == 18 * 4
    asked = [(r.constraint is not None, "<tool_result>" in p) for p, r in oracle.asked]
    assert asked == [(False, False)] * 12 + [(False, True)] * 6 + [(True, False)] * 12 + [(True, True)] * 6
    assert all("lookup" in p for p, _ in oracle.asked)  # declared, also where it is not needed


def test_each_kind_of_error_has_its_own_figure():
    def errs(prompt):
        name = (re.findall(r"look up (\w+)<", prompt) or [""])[-1]
        if "<tool_result>" in prompt:
            return "no" if name == "otter" else knows(prompt)
        if name == "badger":
            return "it is 37"
        if name == "heron":
            return CALL.format(tool="lookup", key="bird", value="heron")
        if name == "raven":
            return CALL.format(tool="lookup", key="name", value="hawk")
        if not name and "+" in prompt:
            return CALL.format(tool="lookup", key="name", value="falcon")
        return knows(prompt) if name else "1000"

    r = tools(Oracle(errs), 192)["results"][0]
    counts = {k: (r[k]["hits"], r[k]["n"]) for k in r if k not in ("manner", "drafts")}
    plus = sum("+" in s.messages[0]["content"] for s in questions(192, 0, calls=False))
    assert counts == {
        "called": (191, 192), "well_formed": (190, 191), "right": (189, 192), "answer_right": (188, 189),
        "exchange_right": (188, 192), "direct_without_call": (192 - plus, 192), "direct_right": (0, 192),
    }  # fmt: skip


def test_thinking_is_as_asked_and_kept_in_the_exchange():
    def rule(prompt):
        return f"falcon</think>{knows(prompt.replace('<think>', '</think>'))}" if prompt.endswith("<think>") else "no"

    oracle = Oracle(rule)
    found = tools(oracle, 3, thinking="high")
    assert found["thinking"] == "high" and found["results"][0]["exchange_right"]["share"] == 1
    assert sum("<think>falcon</think>" in p for p, _ in oracle.asked) == 6


def test_what_is_stopped_has_what_was_asked_until_then():
    (free,) = tools(Oracle(knows), 5, watch=After(3))["results"]
    assert free["right"]["n"] == 3 and free["direct_right"]["n"] == 0 and free["exchange_right"]["n"] == 0
    (free,) = tools(Oracle(knows), 5, watch=After(12))["results"]
    assert free["direct_right"]["n"] == 5 and free["exchange_right"] == free["answer_right"]
    assert free["exchange_right"]["n"] == 2
    assert len(tools(Oracle(knows), 5, watch=After(16))["results"]) == 2


def test_refusals():
    with pytest.raises(RequestError, match="193 look-ups were asked for and there are 192 held out"):
        tools(Oracle(knows), 193)
    with pytest.raises(RequestError, match="thinking 'deep'"):
        tools(Oracle(knows), 3, thinking="deep")
    with pytest.raises(RequestError, match=r"100000 questions that need no tool.*there are 1\d\d\d held out"):
        questions(100_000, 0, calls=False)


def test_a_real_network_is_asked_and_its_grammar_holds():
    with Subject(checkpoint(), numerics="exact") as subject:
        free, bound = tools(subject, 3, max_tokens=10)["results"]
    for found in (free, bound):
        assert found["right"]["n"] == found["direct_right"]["n"] == 3
