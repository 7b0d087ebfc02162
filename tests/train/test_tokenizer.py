"""Tokenizers trained here: the size asked for, the words asked for, any text and back, the same bytes every time."""

import json
import random

import pytest
import tokenizers

from pyrosome.chat import Chat, Tokenizer
from pyrosome.errors import RequestError
from pyrosome.tasks.words import COMMANDS, FILLER, NAMES, ORDINALS
from pyrosome.train.tokenizer import (
    BYTES,
    CONTROL,
    FIRST,
    MIN_VOCAB,
    save_tokenizer,
    task_words,
    template_texts,
    train_tokenizer,
)  # fmt: skip

TEXTS = ["def value(self):\n    return self.value\n" * 20, "The value of a name, and the name of a value.\n" * 20]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    def make(vocab_size):
        path = tmp_path_factory.mktemp(f"tokenizer{vocab_size}")
        save_tokenizer(train_tokenizer(TEXTS, vocab_size, task_words(vocab_size), template_texts()), path)
        return path

    return {size: make(size) for size in (1024, 1280)}


@pytest.mark.parametrize("size", [1024, 1280])
def test_ids_have_their_places(trained, size):
    tokens = Tokenizer.from_dir(trained[size])
    library = tokenizers.Tokenizer.from_file(str(trained[size] / "tokenizer.json"))
    assert tokens.vocab_size == library.get_vocab_size() == size
    assert [tokens.id_of(t) for t in FIRST] == [0, 1, 2]
    assert [tokens.id_of(t) for t in CONTROL] == list(range(size - len(CONTROL), size))
    assert {tokens.token_bytes(i) for i in range(3, 3 + len(BYTES))} == {bytes([b]) for b in range(256)}
    assert len({tokens.token_bytes(i) for i in range(size)}) == size


@pytest.mark.parametrize("size", [1024, 1280])
def test_every_word_of_the_tasks_is_one_token(trained, size):
    tokens = Tokenizer.from_dir(trained[size])
    words = [f" {w}" for w in (*NAMES, *FILLER, *ORDINALS, *COMMANDS)]
    words += [f"{space}{n}" for n in range(100) for space in ("", " ")]
    words += [" ;", " ?", "?", "+", " +", "-", " -", "=", " =", ":", " :", ' "', " .", " ,", " !"]
    words += NAMES if size == 1280 else []
    assert [w for w in words if len(tokens.encode(w)) != 1] == []
    text = "".join(words[:300])
    assert [tokens.decode([i]) for i in tokens.encode(text)] == words[:300]


def test_names_stand_alone_only_where_there_is_room_for_text_too():
    assert set(task_words(1280)) - set(task_words(1024)) == set(NAMES)
    assert set(task_words(1024)) < set(task_words(1280))


def test_numbers_are_read_in_pairs_of_digits(trained):
    tokens = Tokenizer.from_dir(trained[1280])
    assert [tokens.decode([i]) for i in tokens.encode("1234 567 8")] == ["12", "34", " 56", "7", " 8"]


@pytest.mark.parametrize("size", [MIN_VOCAB, 1024, 1280])
def test_any_text_comes_back(trained, tmp_path, size):
    if size == MIN_VOCAB:
        save_tokenizer(train_tokenizer([], size, []), tmp_path)
    tokens, rng = Tokenizer.from_dir(trained.get(size, tmp_path)), random.Random(3)
    alphabet = [*" \n\t;?a9é€😀\u200b\x00", "falcon", " otter", " 37", "  ", *CONTROL[:24], *FIRST]
    for _ in range(1000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(12)))
        ids = tokens.encode(text)
        assert tokens.decode(ids) == text
        assert not set(ids) & set(tokens.control_tokens.values())
        whole = tokens.encode(text, allow_special=True)
        assert tokens.decode(whole) == text


@pytest.mark.parametrize("token", [*FIRST, *CONTROL])
def test_text_that_spells_a_control_token_is_not_one(trained, token):
    tokens = Tokenizer.from_dir(trained[1024])
    for text in (token, f" {token}", f"a{token}b"):
        assert tokens.id_of(token) not in tokens.encode(text)
    assert tokens.encode(token, allow_special=True) == [tokens.id_of(token)]


@pytest.mark.parametrize("size", [MIN_VOCAB + 7, 1024, 3000])
def test_the_size_is_met_and_the_bytes_are_the_same_every_time(tmp_path, size):
    words = task_words(size) if size > 1000 else [" falcon", " 37"]
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_tokenizer(train_tokenizer(iter(TEXTS), size, words, template_texts()), tmp_path / name, 4096)
        files.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    assert sorted(files[0]) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads(files[0]["tokenizer_config.json"])["model_max_length"] == 4096
    assert Tokenizer.from_dir(tmp_path / "one").vocab_size == size


def test_the_room_left_goes_to_what_the_text_is_made_of(tmp_path):
    sizes = []
    for room in (0, 8, 40):
        save_tokenizer(train_tokenizer(TEXTS, MIN_VOCAB + room, []), tmp_path)
        sizes.append(len(Tokenizer.from_dir(tmp_path).encode(TEXTS[0])))
    assert sizes[0] == len(TEXTS[0]) and sizes[0] > 1.4 * sizes[1] > 2 * sizes[2]


def test_no_id_is_wasted_where_there_is_text_enough(tmp_path):
    words = [" value", "value", " of", "self"]  # which the text would give too
    save_tokenizer(train_tokenizer(TEXTS, MIN_VOCAB + 14, words), tmp_path)
    assert not [t for t in Tokenizer.from_dir(tmp_path).control_tokens if "holder" in t]


def test_what_templates_say_again_and_again_becomes_short(tmp_path):
    rare = "Zygote quorum"
    sizes = []
    for templates in ((), (rare,)):
        save_tokenizer(train_tokenizer(TEXTS, MIN_VOCAB + 40, [], templates), tmp_path)
        sizes.append(len(Tokenizer.from_dir(tmp_path).encode(rare)))
    assert sizes[0] > 8 and sizes[1] == 2


def test_the_templates_are_what_the_chat_encoding_adds(trained):
    chat = Chat(trained[1024])
    texts = template_texts()
    assert any("Available Tool Schemas" in t and '"lookup"' in t for t in texts)
    assert any("Absolute maximum" in t for t in texts)
    question = [{"role": "user", "content": "x"}]
    assert texts[-1] in chat.conversation(question, "max").text
    assert not any(c in t for t in texts for c in (*FIRST, *CONTROL))


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(RequestError, match=f"a vocabulary of 400 tokens was asked for; .* need {MIN_VOCAB + 520}"):
        train_tokenizer([], 400, [f" {'a' * n}" for n in range(1, 521)])


def test_a_word_that_is_two_pieces_is_refused():
    with pytest.raises(RequestError, match=r"'two words' was to be one token; it is cut into 2 pieces"):
        train_tokenizer([], 1024, ["two words"])
