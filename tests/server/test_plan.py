"""What a server says it holds."""

from __future__ import annotations

import pytest

from pyrosome.cache.streams import cache_tokens_in, pages_for, plan_cache
from pyrosome.config import ModelConfig
from pyrosome.options import EngineOptions
from pyrosome.plan.inventory import Model, held_bytes
from pyrosome.plan.serving import Server
from pyrosome.server.plan import sessions_in
from tests.server.scripted import MODEL

FLASH = ModelConfig.preset("flash")


def test_the_plan_adds_up_the_weights_by_part(nano):
    plan = nano.get("/plan").json()
    held = Model.open(MODEL).held
    assert sum(plan["weights_bytes"].values()) == sum(held_bytes(t, "tiles") for t in held)
    assert plan["weights_bytes"]["routed experts"] == sum(
        held_bytes(t, "tiles") for t in held if t.part == "routed experts"
    )


def test_the_plan_says_how_many_sessions_of_each_length_the_cache_holds(nano):
    plan = nano.get("/plan").json()
    longest = str(plan["max_context"])
    assert set(plan["sessions_in_cache"]) == {n for n in plan["sequence_bytes"] if int(n) <= plan["max_context"]}
    assert plan["sessions_in_cache"][longest] == plan["cache_tokens"] // plan["max_context"]


def test_the_plan_says_what_steps_take_besides(nano):
    plan = nano.get("/plan").json()
    served = Server.of(Model.open(MODEL), plan["kv_format"], EngineOptions(cache_bytes=64 << 20))
    step, captured = (i.num_bytes for i in served.room(0).items if i.kind == "workspace")
    assert plan["workspace_bytes"] == {"step": step, "captured_steps": captured}


@pytest.mark.parametrize("kv_format", ["fp8", "bf16"])
@pytest.mark.parametrize("context", [128, 8_192, 100_000, 1_048_576])
def test_so_many_sessions_find_pages_and_one_more_does_not(context, kv_format):
    tokens = cache_tokens_in(FLASH, kv_format, 16 << 30, 8)
    plan = plan_cache(FLASH, kv_format, 8, 1_048_576, 3, cache_tokens=tokens)
    found = sessions_in(plan, context, 8)
    spare = {r: n - 1 for r, n in plan.num_pages.items()}  # one page is for padding
    assert found >= 1
    assert all(found * pages_for(context, r) <= spare[r] for r in spare)
    assert any((found + 1) * pages_for(context, r) > spare[r] for r in spare)


def test_a_network_without_history_holds_those_that_run():
    plan = plan_cache(FLASH, "fp8", 8, 1_048_576, cache_tokens=1_048_576)
    assert sessions_in(plan, 3, 5) == 5  # three tokens have no row in any page yet
