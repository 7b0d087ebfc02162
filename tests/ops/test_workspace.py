"""Memory that large results leave behind is lent to the next ones."""

import gc
import threading

import pytest
import torch

from pyrosome.ops import workspace
from pyrosome.ops.workspace import LEAST_BYTES, empty, empty_like, give_back, kept_bytes

LARGE = LEAST_BYTES // 4


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    give_back()
    yield
    give_back()


def test_a_tensor_has_memory_of_its_own_until_its_last_view_is_gone():
    a = empty(LARGE, like=torch.empty(0))
    b = empty(LARGE, like=a)
    assert a.data_ptr() != b.data_ptr() and a.dtype == torch.float32 and a.is_contiguous()
    part, at = a[5:7], a.data_ptr()
    del a
    assert kept_bytes() == 0
    assert empty(LARGE, like=b).data_ptr() != at
    gc.collect()
    give_back()
    part.fill_(1)
    del part
    assert kept_bytes() >= LEAST_BYTES
    again = empty(LARGE, like=b)
    assert again.data_ptr() == at and kept_bytes() == 0
    b.fill_(2), again.fill_(3)
    assert b.eq(2).all() and again.eq(3).all()


def test_about_the_same_size_will_do_and_another_will_not():
    a = empty(9, LARGE // 8, like=torch.empty(0))
    at = a.data_ptr()
    del a
    near = empty(LARGE // 8 * 9 - 16, like=torch.empty(0))  # both are rounded up
    assert near.data_ptr() == at and kept_bytes() == 0
    del near
    less = empty(LARGE, like=torch.empty(0))  # two thirds of a block are enough
    assert less.data_ptr() == at and kept_bytes() == 0
    del less
    assert empty(2 * LARGE, like=torch.empty(0)).data_ptr() != at


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_shapes_and_types(dtype):
    x = torch.zeros(3, 7, LARGE, dtype=dtype)
    made = empty_like(x)
    assert made.shape == x.shape and made.dtype == dtype and made.is_contiguous()
    made.copy_(x)
    assert not made.any()
    small = empty(3, 0, like=x)
    assert small.shape == (3, 0) and small.dtype == dtype


def test_small_ones_and_other_devices_are_plain():
    empty(LARGE - 1, like=torch.empty(0))
    empty(LARGE, like=torch.empty(0, device="meta"))
    gc.collect()
    assert kept_bytes() == 0


def test_what_is_not_used_for_a_while_is_given_back(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(workspace.time, "monotonic", lambda: now[0])
    empty(LARGE, like=torch.empty(0))
    now[0] = 5.0
    empty(2 * LARGE, like=torch.empty(0))
    held = kept_bytes()
    give_back(workspace.KEPT_S)
    assert kept_bytes() == held
    now[0] = 11.0
    give_back(workspace.KEPT_S)
    assert 2 * LEAST_BYTES <= kept_bytes() < held
    now[0] = 12.0
    empty(8 * LARGE, like=torch.empty(0))  # a new block: what has lain idle goes first
    now[0] = 16.0
    give_back(workspace.KEPT_S)
    assert 8 * LEAST_BYTES <= kept_bytes() < 10 * LEAST_BYTES


def test_threads_never_share_a_block():
    wrong = []

    def work(value):
        for _ in range(200):
            x = empty(LARGE, like=torch.empty(0))
            x[:64] = value
            if not x[:64].eq(value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
