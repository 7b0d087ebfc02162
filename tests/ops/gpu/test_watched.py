"""What is wrong in a launch is seen, though the interpreter would let it pass."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from pyrosome.ops import gpu
from pyrosome.ops.gpu import Variant
from tests.ops.gpu.held import DEVICE
from tests.ops.gpu.watched import meeting

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="kernels run on a device, which nobody watches")
ONE = Variant("one", {})


@gpu.jit
def _copy(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at + shift, mask=at < n, other=0.0), mask=at < n)


@gpu.jit
def _to_one_place(out_ptr):
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


@gpu.jit
def _after_the_one_before(x_ptr):
    here = tl.program_id(0)
    if here > 0:
        tl.store(x_ptr + here, tl.load(x_ptr + here - 1) + 1)


@gpu.jit
def _counted(out_ptr):
    tl.atomic_add(out_ptr, 1)


@gpu.jit
def _by_address(table_ptr, out_ptr):
    tl.store(out_ptr, tl.load(tl.load(table_ptr).to(tl.pointer_type(tl.float32))))


def test_a_kernel_that_keeps_to_its_tensors_passes():
    x, out = torch.randn(100), torch.zeros(100)
    gpu.launch(_copy, (4,), x, out, 100, 0, BLOCK=32, variant=ONE)
    assert torch.equal(x, out)


@pytest.mark.parametrize(("n", "shift"), [(101, 0), (100, 1), (100, -1)])
def test_reading_or_writing_outside_is_seen(n, shift):
    with pytest.raises(Exception, match="outside its tensors"):
        gpu.launch(_copy, (4,), torch.randn(100), torch.zeros(128), n, shift, BLOCK=32, variant=ONE)
    with pytest.raises(Exception, match="writes 1 elements outside"):
        gpu.launch(_copy, (4,), torch.randn(128), torch.zeros(100), 101, 0, BLOCK=32, variant=ONE)


def test_programs_that_meet_are_seen():
    with pytest.raises(RuntimeError, match="write to one place"):
        gpu.launch(_to_one_place, (3,), torch.zeros(1), variant=ONE)
    with meeting("_to_one_place"):
        gpu.launch(_to_one_place, (3,), torch.zeros(1), variant=ONE)
    with pytest.raises(RuntimeError, match="reads what program"):
        gpu.launch(_after_the_one_before, (3,), torch.zeros(3), variant=ONE)


def test_atomic_operations_may_meet():
    count = torch.zeros(1, dtype=torch.int32)
    gpu.launch(_counted, (5,), count, variant=ONE)
    assert count.item() == 5


def test_memory_without_values_holds_nan_and_addresses_in_tables_may_be_read():
    assert torch.empty(3).isnan().all() and torch.zeros(2).new_empty(2, 2).isnan().all()
    x, out = torch.tensor([7.0]), torch.zeros(1)
    gpu.launch(_by_address, (1,), torch.tensor([x.data_ptr()]), out, variant=ONE)
    assert out.item() == 7


def test_programs_run_in_the_opposite_order():
    x = torch.zeros(3)
    with meeting("_after_the_one_before"):
        gpu.launch(_after_the_one_before, (3,), x, variant=ONE)
    assert x.tolist() == [0, 1, 1]
