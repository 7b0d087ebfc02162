"""What a server needs of memory before it is loaded, and what it is told where it does not fit."""

from __future__ import annotations

import dataclasses
import re

import pytest

from pyrosome.cache.streams import plan_cache
from pyrosome.config import ModelConfig
from pyrosome.engine import graphs
from pyrosome.errors import DoesNotFit
from pyrosome.options import EngineOptions
from pyrosome.plan import reserve
from pyrosome.plan.inventory import Model
from pyrosome.plan.serving import Server

GIB = 1 << 30
FLASH = Model.of(ModelConfig.preset("flash"), 1)
SERVER = Server.of(FLASH, "fp8", EngineOptions(cache_bytes=8 * GIB))


def changed(server=SERVER, **changes):
    return dataclasses.replace(server, options=dataclasses.replace(server.options, **changes))


def by_name(room):
    return {i.name: i.num_bytes for i in room.items}


def test_weights_and_cache_are_those_of_the_inventory_and_of_the_pool():
    room = SERVER.room(0)
    found = by_name(room)
    assert found["weights"] == FLASH.held_bytes("tiles")
    pool = plan_cache(FLASH.config, "fp8", 8, room.max_context, 3, True, room.cache_tokens)
    assert found["cache"] == pool.total_bytes
    assert found["snapshots"] == 256 << 20
    assert by_name(changed(host_bytes=GIB).room(0))["snapshots"] == GIB + (256 << 20)
    assert room.needed_bytes == sum(found.values())


def test_mapped_experts_take_no_memory():
    experts = sum(t.stored_bytes for t in FLASH.held if t.expert >= 0)
    mapped = dataclasses.replace(SERVER, mapped=True)
    saved = SERVER.room(0).needed_bytes - mapped.room(0).needed_bytes
    assert saved == pytest.approx(experts, rel=0.01) and saved > 130 * GIB


def test_a_longer_step_needs_more_workspace():
    small, large = (by_name(changed(step_tokens=n).room(0)) for n in (512, 32_768))
    assert large["a step of 32,768 tokens"] > 30 * small["a step of 512 tokens"]


def test_a_step_is_the_larger_of_a_prompt_s_and_of_all_sequences_decoding():
    few, many = (by_name(changed(step_tokens=1, max_sequences=n).room(0))["a step of 1 tokens"] for n in (8, 64))
    assert many > 7 * few


def test_captured_steps_are_as_many_as_the_engine_keeps():
    assert (reserve.CAPTURES, reserve.CAPTURED_TOKENS, reserve.CAPTURED_BYTES) == (
        graphs.MOST_KEPT, graphs.MOST_TOKENS, graphs.MOST_BYTES
    )  # fmt: skip
    assert by_name(SERVER.room(0))["captured steps"] == graphs.MOST_BYTES
    small = ModelConfig.preset("flash", hidden_size=256, vocab_size=1280, num_attention_heads=8)
    few = dataclasses.replace(SERVER, config=small)
    found = {n: changed(few, max_sequences=n).captured_steps_bytes(4096) for n in (1, 2, 64)}
    assert found[2] == pytest.approx(2 * found[1], rel=0.05)
    assert found[2] < graphs.MOST_BYTES == found[64]


def test_what_fits_is_told_with_what_is_left():
    room = SERVER.checked_room(200 * GIB)
    assert re.match(r"It needs 16\d\.\d\d GiB of 200\.00 GiB available: weights .*, cache 8\.", str(room))
    assert "is not known" in str(SERVER.checked_room(0))


def change_of(server, available):
    with pytest.raises(DoesNotFit) as refused:
        server.checked_room(available)
    return str(refused.value)


def test_a_cache_that_is_too_large_is_refused_with_the_largest_that_fits():
    available = SERVER.room(0).needed_bytes - 3 * GIB
    said = change_of(SERVER, available)
    found = re.search(r"--cache-gib (\d+\.\d\d) would fit, and holds ([\d,]+) tokens", said)
    assert "--experts" not in said and "weights" in said
    smaller = changed(cache_bytes=int(float(found[1]) * GIB))
    assert smaller.checked_room(available).cache_tokens == int(found[2].replace(",", ""))
    one_more = changed(cache_bytes=int((float(found[1]) + 0.01) * GIB))
    assert one_more.room(0).needed_bytes > available


def test_where_no_cache_fits_experts_may_stay_in_their_files():
    said = change_of(SERVER, 40 * GIB)
    found = re.search(r"--experts mapped and --cache-gib (\d+\.\d\d) would fit", said)
    mapped = dataclasses.replace(changed(cache_bytes=int(float(found[1]) * GIB)), mapped=True)
    mapped.checked_room(40 * GIB)


def test_where_nothing_fits_it_says_how_much_more_memory_would_do():
    mapped = dataclasses.replace(SERVER, mapped=True)
    said = change_of(mapped, 4 * GIB)
    more = re.search(r"; ([\d.]+) GiB more memory is needed for the smallest cache$", said)
    enough = int(4 * GIB + (float(more[1]) + 0.01) * GIB)
    smallest = changed(mapped, cache_bytes=mapped.cache_bytes_for(128))
    smallest.checked_room(enough)
    assert smallest.room(0).needed_bytes > enough - GIB // 50


def test_a_context_that_the_cache_cannot_hold_is_refused_with_the_cache_that_can():
    small = changed(max_context=1_048_576, cache_bytes=2 * GIB)
    said = change_of(small, 0)
    cache, context = re.search(r"--cache-gib (\d+\.\d\d), or --context (\d+)$", said).groups()
    assert changed(small, cache_bytes=int(float(cache) * GIB)).checked_room(0).max_context == 1_048_576
    assert changed(small, max_context=int(context)).checked_room(0).max_context == int(context)
    assert "1,048,576 tokens (--context)" in said


@pytest.mark.parametrize("context", [128, 999, 8_192, 100_000, 1_048_576])
def test_the_smallest_cache_for_a_context_holds_it_and_a_byte_less_does_not(context):
    least = SERVER.cache_bytes_for(context)
    assert changed(cache_bytes=least).room(0).cache_tokens >= context
    assert changed(cache_bytes=least - 1).room(0).cache_tokens < context
