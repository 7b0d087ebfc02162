"""What the shipped model does on what it has never seen: weights, tokenizer, chat and engine fit together.

Bounds are far below what was measured (docs/models.md): they are missed when something breaks, not by chance.
"""

import random

import pytest

from pyrosome.cli.document import Document
from pyrosome.engine.looks import looks, places
from pyrosome.evals.ablate import ablated
from pyrosome.evals.subject import Subject, acceptance
from pyrosome.llm import LLM
from pyrosome.options import SamplingParams
from pyrosome.tasks import make
from pyrosome.testing import make_ledger

SHORT, LONG = SamplingParams(max_tokens=4, temperature=0), SamplingParams(max_tokens=96, temperature=0)


@pytest.fixture(scope="module")
def llm():
    with LLM("builtin:nano", cache_bytes=256 << 20) as one:
        yield one


@pytest.fixture(scope="module")
def ledger():
    return Document.read("builtin:ledger", True).text


def said(llm, sample, thinking, params=LONG):
    return llm.chat(sample.messages[:1], thinking, list(sample.tools) or None, params).content.strip()


def test_every_fact_of_the_shipped_ledger_is_found_and_the_indexer_looked_there(llm, ledger):
    facts = make_ledger.facts()
    found = looked = 0
    for name, value in facts:
        message = {"role": "user", "content": f"{ledger}\n? {name}"}
        right = llm.chat([message], "off", params=SHORT).content.strip() == value
        found += right
        if right and looked < 6:
            prompt = llm.chat_template.conversation([message], "off")
            best = places(looks(llm.model, prompt.ids), range(2, len(prompt.ids) - 8))[:6]
            texts = [llm.tokenizer.decode(prompt.ids[p.first : p.last + 1]) for p in best]
            assert any(f"{name} {value}" in text for text in texts), texts
            looked += 1
    assert len(facts) == 24 and found >= 22 and looked == 6


def test_it_finds_them_through_compressed_rows_alone(ledger):
    """Without those rows nothing beyond the window is known."""
    with LLM("builtin:nano", cache_bytes=128 << 20) as llm, ablated(llm.model.network, "window"):
        right = [
            llm.chat([{"role": "user", "content": f"{ledger}\n? {name}"}], "off", params=SHORT).content.strip() == value
            for name, value in make_ledger.facts()[:6]
        ]
    assert sum(right) <= 1


def test_thinking_pays_where_a_sum_has_three_numbers(llm):
    rng = random.Random("builtin")
    asked = [make("sums", rng, 40, heldout=True, terms=3) for _ in range(32)]
    high, off = (sum(said(llm, s, mode) == s.about["expected"] for s in asked) for mode in ("high", "off"))
    assert high >= 26 and high - off >= 8


def test_it_calls_its_tool_and_answers_by_the_result(llm):
    rng, right = random.Random("builtin"), 0
    asked = [s for s in (make("tool", rng, 400, heldout=True) for _ in range(60)) if s.about["calls"]][:12]
    for sample in asked:
        tools = list(sample.tools)
        message = llm.chat(sample.messages[:1], "off", tools, LONG)
        name, result = sample.messages[0]["content"].removeprefix("look up "), sample.messages[2]["content"]
        if [(c.name, c.arguments) for c in message.tool_calls] == [("lookup", f'{{"name": "{name}"}}')]:
            right += llm.chat(sample.messages[:3], "off", tools, LONG).content.strip() == result
    assert len(asked) == 12 and right >= 9


def test_its_first_drafts_are_mostly_right():
    rng = random.Random("drafts")
    asked = [make("sums", rng, 40, heldout=True) for _ in range(8)]
    with Subject("builtin:nano") as subject, subject.opened(512):  # drafts at every step, whatever a draft costs here
        prompts = [subject.chat_template.conversation(s.messages[:1], "high") for s in asked]
        found = acceptance(subject.answers(prompts, 96))
    assert found.n >= 40 and found.hits / found.n >= 0.6
