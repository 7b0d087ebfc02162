"""Times by events and graphs, ceilings by torch: with a device that is made up, and with the host."""

from __future__ import annotations

import pytest
import torch

from bench import device_clock
from bench.device_clock import CpuClock, CudaClock, about, ceilings, clock_of, median
from tests.bench.fake_cuda import fake_cuda

__all__ = ["fake_cuda"]
CPU = torch.device("cpu")


@pytest.fixture
def clock(fake_cuda, monkeypatch):
    return CudaClock(CPU)


def test_calls_on_a_gpu_are_captured_once_and_timed_by_events(clock, fake_cuda):
    made = []
    run = clock.captured(lambda: made.append(1))
    assert len(made) == device_clock.WARM + 1 and fake_cuda.captures == 1
    assert clock.seconds(run, 7) == pytest.approx([1e-5] * 7)
    assert len(made) == device_clock.WARM + 1  # replayed, not called
    middle, ends = median(clock, run, 20, 0.0)
    assert middle == pytest.approx(1e-5) and ends == pytest.approx([1e-5, 1e-5])


def test_what_is_flushed_is_larger_than_the_cache(clock):
    assert clock._flush.nbytes == 2 << 16


def test_samples_are_as_many_as_the_time_allows_and_ten_times_the_least_at_most():
    class Told(CpuClock):
        def seconds(self, run, count):
            asked.append(count)
            return [0.01] * count

    for seconds, count in ((0.0, 20), (0.5, 50), (100.0, 200)):
        asked: list[int] = []
        median(Told(), lambda: None, 20, seconds)
        assert asked == [1, count]


def test_the_host_s_clock_runs_what_it_times():
    made = []
    clock = clock_of(CPU)
    run = clock.captured(lambda: made.append(1))
    assert len(clock.seconds(run, 3)) == 3 and len(made) == 4 and not clock.exact


@pytest.mark.parametrize("capability", [80, 90])
def test_ceilings_are_of_memory_and_of_each_kind_of_product(capability, monkeypatch):
    monkeypatch.setattr(device_clock, "median", lambda clock, run, least, seconds: (run() is None or 1e-3, [0, 0]))
    found = ceilings(CPU, CpuClock(), 1 << 12, 32, capability)
    assert {"read", "copy", "memory", "f32", "bf16", "fp8"} == set(found)
    assert found["memory"] == found["copy"] == 2 * found["read"] == pytest.approx(2 * 4096 / 1e-3)
    assert found["f32"] == found["fp8"] == pytest.approx(2 * 32**3 / 1e-3)


def test_codes_are_multiplied_as_bfloat16_where_torch_cannot_do_better(monkeypatch):
    def none(*_, **__):
        raise RuntimeError("no such product")

    monkeypatch.setattr(torch, "_scaled_mm", none)
    found = ceilings(CPU, CpuClock(), 1 << 12, 32, 90)
    assert found["fp8"] == found["bf16"] > 0


def test_a_device_is_told_with_its_versions(fake_cuda):
    assert clock_of(torch.device("cpu")).exact is False
    told = about(torch.device("cuda"))
    assert told["device"] == "Some GPU" and told["versions"]["torch"] and told["versions"]["triton"]
    assert {"cuda", "driver"} <= set(told["versions"])
