"""Every family: what it asks, what is right, how long it is, and that it says no to what it does not know."""

import random
import re

import pytest

from pyrosome import tasks
from pyrosome.errors import RequestError
from pyrosome.tasks import make
from pyrosome.tasks.heldout import is_held_out
from pyrosome.tasks.sums import steps_of
from pyrosome.tasks.words import COMMANDS, FILLER, NAMES, ORDINALS, VALUES

THINKING = ("ledger", "ordinal", "several", "sums", "tool", "dialogue")
FACT = re.compile(r"(\w+) (\d\d) ;")


def samples(kind, num=200, length=128, heldout=False, **knobs):
    rng = random.Random(7)
    return [tasks.make(kind, rng, length, heldout, **knobs) for _ in range(num)]


def document(sample):
    return sample.messages[0]["content"].split("\n")[0]


def test_words_are_plain_and_no_word_has_two_parts_to_play():
    words = [*NAMES, *FILLER, *ORDINALS, *COMMANDS]
    assert len(NAMES) == 192 and len(FILLER) >= 100 and tuple(map(str, range(10, 100))) == VALUES
    assert len(words) == len(set(words))
    assert all(re.fullmatch("[a-z]+", w) for w in words)


@pytest.mark.parametrize("kind", tasks.GENERATORS)
@pytest.mark.parametrize("heldout", [False, True])
def test_the_same_seed_gives_the_same_samples_and_another_seed_others(kind, heldout):
    first, again, other = (
        [tasks.make(kind, rng, 96, heldout) for _ in range(5)] for rng in map(random.Random, (1, 1, 2))
    )
    assert first == again != other
    assert {s.kind for s in first} == {kind}


def test_records_answer_what_the_document_says_and_ask_each_fact_once():
    for sample in samples("records"):
        asked = [sample.text[a:b] for a, b in sample.answers]
        body, *questions = sample.text.split(" ?")
        facts = dict(FACT.findall(body))
        words = body.split()
        names = sample.about["names"]
        assert questions == [f" {n}{v} ;" for n, v in zip(names, asked, strict=True)]
        assert [f" {facts[n]}" for n in names] == asked
        assert len(set(names)) == len(names) == len(facts) == sample.about["num_facts"]
        assert [words[p] for p in sample.about["positions"]] == list(names)
        assert (sample.about["name"], sample.about["expected"]) == (names[-1], asked[-1].strip())


def test_records_ask_as_often_as_told_and_at_most_32_times():
    assert {len(s.answers) for s in samples("records", facts=8, asks=3)} == {3}
    assert {len(s.answers) for s in samples("records", facts=2, asks=5)} == {2}
    assert {len(s.answers) for s in samples("records", 5, length=1024, facts=100)} == {32}


@pytest.mark.parametrize("thinking", ["off", "high", "max"])
def test_a_ledger_is_asked_for_several_facts_each_once(thinking):
    for sample in samples("ledger", asks=3, facts=(3, 9), thinking=thinking):
        facts, words = dict(FACT.findall(document(sample))), document(sample).split()
        questions = [m["content"].split("\n")[-1] for m in sample.messages[::2]]
        names = [q.removeprefix("? ") for q in questions]
        assert len(set(names)) == 3 and tuple(names) == sample.about["names"]
        assert [m["content"] for m in sample.messages[1::2]] == [facts[n] for n in names]
        assert [words[p] for p in sample.about["positions"]] == names
        assert sample.about["expected"] == facts[names[-1]] and sample.about["num_facts"] == len(facts)
        for name, message in zip(names, sample.messages[1::2], strict=True):
            assert message.get("reasoning_content") == (None if thinking == "off" else f"{name} {facts[name]}")


@pytest.mark.parametrize("heldout", [False, True])
def test_ordinals_count_in_the_order_of_the_document(heldout):
    seen = set()
    for sample in samples("ordinal", heldout=heldout):
        _, nth, name = sample.messages[0]["content"].split("\n")[1].split()
        values = [v for n, v in FACT.findall(document(sample)) if n == name]
        assert 2 <= len(values) <= 4 and len(set(values)) == len(values)
        assert sample.messages[1]["content"] == values[ORDINALS.index(nth)] == sample.about["expected"]
        at = sample.about["position"]
        assert document(sample).split()[at : at + 2] == [name, sample.about["expected"]]
        seen.add(nth)
    assert seen == set(ORDINALS)


@pytest.mark.parametrize("heldout", [False, True])
def test_several_values_come_all_and_in_order(heldout):
    for sample in samples("several", heldout=heldout):
        _, word, name = sample.messages[0]["content"].split("\n")[1].split()
        values = [v for n, v in FACT.findall(document(sample)) if n == name]
        assert word == "all" and 2 <= len(values) <= 4
        assert sample.messages[1]["content"] == " ".join(values) == sample.about["expected"]


def test_copies_and_quotes_are_the_passage_itself():
    sizes = set()
    for sample in samples("copy"):
        passage = sample.messages[1]["content"]
        assert sample.messages[0]["content"] == f"copy : {passage}" and sample.about["expected"] == passage
        sizes.add(len(passage.split()))
    assert min(sizes) == 3 and max(sizes) == 24
    assert {len(s.about["expected"].split()) for s in samples("copy", words=5)} == {5}
    for sample in samples("quote"):
        before, passage, _ = document(sample).split('"')
        assert sample.messages[1]["content"] == passage.strip() == sample.about["expected"]
        assert sample.about["position"] == len(before.split()) + 1
        assert sample.messages[0]["content"].endswith("\n? quote")


@pytest.mark.parametrize("heldout", [False, True])
def test_sums_are_right_and_so_is_each_step(heldout):
    ops = set()
    for sample in samples("sums", 500, heldout=heldout, thinking="high", asks=2):
        for question, message in zip(sample.messages[::2], sample.messages[1::2], strict=True):
            a, op, b = question["content"].split()
            assert int(message["content"]) == (int(a) + int(b) if op == "+" else int(a) - int(b))
            steps = [s.split(" = ") for s in message["reasoning_content"].split(" ; ")]
            for left, right in steps:
                x, step, y = left.split()
                assert int(right) == (int(x) + int(y) if step == "+" else int(x) - int(y))
                assert step == op and all(0 <= int(n) <= 99 for n in (x, y, right))
            assert steps[-1][1] == message["content"]
            ops.add(op)
    assert ops == {"+", "-"}


@pytest.mark.parametrize("terms", [3, 5])
@pytest.mark.parametrize("heldout", [False, True])
def test_longer_sums_go_from_left_to_right(terms, heldout):
    for sample in samples("sums", 200, heldout=heldout, thinking="high", terms=terms):
        question, message = sample.messages
        parts = question["content"].split()
        assert len(parts) == 2 * terms - 1 and is_held_out(*parts) == heldout
        value, ways = int(parts[0]), []
        for op, number in zip(parts[1::2], parts[2::2], strict=True):
            ways.append(steps_of(value, op, int(number)))
            value += int(number) if op == "+" else -int(number)
            assert 0 <= value <= 99
        assert message["content"] == str(value) and message["reasoning_content"] == " ; ".join(ways)


@pytest.mark.parametrize("terms", [1, 9, 2.0, True])
def test_a_sum_of_so_many_numbers_is_refused(terms):
    with pytest.raises(RequestError, match=f"terms = {terms!r} .* from 2 to 8"):
        make("sums", random.Random(0), 40, terms=terms)


def test_the_tool_is_called_for_names_and_for_nothing_else():
    called = 0
    for sample in samples("tool", 400, thinking="high"):
        assert [t["function"]["name"] for t in sample.tools] == ["lookup"]
        question = sample.messages[0]["content"]
        if question.startswith("look up "):
            called += 1
            name = question.removeprefix("look up ")
            (call,) = sample.messages[1]["tool_calls"]
            assert call["function"] == {"name": "lookup", "arguments": f'{{"name": "{name}"}}'}
            assert sample.messages[2]["content"] == sample.messages[3]["content"] == sample.about["expected"]
            assert sample.about["calls"] and sample.messages[3]["reasoning_content"]
        else:
            assert len(sample.messages) == 2 and not sample.about["calls"]
            assert sample.messages[1]["content"] == sample.about["expected"]
    assert 240 < called < 360
    assert all(s.about["calls"] for s in samples("tool", direct=0))
    assert not any(s.about["calls"] for s in samples("tool", direct=1))


def test_dialogue_answers_follow_their_questions():
    answers = {s.about["question"]: s.messages[1]["content"] for s in samples("dialogue", 3000)}
    assert answers["hello"] == "hello ! ask me about a ledger ."
    for question, answer in answers.items():
        word, *rest = question.split()
        if word == "say":
            assert answer.split() == rest[:1] * (2 if rest[-1] == "twice" else 1)
        elif question.startswith("count to "):
            assert answer == " ".join(str(n) for n in range(1, int(rest[-1]) + 1))
        elif question.startswith("count from "):
            assert answer == " ".join(str(n) for n in range(int(rest[1]), int(rest[3]) + 1))
        elif question.startswith("what is "):
            assert int(answer) - int(rest[-1]) == (1 if "after" in question else -1)
        elif word in ("first", "last"):
            assert answer == rest[1:][0 if word == "first" else -1]
        elif word == "turn":
            assert answer.split() == rest[1:][::-1]
    starts = {q.split()[0] for q in answers}
    assert starts >= {"hello", "who", "thank", "say", "count", "what", "large", "first", "last", "turn"}


@pytest.mark.parametrize("thinking", ["off", "high", "max"])
@pytest.mark.parametrize("kind", THINKING)
def test_every_answer_is_given_as_the_mode_has_it(kind, thinking):
    for sample in samples(kind, 40, thinking=thinking):
        answers = [m for m in sample.messages if m["role"] == "assistant"]
        assert sample.thinking == thinking
        assert all(bool(m.get("reasoning_content")) == (thinking != "off") for m in answers)


@pytest.mark.parametrize("length", [64, 100, 256, 1024])
@pytest.mark.parametrize("kind", ["records", "ledger", "ordinal", "several", "quote"])
def test_documents_fill_the_length_by_words(kind, length):
    for sample in samples(kind, 60, length):
        text = sample.text or " ".join(f"_ _ {m['content']}" for m in sample.messages)  # a role and a cue each
        assert abs(len(re.findall(r"\S+|\n", text)) + 2 - length) <= max(2, length // 10)


@pytest.mark.parametrize("kind", tasks.GENERATORS)
@pytest.mark.parametrize("length", [1, 8, 20])
def test_too_short_a_length_gives_the_least_that_works(kind, length):
    for sample in samples(kind, 30, length):
        assert sample.about["expected"] and len(sample.text.split()) < 60


@pytest.mark.parametrize("kind", ["records", "ledger"])
def test_facts_asked_for_by_number_are_all_there(kind):
    for num in (1, 2, 64, 192):
        assert {s.about["num_facts"] for s in samples(kind, 3, 64, facts=num)} == {num}
    found = {s.about["num_facts"] for s in samples(kind, 200, 256, facts=(3, 5))}
    assert found == {3, 4, 5}


def test_facts_stand_anywhere_in_a_document():
    places = [s.about["positions"][0] for s in samples("records", 400, 200, facts=4, asks=1)]
    quarters = [sum(48 * q <= p < 48 * (q + 1) for p in places) for q in range(4)]
    assert all(60 < n < 140 for n in quarters)
    for first in (s.text.split()[0] for s in samples("records", 100, 64, facts=7)):
        assert first in NAMES or first in FILLER


@pytest.mark.parametrize(
    ("kind", "knobs", "says"),
    [
        ("needle", {}, "the task 'needle' was asked for; there are records, ledger"),
        ("records", {"fact": 3}, "records was asked for with fact; its knobs are facts, asks"),
        ("records", {"facts": 0}, "facts = 0 was asked for; it is a whole number from 1 to 192"),
        ("records", {"facts": 193}, "from 1 to 192"),
        ("records", {"facts": (5, 2)}, "a number or a range"),
        ("records", {"facts": (1, 500)}, "from 1 to 192"),
        ("records", {"facts": "many"}, "a number or a range"),
        ("records", {"asks": 0}, "asks = 0"),
        ("ledger", {"thinking": "low"}, "thinking 'low' was asked for; there are 'off', 'high', 'max'"),
        ("ledger", {"asks": 33}, "asks = 33"),
        ("copy", {"words": 2}, "from 3 to 24"),
        ("copy", {"words": (9, 4)}, "from 3 to 24"),
        ("copy", {"words": "few"}, "from 3 to 24"),
        ("tool", {"direct": 2}, "a share from 0 to 1"),
        ("tool", {"direct": "often"}, "a share from 0 to 1"),
    ],
)
def test_what_is_not_known_is_refused_by_name(kind, knobs, says):
    with pytest.raises(RequestError, match=re.escape(says)):
        tasks.make(kind, random.Random(0), 64, **knobs)


def test_a_length_is_a_number_of_tokens():
    with pytest.raises(RequestError, match="length 0"):
        tasks.make("records", random.Random(0), 0)
