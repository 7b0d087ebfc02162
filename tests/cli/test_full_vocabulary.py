"""The generated checkpoint with the official vocabulary."""

from __future__ import annotations

import json

import pytest

from pyrosome.errors import CheckpointError
from pyrosome.llm import LLM
from pyrosome.options import SamplingParams
from pyrosome.testing.full_vocabulary import full_vocabulary
from tests.cli.sessions import ROOT

TOKENIZER = ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json"


def test_a_checkpoint_with_the_official_vocabulary_generates(tmp_path):
    llm = LLM(full_vocabulary(tmp_path / "model", TOKENIZER))
    assert llm.model.config.vocab_size == 129_280 == llm.tokenizer.vocab_size
    assert llm.tokenizer.id_of("<｜User｜>") == 128_803 and (tmp_path / "model" / "generation_config.json").exists()
    text = "Grüße aus 深海 👋"
    assert llm.tokenizer.decode(llm.encode(text)[1:]) == text
    (out,) = llm.generate([text], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert len(out.token_ids) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "usable tokenizer.json"),
        ("{", "usable tokenizer.json"),
        (json.dumps({"model": {"vocab": {"a": 200_000}}, "added_tokens": []}), "id 200000"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        full_vocabulary(tmp_path / "model", tmp_path / "tokenizer.json")
