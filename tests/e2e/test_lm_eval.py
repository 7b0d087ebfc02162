"""lm-eval against the server, by the commands of docs/clients.md; its scores are those of the model itself."""

from __future__ import annotations

import json
import random
import shlex

import pytest
import torch

from pyrosome import LLM, SamplingParams
from pyrosome.tasks import make
from tests.e2e.clients import PYTHON, environment, ran
from tests.e2e.page import URL, blocks
from tests.server.scripted import TOKENIZER

pytestmark = pytest.mark.clients
NUM_SAMPLES = 24

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
{more}
"""
CHOICE = 'doc_to_choice: "{{choices}}"\nmetric_list:\n  - metric: acc\n'
SAID = "generation_kwargs:\n  until: ['\\n\\n']\nmetric_list:\n  - metric: exact_match\n"


@pytest.fixture(scope="module")
def llm():
    with LLM("builtin:nano") as found:
        yield found


def recall():
    """Questions with choices.  In every third one the document is not there, so that not all can be right."""
    rng = random.Random(5)
    found = []
    for n in range(NUM_SAMPLES):
        sample = make("records", rng, 200, True, facts=4, asks=1)
        context = sample.text[: sample.answers[0][0]]
        choices = [f" {sample.about['expected']}", *(f" {v}" for v in rng.sample(range(10, 100), 3))]
        rng.shuffle(choices)
        question = context if n % 3 else context[context.rindex(" ? ") :]
        answer = choices.index(f" {sample.about['expected']}")
        found.append({"question": question, "choices": choices, "answer": answer})
    return found


def said():
    """Questions about a document that is there, or, in every third one, is not."""
    rng = random.Random(6)
    samples = [make("ledger", rng, 160, True, facts=3) for _ in range(NUM_SAMPLES)]
    texts = [s.messages[0]["content"] if n % 3 else f"? {s.about['name']}" for n, s in enumerate(samples)]
    return [{"question": t, "answer": s.about["expected"]} for t, s in zip(texts, samples, strict=True)]


def evaluated(number, name, task, samples, url, outside, folder):
    """What the page's command makes of the samples: its results, and what it wrote of each."""
    (folder / f"{name}.yaml").write_text(task)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    line = blocks("lm-eval", "sh")[number].replace(URL, url).replace("\\\n", "")
    command = [PYTHON.parent / shlex.split(line)[0], *shlex.split(line)[1:], "--output_path", "out", "--log_samples"]
    done = ran(command, environment(folder, outside, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1"), folder)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(next(folder.glob("out/**/results_*.json")).read_text())
    lines = next(folder.glob("out/**/samples_*.jsonl")).read_text().splitlines()
    written = sorted((json.loads(line) for line in lines), key=lambda s: s["doc_id"])
    assert len(written) == len(samples)
    return results["results"][name], written


def log_probability(llm, context: str, continuation: str) -> float:
    """Of a continuation behind its context, by the model's own logits."""
    ids, num_context = TOKENIZER.encode(context + continuation), len(TOKENIZER.encode(context))
    logs_TV = torch.log_softmax(llm.model.logits(ids[:-1]).double(), -1)
    return sum(float(logs_TV[at - 1, ids[at]]) for at in range(num_context, len(ids)))


def test_log_probabilities_and_accuracy_are_those_of_the_model(llm, model_server, outside, tmp_path):
    samples = recall()
    task = TASK.format(name="recall", kind="multiple_choice", more=CHOICE)
    results, written = evaluated(0, "recall", task, samples, model_server.url, outside, tmp_path)
    right = 0
    for sample, one in zip(samples, written, strict=True):
        ours = [log_probability(llm, sample["question"], choice) for choice in sample["choices"]]
        theirs = [float(answers[0][0]) for answers in one["resps"]]
        assert theirs == pytest.approx(ours, abs=1e-3)
        right += ours.index(max(ours)) == sample["answer"]
    assert 0 < right < NUM_SAMPLES, "all or none right would say nothing"
    assert results["acc,none"] == pytest.approx(right / NUM_SAMPLES)


def test_answers_and_exact_match_are_those_of_the_model(llm, model_server, outside, tmp_path):
    samples = said()
    task = TASK.format(name="said", kind="generate_until", more=SAID)
    results, written = evaluated(1, "said", task, samples, model_server.url, outside, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=256)
    answers = [llm.chat([{"role": "user", "content": s["question"]}], "off", params=params).content for s in samples]
    assert [one["resps"][0][0] for one in written] == answers
    right = sum(a == s["answer"] for a, s in zip(answers, samples, strict=True))
    assert 0 < right < NUM_SAMPLES, "all or none right would say nothing"
    assert results["exact_match,none"] == pytest.approx(right / NUM_SAMPLES)
