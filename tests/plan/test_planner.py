"""Plans: what fits, what would make it fit (and one unit less does not), modes ranked, what a server replays."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pyrosome.config import ModelConfig
from pyrosome.engine.engine import Engine
from pyrosome.errors import CheckpointError, PlanError, RequestError
from pyrosome.llm import load_model
from pyrosome.options import EngineOptions
from pyrosome.plan.fitting import changes, fractional_sessions, longest_context, most, most_sessions, place_experts
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import MODES, Layout, Placement
from pyrosome.plan.memory import Site, fits, places
from pyrosome.plan.plan import OPTIONS, Asked, Plan
from pyrosome.plan.planner import make_plan, make_plans
from pyrosome.testing.shapes import tiny
from tests.networks import network
from tests.plan.machines import A100, GIB, H100, H200, even, gpus, processor, unified

MILLION = 1_048_576
FLASH = Model.open("flash")


def asked(machine, **fields) -> Asked:
    return Asked(FLASH, machine, **{"context": MILLION, **fields})


# What fits


def test_the_most_is_found_wherever_it_is():
    for edge in range(-1, 12):
        assert most(lambda n, edge=edge: n <= edge, 0, 10) == min(edge, 10)


@pytest.mark.parametrize("mode", ["tp", "pp", "ep", "cp"])
def test_the_most_sessions_fit_and_one_more_does_not(mode):
    a, layout = asked(gpus(2, H200)), Layout.of(mode, 2)
    n = most_sessions(a, layout, Placement())
    assert n > 10
    assert fits(places(a, layout, Placement(), n)) and not fits(places(a, layout, Placement(), n + 1))
    assert n <= fractional_sessions(a, layout, Placement()) < n + 2  # of replicas, each has a part of one left


@pytest.mark.parametrize("mode", ["tp", "ep"])
def test_parts_of_a_session_are_what_is_free_of_what_one_takes(mode):
    a, layout = asked(gpus(2, H200), context=524_288), Layout.of(mode, 2)
    n = most_sessions(a, layout, Placement())
    n -= n % layout.replicas
    free = min(p.free_bytes for p in places(a, layout, Placement(), n))
    each = (
        places(a, layout, Placement(), n + layout.replicas)[0].used_bytes
        - places(a, layout, Placement(), n)[0].used_bytes
    )
    found = fractional_sessions(a, layout, Placement())
    assert found == pytest.approx(n + layout.replicas * free / each, abs=0.05)


def test_the_longest_context_fits_and_a_block_more_does_not():
    a, layout = asked(gpus(2, H100), sessions=3, context=131_072), Layout.of("pp", 2)
    n = longest_context(a, layout, Placement())
    assert n % 128 == 0 and 0 < n < MILLION
    assert fits(places(dataclasses.replace(a, context=n), layout, Placement(), 3))
    assert not fits(places(dataclasses.replace(a, context=n + 128), layout, Placement(), 3))


def test_a_pipeline_holds_more_of_the_same_bill_than_tensor_shards():
    room = {p.mode: p.sessions.decoding for p in make_plans(asked(gpus(4, A100)), even)}
    assert room["pp"] > 3 * room["tp"] > 0
    assert room["dp"] == 0


def test_each_replica_has_sessions_of_its_own():
    a = asked(gpus(2, H200), sessions=1)
    by_two, layout = most_sessions(a, Layout.of("ep", 2), Placement()), Layout.of("ep", 2)
    a_rank = places(a, layout, Placement(), by_two)
    assert a_rank[0].used_bytes - a_rank[1].used_bytes in (0, pytest.approx(4.09e9, rel=0.05))


# Where experts go


def test_experts_stay_on_devices_that_hold_them():
    assert place_experts(asked(gpus(2, H200, ram=1 << 40), sessions=500), Layout.of("tp", 2)) == Placement()


def test_experts_that_do_not_fit_go_to_ram_whole_and_as_few_as_possible():
    a, layout = asked(gpus(1, 32_607, ram=512 * GIB), context=32_768, sessions=4), Layout.of("tp", 1)
    placement = place_experts(a, layout)
    near, far, on_nvme = placement.counts(256)
    assert 0 < near < 256 and on_nvme == 0 and near + far == 256
    assert fits(places(a, layout, placement, 4))
    assert not fits(places(a, layout, Placement.of(near + 1, far - 1, 256), 4)[:1])
    assert place_experts(a, layout) == placement


def test_what_ram_does_not_hold_is_on_nvme():
    a, layout = asked(gpus(1, 32_607, ram=64 * GIB, nvme=10**12), context=32_768), Layout.of("tp", 1)
    near, far, on_nvme = place_experts(a, layout).counts(256)
    assert near > 0 and far > 0 and on_nvme > 0
    ram = places(a, layout, Placement.of(near, far + 1, 256), 1)[1]
    assert ram.name == "RAM" and ram.free_bytes < 0
    slow = dataclasses.replace(a, machine=dataclasses.replace(a.machine, nvme_read_bytes_s=0.0))
    assert place_experts(slow, layout) == Placement()  # how fast such a drive reads is not known: it is not offered


def test_a_processor_reads_from_files_what_its_memory_does_not_hold():
    (plan,) = make_plans(asked(processor(96 * GIB, 10**12), context=16_384), even)
    assert plan.fits and plan.options["experts"] == "mapped"
    assert any("mapped" in note for note in plan.notes)
    (plan,) = make_plans(asked(processor(512 * GIB, 10**12), context=16_384), even)
    assert plan.fits and plan.options["experts"] == "resident"


# What would make it fit

SHORT = {
    "too many sessions": asked(gpus(2, H200), sessions=20, mode="tp"),
    "too many, with rows on the host": asked(gpus(2, H200, ram=64 * GIB), sessions=90, mode="ep", csa_host=True),
    "a little too much": asked(gpus(2, H200), sessions=15, mode="tp", prefilling=2),
    "wide rows": asked(gpus(2, H200), sessions=20, mode="tp", kv_format="bf16", context=524_288),
    "weights": asked(gpus(1, H200), context=8192),
    "weights beside little RAM": asked(gpus(1, 32_607, ram=32 * GIB), context=8192),
    "replicas": asked(gpus(2, H100), mode="dp", context=8192),
    "a processor": asked(processor(128 * GIB), context=8192),
    "rows on a small host": asked(gpus(2, H200, ram=16 * GIB), sessions=9, csa_host=True, mode="ep"),
    "rows on an unknown host": asked(gpus(2, H200), sessions=9, csa_host=True, mode="ep"),
    "many parked": asked(gpus(2, H200, ram=64 * GIB), mode="pp", parked=40),
    "one memory": asked(unified(122_880), context=8192),
    "many prompts": asked(gpus(2, H200), sessions=14, mode="tp", prefilling=14, step_tokens=2048),
    "more sessions than experts leave room for": asked(gpus(2, 24_564, ram=256 * GIB), sessions=300, context=131_072),
    "a longer context than experts leave room for": asked(gpus(1, 32_607, ram=256 * GIB), sessions=8, kv_format="bf16"),
    "weights beside little RAM and a drive": asked(gpus(1, 32_607, ram=8 * GIB, nvme=20 * 10**9), context=8192),
    "parked sessions beside an unknown RAM": asked(
        gpus(2, H200, nvme=200 * 10**9), parked=40, csa_host=True, mode="ep"
    ),
}


UNITS = ("step_tokens", "prefilling", "sessions", "context", "ram", "nvme", "devices")


def less(change) -> Asked:
    """The same with one unit of the change less."""
    a, machine = change.asked, change.asked.machine
    match change.what:
        case "step_tokens":
            return dataclasses.replace(a, step_tokens=a.step_tokens + 256)
        case "prefilling":
            return dataclasses.replace(a, prefilling=a.prefilling + 1)
        case "sessions":
            # Where all of them read prompts, so would one more.
            prompts = a.prefilling + 1 if a.prefilling == a.sessions > 1 else a.prefilling
            return dataclasses.replace(a, sessions=a.sessions + 1, prefilling=prompts)
        case "context":
            return dataclasses.replace(a, context=a.context + 128)
        case "ram" | "csa_host":
            return dataclasses.replace(a, machine=dataclasses.replace(machine, ram_bytes=machine.ram_bytes - GIB))
        case "nvme":
            return dataclasses.replace(a, machine=dataclasses.replace(machine, nvme_bytes=machine.nvme_bytes - 10**9))
        case "devices":
            return dataclasses.replace(a, machine=dataclasses.replace(machine, count=machine.count - 1))
        case _:
            return a


@pytest.mark.parametrize("name", SHORT)
def test_every_change_that_is_told_makes_it_fit_and_one_unit_less_does_not(name):
    short = SHORT[name]
    plan = make_plan(short, even)
    assert not plan.fits and plan.speed is None and plan.cost is None
    layout = Layout.of(plan.mode, short.machine.count)
    found = changes(short, layout, place_experts(short, layout))
    assert found, plan.change
    for change in found:
        assert change.text in plan.change
        other = make_plan(dataclasses.replace(change.asked, mode=change.layout.mode), even)
        assert other.fits, change.text
        has_unit = change.what in UNITS or (change.what == "csa_host" and "GiB are needed" in change.text)
        if has_unit:
            assert not make_plan(dataclasses.replace(less(change), mode=change.layout.mode), even).fits, change.text


def test_the_changes_are_in_the_order_of_their_harm():
    kinds = {name: [c.what for c in _changes(short)] for name, short in SHORT.items()}
    assert kinds["a little too much"][:3] == ["step_tokens", "prefilling", "csa_host"]
    assert kinds["many prompts"][:2] == ["step_tokens", "prefilling"]
    assert kinds["too many sessions"] == ["csa_host", "mode", "sessions", "context", "devices"]
    assert kinds["wide rows"][:3] == ["csa_host", "mode", "kv_format"]
    assert kinds["weights"] == ["ram", "nvme", "devices"]
    assert kinds["a processor"] == ["ram", "nvme"]
    assert kinds["rows on a small host"] == ["sessions", "context", "ram"]
    assert kinds["rows on an unknown host"] == ["ram"]
    assert kinds["many parked"] == ["context", "ram", "nvme"]
    assert "ram" not in kinds["one memory"] and "devices" in kinds["one memory"]


def _changes(short: Asked):
    layout = Layout.of("tp" if short.mode == "auto" else short.mode, short.machine.count)
    return changes(short, layout, place_experts(short, layout))


def test_what_is_lacking_is_told_in_units():
    plan = make_plan(asked(gpus(2, H200), sessions=20, mode="tp"), even)
    lack = -plan.places[0].free_bytes / GIB
    assert plan.why_not == (
        f"each of 2 devices lacks {lack:.1f} GiB of {plan.places[0].used_bytes / GIB:.1f} GiB, and has 140.4 GiB"
    )
    assert plan.change.startswith("it fits with CSA rows in host memory, of which ")
    assert f"{plan.sessions.decoding} sessions instead of 20" in plan.change


def test_a_host_that_lacks_memory_is_told_apart_from_the_devices():
    plan = make_plan(asked(gpus(2, H200, ram=16 * GIB), sessions=9, csa_host=True, mode="ep"), even)
    assert plan.why_not.startswith("RAM lacks ") and plan.why_not.endswith(", and has 16.0 GiB")
    unknown = make_plan(asked(gpus(2, H200), sessions=9, csa_host=True, mode="ep"), even)
    assert unknown.why_not.endswith("it is not known how much there is")
    uneven = make_plan(asked(gpus(3, A100), sessions=40, mode="ep"), even)
    assert " GiB to " in uneven.why_not


def test_a_model_that_nothing_makes_fit_is_told_so():
    plan = make_plan(asked(gpus(1, 300), context=128), even)
    assert not plan.fits
    assert plan.change.startswith("no single change makes it fit")


# Modes


def test_modes_are_ranked_by_sessions_and_then_by_tokens():
    def fast(a, layout, placement):
        s = even(a, layout, placement)
        rate = 900.0 if layout.mode == "cp" else 10.0
        return dataclasses.replace(s, total_tok_s=dataclasses.replace(s.total_tok_s, mid=rate))

    plans = make_plans(asked(gpus(2, H200), sessions=3), fast)
    assert {p.mode for p in plans} == set(MODES)
    assert [p.fits for p in plans] == sorted((p.fits for p in plans), reverse=True)
    room = [p.sessions.decoding for p in plans if p.fits]
    assert room == sorted(room, reverse=True) and plans[0].mode == "pp"
    # With the rows in RAM it is that which decides how many there are.
    equal = [p for p in make_plans(asked(gpus(2, H200, ram=256 * 10**9), sessions=3, csa_host=True), fast) if p.fits]
    tied = [p.mode for p in equal if p.sessions.decoding == equal[0].sessions.decoding]
    assert len(tied) > 1 and tied[0] == "cp"


def test_plans_with_experts_elsewhere_go_after_those_without():
    def fast(a, layout, placement):
        s = even(a, layout, placement)
        rate = {"tp": 30.0, "cp": 20.0, "dp": 10.0}.get(layout.mode, 40.0)
        return dataclasses.replace(s, total_tok_s=dataclasses.replace(s.total_tok_s, mid=rate))

    plans = make_plans(asked(gpus(2, 85_000, ram=512 * GIB), context=8192), fast)
    is_spread = [any("experts of each layer" in note for note in p.notes) for p in plans]
    assert all(p.fits for p in plans) and is_spread == [False, False, True, True, True]
    assert plans[2].sessions.decoding > plans[1].sessions.decoding
    rates = [p.speed.total_tok_s.mid for p in plans[2:]]
    assert rates == sorted(rates, reverse=True)
    assert [p.sessions.decoding for p in plans[2:]] != sorted((p.sessions.decoding for p in plans[2:]), reverse=True)


def test_of_plans_that_do_not_fit_the_one_that_lacks_least_is_first():
    plans = make_plans(asked(gpus(2, H100), sessions=2), even)
    assert not any(p.fits for p in plans)
    lack = [min(at.free_bytes for at in p.places) for p in plans]
    assert lack == sorted(lack, reverse=True) and plans[0].mode == "pp"
    # Room for some of those asked for goes before that.
    assert make_plans(asked(gpus(2, H200), sessions=40), even)[0].sessions.decoding > 0


def test_a_context_that_is_no_use_is_not_offered():
    plan = make_plan(asked(gpus(2, H100), sessions=2, mode="tp"), even)
    short = longest_context(asked(gpus(2, H100), sessions=2), Layout.of("tp", 2), Placement())
    assert 0 < short < MILLION // 16 and "context" not in plan.change


def test_a_context_shorter_than_a_block_has_no_shorter_one():
    plan = make_plan(asked(gpus(1, H200), context=1, sessions=1), even)
    assert not plan.fits and "a context of" not in plan.change


def test_devices_without_a_link_share_nothing():
    apart = dataclasses.replace(gpus(2, 200_000).device, peer_bytes_s=0.0, host_bytes_s=0.0)
    machine = dataclasses.replace(gpus(2, 200_000), device=apart)
    assert [p.mode for p in make_plans(asked(machine, context=8192))] == ["dp"]
    with pytest.raises(RequestError, match="no link between devices of Card is known, and ep needs one"):
        make_plan(asked(machine, context=8192, mode="ep"))
    one = asked(dataclasses.replace(machine, device=dataclasses.replace(apart, memory_bytes=GIB << 6), count=1))
    assert "devices instead" not in make_plan(one, even).change


@pytest.mark.parametrize("machine", [gpus(2, 24_564, ram=256 * GIB), gpus(1, 32_607, nvme=10**12)])
def test_room_of_what_does_not_fit_is_with_experts_out_of_the_way(machine):
    short = asked(machine, context=131_072, sessions=5000)
    for plan in make_plans(short, even):
        room = plan.sessions.decoding
        assert room > 20 and f"{room} sessions instead of 5,000" in plan.change
        fit, more = (make_plan(dataclasses.replace(short, sessions=n, mode=plan.mode), even) for n in (room, room + 1))
        assert fit.fits and not more.fits and fit.sessions.decoding == more.sessions.decoding == room
        few = make_plan(dataclasses.replace(short, sessions=1, mode=plan.mode), even)
        assert few.sessions.decoding < room and any("with experts where they are" in note for note in few.notes)


def test_machines_of_one_memory_each_park_as_many_sessions_as_the_fullest_can():
    machine = dataclasses.replace(unified(122_880, 4), nvme_bytes=20 * 10**9)
    plan = make_plan(asked(machine, sessions=5, parked=100, mode="ep"), even)
    assert plan.fits == (plan.sessions.parked_ram + plan.sessions.parked_disk >= 100)
    assert all(p.free_bytes >= 0 for p in plan.places[:4])


def test_one_device_has_one_plan_and_an_impossible_mode_is_refused_or_left_out():
    assert len(make_plans(asked(gpus(1, 200_000)), even)) == 1
    assert "tp" not in {p.mode for p in make_plans(asked(gpus(9, H200)), even)}
    with pytest.raises(RequestError, match="tp cuts attention by its output groups, and the model has 8 for 9"):
        make_plan(asked(gpus(9, H200), mode="tp"), even)


def test_several_devices_are_said_to_be_a_plan_for_what_is_to_come():
    assert any("plan for what is to come" in note for note in make_plan(asked(gpus(2, H200)), even).notes)
    assert not any("plan for what is to come" in n for n in make_plan(asked(gpus(1, 200_000)), even).notes)


# What a plan tells


def test_what_was_asked_is_told_as_plain_data():
    plan = make_plan(asked(gpus(2, H200, price=9.42), sessions=7, context=MILLION), even)
    assert plan.asked["sessions"] == 7 and plan.asked["context"] == MILLION
    assert plan.asked["model"]["name"] == "flash"
    assert plan.asked["model"]["stored_bytes"] == FLASH.stored_bytes
    assert plan.asked["machine"]["count"] == 2 and plan.asked["machine"]["usd_hour"] == 9.42
    assert Plan.from_json(plan.to_json()) == plan


def test_a_session_takes_its_rows_on_every_device_that_repeats_them():
    by = {p.mode: p.sessions.device_bytes for p in make_plans(asked(gpus(2, H200)), even)}
    assert by["tp"] == pytest.approx(2 * by["ep"], rel=1e-3)
    assert 3_700_378_624 < by["ep"] < 1.12 * 3_700_378_624  # pages for branches beside them
    assert by["pp"] == pytest.approx(by["ep"], rel=1e-3)


def test_sessions_are_told_by_state():
    plan = make_plan(
        asked(gpus(2, H200, ram=64 * GIB, nvme=10**12), sessions=4, prefilling=2, parked=3, mode="pp"), even
    )
    s = plan.sessions
    assert (s.prefilling, s.parked_bytes) == (2, 3_688_717_216)
    assert s.parked_ram == 17 and s.parked_disk == 268
    assert s.decoding >= 4


def test_the_options_are_an_engines():
    plan = make_plan(asked(gpus(2, H200, ram=64 * GIB), sessions=4, prefilling=2, parked=3, mode="pp"), even)
    options = plan.options
    assert set(options) <= set(OPTIONS)
    assert options["max_sequences"] == 4 and options["max_context"] == MILLION
    assert options["step_tokens"] == 2 * 8192
    assert options["host_bytes"] == 3 * plan.sessions.parked_bytes
    engine = {k: v for k, v in options.items() if k not in ("numerics", "kv_format", "experts")}
    assert dataclasses.asdict(EngineOptions(**engine)).items() >= engine.items()


def test_options_are_those_of_the_device_with_most_sessions():
    plan = make_plan(asked(gpus(2, H200), sessions=7, mode="ep"), even)
    assert plan.options["max_sequences"] == 4 and plan.options["step_tokens"] == 8192


def test_experts_that_an_accelerators_host_reads_from_files_are_no_option_of_this_engine():
    plan = make_plan(asked(gpus(1, 32_607, ram=64 * GIB, nvme=10**12), context=32_768), even)
    assert plan.fits and plan.options["experts"] == "resident"
    assert any("on a CPU only" in note for note in plan.notes)
    bare = make_plan(asked(gpus(1, 200_000, ram=64 * GIB, nvme=10**12), context=32_768), even)
    assert plan.sessions.parked_disk < bare.sessions.parked_disk  # the experts are on that drive


@pytest.mark.parametrize(("sessions", "context", "shared"), [(1, 300, 0), (3, 700, 0), (4, 1024, 512)])
@pytest.mark.parametrize("drafts", [True, False])
def test_an_engine_allocates_what_the_plan_for_a_processor_says(sessions, context, shared, drafts):
    config = tiny((0, 4, 128))
    model = Model.of(config, 1, "bf16")
    a = Asked(
        model, processor(8 * GIB), context=context, sessions=sessions, shared_prefix=shared, kv_format="f32",
        numerics="exact", drafts=drafts,
    )  # fmt: skip
    plan = make_plan(a, even)
    assert plan.fits
    options = {k: v for k, v in plan.options.items() if k not in ("numerics", "kv_format", "experts")}
    engine = Engine(network(config), "f32", EngineOptions(**options))
    assert engine.max_context == context
    pool = Site(a, Layout.of("tp", 1), Placement(), sessions).pool_bytes()
    assert engine.runner.pool.allocated_bytes == pool
    names = {"workspace", "reserve", "system", "weights"}
    assert pool == sum(i.num_bytes for i in plan.places[0].items if i.kind not in names)


def test_the_built_in_model_takes_the_cache_that_was_planned():
    model = Model.open("builtin:nano")
    a = Asked(model, processor(8 * GIB), context=4096, sessions=3, prefilling=2)
    plan = make_plan(a, even)
    options = {k: v for k, v in plan.options.items() if k not in ("numerics", "kv_format", "experts")}
    loaded = load_model("builtin:nano", numerics=plan.options["numerics"], kv_format=plan.options["kv_format"])
    engine = loaded.engine(EngineOptions(**options))
    pool = Site(a, Layout.of("tp", 1), Placement(), 3).pool_bytes()
    assert engine.runner.pool.allocated_bytes == pool
    assert (engine.max_context, options["step_tokens"]) == (4096, 2 * 2048)


def test_a_prompt_takes_no_larger_steps_than_it_is_long():
    short = make_plan(asked(gpus(1, 200_000), context=512), even)
    assert short.asked["step_tokens"] == 512 and short.options["step_tokens"] == 512
    long = make_plan(asked(gpus(1, 200_000), context=65_536), even)
    assert long.asked["step_tokens"] == 8192


def test_a_vendors_row_format_is_planned_and_said_not_to_be_served():
    plan = make_plan(asked(gpus(2, H200), kv_format="fp8-index8"), even)
    assert any("fp8-index8" in note for note in plan.notes)
    here, there = (
        sum(i.num_bytes for p in make_plan(asked(gpus(1, 400_000), kv_format=f), even).places for i in p.items
            if i.name == "index_k")
        for f in ("fp8", "fp8-index8")
    )  # fmt: skip
    assert there / here == pytest.approx(132 / 68)


# Nonsense


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"context": 0}, "context is 0"),
        ({"context": -1}, "context is -1"),
        ({"context": 2 * MILLION}, "2,097,152 tokens and flash has 1,048,576 positions"),
        ({"context": math.nan}, "context is nan"),
        ({"context": "1M"}, "context is '1M'"),
        ({"sessions": 0}, "sessions is 0"),
        ({"sessions": True}, "sessions is True"),
        ({"sessions": 10**9}, "1 to 1000000"),
        ({"prefilling": -1}, "prefilling is -1"),
        ({"prefilling": 3, "sessions": 2}, "prefilling is 3 and sessions is 2"),
        ({"parked": -5}, "parked is -5"),
        ({"shared_prefix": MILLION + 1}, "shared_prefix is 1,048,577 tokens"),
        ({"prompt": 5000, "context": 4096}, "prompt is 5,000 tokens, and the context has 4,096"),
        ({"output": 0}, "output is 0"),
        ({"step_tokens": 10**9}, "step_tokens is 1000000000"),
        ({"mode": "fast"}, "mode is 'fast'; it is one of auto, tp, pp, ep, dp, cp"),
        ({"mode": None}, "mode is None"),
        ({"kv_format": "int4"}, "kv_format is 'int4'"),
        ({"numerics": "guess"}, "numerics is 'guess'"),
        ({"csa_host": 1}, "csa_host is 1"),
        ({"drafts": "yes"}, "drafts is 'yes'"),
        ({"model": "flash"}, "model is 'flash'"),
        ({"machine": "h200:2"}, "machine is 'h200:2'"),
    ],
)
def test_nonsense_is_refused_by_the_name_of_its_field(fields, word):
    with pytest.raises(RequestError) as caught:
        make_plan(dataclasses.replace(asked(gpus(2, H200)), **fields), even)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "word"),
    [
        (gpus(0), "devices is 0"),
        (gpus(2, ram=-1), "ram is -1"),
        (dataclasses.replace(gpus(2), nvme_bytes=1.5), "nvme is 1.5"),
        (gpus(1, 0), "has 0 bytes of memory"),
        (gpus(1, price=-1.0), "price is -1.0"),
        (gpus(1, price=math.nan), "price is nan"),
        (processor(0), "needs its RAM"),
        (dataclasses.replace(processor(GIB), count=2), "one machine"),
    ],
)
def test_machines_that_cannot_be_are_refused(machine, word):
    with pytest.raises(RequestError) as caught:
        make_plan(asked(machine), even)
    assert word in str(caught.value)


def test_rows_on_a_host_that_is_the_device_are_refused():
    with pytest.raises(RequestError, match="no memory beside the host's"):
        make_plan(asked(unified(200_000), csa_host=True), even)


def test_a_shape_that_a_format_cannot_store_is_refused():
    odd = Model.of(tiny(head_dim=48), 1, "bf16")
    with pytest.raises(CheckpointError, match="kv_format"):
        make_plan(Asked(odd, gpus(1), context=128), even)


def test_weights_that_a_processor_does_not_hold_are_refused():
    with pytest.raises(PlanError, match="take native weights"):
        make_plan(Asked(Model.open("flash", "w4a16"), processor(512 * GIB), context=8192), even)


def test_the_pro_release_is_planned_too():
    pro = Model.of(ModelConfig.preset("pro", num_hidden_layers=5, compress_ratios=(128, 4, 128, 4, 4, 0)), 1)
    plans = make_plans(Asked(pro, gpus(4, H200), context=MILLION), even)
    assert all(p.fits for p in plans)
