"""`pyrosome ask`: what is asked, what is told of the answer, and where in the document it came from.

The model is a stand-in with a tokenizer of the synthetic tasks; the last test asks the built-in one.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest
import typer

from pyrosome.chat import Chat, Tokenizer
from pyrosome.chat.events import ContentDelta, Done, Message, ReasoningDelta, Usage
from pyrosome.cli.ask import ask
from pyrosome.cli.document import Document, Located
from pyrosome.engine import looks as engine_looks
from pyrosome.engine.looks import Look
from pyrosome.errors import ContextTooLong, RequestError
from pyrosome.tasks.sample import user
from pyrosome.testing import make_ledger
from pyrosome.train.tokenizer import save_tokenizer, task_words, template_texts, train_tokenizer

TEXT = "the river wood falcon 37 ;\nroad hill field\n\nheron 41 ; rain\n"
JOINED = "the river wood falcon 37 ; road hill field heron 41 ; rain"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer((), 1280, task_words(1280), template_texts()), path)
    return path


class FakeLLM:
    """Answers by rule, and remembers what it was given."""

    context, ratios, failure = 4000, (0, 4, 128, 4), None
    directory = asked = None

    def __init__(self, name, numerics="trained", kv_format=None, *, options=None, progress=None, **held):
        config = SimpleNamespace(
            max_position_embeddings=self.context, layer_ratios=self.ratios, index_topk=16, vocab_size=1280
        )
        self.model = SimpleNamespace(config=config, numerics=numerics, kv_format=kv_format or "fp8")
        self.chat_template = Chat(self.directory)
        self.tokenizer = self.chat_template.tokenizer
        self.engine, self.num_closed = None, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.num_closed += 1

    def request(self, prompt, params):
        type(self).asked = (prompt, params)
        return prompt

    def answer(self, prompt, request):
        if self.failure:
            raise self.failure
        if prompt.thinking:
            yield ReasoningDelta("falcon 37")
        yield ContentDelta("3")
        if "slow" in prompt.text:
            signal.raise_signal(signal.SIGINT)
            yield ContentDelta(" so")
            raise AssertionError("it was to stop")
        yield ContentDelta("7")
        said = 3 if prompt.thinking else 1
        yield Done(Message("", "37", (), "stop"), Usage(len(prompt.ids), said, said - 1))


@pytest.fixture
def model(monkeypatch, directory):
    """The class that stands in for `LLM`; a test may change it."""
    stand_in = type("LLM", (FakeLLM,), {"directory": directory})
    module = ModuleType("pyrosome.llm")
    module.LLM = stand_in
    monkeypatch.setitem(sys.modules, "pyrosome.llm", module)
    monkeypatch.setattr(engine_looks, "looks", lambda *_: [])
    return stand_in


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def told(capsys, *args, **kwargs) -> dict:
    ask(*args, as_json=True, **kwargs)
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    return json.loads(out)


# The document.


@pytest.mark.parametrize(("join", "text"), [(None, TEXT.rstrip("\n")), (False, TEXT.rstrip("\n")), (True, JOINED)])
def test_a_document_is_asked_about_as_it_is_or_with_its_lines_joined(file, join, text):
    assert Document.read(file, join).text == text


@pytest.mark.parametrize("join", [False, True])
def test_the_line_of_a_place_is_that_of_the_file(file, join):
    document = Document.read(file, join)
    expected = {"the": 1, "37 ;": 1, "road": 2, "field": 2, "heron": 4, "rain": 4}
    for words, line in expected.items():
        at = document.text.index(words)
        assert document.lines(at, at + len(words)) == (line, line)
        assert document.lines(max(0, at - 1), at + len(words)) == (line, line), "the blank before is no other line"
    assert document.lines(0, len(document.text)) == (1, 4)
    at = document.text.index("field")
    assert document.lines(at - 5, at + 11) == (2, 4)


def test_joining_and_counting_agree_with_any_white_space():
    text = " \ta\r\n\u00a0b  c\n\n\x0c d \n"
    document = Document.of("x", text, join=True)
    assert document.text == "a b c d"
    assert [document.lines(at, at + 1)[0] for at in (0, 2, 4, 6)] == [1, 2, 2, 4]


@pytest.mark.parametrize("think", ["off", "high", "max"])
def test_the_tokens_of_a_document_are_found_in_the_prompt(directory, think):
    chat = Chat(directory)
    document = Document.of("x", "the 深海 river é falcon 37 ;", join=False)
    content = f"{document.text}\n? falcon"
    prompt = chat.conversation([user(content)], think)
    found = Located(document, prompt.text, prompt.text.rindex(content), prompt.ids, chat.tokenizer.token_bytes)
    inside = [prompt.ids[i] for i in found.tokens]
    assert chat.tokenizer.decode(inside) == document.text
    at = prompt.ids.index(chat.tokenizer.encode(" 37")[0])
    assert found.characters(at, at) == (document.text.index(" 37"), document.text.index(" ;"))
    assert (found.excerpt(at - 1, at + 1), found.lines(at, at)) == ("falcon 37 ;", (1, 1))
    # Beyond the document's end there is nothing to show.
    assert found.excerpt(found.tokens.start, len(prompt.ids) - 1) == document.text


def test_a_token_shared_with_what_follows_belongs_to_the_document():
    document = Document.of("x", "ab", join=False)
    pieces = [b"<", b"a", b"b\n", b"q"]
    found = Located(document, "<ab\nq", 1, range(4), lambda i: pieces[i])
    assert (found.tokens, found.characters(2, 3)) == (range(1, 3), (1, 2))


def test_an_excerpt_is_one_harmless_line_and_not_long():
    document = Document.of("x", "a\x1b[31m\n\tb " + "word " * 100 + "end", join=False)
    found = Located(document, document.text, 0, [0], lambda _: document.text.encode())
    shown = found.excerpt(0, 0)
    assert shown.startswith("a·[31m b word") and shown.endswith("word end") and " ... " in shown and len(shown) <= 120


def test_a_document_comes_from_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\r\ntwo\n")))
    assert Document.read("-") == Document("standard input", "one\ntwo")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (None, "does not exist in"),
        (b"", r"is empty \(0 bytes\)"),
        (b" \n\n", r"is empty \(3 bytes\)"),
        (b"caf\xe9 au", r"is not UTF-8 text \(byte 0xe9 at 3\)"),
        (b"ab\0c", "zero byte at 2"),
        ("folder", "is a directory"),
    ],
    ids=str,
)
def test_what_is_no_document_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path, raw, said):
    monkeypatch.setitem(sys.modules, "pyrosome.llm", None)
    path = tmp_path / "x"
    if raw == "folder":
        path.mkdir()
    elif raw is not None:
        path.write_bytes(raw)
    with pytest.raises(RequestError, match=said):
        ask(str(path), "?")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"question": " \n"}, "the question is empty"),
        ({"think": "low"}, "'low' is no way of thinking; there are off, high, max"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"cache_gib": 0.0}, "--cache-gib is 0"),
        ({"document": "builtin:other"}, "built in are builtin:ledger"),
    ],
    ids=str,
)
def test_a_flag_out_of_its_range_is_refused_before_a_model_is_loaded(monkeypatch, file, changes, said):
    monkeypatch.setitem(sys.modules, "pyrosome.llm", None)
    with pytest.raises(RequestError, match=said):
        ask(**{"document": file, "question": "?", **changes})


# What is asked.


def test_the_prompt_is_the_document_a_line_break_and_the_question_and_the_choice_is_greedy(model, capsys, file):
    report = told(capsys, file, "? falcon", model="some")
    prompt, params = model.asked
    assert prompt == Chat(model.directory).conversation([user(TEXT.rstrip("\n") + "\n? falcon")], "off")
    assert (params.temperature, params.top_p, params.max_tokens) == (0.0, 1.0, 4000 - len(prompt.ids))
    assert report["document_tokens"] + 7 == report["prompt_tokens"] == len(prompt.ids)


def test_flags_reach_the_prompt_and_the_sampling(model, capsys, file):
    told(capsys, file, "?", think="max", max_tokens=9, temperature=0.5, top_p=0.9, seed=3, join_lines=True)
    prompt, params = model.asked
    assert prompt.effort == "max" and f"{JOINED}\n?<" in prompt.text
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (9, 0.5, 0.9, 3)


def test_the_built_in_model_stops_though_it_never_says_that_it_is_done(model, capsys, file):
    told(capsys, file, "?")
    assert model.asked[1].max_tokens == 256


# What is told.


def test_the_answer_goes_to_standard_output_and_all_else_to_standard_error(model, capsys, file):
    ask(file, "? falcon", think="high")
    out, err = capsys.readouterr()
    assert out == "37\n"
    assert f"{file}: " in err and " with the question; first token after 0.0" in err and "(stop)" in err


@pytest.mark.parametrize(("think", "said", "later"), [("off", 1, 1), ("high", 3, 3)])
def test_json_has_the_message_its_tokens_and_its_times(model, capsys, file, think, said, later):
    report = told(capsys, file, "? falcon", think=think)
    assert report["message"]["content"] == "37" and report["finish_reason"] == "stop"
    assert report["message"].get("reasoning_content") == ("falcon 37" if think == "high" else None)
    assert report["usage"]["completion_tokens"] == said and report["decode_tokens"] == later
    assert report["first_token_s"] >= 0 and report["prefill_tokens_per_s"] > 0


def found_in(directory, word: str, layer: int, score: float):
    """A look of the prompt's last token at three tokens, the first of them `word`."""

    def find(ids):
        at = ids.index(Tokenizer.from_dir(directory).encode(word)[0])
        return Look(layer, len(ids) - 1, at, at + 2, score, None)

    return find


def test_it_says_where_in_the_document_the_indexers_looked(monkeypatch, model, capsys, file):
    heron, falcon = (
        found_in(str(model.directory), w, layer, s) for w, layer, s in ((" 41", 3, 1.0), (" falcon", 1, 9.0))
    )
    given = []

    def looks(llm, ids, last):
        given.append((len(ids), last))
        here = [heron(ids), falcon(ids), falcon(ids)._replace(layer=3, score=5.0)]
        # The question itself has the best row of all, and is no part of the document.
        return [*here, Look(1, len(ids) - 1, len(ids) - 4, len(ids) - 1, 99.0, None)]

    monkeypatch.setattr(engine_looks, "looks", looks)
    report = told(capsys, file, "? falcon", join_lines=True)
    assert given == [(report["prompt_tokens"], 5)], "a line break, two words of the question, and two of the template"
    first, second = report["looked"]
    ids = model.asked[0].ids
    place = ids.index(ids[-3]) - 1  # the token of the question, in a document that begins after two, counted from 1
    assert first == {
        "tokens": [place, place + 2], "lines": [1, 1], "text": "falcon 37 ;", "first_in_layers": 2, "first_for": 2,
        "score": 9.0,
    }  # fmt: skip
    assert (second["text"], second["lines"], second["first_for"]) == ("41 ; rain", [4, 4], 0)
    assert (report["indexers"], report["asked_by"], report["topk"]) == (2, 10, 16)

    ask(file, "? falcon", join_lines=True)
    err = capsys.readouterr().err
    assert f"    tokens {place}-{place + 2}, line 1, ranked first by 2 of 2 layers, 2 of 10 times:\n" in err
    assert "        falcon 37 ;\n" in err and "indexers of 2 layers looked, for the last 5 tokens" in err


def test_where_nothing_can_be_said_of_looks_that_is_said(monkeypatch, model, capsys, file):
    ask(file, "?")
    assert "No compressed row reaches into a document so short" in capsys.readouterr().err
    model.ratios = (0, 128)
    ask(file, "?")
    assert "This model has no indexer" in capsys.readouterr().err
    ask(file, "?", looked=False)
    assert "indexer" not in capsys.readouterr().err
    assert "looked" not in told(capsys, file, "?", looked=False)


# How it ends.


def test_ctrl_c_ends_the_answer_with_what_there_is_and_status_130(monkeypatch, model, capsys, file):
    monkeypatch.setattr(engine_looks, "looks", None)
    with pytest.raises(typer.Exit) as ended:
        ask(file, "slow", as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert (ended.value.exit_code, report["message"]["content"], report["finish_reason"]) == (
        130,
        "3 so",
        "interrupted",
    )
    assert "looked" not in report


def test_ctrl_c_while_it_looks_leaves_the_answer(monkeypatch, model, capsys, file):
    def looks(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_looks, "looks", looks)
    with pytest.raises(typer.Exit) as ended:
        ask(file, "?")
    out, err = capsys.readouterr()
    assert (ended.value.exit_code, out) == (130, "37\n") and "(stop)" in err


def test_a_document_longer_than_the_context_is_refused_with_both_numbers(model, file):
    model.context = 14
    with pytest.raises(ContextTooLong, match=r"^\d+ tokens were asked for and the context holds 14; ask about a part"):
        ask(file, "?")
    model.context = 0
    with pytest.raises(RequestError, match="has 59 bytes, too long for a context of 0 tokens"):
        ask(file, "?")


def test_a_document_longer_than_the_cache_is_refused_with_what_to_do(model, capsys, file):
    model.failure = ContextTooLong(20, 16, "shorten the prompt")
    with pytest.raises(ContextTooLong, match=r"20 tokens .* holds 16; .* --cache-gib"):
        ask(file, "?")
    assert capsys.readouterr().out == ""


# What is shipped.


def test_the_shipped_document_is_made_again_byte_for_byte():
    assert make_ledger.HOME.read_bytes() == make_ledger.ledger_text().encode()


def test_the_shipped_document_is_a_ledger_as_a_model_is_trained_on(directory):
    text, facts = make_ledger.ledger_text(), make_ledger.facts()
    lines = text.split("\n")
    assert lines.pop() == "" and all(50 < len(line) <= 100 and line == " ".join(line.split()) for line in lines[:-1])
    assert len(facts) == len(dict(facts)) == 24
    for name, value in facts:
        assert sum(line.count(f"{name} {value} ;") for line in lines) == 1, "in one line, and once"
    document = Document.read("builtin:ledger")
    assert document.is_joined and document.text == " ".join(lines)
    ids = Tokenizer.from_dir(directory).encode(document.text)
    assert 9000 <= len(ids) <= 10000
    assert len(ids) - 9499 == len(Tokenizer.from_dir(directory).encode("waited")), "a word after a space is a token"
    where = [document.text.index(f"{n} {v} ;") / len(document.text) for n, v in facts]
    assert min(where) < 0.15 and max(where) > 0.85


def test_a_file_beside_the_built_in_models_is_not_taken_for_one():
    from pyrosome.checkpoint.index import open_checkpoint
    from pyrosome.errors import CheckpointError

    with pytest.raises(CheckpointError, match="built in are builtin:nano") as refused:
        open_checkpoint("builtin:ledger")
    assert str(refused.value).count("ledger") == 1


def test_the_built_in_model_is_asked_and_says_where_it_looked(capsys, tmp_path):
    path = tmp_path / "part.txt"
    path.write_text("\n".join(make_ledger.ledger_text().split("\n")[:4]), encoding="utf-8")
    report = told(capsys, str(path), "? falcon", max_tokens=4, join_lines=True)
    assert report["finish_reason"] in ("stop", "length") and 1 <= len(report["looked"]) <= 3
    text = Document.read(str(path), True).text
    for place in report["looked"]:
        assert all(part in text for part in place["text"].split(" ... "))
        assert 1 <= place["lines"][0] <= place["lines"][1] <= 4
        assert 1 <= place["tokens"][0] <= place["tokens"][1] <= report["document_tokens"]
    assert sum(place["first_for"] for place in report["looked"]) >= 1
