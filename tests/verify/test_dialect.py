"""Tokenizer, control tokens, dialect, and the official encoding cases that the package ships."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil

import pytest

from pyrosome.chat import Tokenizer
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.config import ModelConfig
from pyrosome.verify import dialect
from pyrosome.verify.dialect import cases, check
from pyrosome.verify.finding import Wanted
from tests.checkpoint.files import DATA, copied
from tests.verify import make_cases

OFFICIAL = DATA / "tokenizer"
read_once = functools.cache(Tokenizer.from_dir)


@pytest.fixture
def nano(tmp_path):
    path = tmp_path / "nano"
    shutil.copytree(open_checkpoint("builtin:nano").path, path)
    return path


@pytest.fixture
def as_official(monkeypatch):
    """The built-in model as if it had the official vocabulary: its weights are not looked at."""
    index = open_checkpoint("builtin:nano")
    object.__setattr__(index, "config", ModelConfig.preset("flash"))
    monkeypatch.setattr(dialect, "open_checkpoint", lambda _: index)
    monkeypatch.setattr(Tokenizer, "from_dir", read_once)


def found(path="builtin:nano", **wanted):
    return {f.what: f for f in check(Wanted(str(path), **wanted))}


def failed(findings):
    return {what for what, f in findings.items() if f.ok is False}


def test_the_shipped_cases_are_those_of_the_tests():
    """After a change run `python -m tests.verify.make_cases`."""
    assert make_cases.TARGET.read_text(encoding="utf-8") == make_cases.text()
    assert len(cases()["requests"]) > 80 and len(cases()["texts"]) == 20 and "MIT" in cases()["origin"]


def test_with_the_official_tokenizer_every_case_is_as_recorded(as_official):
    findings = found(tokenizer=OFFICIAL)
    assert failed(findings) == set() and all(f.ok for f in findings.values())
    assert findings["official prompts"].figures["cases"] == len(cases()["requests"])


def test_of_another_vocabulary_the_official_cases_are_left_out():
    findings = found()
    assert failed(findings) == set()
    left_out = {what for what, f in findings.items() if f.ok is None}
    assert left_out == {"official control tokens", "official texts", "official prompts"}
    assert "129,280" in findings["official prompts"].detail and "1,280" in findings["official prompts"].detail


def test_another_models_tokenizer_beside_official_weights_is_found(as_official):
    assert {"official control tokens", "official texts", "official prompts"} <= failed(found())


def changed(name, **fields):
    """The shipped cases with one of a list changed."""
    found = json.loads(json.dumps(cases()))
    found[name][0] |= fields
    return lambda: found


@pytest.mark.parametrize(
    ("name", "fields", "what", "said"),
    [
        ("texts", {"ids": [1, 2]}, "official texts", "tok_ascii"),
        ("requests", {"prompt": "<｜begin▁of▁sentence｜>Hello"}, "official prompts", "from character"),
        ("requests", {"sha256": "0" * 64}, "official prompts", "ids, other than"),
        ("requests", {"body": {"messages": 3}}, "official prompts", "refused"),
    ],
)
def test_a_case_that_comes_out_otherwise_is_named(name, fields, what, said, as_official, monkeypatch):
    monkeypatch.setattr(dialect, "cases", changed(name, **fields))
    findings = found(tokenizer=OFFICIAL)
    assert failed(findings) == {what}
    assert said in findings[what].detail and findings[what].detail.startswith("1 of ")


def test_without_a_tokenizer_nothing_else_is_asked(tmp_path):
    findings = found(copied(tmp_path))
    assert failed(findings) == {"tokenizer"} and len(findings) == 1


def test_a_tokenizer_larger_than_the_network_is_found(tmp_path):
    findings = found(copied(tmp_path), tokenizer=open_checkpoint("builtin:nano").path)
    assert "tokenizer" in failed(findings) and "1,280" in findings["tokenizer"].detail


def edited(path, edit):
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    edit(tokenizer)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def test_control_tokens_that_are_missing_or_elsewhere_are_found(nano):
    def rename(tokenizer):
        for token in tokenizer["added_tokens"]:
            if token["content"] == "<think>":
                token["content"] = "<thunk>"

    edited(nano, rename)
    assert "<think> is missing" in found(nano)["control tokens"].detail
    config = json.loads((nano / "config.json").read_text()) | {"bos_token_id": 7}
    (nano / "config.json").write_text(json.dumps(config))
    findings = found(nano)
    assert "control tokens" in failed(findings) and "bos_token_id is 7" in findings["control tokens"].detail


def test_texts_that_are_read_back_otherwise_are_found(nano, monkeypatch):
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decode(self, ids).replace("  ", " "))
    findings = found(nano)
    assert failed(findings) == {"round trips"} and "'a  b" in findings["round trips"].detail


def test_text_that_forges_a_role_is_found(nano, monkeypatch):
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, **_: encode(self, text, allow_special=True))
    assert "gives a control token" in found(nano)["round trips"].detail


def test_a_dialect_that_contradicts_the_configuration_is_told(nano):
    (nano / "encoding").mkdir()
    (nano / "encoding" / "code.py").write_text("'Reasoning Effort: Beyond maximum'")
    finding = found(nano)["dialect"]
    assert finding.ok and finding.warns and finding.figures == {"dialect": "0731", "release": "preview"}


def test_the_file_says_how_ids_are_hashed():
    case = next(c for c in cases()["requests"] if c["id"] == "chat_default")
    golden = json.loads((DATA / "encoding" / "api_encode.json").read_text(encoding="utf-8"))["cases"]
    ids = next(c for c in golden if c["id"] == "chat_default")["expected"]["v4"]["tokens"]["ids"]
    assert case["sha256"] == hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
