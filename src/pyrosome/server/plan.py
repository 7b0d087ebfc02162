"""What a server holds, in bytes: weights by part, its cache, what a step takes besides, and the room for sessions."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pyrosome.cache.streams import CachePlan, cache_tokens_in, pages_for, plan_cache
from pyrosome.config import ModelConfig
from pyrosome.plan.inventory import Model, add_up
from pyrosome.plan.serving import Server
from pyrosome.server.service import Service

PLANNED_CONTEXTS = (8_192, 131_072, 1_048_576)


def planned(service: Service, about: dict[str, Any]) -> dict[str, Any]:
    """Everything `/plan` tells, as plain data.

    Args:
        about: what the engine says of its set-up.
    """
    config, kv_format, options = service.config, about["kv_format"], service.engine_options
    tokens = cache_tokens_in(config, kv_format, options.cache_bytes, options.max_sequences)
    plan = plan_cache(
        config, kv_format, options.max_sequences, about["max_context"], options.max_drafts, cache_tokens=tokens
    )
    contexts = _contexts(config, about["max_context"])
    within = [n for n in contexts if n <= about["max_context"]]
    return {
        "model": service.card.name,
        "kv_format": kv_format,
        "kv_bytes_per_token": plan.bytes_per_token,
        "state_bytes_per_sequence": plan.state_bytes,
        "sequence_bytes": {str(n): plan.sequence_bytes(n) for n in contexts},
        "cache_bytes": options.cache_bytes,
        "cache_tokens": tokens,
        "max_sequences": options.max_sequences,
        "max_context": about["max_context"],
        "weights_bytes": weights_by_part(service.card.path),
        "workspace_bytes": _workspace(service, about),
        "sessions_in_cache": {str(n): sessions_in(plan, n, options.max_sequences) for n in within},
    }


def weights_by_part(path: Path) -> dict[str, int]:
    """Bytes of weights by part, as the CPU kernels hold them."""
    found = add_up(_model(path).held, lambda t: t.part, "tiles")
    return {str(part): num_bytes for part, num_bytes in found.items()}


def _workspace(service: Service, about: dict[str, Any]) -> dict[str, int]:
    """Bytes that steps take beside weights and cache, at most."""
    model, numerics = _model(service.card.path), about["numerics"]
    server = Server.of(model, about["kv_format"], service.engine_options, numerics=numerics)
    context = about["max_context"]
    return {"step": server.step_bytes(context), "captured_steps": server.captured_steps_bytes(context)}


@functools.lru_cache(maxsize=4)
def _model(path: Path) -> Model:
    return Model.open(path)


def sessions_in(plan: CachePlan, context: int, max_sequences: int) -> int:
    """Sessions of so many tokens whose rows the pages hold at once, running or not; those that run are `max_sequences`.

    Where a network keeps no history, only those that run hold anything.
    """
    pages = {r: pages_for(context, r) for r in plan.page_bytes}
    return min(((plan.num_pages[r] - 1) // n for r, n in pages.items() if n), default=max_sequences)


def _contexts(config: ModelConfig, most: int) -> list[int]:
    return sorted({n for n in PLANNED_CONTEXTS if n <= config.max_position_embeddings} | {most})
