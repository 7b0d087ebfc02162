"""Layers beside their definitions: sound ones pass, and every planted fault is named by layer and by op or tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref

import pytest
import torch

from pyrosome.ops import native
from pyrosome.ops.compress import compressed_rows
from pyrosome.ops.experts import routed_experts
from pyrosome.ops.index_topk import index_topk
from pyrosome.ops.route import route
from pyrosome.ops.seam import OPS, Kernel, place_of, use
from pyrosome.ops.sparse_attention import attention
from pyrosome.ops.store import as_stored, store_rows
from pyrosome.testing.checkpoints import random_checkpoint
from pyrosome.testing.shapes import tiny
from pyrosome.verify import layers
from pyrosome.verify.beside import Tally, beside, difference, expert_gaps, row_gaps
from pyrosome.verify.finding import Wanted
from pyrosome.verify.passage import Passage
from tests.checkpoint.files import SHARD, copied, read_entries, rewrite

needs_kernels = pytest.mark.skipif(not native.available(), reason="there are no native kernels here")
NANO = "builtin:nano"


@pytest.fixture
def only(monkeypatch):
    """Look at these layers alone, and nothing else: what is planted there is found there."""

    def narrow(*numbers):
        monkeypatch.setattr(Passage, "parts", lambda self: [self._layer(i) for i in numbers])

    return narrow


def found(model=NANO, **wanted):
    return list(layers.check(Wanted(str(model), quick=wanted.pop("quick", True), **wanted)))


def failed(findings):
    return [f.what for f in findings if f.ok is False and f.what != "all layers"]


@contextlib.contextmanager
def planted(op, spoil, when=lambda *args: True):
    """In front of the others a version of `op` that spoils what would have run, where `when` says so."""
    fast = op.kernels[0]
    version = fast.load()

    def wrong(*args, **kwargs):
        result = version(*args, **kwargs)
        return spoil(result, *args) if when(*args) else result

    kernel = Kernel("planted", fast.when, lambda: wrong, False)
    op.kernels.insert(0, kernel)
    try:
        with use(op, "auto"):
            yield
    finally:
        op.kernels.remove(kernel)


@dataclasses.dataclass
class Loads:
    """What was loaded, seen each time before the next part is."""

    findings: list = dataclasses.field(default_factory=list)
    networks: list = dataclasses.field(default_factory=list)  # weak references
    bytes: list = dataclasses.field(default_factory=list)
    alive: list = dataclasses.field(default_factory=list)  # networks that still were, at each load
    foreign: list = dataclasses.field(default_factory=list)  # parameters of parts that were not asked for

    def watching(self, load):
        def loading(index, names, *args, **kwargs):
            self.alive.append(sum(n() is not None for n in self.networks))
            network = load(index, names, *args, **kwargs)
            self.networks.append(weakref.ref(network))
            self.bytes.append(sum(index.tensors[n].nbytes for n in names))
            kept = [n for n, p in network.named_parameters() if p.device.type != "meta"]
            kept += list(map(str, network.bank._stacks | network.bank._kept))
            self.foreign += [k for k in kept if _foreign(k, names)]
            return network

        return loading


@pytest.fixture(scope="module")
def sound():
    """The built-in model looked at once, in full."""
    loads = Loads()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("as_stored", "as_held"):
            patch.setattr(layers, name, loads.watching(getattr(layers, name)))
        loads.findings = found(quick=False)
    return loads


def _foreign(kept, names):
    """Whether a parameter is of a layer that was not to be loaded."""
    return any(f"layers.{i}." in kept and not any(n.startswith(f"layers.{i}.") for n in names) for i in range(4))


def test_the_built_in_model_computes_what_it_means(sound):
    findings = sound.findings
    assert [f.what for f in findings if f.ok is not True] == []
    names = [f"layer {i}" for i in range(4)] + ["head", "draft stage"]
    expected = [(n, a) for n in names for a in ("exact", "trained")]
    assert [(f.what.split(" (")[0], f.what.rpartition(", ")[2]) for f in findings[:-1]] == expected
    exact = [f.figures["apart"] for f in findings[:-1] if f.what.endswith("exact")]
    assert max(exact) < 2e-5  # far below the bound, which a fault must not hide under
    if native.available():
        assert all(f.figures["ops"] for f in findings[:-1])
        assert {"attention", "routed_experts", "store_rows", "linears"} <= findings[0].figures["ops"].keys()
        assert "index_topk" in findings[2].figures["ops"] and "compressed_rows" in findings[4].figures["ops"]
    titles = [p["title"] for p in findings[-1].figures["plots"]]
    assert len(titles) == 4 and findings[-1].figures["plots"][0]["x"] == [0, 1, 2, 3]


def test_a_quick_look_takes_the_first_layer_of_each_kind_and_the_last(noise_checkpoint):
    passage = Passage(layers.open_checkpoint(noise_checkpoint), "cpu", quick=True, seed=0)
    # Six layers: window, window, CSA, HCA, CSA, HCA, of which the first three choose experts by token id.
    assert [p.layer for p in passage.parts() if p.layer >= 0] == [0, 2, 3, 4, 5]


def test_the_sequence_passes_window_tails_pages_and_the_indexers_choice():
    index = layers.open_checkpoint(NANO)
    passage = Passage(index, "cpu", quick=False, seed=0)
    assert len(passage.ids) > max(2 * 128, 4 * index.config.index_topk, index.config.sliding_window)
    assert passage.spans[0][0] == 0 and passage.spans[-1][1] == len(passage.ids)
    assert [a for a, _ in passage.spans[1:]] == [b for _, b in passage.spans[:-1]]
    assert any(a % 4 and a % 128 for a, _ in passage.spans) and passage.spans[-1][1] - passage.spans[-1][0] == 1
    assert Passage(index, "cpu", quick=False, seed=1).ids != passage.ids


def scaled_by(factor):
    return lambda result, *args: result * factor


def the_worst_rows(result, *args):
    q, keys, weights, *rest = args
    _, rows = index_topk.kernels[-1].load()(q, keys, -weights, *rest)
    return result[0], rows


def other_expert(result, *args):
    experts, weights = result
    changed = experts.clone()
    changed[0] = (experts[0] + 1) % args[1].shape[0]
    return changed, weights


def the_same_twice(result, *args):
    experts, weights = result
    return torch.cat([experts[:, :1], experts[:, :-1]], dim=1), weights


def without_the_last(result, *args):
    """Of tokens that see fewer rows than can be kept."""
    score, rows = (x.clone() for x in result)
    last_T = (rows >= 0).sum(1) - 1
    few = ((last_T >= 0) & (rows[:, -1] < 0)).nonzero()[:, 0]
    score[few, last_T[few]], rows[few, last_T[few]] = -math.inf, -1
    return score, rows


def one_not_to_be_seen(result, *args):
    score, rows = (x.clone() for x in result)
    few = (rows[:, -1] < 0).nonzero()[:, 0]
    score[few, -1], rows[few, -1] = 0.0, rows[few].amax(1) + 1
    return score, rows


def one_bit(result, *args):
    planes = args[1]
    planes[0].view(torch.uint8)[args[3][-1], 0] ^= 1
    return result


FAULTS = {
    "attention off by a thousandth": (attention, scaled_by(1.001), 0, ("exact",)),
    "experts' sum": (routed_experts, scaled_by(1.02), 2, ("exact", "trained")),
    "the worst rows": (index_topk, the_worst_rows, 1, ("exact", "trained")),
    "an expert nobody chose": (route, other_expert, 3, ("exact", "trained")),
    "an expert chosen twice": (route, the_same_twice, 1, ("exact", "trained")),
    "a row that is left out": (index_topk, without_the_last, 1, ("exact", "trained")),
    "a row that is not visible yet": (index_topk, one_not_to_be_seen, 1, ("exact", "trained")),
    "a bit of a stored row": (store_rows, one_bit, 0, ("exact", "trained")),
    "rows as read back": (as_stored, scaled_by(1 + 1e-6), 1, ("exact", "trained")),
}


@needs_kernels
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_named_with_its_layer(fault, only):
    op, spoil, layer, arithmetics = FAULTS[fault]
    only(layer)
    with planted(op, spoil):
        findings = found()
    named = {f"layer {layer}, {op.name}, {a}" for a in arithmetics}
    assert named <= set(failed(findings)) and findings[-1].ok is False
    assert all(f"{f.figures['kernel']}" == "planted" for f in findings if f.what in named)


@needs_kernels
def test_a_fault_in_one_kind_of_layer_is_found_there_and_nowhere_else(only):
    only(1, 2)
    with planted(compressed_rows, scaled_by(1.01), when=lambda *args: args[6] == 128):
        names = failed(found())
    assert {n.split(",")[0].split(" (")[0] for n in names} == {"layer 2"}
    assert "layer 2, compressed_rows, exact" in names


@needs_kernels
def test_a_kernel_that_gives_no_number_or_fails_is_found(only):
    only(0)

    def hole(result, *args):
        result = result.clone()
        result[-1, 1] = math.nan
        return result

    with planted(attention, hole):
        assert "layer 0, attention, trained" in failed(found())

    def burst(result, *args):
        raise RuntimeError("out of registers")

    with planted(attention, burst):
        findings = found()
    assert failed(findings) == ["layer 0 (window), exact", "layer 0 (window), trained"]
    assert "RuntimeError: out of registers" in findings[0].detail


@pytest.mark.parametrize(
    ("tensor", "of"),
    [
        ("layers.1.attn.wq_a.weight", lambda n: n.layers[1].attn.wq_a.value),
        ("layers.1.ffn.experts.3.w2.weight", lambda n: n.bank._stacks["layers.1", "w2"]),
    ],
)
def test_a_byte_that_changes_in_memory_is_named_by_its_tensor(tensor, of, only, monkeypatch):
    only(1)
    load = layers.as_held

    def flipped(*args, **kwargs):
        network = load(*args, **kwargs)
        data = of(network).data.view(torch.uint8)
        (data[3] if data.dim() > 1 else data).view(-1)[1000] ^= 0x10
        return network

    monkeypatch.setattr(layers, "as_held", flipped)
    assert f"layer 1, {tensor}" in failed(found())


def test_a_weight_in_a_vector_that_changes_shows_in_its_layer(only, monkeypatch):
    """What is not held by a `Weight` is not compared byte by byte; the layer as a whole tells."""
    only(1)
    load = layers.as_held

    def changed(*args, **kwargs):
        network = load(*args, **kwargs)
        network.layers[1].attn.attn_sink[0] += 1.0
        return network

    monkeypatch.setattr(layers, "as_held", changed)
    assert "layer 1 (CSA), exact" in failed(found())


def test_no_more_than_one_part_is_in_memory_at_a_time(sound):
    assert len(sound.networks) == 2 * 2 * 6 and set(sound.alive) == {0}
    assert sound.foreign == []
    assert max(sound.bytes) < layers.open_checkpoint(NANO).nbytes / 2.5


def test_a_draft_head_that_does_not_run_here_is_left_out(tmp_path, only):
    only()
    findings = found(copied(tmp_path, "golden_dspark/fp8fp4"))
    assert [f.ok for f in findings if f.what == "draft stage"] == [None]


@pytest.mark.parametrize("quick", [True, False])
def test_weights_that_are_no_numbers_are_named_by_the_first_layer_that_has_them(quick, tmp_path):
    path = copied(tmp_path)
    dtype, shape, data = read_entries(path / SHARD)["layers.1.attn.kv_norm.weight"]
    rewrite(path, {"layers.1.attn.kv_norm.weight": (dtype, shape, b"\xff\xff" + data[2:])})
    findings = found(path, quick=quick)
    assert failed(findings)[0] == "layer 1, exact" and findings[-1].ok is False
    after = {f.what.split(" (")[0] for f in findings if f.ok}
    assert "layer 0" in after and ("layer 2" in after) is quick


def test_where_a_layer_does_not_fit_it_is_left_out_with_its_bytes(only, monkeypatch):
    only(0, 1)
    monkeypatch.setattr(layers, "free_memory", lambda: 1000)
    findings = found()
    assert [f.ok for f in findings] == [None] * 5  # nothing was compared, so nothing is well
    assert findings[0].figures["free_bytes"] == 1000 and "1,000 are free" in findings[0].detail
    assert "0 of 4 layers" in findings[-1].detail and "4 comparison(s) left out" in findings[-1].detail


def test_without_kernels_it_says_that_definitions_run(only):
    only(1)
    with contextlib.ExitStack() as stack:
        for op in OPS.values():
            stack.enter_context(use(op, "torch"))
        findings = found()
    assert all(f.ok for f in findings) and "no kernel runs here" in findings[0].detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_here_is_said():
    (finding,) = found(device="cuda")
    assert finding.ok is None and "no such device" in finding.detail


def test_missing_tensors_are_left_to_the_check_of_files(tmp_path):
    path = copied(tmp_path)
    rewrite(path, {"layers.1.attn_norm.weight": None})
    (finding,) = found(path)
    assert finding.ok is None


def test_a_shape_that_fp8_rows_cannot_hold_is_looked_at_with_others(tmp_path):
    random_checkpoint(tmp_path, tiny((0, 4), head_dim=40, qk_rope_head_dim=8), layout="bf16")
    findings = found(tmp_path)
    assert failed(findings) == [] and "trained with bf16 rows" in findings[-1].detail


def test_the_seam_is_as_before_when_it_is_over():
    before = {name: (list(op.kernels), op.choice) for name, op in OPS.items()}
    x = torch.zeros(1)
    with beside():
        assert all(op.pick(place_of(x)).name == "beside" for op in OPS.values())
    assert {name: (list(op.kernels), op.choice) for name, op in OPS.items()} == before


def test_differences_are_counted_with_what_is_no_number():
    inf, nan = math.inf, math.nan
    apart, _ = difference(torch.tensor([1.0, inf, nan, 2.0, -inf]), torch.tensor([1.5, inf, nan, nan, inf]))
    assert apart.tolist() == [0.5, 0.0, 0.0, inf, inf]
    tally = Tally()
    tally.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    assert (tally.unequal, tally.worst) == (1, 0.5) and tally.relative_rms == pytest.approx(math.sqrt(4 / 17))
    tally.add(torch.tensor([1.0]), torch.tensor([0.0]))
    assert tally.worst == inf


def test_a_choice_made_otherwise_is_as_far_from_a_tie_as_its_scores():
    scores = torch.tensor([[0.5, 1.0, 0.98, 0.1]])
    chosen, wanted = torch.tensor([[1, 3]]), torch.tensor([[1, 2]])
    assert expert_gaps(chosen, wanted, scores).item() == pytest.approx(0.88)
    assert expert_gaps(wanted, wanted, scores).item() == 0.0
    assert expert_gaps(chosen, wanted, torch.empty(0)).item() == math.inf  # by hash there are no ties
    assert expert_gaps(torch.tensor([[1, 1]]), wanted, scores).item() == math.inf
    rows, other = torch.tensor([[2, 7]]), torch.tensor([[2, 5]])
    mine, theirs = torch.tensor([[4.0, 1.0]]), torch.tensor([[4.0, 1.2]])
    assert row_gaps(rows, mine, other, theirs).item() == pytest.approx(0.05)
    assert row_gaps(rows, mine, rows, mine).item() == 0.0
    above = torch.tensor([[4.0, 2.2]])  # were it so good, the definition would have chosen it
    assert row_gaps(rows, above, other, theirs).item() == pytest.approx(0.25)


def test_where_all_visible_rows_are_kept_another_choice_is_no_tie():
    inf = math.inf
    two, score = torch.tensor([[2, 5, -1]]), torch.tensor([[4.0, 1.2, -inf]])
    for rows, mine in (
        ([2, 7, -1], [4.0, 1.2, -inf]),
        ([2, -1, -1], [4.0, -inf, -inf]),
        ([2, 5, 7], [4.0, 1.2, 1.2]),
        ([2, 2, 5], [4.0, 4.0, 1.2]),
    ):
        assert row_gaps(torch.tensor([rows]), torch.tensor([mine]), two, score).item() == inf
    assert row_gaps(two, score, two, score).item() == 0.0
