"""Attention over chosen rows, in parts, against one softmax written out in Python floats."""

import cmath
import contextlib
import itertools
import math

import pytest
import torch

import pyrosome.ops.sparse_attention as module
from pyrosome.ops.rope import frequencies, rotation
from pyrosome.ops.rows import UnitedRows
from pyrosome.ops.seam import use
from pyrosome.ops.sparse_attention import finish_attention, merge, sparse_attention

T, H, C, N, K = 6, 3, 8, 20, 7
NONE = float("-inf")


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chosen(num_tokens=T, num_keys=K, seed=0):
    """Different rows for each token: all there, some -1 in between, one there, none there."""
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([1 + torch.randperm(N - 1, generator=g)[:num_keys] for _ in range(num_tokens)])
    index[1::4, ::2] = -1
    index[2::4, : num_keys - 1] = -1
    index[3::4] = -1
    return index


def rows_of(values):
    """A source whose row i is values[i]; row 0, which stands for nothing, is zero."""
    return UnitedRows(values.new_zeros(1, 0, values.shape[1]), values[1:])


def example(dtype=torch.float32):
    return 2 * draw(T, H, C, dtype=dtype), draw(N, C, dtype=dtype, seed=1), chosen()


def softmax_by_hand(q, values, index, sink=None):
    """(o [T, H, C], lse [T, H]) in float64, with a sink's mass in the denominator where there is one."""
    o, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:2], NONE, dtype=torch.float64)
    for t, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        rows = [values[i].double() for i in index[t].tolist() if i >= 0]
        score = [math.fsum((q[t, h].double() * row).tolist()) / math.sqrt(q.shape[2]) for row in rows]
        masses = [*score, *([] if sink is None else [sink[h].item()])]
        if not rows:
            continue
        top = max(masses)
        lse[t, h] = top + math.log(math.fsum(math.exp(s - top) for s in masses))
        o[t, h] = sum(math.exp(s - lse[t, h].item()) * row for s, row in zip(score, rows, strict=True))
    return o, lse


def assert_by_hand(q, values, index, tolerance=1e-5):
    o, lse = sparse_attention(q, rows_of(values), index)
    expected_o, expected_lse = softmax_by_hand(q, values, index)
    torch.testing.assert_close(o.double(), expected_o, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)
    return o, lse


@pytest.mark.parametrize("split", [1, 2, 3, 6, 7, 8, 128])
@pytest.mark.parametrize("elements", [1, 2 * 3 * C, 1 << 20])
def test_against_one_softmax_whatever_the_splits_and_tiles(monkeypatch, split, elements):
    monkeypatch.setattr(module, "SPLIT_ROWS", split)
    monkeypatch.setattr(module, "TILE_ELEMENTS", elements)
    assert_by_hand(*example())


@pytest.mark.parametrize("num_keys", [1, 127, 128, 129, 257])
def test_around_the_split_itself(num_keys):
    q, values = draw(2, H, C), draw(300, C, seed=1)
    index = 1 + draw(2, 299, seed=2).argsort(1)[:, :num_keys]
    index[0, -1] = -1
    assert_by_hand(q, values, index)


def test_a_token_with_no_rows_gives_nothing():
    q, values, index = example()
    o, lse = sparse_attention(q, rows_of(values), index)
    empty = (index < 0).all(1)
    assert empty.any()
    assert not o[empty].any()
    assert (lse[empty] == NONE).all()
    assert torch.isfinite(lse[~empty]).all()


@pytest.mark.parametrize("split", [2, 128])
def test_a_step_of_padding_gives_nothing(monkeypatch, split):
    monkeypatch.setattr(module, "SPLIT_ROWS", split)
    o, lse = sparse_attention(draw(T, H, C), rows_of(draw(N, C)), torch.full((T, K), -1))
    assert torch.equal(o, torch.zeros(T, H, C))
    assert (lse == NONE).all()
    sink, turn = draw(H), rotation(frequencies(1e4, 4, None), torch.arange(T))
    assert torch.equal(finish_attention(sink, turn, [(o, lse)]), torch.zeros(T, H, C))


@pytest.mark.parametrize("shape", [(0, K), (T, 0)])
def test_no_tokens_and_no_keys(shape):
    q, index = draw(shape[0], H, C), torch.zeros(shape, dtype=torch.int64)
    o, lse = sparse_attention(q, rows_of(draw(N, C)), index)
    assert torch.equal(o, torch.zeros(shape[0], H, C))
    assert torch.equal(lse, torch.full((shape[0], H), NONE))


def test_a_row_named_twice_counts_twice():
    q, values = draw(1, H, C), draw(N, C, seed=1)
    assert_by_hand(q, values, torch.tensor([[4, 9, 4, -1]]))


def test_minus_one_is_masked_and_not_merely_zero():
    """A row of zeros would have score 0 and take mass; a source may also give it any finite row."""

    class Loud(UnitedRows):
        def read(self, index_TK):
            rows, flat = super().read(index_TK)
            return torch.cat([rows, rows.new_full((1, C), 50.0)]), torch.where(index_TK < 0, len(rows), flat)

    q, values, index = example()
    expected = sparse_attention(q, rows_of(values), index)
    found = sparse_attention(q, Loud(values.new_zeros(1, 0, C), values[1:]), index)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("split", [2, 128])
def test_poison_in_rows_never_asked_for_does_not_spread(monkeypatch, split):
    monkeypatch.setattr(module, "SPLIT_ROWS", split)
    q, values, index = example()
    clean = sparse_attention(q, rows_of(values), index)
    asked = index.unique()
    poisoned = torch.full_like(values, float("nan"))
    poisoned[asked[asked >= 0]] = values[asked[asked >= 0]]
    assert poisoned[1:].isnan().any()
    found = sparse_attention(q, rows_of(poisoned), index)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


def test_poison_in_one_token_s_rows_stays_with_that_token():
    q, values, _ = example()
    values[5] = float("nan")
    index = torch.tensor([[1, 2, -1], [3, 5, 2], [-1, -1, 4]] * 2)
    part = sparse_attention(q, rows_of(values), index)
    turn = rotation(frequencies(1e4, 4, None), torch.arange(T))
    for out in (part[0], finish_attention(draw(H), turn, [part])):
        assert out.isnan().flatten(1).any(1).tolist() == [False, True, False] * 2


@pytest.mark.parametrize("split", [2, 128])
@pytest.mark.parametrize("size", [1e-20, 300.0, 1e4])
def test_huge_and_tiny_scores(monkeypatch, split, size):
    monkeypatch.setattr(module, "SPLIT_ROWS", split)
    q, values, index = example()
    assert_by_hand((q * size).double(), values.double(), index, tolerance=1e-9)
    o, lse = sparse_attention(q * size, rows_of(values), index)
    assert torch.isfinite(o).all()
    assert (torch.isfinite(lse) | (index < 0).all(1)[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_are_at_least_float32(dtype):
    q, values, index = example(dtype)
    o, lse = assert_by_hand(q, values, index, tolerance=1e-13 if dtype == torch.float64 else 1e-5)
    assert o.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)


def finished_by_hand(q, values, index, sink, positions, frequency):
    o, _ = softmax_by_hand(q, values, index, sink)
    nope = q.shape[2] - 2 * len(frequency)
    for t, h, i in itertools.product(range(q.shape[0]), range(q.shape[1]), range(len(frequency))):
        at = nope + 2 * i
        z = complex(o[t, h, at], o[t, h, at + 1]) * cmath.exp(-1j * positions[t] * frequency[i])
        o[t, h, at], o[t, h, at + 1] = z.real, z.imag
    return o


POSITIONS = [0, 1, 5, 77, 300, 2]


def finish_example():
    q, values, index = (x.double() if x.is_floating_point() else x for x in example())
    f = frequencies(1e4, 4, None).double()
    sink = 2 * draw(H, dtype=torch.float64, seed=5)
    expected = finished_by_hand(q, values, index, sink, POSITIONS, f.tolist())
    return q, rows_of(values), index, sink, rotation(f, torch.tensor(POSITIONS)), expected


def test_any_assignment_of_rows_to_parts_is_one_softmax_with_a_sink():
    q, source, index, sink, turn, expected = finish_example()
    for number, owners in enumerate(itertools.product(range(3), repeat=K)):
        if number % 19:  # every 19th of the 2,187 meets all columns in all parts, and parts without any
            continue
        owner = torch.tensor(owners)
        parts = [sparse_attention(q, source, index[:, owner == p]) for p in range(3)]
        torch.testing.assert_close(finish_attention(sink, turn, parts), expected, rtol=1e-12, atol=1e-12)


def test_parts_may_come_in_any_order():
    q, source, index, sink, turn, expected = finish_example()
    parts = [sparse_attention(q, source, index[:, k : k + 1]) for k in range(4)]
    parts.append(sparse_attention(q, source, index[:, 4:]))
    for order in itertools.permutations(parts):
        torch.testing.assert_close(finish_attention(sink, turn, list(order)), expected, rtol=1e-12, atol=1e-12)


def test_a_part_of_nothing_changes_no_bit():
    q, source, index = example()[0], rows_of(example()[1]), example()[2]
    part = sparse_attention(q, source, index)
    nothing = sparse_attention(q, source, torch.full((T, 2), -1))
    for merged in (merge(*part, *nothing), merge(*nothing, *part)):
        assert all(torch.equal(a, b) for a, b in zip(merged, part, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(merge(*nothing, *nothing), nothing, strict=True))


@pytest.mark.parametrize("gap", [50.0, 1e4, 1e30])
def test_parts_far_apart_do_not_overflow(gap):
    ones = torch.ones(1, 1, 2)
    near, far = torch.tensor([[gap]]), torch.tensor([[-gap]])
    for o, lse in (merge(ones, near, -ones, far), merge(-ones, far, ones, near)):
        assert torch.equal(o, ones)
        assert torch.equal(lse, near)


def test_the_sink_takes_mass_and_adds_no_value():
    q, source, index, sink, turn, _ = finish_example()
    part = sparse_attention(q, source, index)
    without = finish_attention(torch.full_like(sink, -1e5), turn, [part])
    torch.testing.assert_close(without.norm(dim=-1), part[0].norm(dim=-1), rtol=1e-12, atol=1e-12)
    assert not finish_attention(torch.full_like(sink, 1e5), turn, [part]).any()
    equal = finish_attention(part[1][0], turn, [part])  # a sink as heavy as token 0's rows together
    torch.testing.assert_close(equal[0], without[0] / 2)


def test_the_sink_is_each_head_s_own():
    q, source, index, sink, turn, _ = finish_example()
    part = sparse_attention(q, source, index)
    before = finish_attention(sink, turn, [part])
    sink[1] += 3
    after = finish_attention(sink, turn, [part])
    changed = (after != before).any(-1).any(0)
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("split", [2, 128])
def test_gradients(monkeypatch, split):
    monkeypatch.setattr(module, "SPLIT_ROWS", split)
    g = [
        draw(*s, dtype=torch.float64, seed=i).requires_grad_()
        for i, s in enumerate([(4, 2, 6), (1, 2, 6), (3, 6), (2,)])
    ]
    index = torch.tensor([[1, 4, 3], [-1, 5, -1], [-1, -1, -1], [2, 2, 5]])
    turn = rotation(frequencies(1e4, 4, None).double(), torch.tensor([0, 3, 9, 4]))

    def run(q, ring, fresh, sink):
        source = UnitedRows(ring, fresh)
        parts = [sparse_attention(q, source, index), sparse_attention(q, source, index.flip(1)[:, :2])]
        return finish_attention(sink, turn, parts)

    assert torch.autograd.gradcheck(run, g)

    def log_masses(q, ring, fresh):
        lse = sparse_attention(q, UnitedRows(ring, fresh), index)[1]
        return lse.masked_fill(lse == NONE, 0.0)

    assert torch.autograd.gradcheck(log_masses, g[:3])


def test_gradients_of_a_step_of_padding_are_zero_and_finite():
    q, fresh, sink = (draw(*s).requires_grad_() for s in [(T, H, C), (N, C), (H,)])
    source, index = UnitedRows(torch.zeros(1, 0, C), fresh), torch.full((T, K), -1)
    turn = rotation(frequencies(1e4, 4, None), torch.arange(T))
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        parts = [sparse_attention(q, source, index), sparse_attention(q, source, index)]
        finish_attention(sink, turn, parts).sum().backward()
    for x in (q, fresh, sink):
        assert x.grad is not None
        assert not x.grad.any()


@pytest.mark.parametrize("version", ["torch", "cpu"])
def test_a_row_that_is_not_a_number_shows_in_the_answer(version):
    """A fault upstream must not be taken for a token without rows."""
    q, values, index = draw(1, 2, 32), draw(3, 32, seed=1), torch.tensor([[0, 1, -1]])
    values[1, 5] = float("nan")
    turn = rotation(frequencies(1e4, 8, None), torch.tensor([3]))
    ops = (module.sparse_attention, module.finish_attention)
    with torch.inference_mode(), contextlib.ExitStack() as forced:
        for op in ops:
            forced.enter_context(use(op, version))
        part = module.sparse_attention(q, rows_of(values), index)
        other = module.sparse_attention(q, rows_of(draw(2, 32, seed=2)), torch.tensor([[0, 1]]))
        assert part[0].isnan().any() and part[1].isnan().all()
        assert module.finish_attention(torch.zeros(2), turn, [part, other]).isnan().any()
