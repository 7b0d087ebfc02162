"""Steps by their parts: published sums of bytes and FLOPs, what each mode shares, where experts are, calibrations."""

import dataclasses
import json
import math

import pytest

from pyrosome.config import ModelConfig
from pyrosome.errors import PlanError
from pyrosome.plan import calibration
from pyrosome.plan.hardware import device, machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import MODES, Layout, Placement
from pyrosome.plan.speed import coefficients_for, coefficients_of, prompt_time, step_time
from pyrosome.plan.work import Load, busiest, touched, weights_of, work_of
from tests.plan import published
from tests.plan.published import FLASH
from tests.plan.test_calibration import TRUE, _calibration

ONE = Layout.of("tp", 1)
H200 = machine("h200")
RESIDENT = Placement()


def _sum(works, field, parts=None, groups=None):
    return sum(getattr(w, field) for w in works if (not parts or w.part in parts) and (not groups or w.group in groups))


def _step(load, gpu="h200:4", mode="tp", placement=RESIDENT, model=FLASH, **changes):
    found = machine(gpu) if isinstance(gpu, str) else gpu
    c = dataclasses.replace(coefficients_for(found), **changes)
    return step_time(model, found, Layout.of(mode, found.count), placement, load, c)


# What a step reads and computes


@pytest.mark.parametrize(
    ("batch", "gigabytes"), [(1, 11.2), (8, 33.2), (32, 86.0), (64, 122.7), (256, 154.6)]
)  # with the head, which is read once whatever the batch
def test_weights_that_a_batch_reads(batch, gigabytes):
    assert _sum(work_of(FLASH, ONE, Load(batch, 1, 4096)), "weight_bytes") / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_the_head_is_1_06_gigabytes_of_that():
    load = Load(1, 1, 4096)
    without = work_of(FLASH, ONE, dataclasses.replace(load, with_head=False))
    head = _sum(work_of(FLASH, ONE, load), "weight_bytes") - _sum(without, "weight_bytes")
    assert head == 129_280 * 4096 * 2


@pytest.mark.parametrize(
    ("kv_format", "context", "megabytes"),
    [
        ("fp8", 8192, 13.2), ("fp8", 131_072, 68), ("fp8", 1 << 20, 480),
        ("fp8-index8", 8192, 15.9), ("fp8-index8", 131_072, 112), ("fp8-index8", 1 << 20, 832),
    ],
)  # fmt: skip
def test_rows_that_a_token_reads(kv_format, context, megabytes):
    works = work_of(FLASH, ONE, Load(1, 1, context, kv_format))
    assert _sum(works, "row_bytes") / 1e6 == pytest.approx(megabytes, abs=0.5 if megabytes > 20 else 0.05)


@pytest.mark.parametrize(
    ("context", "linear", "attention", "indexer"),
    [(4096, 26.5, 2.2, 0.4), (32_768, 26.5, 2.8, 2.9), (131_072, 26.5, 4.8, 11.4), (1 << 20, 26.5, 23.6, 91.3)],
)
def test_flops_of_a_token(context, linear, attention, indexer):
    works = work_of(FLASH, ONE, Load(1, 1, context))
    products = _sum(works, "flops", groups=("matrices", "experts", "plain", "streams"))
    assert products / 1e9 == pytest.approx(linear, abs=0.05)
    assert _sum(works, "flops", groups=("attention",)) / 1e9 == pytest.approx(attention, abs=0.05)
    assert _sum(works, "flops", parts=("indexer",), groups=("indexer",)) / 1e9 == pytest.approx(indexer, abs=0.06)


def test_a_prompt_computes_what_its_tokens_would_alone():
    whole = work_of(FLASH, ONE, Load(1, 64, 32_768, with_head=False))
    each = [work_of(FLASH, ONE, Load(1, 1, 32_768 + i, with_head=False)) for i in range(64)]
    for group in ("matrices", "experts", "plain", "streams", "attention", "indexer"):
        assert _sum(whole, "flops", groups=(group,)) == pytest.approx(
            sum(_sum(w, "flops", groups=(group,)) for w in each), rel=1e-4
        )
    assert _sum(whole, "weight_bytes") < sum(_sum(w, "weight_bytes") for w in each) / 5


def test_tokens_of_a_prompt_share_what_is_read_of_the_index_and_of_neighbours():
    one, many = (work_of(FLASH, ONE, Load(1, n, 1 << 20)) for n in (1, 64))
    shared = {p: _sum(many, "row_bytes", (p,)) / _sum(one, "row_bytes", (p,)) for p in ("indexer", "HCA attention")}
    assert shared == {"indexer": pytest.approx(64 / 16, rel=1e-3), "HCA attention": pytest.approx(64 / 2, rel=1e-3)}
    assert _sum(many, "row_bytes", ("CSA attention",)) == 64 * _sum(one, "row_bytes", ("CSA attention",))


def test_experts_that_a_batch_visits():
    assert touched(256, 6, 1) == pytest.approx(6)
    assert touched(256, 6, 1e6) == pytest.approx(256)
    assert touched(8, 8, 1) == 8


def test_the_busiest_rank_has_more_than_the_mean_and_no_more_than_all():
    assert busiest(6.0, 1) == 6
    assert 0.75 < busiest(6.0, 8) < 6
    assert busiest(256.0, 8) == pytest.approx(32, rel=0.35)
    assert busiest(256.0, 8) > 32


def test_draft_stages_are_no_part_of_the_trunk():
    weights = weights_of(FLASH)
    assert (weights.moe_layers, weights.draft_layers) == (43, 1)
    drafted = work_of(FLASH, ONE, Load(1, 2, 4096, head_rows=2, drafts=1))
    assert "draft head" in {w.part for w in drafted}
    assert "draft head" not in {w.part for w in work_of(FLASH, ONE, Load(1, 2, 4096))}
    stage = _sum(drafted, "weight_bytes", parts=("draft head",))
    assert stage == pytest.approx(
        13.37e6 * 6 + 132e6 + 33.6e6 + 1.06e9, rel=0.05
    )  # experts, the rest, e_ and h_proj, head


# Modes


def test_tensor_parallelism_reads_less_and_waits_for_links():
    alone, four = _step(Load(1, 1, 4096), "h200"), _step(Load(1, 1, 4096), "h200:4")
    assert four.parts["attention"] < alone.parts["attention"]
    rows = [_sum(work_of(FLASH, Layout.of("tp", n), Load(1, 1, 4096)), "row_bytes") for n in (1, 4)]
    assert rows[0] == rows[1]  # the latent head is on every rank
    assert four.parts["links"] > 0
    assert "links" not in alone.parts


def test_a_pipeline_gives_one_session_nothing_and_many_sessions_all():
    load = Load(64, 1, 4096)
    assert _step(Load(1, 1, 4096), mode="pp").seconds > _step(Load(1, 1, 4096), "h200").seconds
    assert _step(load, mode="pp").seconds == pytest.approx(_step(Load(16, 1, 4096), "h200").seconds, rel=0.02)
    prompt = Load(1, 8192, 0)
    assert _step(prompt, mode="pp").seconds == pytest.approx(_step(prompt, "h200").seconds / 4, rel=0.02)


def test_replicas_share_sessions():
    assert _step(Load(64, 1, 4096), mode="dp").seconds == _step(Load(16, 1, 4096), "h200").seconds


def test_experts_dealt_out_are_read_once_for_all_sessions():
    ep, dp = (work_of(FLASH, Layout.of(mode, 4), Load(64, 1, 4096)) for mode in ("ep", "dp"))
    experts = [_sum(found, "weight_bytes", parts=("routed experts",)) for found in (ep, dp)]
    assert 4 * experts[0] > 43 * touched(256, 6, 64) * 13_369_344  # the busiest has more than a fourth of all
    assert experts[0] < 0.75 * experts[1]
    assert _sum(ep, "flops", parts=("routed experts",)) == pytest.approx(_sum(dp, "flops", parts=("routed experts",)))
    assert _sum(ep, "row_bytes") == _sum(dp, "row_bytes")


def test_a_shared_context_splits_rows_and_not_the_window():
    cp, one = (work_of(FLASH, Layout.of("cp", n), Load(1, 1, 1 << 20)) for n in (4, 1))
    for part in ("indexer", "CSA attention", "HCA attention"):
        assert _sum(cp, "row_bytes", parts=(part,)) == _sum(one, "row_bytes", parts=(part,)) / 4
    assert _sum(cp, "row_bytes", parts=("window attention",)) == _sum(one, "row_bytes", parts=("window attention",))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_every_mode_gives_times_that_add_up(mode, count):
    for load in (Load(1, 1, 0), Load(7, 2, 100, drafts=1, head_rows=2), Load(1, 4096, 1 << 19)):
        step = _step(load, f"h200:{count}", mode)
        assert step.seconds == pytest.approx(sum(step.parts.values()))
        assert all(s > 0 and math.isfinite(s) for s in step.parts.values())
        assert step.limit.rpartition(": ")[2] == max(step.parts, key=step.parts.get)


def test_more_never_takes_less():
    for mode in MODES:
        steps = [_step(Load(n, 1, 4096), mode=mode).seconds for n in (1, 2, 8, 64, 256)]
        assert steps == sorted(steps)
        steps = [_step(Load(4, 1, n), mode=mode).seconds for n in (0, 1000, 100_000, 1 << 20)]
        assert steps == sorted(steps)


# Where experts and rows are


def test_experts_in_ram_go_the_faster_way_and_it_is_told():
    slow_host = dataclasses.replace(H200, host=dataclasses.replace(device("ryzen-9950x"), read_bytes_s=10e9))
    no_link = dataclasses.replace(H200, device=dataclasses.replace(H200.device, host_bytes_s=0.0))
    half = Placement(0.5, 0.5)
    assert "routed experts over the host link" in _step(Load(1, 1, 4096), slow_host, placement=half).parts
    found = _step(Load(1, 1, 4096), no_link, placement=half)
    assert "routed experts by the host's processor" in found.parts
    assert found.limit == "host memory and processor: routed experts by the host's processor"
    neither = dataclasses.replace(no_link, host=None)
    with pytest.raises(PlanError, match="neither a link"):
        _step(Load(1, 1, 4096), neither, placement=half)


def test_one_host_serves_all_devices():
    no_link = dataclasses.replace(machine("h200:4"), device=dataclasses.replace(H200.device, host_bytes_s=0.0))
    load = Load(1, 1, 4096)
    name = "routed experts by the host's processor"
    each = _step(load, no_link, "dp", Placement(0.5, 0.5)).parts[name]
    alone = _step(load, dataclasses.replace(no_link, count=1), placement=Placement(0.5, 0.5)).parts[name]
    assert each == pytest.approx(4 * alone)


def test_experts_over_the_link_take_their_bytes_by_its_bandwidth():
    alone = dataclasses.replace(H200, host=None)
    found = _step(Load(1, 1, 4096), alone, placement=Placement(0.0, 1.0), link=1.0)
    visited = 43 * 6 * 13_369_344
    seconds = visited / alone.device.host_bytes_s
    assert found.parts["routed experts over the host link"] == pytest.approx(seconds, rel=0.01)
    assert "routed experts" not in found.parts


def test_experts_on_nvme_take_their_bytes_by_its_bandwidth():
    with_drive = dataclasses.replace(H200, nvme_bytes=10**12, nvme_read_bytes_s=7e9)
    found = _step(Load(1, 1, 4096), with_drive, placement=Placement(0.5, 0.0, 0.5))
    assert found.parts["routed experts from NVMe"] == pytest.approx(0.5 * 43 * 6 * 13_369_344 / 7e9, rel=0.01)
    assert found.limit == "NVMe: routed experts from NVMe"
    measured = _step(Load(1, 1, 4096), with_drive, placement=Placement(0.5, 0.0, 0.5), nvme_bytes_s=3.5e9)
    name = "routed experts from NVMe"
    assert measured.parts[name] == pytest.approx(2 * found.parts[name])
    with pytest.raises(PlanError, match="NVMe"):
        _step(Load(1, 1, 4096), H200, placement=Placement(0.5, 0.0, 0.5))


def test_a_processor_s_own_memory_is_no_other_place():
    alone = machine("epyc-9654", ram="512G")
    load = Load(1, 1, 4096)
    assert _step(load, alone, placement=Placement(0.0, 1.0)) == _step(load, alone)


def test_rows_on_the_host_take_512_of_them_for_each_layer_and_token():
    far = _step(Load(3, 1, 1 << 20), H200, placement=Placement(csa_on_host=True), link=1.0)
    moved = 3 * 21 * 512 * 584
    assert far.parts["CSA rows over the host link"] == pytest.approx(moved / H200.device.host_bytes_s)
    with pytest.raises(PlanError, match="no link"):
        _step(Load(1, 1, 4096), "gb10", placement=Placement(csa_on_host=True))


# Prompts


@pytest.mark.parametrize("tokens", [1, 100, 8192, 8193, 20_000, 300_000])
def test_a_prompt_takes_what_its_steps_take(tokens):
    c = coefficients_for(H200)
    steps = [Load(1, min(8192, tokens - at), at, with_head=at + 8192 >= tokens) for at in range(0, tokens, 8192)]
    each = sum(step_time(FLASH, H200, ONE, RESIDENT, load, c).seconds for load in steps)
    found = prompt_time(FLASH, H200, ONE, RESIDENT, tokens, c)
    assert found.seconds == pytest.approx(each, rel=0.005)
    assert found.seconds == pytest.approx(sum(found.parts.values()))


def test_what_is_cached_is_not_computed_and_is_read():
    c = coefficients_for(H200)
    first, second = (prompt_time(FLASH, H200, ONE, RESIDENT, 65_536, c, cached=n) for n in (0, 65_536))
    whole = prompt_time(FLASH, H200, ONE, RESIDENT, 131_072, c)
    assert first.seconds < second.seconds
    assert first.seconds + second.seconds == pytest.approx(whole.seconds, rel=0.01)


# Coefficients


def test_published_deployments_lie_within_the_band_but_for_those_that_are_known():
    text, outside = published.table()
    print(text)
    assert outside == published.OUTSIDE


def test_assumptions_say_what_they_are():
    c = coefficients_for(H200)
    assert c.read == pytest.approx(0.75 * H200.device.read_bytes_s)
    assert (c.band, "assumed" in c.source, "H200" in c.source) == ((0.5, 2.0), True, True)


def test_a_device_without_a_rate_is_refused():
    unknown = dataclasses.replace(H200, device=dataclasses.replace(H200.device, flops={}))
    with pytest.raises(PlanError, match="has no rate"):
        coefficients_for(unknown)
    unread = dataclasses.replace(H200, device=dataclasses.replace(H200.device, read_bytes_s=0.0))
    with pytest.raises(PlanError, match="bandwidth is unknown"):
        coefficients_for(unread)


def test_tiles_of_intel_are_not_counted_on():
    amx = device("xeon-8480")
    assert amx.flops["bf16"] > 4 * amx.flops["f32"]
    found = coefficients_for(machine("xeon-8480", ram="512G"))
    assert found.compute["matrices"] <= 2 * amx.flops["f32"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A machine that is this one, whose processor was calibrated."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    cpu = dataclasses.replace(device("epyc-9654"), title="A processor, 2 cores")
    return dataclasses.replace(machine("epyc-9654", ram="512G"), device=cpu, host=cpu, is_here=True)


def test_a_calibration_is_used_where_the_plan_is_for_this_machine(here):
    assert "assumed" in coefficients_for(here).source
    calibration.save(_calibration())
    c = coefficients_for(here)
    assert (c.read, c.layer_s, c.band) == (pytest.approx(30e9), 80e-6, (0.8, 1.25))
    assert c.source.startswith("calibrated 2026-01-02 on A processor, 2 cores, 1 thread:")
    assert "assumed" in coefficients_for(dataclasses.replace(here, is_here=False)).source


def test_a_step_by_a_calibration_is_what_was_fitted(here):
    calibration.save(_calibration())
    for load in (Load(1, 1, 4096), Load(8, 1, 1 << 20), Load(1, 2048, 100_000)):
        found = step_time(FLASH, here, ONE, RESIDENT, load, coefficients_for(here))
        assert found.seconds == pytest.approx(_calibration().predicted(FLASH, load))


def test_a_band_is_no_narrower_than_the_fit(here):
    calibration.save(_calibration(worst=0.6))
    assert coefficients_for(here).band == (1 / 1.6, 1.6)


def test_a_calibration_of_another_version_does_not_count_and_it_is_told(here):
    calibration.save(_calibration(torch="1.0"))
    c = coefficients_for(here)
    assert "assumed" in c.source
    assert "calibration of 2026-01-02 does not count, since it is of torch 1.0" in c.source
    assert "run `pyrosome calibrate`" in c.source


def test_a_gpu_here_has_the_measured_link_drive_and_host(here):
    calibration.save(_calibration(link_bytes_s=21e9))
    slow = dataclasses.replace(here.device, read_bytes_s=1e9)
    gpu = dataclasses.replace(machine("h200"), host=slow, is_here=True)
    c = coefficients_for(gpu)
    assert c.link == pytest.approx(21e9 / gpu.device.host_bytes_s)
    assert (c.nvme_bytes_s, c.host) == (2e9, coefficients_of(_calibration()))
    by_link = step_time(FLASH, gpu, ONE, Placement(0.0, 1.0), Load(1, 4096, 0), c)
    assert "routed experts over the host link" in by_link.parts
    by_host = step_time(FLASH, gpu, ONE, Placement(0.0, 1.0), Load(1, 1, 4096), c)
    read, computed = 43 * 6 * 13_369_344 / 30e9, 2 * 43 * 6 * 3 * 4096 * 2048 / 350e9  # as calibrated
    assert by_host.parts["routed experts by the host's processor"] == pytest.approx(read + computed)


def test_a_part_that_took_no_time_of_its_own_is_free():
    c = coefficients_of(_calibration(seconds={**TRUE, "plain": 0.0}))
    assert c.compute["plain"] == math.inf
    assert step_time(FLASH, H200, ONE, RESIDENT, Load(1, 1, 4096), c).seconds > 0


def test_a_model_of_one_layer_and_no_draft_stage():
    changes = {"num_hidden_layers": 1, "compress_ratios": (0,), "num_hash_layers": 0, "num_nextn_predict_layers": 0}
    tiny = Model.of(ModelConfig.preset("flash", **changes), 0)
    step = _step(Load(1, 1, 10, drafts=1), "h200", model=tiny)
    assert json.dumps(step.parts)
    assert "indexer" not in step.parts
    assert "draft head" not in step.parts
