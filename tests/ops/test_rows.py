"""`UnitedRows`: one numbering for nothing, the rings, and the step's own rows."""

import pytest
import torch

from pyrosome.ops.rows import UnitedRows

B, R, T, C = 2, 3, 4, 5


def example(dtype=torch.float32):
    """Every row holds its own number, from 1."""
    number = torch.arange(1, 1 + B * R + T, dtype=dtype)[:, None].expand(-1, C)
    return number[: B * R].reshape(B, R, C), number[B * R :]


def test_row_zero_is_nothing_then_come_the_rings_span_by_span_then_the_step():
    ring, fresh = example()
    rows = UnitedRows(ring, fresh)
    assert rows.format == ""
    assert rows.num_rows == 1 + B * R + T
    index = torch.arange(rows.num_rows)[None]
    found, flat = rows.read(index)
    assert found[flat][0].tolist() == [[float(i)] * C for i in range(rows.num_rows)]
    assert torch.equal(found[1 + R], ring[1, 0])
    assert torch.equal(found[1 + B * R :], fresh)


def test_minus_one_reads_the_row_of_zeros():
    rows = UnitedRows(*example())
    index = torch.tensor([[3, -1, 0], [-1, -1, 10]])
    found, flat = rows.read(index)
    assert flat.shape == index.shape
    assert flat.tolist() == [[3, 0, 0], [0, 0, 10]]
    assert not found[flat][index < 1].any()


@pytest.mark.parametrize(("low", "high"), [(0, 3), (4, 11), (10, 11), (2, 2)])
def test_span_rows_are_a_slice_shared_by_all_spans(low, high):
    rows = UnitedRows(*example())
    part = rows.span_rows(low, high)
    assert part.shape == (1, high - low, C)
    assert part[0, :, 0].tolist() == list(range(low, high))


def test_a_ring_of_no_rows_and_a_step_of_no_tokens():
    ring, fresh = example()
    assert UnitedRows(ring[:, :0], fresh).num_rows == 1 + T
    assert UnitedRows(ring, fresh[:0]).num_rows == 1 + B * R


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_have_the_step_s_own_dtype(dtype):
    ring, fresh = example()
    rows, _ = UnitedRows(ring, fresh.to(dtype)).read(torch.tensor([[1]]))
    assert rows.dtype == dtype
    assert rows[:, 0].tolist() == list(range(1 + B * R + T))


def test_poison_in_a_ring_stays_where_it_is():
    ring, fresh = example()
    ring = ring.clone()
    ring[0, 1] = float("nan")
    found, flat = UnitedRows(ring, fresh).read(torch.tensor([[1, 3, -1, 4, 7]]))
    assert torch.isfinite(found[flat]).all()
    assert found.isnan().any(1).nonzero().flatten().tolist() == [2]


def test_gradients_reach_both_the_ring_and_the_step():
    ring, fresh = (x.clone().requires_grad_(True) for x in example())
    found, flat = UnitedRows(ring, fresh).read(torch.tensor([[2, -1, 7, 7]]))
    found[flat].sum().backward()
    assert ring.grad[..., 0].tolist() == [[0, 1, 0], [0, 0, 0]]
    assert fresh.grad[..., 0].tolist() == [2, 0, 0, 0]
