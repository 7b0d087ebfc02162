"""What users import and call: a change here is a change of the public face, and is made on purpose."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pyrosome

NAMES = {
    "LLM", "Chat", "CheckpointError", "EngineError", "EngineOptions", "LoadedModel", "Message", "ModelConfig", "Output",
    "Piece",
    "PlanError", "PyrosomeError", "RequestError", "SamplingParams", "Session", "ToolCall", "load_model",
}  # fmt: skip
HEAVY = ("torch", "numpy", "tokenizers", "typer", "rich", "safetensors", "deepseek_recipe")
REQUIRED = inspect.Parameter.empty


def fresh(code: str) -> str:
    """What `code` prints in an interpreter that has imported nothing of ours."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def parameters(function) -> dict[str, object]:
    """Names and defaults of what can be given by position, then of what must be given by name."""
    found = inspect.signature(function).parameters.values()
    return {("*" if p.kind is p.KEYWORD_ONLY else "") + p.name: p.default for p in found if p.name != "self"}


def test_the_public_names_are_exactly_these():
    assert set(pyrosome.__all__) == NAMES and len(pyrosome.__all__) == len(NAMES)
    assert set(pyrosome._HOME) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_is_the_thing_its_module_defines(name):
    home = importlib.import_module(f"pyrosome.{pyrosome._HOME[name]}")
    assert getattr(pyrosome, name) is getattr(home, name)


def test_a_star_import_gives_the_public_names():
    namespace: dict[str, object] = {}
    exec("from pyrosome import *", namespace)
    assert namespace.keys() - {"__builtins__"} == NAMES


def test_importing_the_package_imports_nothing_heavy():
    assert fresh(f"import sys, pyrosome; print([m for m in {HEAVY!r} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("name", ["SamplingParams", "ModelConfig", "PyrosomeError", "RequestError"])
def test_a_light_name_needs_no_torch(name):
    assert fresh(f"import sys, pyrosome; pyrosome.{name}; print('torch' in sys.modules)") == "False"


def test_a_module_is_imported_when_its_name_is_first_used():
    code = (
        "import sys, pyrosome; a = 'pyrosome.llm' in sys.modules; pyrosome.LLM; print(a, 'pyrosome.llm' in sys.modules)"
    )
    assert fresh(code) == "False True"


def test_listing_the_names_imports_nothing():
    code = f"import sys, pyrosome; print({NAMES!r} <= set(dir(pyrosome)), 'torch' in sys.modules)"
    assert fresh(code) == "True False"
    assert dir(pyrosome) == sorted(dir(pyrosome)) and "__version__" in dir(pyrosome)


def test_a_name_there_is_not_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="module 'pyrosome' has no attribute 'llama'"):
        _ = pyrosome.llama
    assert not hasattr(pyrosome, "llama")
    with pytest.raises(ImportError, match="llama"):
        exec("from pyrosome import llama")


def test_the_version_is_the_project_s():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pyrosome.__version__ == project["version"]


SIGNATURES = {
    "load_model": {
        "path_or_name": REQUIRED, "device": "cpu", "numerics": "exact", "kv_format": None,
        "*unpack": None, "*experts": "resident", "*lock_memory": False, "*numa": "auto", "*progress": None,
    },
    "LLM": {
        "path_or_name": REQUIRED, "numerics": "trained", "kv_format": None, "device": "cpu",
        "*experts": "resident", "*lock_memory": False, "*numa": "auto", "*options": None, "*progress": None,
        "changes": REQUIRED,
    },
    "LLM.generate": {"prompts": REQUIRED, "params": None},
    "LLM.stream": {"prompt": REQUIRED, "params": None},
    "LLM.chat": {"messages": REQUIRED, "thinking": "high", "tools": None, "params": None},
    "LLM.chat_stream": {"messages": REQUIRED, "thinking": "high", "tools": None, "params": None},
    "LLM.kv_bytes": {"context": 0},
    "LLM.encode": {"text": REQUIRED},
    "LLM.session": {"prompt": ()},
    "LLM.restore": {"path": REQUIRED},
    "Session.extend": {"more": REQUIRED},
    "Session.generate": {"params": None},
    "Session.stream": {"params": None},
    "Session.chat": {"messages": (), "thinking": "high", "tools": None, "params": None},
    "Session.fork": {},
    "Session.rewind": {"num_tokens": REQUIRED},
    "Session.save": {"path": REQUIRED},
    "Session.close": {},
    "LoadedModel.logits": {"ids": REQUIRED, "cuts": None},
    "LoadedModel.draft_logits": {"ids": REQUIRED, "cuts": None},
    "LoadedModel.runner": {"max_sequences": 4, "max_context": 4096, "*num_drafts": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_that_users_call(name):
    thing = pyrosome
    for part in name.split("."):
        thing = getattr(thing, part)
    assert parameters(thing) == SIGNATURES[name]
    assert list(parameters(thing)) == list(SIGNATURES[name])


FIELDS = {
    "Output": [
        "token_ids", "text", "logprobs", "finish_reason", "cached_tokens", "error", "reuse", "timeline",
        "prompt_logprobs",
    ],
    "Piece": ["text", "token_ids", "finish_reason"],
    "LoadedModel": ["network", "config", "numerics", "kv_format", "path", "index"],
    "SamplingParams": [
        "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "seed", "stop_token_ids", "stop", "logprobs", "ignore_eos", "n",
        "max_thinking_tokens", "max_repeats", "prompt_logprobs", "min_tokens",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_users_read(name):
    assert [f.name for f in dataclasses.fields(getattr(pyrosome, name))] == FIELDS[name]


@pytest.mark.parametrize("name", sorted(n for n in SIGNATURES if n != "LLM"))
def test_public_functions_are_annotated_and_say_what_they_do(name):
    thing = pyrosome
    for part in name.split("."):
        thing = getattr(thing, part)
    signature = inspect.signature(thing)
    assert signature.return_annotation is not REQUIRED and thing.__doc__
    assert all(p.annotation is not REQUIRED for p in signature.parameters.values() if p.name != "self")
