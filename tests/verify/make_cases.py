"""Write the encoding cases that the package ships for `pyrosome verify`: `python -m tests.verify.make_cases`.

They are those of tests/data/encoding that this project renders as the official code does, without the longest, as
requests with the text and the ids expected of them; and the official ids of control tokens.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.chat.cases import golden, tokenizer
from tests.chat.exceptions import REFERENCE
from tests.chat.test_reference_encode import body_of

TARGET = Path(__file__).parents[2] / "src" / "pyrosome" / "verify" / "cases" / "encoding.json"
MOST_CHARACTERS = 1500
_PLACE = re.compile(r"place.holder")  # reserved names, hundreds of them
ORIGIN = (
    "Facts of the format. requests: conversations written for this project; ids beginning with official_test are tests "
    "that DeepSeek ships with the model (MIT, Copyright (c) DeepSeek). prompt, count and sha256 (of the ids, joined by "
    "commas): dialect 0731 by DeepSeek's package deepseek-recipe 0.2.0 (MIT), dialect preview by DeepSeek's "
    "encoding_dsv4.py of the April 2026 release (MIT). texts and control: by the official tokenizer (MIT, Copyright "
    "(c) DeepSeek). Made from tests/data/encoding by tests/verify/make_cases.py."
)


def cases() -> dict[str, Any]:
    """What the file holds."""
    by_name = tokenizer().control_tokens
    return {
        "origin": ORIGIN,
        "vocabulary": 129280,
        "control": {
            name: i for name, i in sorted(by_name.items(), key=lambda item: item[1]) if not _PLACE.search(name)
        },
        "texts": [{"id": c["id"], "text": c["text"], "ids": c["ids"]} for c in golden("tokenizer")],
        "requests": [*_of_api(), *_of_reference()],
    }


def _of_api():
    for case in golden("api_encode"):
        expected = case["expected"]["v4"]
        if len(expected.get("prompt", " " * (MOST_CHARACTERS + 1))) <= MOST_CHARACTERS:
            yield _case(
                case["id"], "0731", case["protocol"], "deepseek", case["body"], expected["prompt"], expected["tokens"]
            )


def _of_reference():
    for case in golden("reference_encode"):
        kwargs = case["kwargs"]
        told_apart = kwargs.get("context") or kwargs.get("add_default_bos_token") is False
        if case["id"] in REFERENCE or case["category"] == "hostile" or told_apart or "tokens" not in case:
            continue
        if len(case["expected_prompt"]) <= MOST_CHARACTERS:
            body = body_of(case["messages"], kwargs)
            yield _case(case["id"], "preview", "chat_completions", None, body, case["expected_prompt"], case["tokens"])


def _case(name, dialect, protocol, compat, body, prompt, tokens) -> dict[str, Any]:
    return {
        "id": name, "dialect": dialect, "protocol": protocol, "compat": compat, "body": body, "prompt": prompt,
        "count": tokens["count"], "sha256": tokens["sha256"],
    }  # fmt: skip


def text() -> str:
    """The file, a case to a line."""
    found = cases()
    lists = {key: found.pop(key) for key in ("texts", "requests")}
    lines = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in found.items()]
    for key, items in lists.items():
        rows = ",\n".join(json.dumps(i, ensure_ascii=False, separators=(",", ":")) for i in items)
        lines.append(f"{json.dumps(key)}: [\n{rows}\n]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
