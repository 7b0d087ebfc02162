"""An engine for DeepSeek-V4-Flash.

    from pyrosome import LLM, SamplingParams, load_model

Names are imported when first used, so that `import pyrosome` is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pyrosome.chat import Chat, Message, ToolCall
    from pyrosome.config import ModelConfig
    from pyrosome.errors import CheckpointError, EngineError, PlanError, PyrosomeError, RequestError
    from pyrosome.llm import LLM, LoadedModel, load_model
    from pyrosome.options import EngineOptions, SamplingParams
    from pyrosome.output import Output, Piece
    from pyrosome.session import Session

_HOME = {
    "LLM": "llm",
    "LoadedModel": "llm",
    "Output": "output",
    "Piece": "output",
    "load_model": "llm",
    "Chat": "chat",
    "Message": "chat",
    "ToolCall": "chat",
    "SamplingParams": "options",
    "EngineOptions": "options",
    "Session": "session",
    "ModelConfig": "config",
    "PyrosomeError": "errors",
    "CheckpointError": "errors",
    "PlanError": "errors",
    "RequestError": "errors",
    "EngineError": "errors",
}
__all__ = [
    "LLM",
    "Chat",
    "CheckpointError",
    "EngineError",
    "EngineOptions",
    "LoadedModel",
    "Message",
    "ModelConfig",
    "Output",
    "Piece",
    "PlanError",
    "PyrosomeError",
    "RequestError",
    "SamplingParams",
    "Session",
    "ToolCall",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pyrosome' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pyrosome.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
