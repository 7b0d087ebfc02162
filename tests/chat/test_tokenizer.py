"""Text to ids and back, against the official tokenizer's golden cases and the library's own decoding."""

import json
import random

import pytest
import tokenizers

from pyrosome.chat import Tokenizer
from pyrosome.errors import CheckpointError
from tests.chat.cases import NANO, OFFICIAL, golden, tokenizer

CASES = golden("tokenizer")
CONTROL = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜end▁of▁sentence｜>", "<dsml:"]


@pytest.mark.parametrize("case", CASES, ids=[c["id"] for c in CASES])
def test_ids_and_text_are_the_official_ones(case):
    tokens = tokenizer()
    assert tokens.encode(case["text"], allow_special=True) == case["ids"]
    assert tokens.decode(case["ids"]) == case["decoded_keep_special"]


@pytest.mark.parametrize("home", [OFFICIAL, NANO], ids=["official", "nano"])
def test_any_ids_decode_as_the_library_decodes_them(home):
    library = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json"))
    tokens, rng = tokenizer(home), random.Random(5)
    assert tokens.vocab_size == library.get_vocab_size(with_added_tokens=True)
    control = list(tokens.control_tokens.values())
    for _ in range(2000):
        ids = [rng.choice(control) if rng.random() < 0.2 else rng.randrange(tokens.vocab_size) for _ in range(9)]
        ids = ids[: rng.randrange(10)]
        assert tokens.decode(ids) == library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("home", [OFFICIAL, NANO], ids=["official", "nano"])
@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_are_such_only_where_a_template_says_so(home, token):
    tokens = tokenizer(home)
    number = tokens.id_of(token)
    text = f"a {token} b"
    assert number in tokens.encode(text, allow_special=True)
    plain = tokens.encode(text)
    assert not set(plain) & set(tokens.control_tokens.values())
    assert tokens.decode(plain) == text
    spans = [(2, 2 + len(token))]
    assert tokens.encode_spans(text, spans) == [*tokens.encode("a "), number, *tokens.encode(" b")]
    with pytest.raises(CheckpointError, match="has no token 'a '"):
        tokens.encode_spans(text, [(0, 2)])


@pytest.mark.parametrize("home", [OFFICIAL, NANO], ids=["official", "nano"])
def test_every_text_comes_back(home):
    tokens = tokenizer(home)
    for text in ("", "\n\n\t x", "思考 ☀️ שלום", "\x00\x1b\ufeff", "👩‍👩‍👧‍👦", "｜｜DSML", "e\u0301 é", "12345 ١٢٣"):
        assert tokens.decode(tokens.encode(text)) == text
    assert tokens.decode(tokens.encode("a\ud800b")) == "a?b"
    assert tokens.token_bytes(-1) == tokens.token_bytes(10**9) == b""


def test_nano_is_byte_level_with_ids_of_its_own():
    tokens = tokenizer(NANO)
    assert len(tokens.encode("é思")) == 5
    assert tokens.id_of("<｜User｜>") != tokenizer().id_of("<｜User｜>") == 128803
    assert tokens.id_of("no such token") is None


def rewritten(tmp_path, change):
    values = json.loads((NANO / "tokenizer.json").read_text(encoding="utf-8"))
    values = change(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return tmp_path


def test_the_order_of_the_files_parts_does_not_matter(tmp_path):
    home = rewritten(tmp_path, lambda v: {"model": v["model"], **{k: v[k] for k in v if k != "model"}})
    again, tokens = Tokenizer.from_dir(home), tokenizer(NANO)
    assert again.control_tokens == tokens.control_tokens
    text = "a<think>b｜DSML｜"
    assert again.encode(text, allow_special=True) == tokens.encode(text, allow_special=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: [], "not a usable tokenizer"),
        (lambda v: {**v, "model": {"type": "nothing"}}, "not a usable tokenizer"),
        (lambda v: {**v, "added_tokens": [{"id": 1}]}, "not a usable tokenizer"),
        (lambda v: {**v, "decoder": None}, "ByteLevel one"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, says):
    with pytest.raises(CheckpointError, match=says):
        Tokenizer.from_dir(rewritten(tmp_path, change))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="looked for"):
        Tokenizer.from_dir(tmp_path)
