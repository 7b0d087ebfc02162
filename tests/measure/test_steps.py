"""Steps that are timed: what runs, at which positions, and what is made of the times.  No test is of time."""

from typing import ClassVar

import pytest
import torch

from pyrosome.errors import RequestError
from pyrosome.measure import calibrate as calibrating
from pyrosome.measure import ceilings, own
from pyrosome.measure import steps as timing
from pyrosome.measure.steps import GROUP, LEAST_ROUNDS, WARM, Load, Shape, Timed, clock, measured, seeded
from pyrosome.ops import native
from pyrosome.plan import calibration
from pyrosome.plan.calibration import TERMS

LOADS = (Load(1, 1, 300), Load(2, 1, 40), Load(1, 20, 0), Load(1, 20, 130))
TINY = Shape("tiny", 64, 32, 2, 32, 1, 32, 2, 4, 2, (0, 4, 128), 64, LOADS)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    if not native.available():
        pytest.skip("no native library here")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def network():
    return seeded(TINY.config)


class Watched(timing.Runner):
    """Keeps (position, tokens) of the spans of each step."""

    seen: ClassVar[list] = []

    def step(self, spans, **kwargs):
        self.seen.append([(s.length, len(ids)) for s, ids in spans])
        return super().step(spans, **kwargs)


@pytest.fixture
def watched(monkeypatch):
    Watched.seen = []
    monkeypatch.setattr(timing, "Runner", Watched)
    return Watched.seen


def test_a_shape_is_the_same_to_the_engine_and_to_the_planner(network):
    model = TINY.model
    assert model.config == network.config
    assert sum(t.numel for t in model.tensors if t.part == "hyper-connections") == sum(
        p.numel() for name, p in network.named_parameters() if "hc_" in name
    )
    assert (model.config.head_dim, model.config.index_head_dim, model.config.sliding_window) == (512, 128, 128)


def test_decoding_goes_on_over_a_filled_cache_and_every_other_group_is_timed(network, watched):
    timed = Timed(network, [Load(2, 1, 40)], clock(1))
    assert watched == [[(40 + i, 1), (40 + i, 1)] for i in range(WARM)]
    timed.take(0)
    timed.take(0)
    assert watched[WARM:] == [[(40 + WARM + i, 1)] * 2 for i in range(4 * GROUP)]


@pytest.mark.parametrize("context", [0, 130])
def test_a_part_of_a_prompt_is_read_at_the_same_place_every_time(network, watched, context):
    timed = Timed(network, [Load(1, 20, context)], clock(1))
    timed.take(0)
    timed.take(0)
    assert watched == [[(context, 20)]] * 4


def test_the_first_time_is_left_out_and_the_median_counts(network):
    ticks = iter([0, 100, 0, 4, 0, 40, 0, 8])
    timed = Timed(network, [Load(1, 20, 0)], lambda: next(ticks))
    for _ in range(4):
        timed.take(0)
    assert timed.medians() == [8]
    assert timed.spreads() == [36 / 8]


def test_decoding_is_timed_by_the_step(network):
    ticks = iter([0, 100, 0, 4 * GROUP])
    timed = Timed(network, [Load(1, 1, 40)], lambda: next(ticks))
    timed.take(0)
    timed.take(0)
    assert timed.medians() == [4]


def test_loads_take_turns_and_rounds_end_with_the_time(monkeypatch):
    taken = []
    monkeypatch.setattr(Timed, "take", lambda self, at: (taken.append((id(self), at)), self._seconds[at].append(1.0)))
    said = []
    samples = measured([TINY, TINY], 1, until=0.0, say=said.append)
    assert len(taken) == LEAST_ROUNDS * 2 * len(LOADS)
    assert [at for _, at in taken[: 2 * len(LOADS)]] == [*range(len(LOADS))] * 2
    assert len({who for who, _ in taken[: len(LOADS)]}) == 1
    assert [s.load for s in samples] == [*LOADS] * 2
    assert said[-1] == f"8 steps were timed {LEAST_ROUNDS} times each"


def test_it_is_timed_with_the_threads_asked_for_and_left_with_those_before(monkeypatch):
    before, seen = torch.get_num_threads(), set()

    def take(self, at):
        seen.add(torch.get_num_threads())
        self._seconds[at].append(1.0)

    monkeypatch.setattr(Timed, "take", take)
    measured([TINY], before + 1, until=0.0)
    assert (seen, torch.get_num_threads()) == ({before + 1}, before)


# Ceilings


def test_ceilings_are_positive_numbers():
    assert ceilings.read_rate(1, 1 << 16) > 0
    assert ceilings.product_rate(1, 32) > 0


def test_a_drive_is_read_whether_a_file_or_a_folder_is_named(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    assert ceilings.disk_rate(file, 1 << 19) > 0
    assert ceilings.disk_rate(tmp_path, 1 << 20) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]
    with pytest.raises(RequestError, match="cannot be measured"):
        ceilings.disk_rate(tmp_path / "nowhere" / "file")


def test_no_link_is_measured_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ceilings.link_rate() == 0


# Calibrating


def _small(monkeypatch):
    monkeypatch.setattr(ceilings, "read_rate", lambda threads: 20e9)
    monkeypatch.setattr(ceilings, "product_rate", lambda threads: 100e9)


def test_a_calibration_is_fitted_to_what_was_timed(tmp_path, monkeypatch):
    _small(monkeypatch)
    monkeypatch.setattr(ceilings, "disk_rate", lambda place: 3e9)
    found, samples = calibrating.calibrate(60, 1, tmp_path, shapes=[TINY])
    assert [s.load for s in samples] == list(LOADS)
    assert (found.threads, found.points, found.disk_bytes_s, found.read_bytes_s) == (1, 4, 3e9, 20e9)
    assert set(found.seconds) == set(TERMS)
    assert found.outdated == ""
    assert found.residual <= found.worst
    assert calibration.load(calibration.save(found)) == found
    assert calibration.latest(found.processor) == found


@pytest.mark.parametrize(
    ("seconds", "threads", "said"),
    [(0, 1, "seconds"), (-5, 1, "seconds"), (float("nan"), 1, "seconds"), (1e9, 1, "seconds"), (120, 0, "threads"),
     (120, 10_000, "threads"), (120, -1, "threads")],
)  # fmt: skip
def test_nonsense_is_refused_before_anything_is_measured(tmp_path, monkeypatch, seconds, threads, said):
    monkeypatch.setattr(ceilings, "read_rate", lambda threads: pytest.fail("it was measured"))
    with pytest.raises(RequestError, match=said):
        calibrating.calibrate(seconds, threads, tmp_path)


def test_too_little_memory_is_refused_with_how_much_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrating, "available_memory", lambda: 1 << 30)
    with pytest.raises(RequestError, match=r"1\.0 GiB of memory are available and calibrating takes 4\.0 GiB"):
        calibrating.calibrate(120, 1, tmp_path)


def test_shapes_that_are_fitted_to_differ_in_all_that_counts():
    configs = [s.config for s in calibrating.SHAPES]
    for key in ("hidden_size", "num_attention_heads", "n_routed_experts", "num_hidden_layers", "index_n_heads"):
        assert len({getattr(c, key) for c in configs}) >= 3
    assert sum(len(s.loads) for s in calibrating.SHAPES) >= 3 * len(TERMS)


def test_a_checkpoint_s_own_steps_are_predicted_beside_timed(monkeypatch):
    monkeypatch.setattr(own, "ROUNDS", 1)
    monkeypatch.setattr(own, "DECODING", (64,))
    monkeypatch.setattr(own, "PROMPTS", (32,))
    loaded, load = [], own.load_model
    monkeypatch.setattr(own, "load_model", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0])
    found = own.own_steps("builtin:nano", 1)
    assert loaded[0].numerics == "trained"  # as calibrated steps are, and as a plan asks for
    assert [(f["what"], f["at"]) for f in found] == [("decode tok/s", " at 64"), ("prefill tok/s", " of 32")]
    assert all(f["predicted"] > 0 and f["measured"] > 0 for f in found)
