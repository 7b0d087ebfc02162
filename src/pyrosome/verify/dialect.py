"""`verify`'s check of what text becomes: tokenizer, control tokens, dialect, and the official encoding cases."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from pyrosome.chat import Chat, Tokenizer
from pyrosome.chat.chat import ASSISTANT, BEGIN, DSML, THINK
from pyrosome.chat.dialect import dialect_of
from pyrosome.chat.parser import END, THINK_END
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError, PyrosomeError
from pyrosome.verify.finding import Finding, Wanted

NEEDED = (BEGIN, END, "<｜User｜>", ASSISTANT, THINK, THINK_END, DSML)
# Written and read back by any tokenizer of bytes: letters of many scripts, runs of blanks, digits, characters outside
# the first plane, a combining accent, and the name of a control token as plain text.
TEXTS = (
    "Hello, world!",
    "深海の熱水 — 안녕하세요",
    "a  b\t\tc\r\n\n d",
    "3.14159 1234567890",
    "🐋🏴‍☠️ e\u0301",
    f"plain {ASSISTANT}",
)
LISTED = 5


def check(wanted: Wanted) -> Iterator[Finding]:
    """Tokenizer, control tokens, dialect, round trips; the official cases where the vocabulary is the official one."""
    index = open_checkpoint(wanted.model)
    folder = wanted.tokenizer or index.path
    try:
        tokenizer = Tokenizer.from_dir(folder)
    except CheckpointError as error:
        yield Finding("dialect", "tokenizer", False, str(error))
        return
    yield _vocabulary(tokenizer, index.config)
    yield _control(tokenizer, index.config)
    yield _dialect(index.path, index.config)
    yield _round_trips(tokenizer)
    if why_not := unofficial(tokenizer, index.config):
        for what in ("official control tokens", "official texts", "official prompts"):
            yield Finding("dialect", what, None, f"left out: {why_not}")
        return
    yield _official_control(tokenizer)
    yield _official_texts(tokenizer)
    yield _official_prompts(tokenizer, folder)


@functools.cache
def cases() -> dict[str, Any]:
    """The recorded official encoding cases that come with the package."""
    file = resources.files("pyrosome.verify") / "cases" / "encoding.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def unofficial(tokenizer: Tokenizer, config: ModelConfig) -> str:
    """Why the official cases do not apply to a tokenizer; "" where they do.

    A model of the official vocabulary is held to them even where its tokenizer has other ids: that is the fault looked
    for.
    """
    official = cases()["vocabulary"]
    if config.vocab_size == official:
        return ""
    return (
        f"the cases are of the official vocabulary of {official:,} tokens, and this model has {config.vocab_size:,} "
        f"(its tokenizer {tokenizer.vocab_size:,})"
    )


def _vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> Finding:
    known, rows = tokenizer.vocab_size, config.vocab_size
    figures = {"tokenizer": known, "network": rows}
    highest = max(tokenizer.control_tokens.values(), default=0)
    if known > rows or highest >= rows:
        detail = (
            f"the tokenizer knows {known:,} ids, up to {max(known - 1, highest):,}, and the network has {rows:,} rows; "
            "take both from the same release"
        )
        return Finding("dialect", "tokenizer", False, detail, figures)
    return Finding("dialect", "tokenizer", True, f"{known:,} ids of the network's {rows:,}", figures)


def _control(tokenizer: Tokenizer, config: ModelConfig) -> Finding:
    wrong = [f"{t} is missing" for t in NEEDED if tokenizer.id_of(t) is None]
    for token, name, expected in (
        (BEGIN, "bos_token_id", config.bos_token_id),
        (END, "eos_token_id", config.eos_token_id),
    ):
        found = tokenizer.id_of(token)
        if found is not None and found != expected:
            wrong.append(f"{token} is {found} and config.json's {name} is {expected}")
    if wrong:
        return Finding("dialect", "control tokens", False, f"{'; '.join(wrong)}: the tokenizer is another model's")
    return Finding(
        "dialect", "control tokens", True, f"{len(NEEDED)} that every prompt needs, two of them as config.json says"
    )


def _dialect(folder: Path, config: ModelConfig) -> Finding:
    found = dialect_of(folder)
    has_code = any((folder / "encoding").glob("*.py"))
    by = (
        "the encoding code beside the weights" if has_code else "config.json, as no encoding code is beside the weights"
    )
    detail = f"{found}, by {by}"
    figures = {"dialect": found, "release": config.release}
    if found != config.release:
        detail += f"; config.json describes release {config.release}: check that both are of one release"
        return Finding("dialect", "dialect", True, detail, figures, warns=True)
    return Finding("dialect", "dialect", True, detail, figures)


def _round_trips(tokenizer: Tokenizer) -> Finding:
    changed = [t for t in TEXTS if tokenizer.decode(tokenizer.encode(t)) != t]
    controls = set(tokenizer.control_tokens.values())
    forged = [t for t in TEXTS if controls & set(tokenizer.encode(t))]
    if changed or forged:
        said = [f"{t!r} is read back otherwise" for t in changed] + [f"{t!r} gives a control token" for t in forged]
        return Finding("dialect", "round trips", False, "; ".join(said))
    return Finding("dialect", "round trips", True, f"{len(TEXTS)} texts are read back as they were, none forges a role")


def _official_control(tokenizer: Tokenizer) -> Finding:
    recorded = cases()["control"]
    wrong = [f"{t} is {tokenizer.id_of(t)}, not {i}" for t, i in recorded.items() if tokenizer.id_of(t) != i]
    return _counted("official control tokens", len(recorded), wrong)


def _official_texts(tokenizer: Tokenizer) -> Finding:
    recorded = cases()["texts"]
    wrong = [
        f"{c['id']}: {found[:8]}, not {c['ids'][:8]}"
        for c in recorded
        if (found := tokenizer.encode(c["text"], allow_special=True)) != c["ids"]
    ]
    return _counted("official texts", len(recorded), wrong)


def _official_prompts(tokenizer: Tokenizer, folder: Path) -> Finding:
    recorded = cases()["requests"]
    wrong = [f"{c['id']}: {problem}" for c in recorded if (problem := _rendered(c, tokenizer, folder))]
    return _counted("official prompts", len(recorded), wrong)


def _rendered(case: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> str:
    """How a request's prompt differs from the recorded one; "" where it does not."""
    try:
        chat = Chat(folder, case["dialect"], case["compat"], tokenizer=tokenizer)
        prompt = chat.render(case["body"], case["protocol"])
    except PyrosomeError as error:
        return f"refused ({error})"
    if prompt.text != case["prompt"]:
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt.text, case["prompt"], strict=False)) if a != b),
            min(len(prompt.text), len(case["prompt"])),
        )
        return f"from character {at}: {prompt.text[at : at + 40]!r}, not {case['prompt'][at : at + 40]!r}"
    digest = hashlib.sha256(",".join(map(str, prompt.ids)).encode()).hexdigest()
    return "" if digest == case["sha256"] else f"{len(prompt.ids)} ids, other than the {case['count']} recorded"


def _counted(what: str, num: int, wrong: list[str]) -> Finding:
    figures = {"cases": num, "wrong": wrong[:100]}
    if wrong:
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        detail = f"{len(wrong)} of {num} are not as recorded: {'; '.join(wrong[:LISTED])}{more}"
        return Finding("dialect", what, False, detail, figures)
    return Finding("dialect", what, True, f"all {num} as recorded from the official code", figures)
