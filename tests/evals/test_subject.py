"""Many answers from one engine for each job: in order, as a client would have them, with what became of drafts."""

from __future__ import annotations

import gc

import pytest

from pyrosome.errors import ContextTooLong, EngineError, RequestError
from pyrosome.evals.ablate import ABLATIONS
from pyrosome.evals.shares import Share
from pyrosome.evals.subject import Answer, Subject, acceptance
from pyrosome.llm import LLM
from pyrosome.model.deepseek_v4 import Indexer
from pyrosome.options import SamplingParams
from tests.evals.subjects import CALL, Oracle, checkpoint

PROMPTS = [[0, *range(20 + i, 200 + 9 * i)] for i in range(12)]
TOOL = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def subject():
    with Subject(checkpoint(), numerics="exact") as one:
        yield one


def test_answers_are_those_of_an_llm_in_order(subject):
    with LLM(checkpoint(), numerics="exact", drafter="off") as llm:
        expected = llm.generate(PROMPTS, SamplingParams(max_tokens=6, temperature=0))
    with subject.opened(400):
        assert subject.options.max_sequences < len(PROMPTS)
        found = list(subject.answers(PROMPTS, 6))
    assert [a.message.content for a in found] == [o.text for o in expected]
    assert len({a.message.content for a in found}) > 1


def test_every_step_has_one_draft(subject):
    with subject.opened(400):
        (answer,) = subject.answers(PROMPTS[:1], 8)
        drafted = subject.stats().drafted
    # The first token comes with the prompt, each later one from a step that checks a draft, unless one stayed.
    assert drafted == (answer.drafted,) and answer.drafted == 7 - answer.accepted
    assert acceptance([answer, answer]) == Share(2 * answer.accepted, 2 * answer.drafted)


@pytest.mark.parametrize("reuse", [False, True])
def test_prompts_share_what_is_computed_only_where_they_may(subject, reuse):
    with subject.opened(400, reuse=reuse):
        texts = [a.message.content for a in subject.answers([PROMPTS[3]] * 10, 4)]
        assert (subject.stats().reused_tokens > 0) == reuse
    assert len(set(texts)) == 1


def test_a_job_takes_the_memory_it_needs_and_is_gone_afterwards(subject):
    with subject.opened(1000):
        pool = subject.model.engine(subject.options).runner.pool
        assert pool.plan.num_pages[4] >= subject.options.max_sequences * 1000 // 4 // 64
        assert subject.options.cache_bytes < 32 << 20 and subject.options.snapshot_bytes == 0
        next(subject.answers(PROMPTS, 4))
        assert "engine" in subject.__dict__
    assert "engine" not in subject.__dict__
    with subject.opened(4096):
        assert subject.options.max_sequences == 8 and subject.options.max_context == 4096


def test_answers_given_up_are_computed_no_further(subject):
    with subject.opened(400):
        answers = subject.answers(PROMPTS, 150)
        next(answers)
        answers.close()
        while subject.stats().running:
            pass
        assert subject.stats().ended_by_reason["abort"] > 0


@pytest.mark.parametrize("kind", ABLATIONS)
def test_an_ablation_holds_while_the_job_is_open(subject, kind):
    (indexer,) = (m for m in subject.model.network.modules() if isinstance(m, Indexer))
    topk = indexer.topk
    with subject.opened(400, ablation=kind):
        first = [a.message.content for a in subject.answers(PROMPTS, 6)]
        assert [a.message.content for a in subject.answers(PROMPTS, 6)] == first
        assert (indexer.topk != topk) == (kind in ("dense", "half"))
    assert indexer.topk == topk


def test_a_dense_job_takes_smaller_steps():
    oracle = Oracle(str, index_topk=16)
    assert oracle._options(1 << 20, True, False).step_tokens == 128
    assert oracle._options(1 << 20, False, False).step_tokens == oracle._options(256, True, False).step_tokens == 2048


def test_no_job_is_longer_than_the_model(subject):
    with pytest.raises(ContextTooLong, match="5000 tokens were asked for and the context holds 4096"):
        subject.opened(5000).__enter__()
    with pytest.raises(RequestError, match="ablation 'no'"):
        subject.opened(500, ablation="no").__enter__()
    assert "engine" not in subject.__dict__


def test_a_failure_is_no_wrong_answer(subject, monkeypatch):
    with subject.opened(400):
        monkeypatch.setattr(type(subject.model.network), "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            list(subject.answers(PROMPTS[:2], 4))
    gc.collect()


def test_conversations_are_read_as_a_client_would():
    oracle = Oracle(lambda _: "falcon 37</think>37" + CALL.format(tool="lookup", key="name", value="x") + "and more")
    prompts = [
        oracle.chat_template.conversation([{"role": "user", "content": "hello"}], m, [TOOL]) for m in ("high", "off")
    ]
    thought, direct = oracle.answers(prompts, 200)
    assert thought.message.reasoning == "falcon 37" and thought.thought_tokens == 2 and thought.message.content == "37"
    assert [c.name for c in thought.message.tool_calls] == ["lookup"]
    assert thought.message.finish_reason == "tool_calls"
    assert "text after the tool calls was dropped" not in thought.message.malformed  # no client would wait for it
    assert direct.thought_tokens == 0 and (direct.drafted, direct.accepted) == (4, 3)
    (cut,) = oracle.answers(prompts[:1], 2)
    assert cut.message.finish_reason == "length" and cut.message.content == ""
    assert [r.constraint is None for _, r in oracle.asked] == [False, False, False]
    list(oracle.answers(prompts[:1], 2, constraint=None))
    assert oracle.asked[-1][1].constraint is None
    assert all(r.params.temperature == 0 for _, r in oracle.asked)


def test_plain_text_is_given_as_it_comes():
    (answer,) = Oracle(lambda p: p[-2:] + " 37 ;").answers([[0, *Oracle(str).tokenizer.encode("a falcon")]], 2)
    assert answer.message.content.startswith("on") and answer.message.finish_reason == "length"


def test_a_model_without_drafts_has_none():
    assert acceptance([Answer(None)]) == Share(0, 0)
