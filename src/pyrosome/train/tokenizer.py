"""Tokenizers in the official format, small enough for small networks: byte-level BPE with the official control tokens.

Ids: beginning, end and padding first; then one per byte, what was learnt, and the words asked for; control tokens last.
A word asked for needs no merges: a piece of text that is in the vocabulary is one token (`ignore_merges`).
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from pyrosome.chat.chat import Chat
from pyrosome.errors import RequestError
from pyrosome.tasks.tool import LOOKUP
from pyrosome.tasks.words import COMMANDS, FILLER, NAMES, ORDINALS, VALUES

# Strings of the official tokenizer's control tokens; ids are each tokenizer's own.
FIRST = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
CONTROL = (
    "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>", "<|EOT|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>", "<｜begin▁of▁repo▁name｜>", "<｜end▁of▁repo▁name｜>", "<｜begin▁of▁file▁name｜>",
    "<｜end▁of▁file▁name｜>", "<｜begin▁of▁file｜>", "<｜end▁of▁file｜>", "<think>", "</think>", "｜DSML｜",
    "<｜begin▁sys｜>", "<｜end▁sys｜>", "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>",
    "<｜domain｜>", "<｜task｜>", "<｜title｜>", "<｜answer｜>", "<｜search｜>", "<dsml:", "</dsml:",
    "<｜search▁begin｜>", "<｜search▁end｜>", "<｜extracted_url｜>", "<｜read_url｜>",
)  # fmt: skip
BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
MIN_VOCAB = len(FIRST) + len(BYTES) + len(CONTROL)

# Numbers of one or two digits, words, and runs of punctuation, each with the space before it; other white space.
_PIECES = r" ?\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUNCTUATION = ';?!.,:+-="'
_OPENINGS = ("copy", "look", "say", "count")  # what questions begin with
_MIN_LEARNT = 128  # ids that task_words leaves to what is learnt from text
_TEMPLATE_SHARE = 6  # what templates count for, as one part in so many of the text


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, words: Sequence[str], templates: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """A tokenizer of exactly `vocab_size` ids; the same arguments give the same bytes.

    Args:
        words: each becomes one token, with the leading space it is given with or without one.
        templates: texts that will be met again and again; they weigh a sixth of what `texts` do.

    Raises:
        RequestError: `vocab_size` has no room for bytes, control tokens and `words`, or a word is not one piece.
    """
    pre_tokenizer = _pre_tokenizer()
    asked = [p for p in dict.fromkeys(_piece(pre_tokenizer, w) for w in words) if len(p) > 1]
    room = vocab_size - MIN_VOCAB - len(asked)
    if room < 0:
        raise RequestError(
            f"a vocabulary of {vocab_size} tokens was asked for; {len(asked)} words, {len(BYTES)} bytes and "
            f"{len(FIRST) + len(CONTROL)} control tokens need {vocab_size - room}: ask for more tokens or fewer words"
        )
    counts = _counted(pre_tokenizer, texts)
    often = _counted(pre_tokenizer, templates)
    weight = max(1, counts.total() // (_TEMPLATE_SHARE * max(1, often.total())))
    for piece, count in often.items():
        counts[piece] += weight * count
    for piece in asked:
        counts.pop(piece, None)
    learnt, merges = _learnt(counts, room, set(asked))
    return _assembled([*learnt, *asked], merges, vocab_size, pre_tokenizer)


def task_words(vocab_size: int) -> list[str]:
    """What is one token for the synthetic tasks: their words with a leading space, and all numbers to 99.

    Names without a leading space too (tool calls and copies begin with one), if enough room for other text is left.
    """
    words = [f" {w}" for w in (*NAMES, *FILLER, *ORDINALS, *COMMANDS, *_PUNCTUATION)]
    words += [*(f" {n}" for n in range(100)), *VALUES, *_OPENINGS]
    room = vocab_size - MIN_VOCAB - len(dict.fromkeys(words))
    return [*words, *NAMES] if room >= len(NAMES) + _MIN_LEARNT else words


def template_texts(tools: Sequence[dict[str, Any]] = (LOOKUP,)) -> list[str]:
    """What the chat encoding adds to conversations with `tools` and to those of the highest effort."""
    with tempfile.TemporaryDirectory() as directory:
        save_tokenizer(train_tokenizer((), MIN_VOCAB, ()), Path(directory))
        chat = Chat(directory)
    question: dict[str, Any] = {"role": "user", "content": ""}
    calls = [{"type": "function", "function": {"name": t["function"]["name"], "arguments": "{}"}} for t in tools]
    results = [{"role": "tool", "content": ""} for _ in tools]
    used = [question, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
    texts: list[str] = []
    for prompt in (chat.conversation(used, "off", tools), chat.conversation([question], "max")):
        control = set(chat.tokenizer.control_tokens.values())
        run: list[int] = []
        for token in prompt.ids:  # the last is a control token
            if token not in control:
                run.append(token)
            elif run:
                texts.append(chat.tokenizer.decode(run))
                run = []
    return texts


def save_tokenizer(tokenizer: tokenizers.Tokenizer, directory: Path, max_context: int = 1 << 20) -> None:
    """Write `tokenizer.json` and the two configuration files that go with it; `max_context` in tokens."""
    tokenizer.save(str(directory / "tokenizer.json"))
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": {**token, "content": FIRST[0]},
        "eos_token": {**token, "content": FIRST[1]},
        "pad_token": {**token, "content": FIRST[1]},
        "model_max_length": max_context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
    for name, values in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pre_tokenizer() -> Any:
    split = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _piece(pre_tokenizer: Any, word: str) -> str:
    pieces = [p for p, _ in pre_tokenizer.pre_tokenize_str(word)]
    if len(pieces) != 1:
        raise RequestError(f"the word {word!r} was to be one token; it is cut into {len(pieces)} pieces before that")
    return str(pieces[0])


def _counted(pre_tokenizer: Any, texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(p for p, _ in pre_tokenizer.pre_tokenize_str(text))
    return counts


def _learnt(counts: Counter[str], room: int, asked: set[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """At most `room` new tokens beside those `asked` for, and the merges that make the first half of them.

    The other half are whole pieces, those that save the most tokens: unlike merges they need no tokens on the way.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=len(BYTES) + room - room // 2, initial_alphabet=list(BYTES), show_progress=False
    )
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Split("\n", "removed")  # stands for a byte itself, so never in a piece
    longer = sorted(p for p in counts if len(p) > 1)
    trained.train_from_iterator(("\n".join([p] * counts[p]) for p in longer), trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [(a, b) for a, b in model["merges"]]
    tokens = [t for t in dict.fromkeys(a + b for a, b in merges) if t not in asked]
    saved = {p: counts[p] * (len(trained.encode(p).ids) - 1) for p in longer}
    whole = sorted((p for p in longer if saved[p] > 0), key=lambda p: (-saved[p], p))
    return tokens + whole[: room - len(tokens)], merges


def _assembled(
    tokens: Sequence[str], merges: list[tuple[str, str]], vocab_size: int, pre_tokenizer: Any
) -> tokenizers.Tokenizer:
    plain = [*FIRST, *BYTES, *tokens]
    reserved = [f"<｜place▁holder▁no▁{i}｜>" for i in range(vocab_size - len(plain) - len(CONTROL))]
    model = models.BPE({t: i for i, t in enumerate(plain)}, merges, unk_token=None, ignore_merges=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    # Control tokens are not in the model's own vocabulary: there a piece that spells one would be taken for it.
    added = [tokenizers.AddedToken(t, special=t in FIRST, normalized=False) for t in (*FIRST, *reserved, *CONTROL)]
    tokenizer.add_tokens(added)
    return tokenizer
