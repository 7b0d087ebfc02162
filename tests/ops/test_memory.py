"""Where weights lie: spread over memory nodes, held against being swapped out.  One node is enough to run these."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.errors import RequestError
from pyrosome.model.build import build
from pyrosome.model.numerics import EXACT
from pyrosome.ops import native
from pyrosome.options import LoadOptions
from tests.checkpoint.files import DATA

pytestmark = pytest.mark.skipif(not native.available(), reason="there are no native kernels here")

PAGE = 4096
REFUSED = (errno.ENOSYS, errno.EPERM)  # what a container may answer


class Library:
    """The library, with answers of our own to some of its calls."""

    def __init__(self, **answers):
        self.calls, self._answers, self._real = [], answers, native.library()

    def __getattr__(self, name):
        if name not in self._answers:
            return getattr(self._real, name)

        def answer(*arguments):
            self.calls.append((name, *arguments))
            return self._answers[name]

        return answer


@pytest.fixture
def answering(monkeypatch):
    def use(**answers):
        made = Library(**answers)
        monkeypatch.setattr(native, "library", lambda: made)
        native._tell_not_spread.cache_clear()
        return made

    yield use
    native._tell_not_spread.cache_clear()


@pytest.fixture(scope="module")
def index():
    return open_checkpoint(DATA / "golden/fp8fp4")


def test_there_is_a_node_at_least():
    nodes = native.library().numa_nodes()
    assert nodes >= 1
    listed = Path("/sys/devices/system/node/has_memory")
    if listed.exists():  # such as 0-1
        assert nodes == 1 + int(listed.read_text().strip().replace("-", ",").split(",")[-1])
    else:
        assert nodes == 1


@pytest.mark.parametrize("offset", [0, 1, 64, PAGE - 1])
def test_a_spread_region_keeps_what_it_holds(offset):
    """Written before and after, and what lies beside it too."""
    whole = torch.arange(40 * PAGE, dtype=torch.int64).to(torch.uint8)
    before = whole.clone()
    region = whole[offset : offset + 30 * PAGE]
    error = native.library().interleave(region.data_ptr(), region.nbytes, 1)
    assert error == 0 or error in REFUSED
    assert torch.equal(whole, before)
    region += 1
    assert torch.equal(region, before[offset : offset + 30 * PAGE] + 1)
    assert torch.equal(whole[:offset], before[:offset])
    assert torch.equal(whole[offset + 30 * PAGE :], before[offset + 30 * PAGE :])


def test_a_region_without_a_page_of_its_own_is_left_alone():
    small = torch.ones(100, dtype=torch.uint8)
    assert native.library().interleave(small.data_ptr(), small.nbytes, 1) in (0, *REFUSED)
    assert small.sum() == 100


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the call")
@pytest.mark.parametrize("nodes", [0, -1, 1025])
def test_a_number_of_nodes_there_cannot_be_is_an_error(nodes):
    region = torch.empty(4 * PAGE, dtype=torch.uint8)
    assert native.library().interleave(region.data_ptr(), region.nbytes, nodes) == errno.EINVAL


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/numa_maps is Linux's")
def test_a_spread_region_is_known_to_the_system():
    maps = Path("/proc/self/numa_maps")
    if not maps.exists():
        pytest.skip("this system does not tell how memory is spread")
    region = torch.empty(64 << 20, dtype=torch.uint8)  # large: of a mapping of its own
    if native.library().interleave(region.data_ptr(), region.nbytes, 1) in REFUSED:
        pytest.skip("mbind is not allowed here")
    first = -(-region.data_ptr() // PAGE) * PAGE
    lines = [line.split() for line in maps.read_text().splitlines()]
    assert {policy for at, policy, *_ in lines if int(at, 16) == first} == {"interleave:0"}


def test_one_node_spreads_nothing(answering):
    library = answering(numa_nodes=1, interleave=0)
    with native.spread():
        native.empty_pages(8, PAGE)
    assert [name for name, *_ in library.calls] == ["numa_nodes"]


def test_regions_are_spread_inside_the_block_alone(answering):
    library = answering(numa_nodes=3, interleave=0)
    native.empty_pages(8, PAGE)
    with native.spread():
        region = native.empty_pages(8, PAGE)
    native.empty_pages(8, PAGE)
    assert [call for call in library.calls if call[0] == "interleave"] == [
        ("interleave", region.data_ptr(), 8 * PAGE, 3)
    ]


def test_a_refusal_is_said_once(answering, caplog):
    answering(numa_nodes=2, interleave=errno.EPERM)
    with caplog.at_level(logging.WARNING, "pyrosome"), native.spread():
        for _ in range(3):
            native.empty_pages(8, PAGE).fill_(1)
    (record,) = caplog.records
    assert "2 memory nodes" in record.getMessage() and "numa=off" in record.getMessage()


def test_weights_of_a_load_are_spread_where_it_was_not_put_off(answering, index):
    library = answering(numa_nodes=2, interleave=0)
    build(index, EXACT, options=LoadOptions(numa="off"))
    assert not library.calls
    build(index, EXACT)
    assert len([name for name, *_ in library.calls if name == "interleave"]) > 10


# ---------------------------------------------------------------- held against being swapped out


def test_a_small_region_is_held_or_the_limit_is_in_the_way():
    region = torch.ones(4 * PAGE, dtype=torch.uint8)
    assert native.library().lock(region.data_ptr(), region.nbytes) in (0, errno.ENOMEM, errno.EPERM, errno.EAGAIN)
    assert region.sum() == 4 * PAGE
    assert native.library().lock(region.data_ptr(), 0) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="VmLck is Linux's")
def test_what_is_held_is_known_to_the_system():
    def held():
        return 1024 * next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmLck"))

    before, region = held(), torch.ones(1 << 20, dtype=torch.uint8)
    if native.lock([region]):
        pytest.skip("the limit of this process is too low")
    assert held() - before >= region.nbytes - 2 * PAGE
    ctypes.CDLL(None).munlock(ctypes.c_void_p(region.data_ptr()), ctypes.c_size_t(region.nbytes))


# In a process of its own, which has no right to hold memory: the limit is nothing, and no privilege goes past it.
UNPRIVILEGED = """
import os, resource, sys, torch
from pyrosome.ops import native
native.library()
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
print(native.lock([torch.ones(1 << 20, dtype=torch.uint8)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits are told apart by Linux's rules")
def test_a_limit_of_nothing_is_named():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 of 1,048,576 bytes are held") and "RLIMIT_MEMLOCK is 0 bytes" in done.stdout


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EPERM, errno.EAGAIN])
def test_a_load_goes_on_without_and_says_what_to_do(answering, index, caplog, error):
    library = answering(lock=error)
    with caplog.at_level(logging.WARNING, "pyrosome"):
        build(index, EXACT, options=LoadOptions(lock_memory=True))
    (text,) = [r.getMessage() for r in caplog.records]
    assert text.startswith("lock_memory: the weights may be swapped out: 0 of ") and os.strerror(error) in text
    assert "RLIMIT_MEMLOCK is " in text and "ulimit -l unlimited" in text and "LimitMEMLOCK" in text
    assert [name for name, *_ in library.calls] == ["lock"]  # the first that fails is enough


def test_another_error_does_not_send_to_the_limit(answering):
    answering(lock=errno.ENOSYS)
    assert "RLIMIT_MEMLOCK" not in native.lock([torch.ones(9)])


def test_all_tiles_of_a_load_are_held(answering, index, caplog):
    library = answering(lock=0)
    with caplog.at_level(logging.WARNING, "pyrosome"):
        network = build(index, EXACT, options=LoadOptions(lock_memory=True))
    held = {begin: size for _, begin, size in library.calls}
    tiles = [network.layers[1].attn.wq_a.value, network.bank.weights("layers.1").w2]
    assert all(held[t.data.data_ptr()] == t.data.nbytes for t in tiles)
    assert len(held) == len(library.calls) and not caplog.records


def test_nothing_is_held_unless_it_was_asked_for(answering, index):
    library = answering(lock=0)
    build(index, EXACT)
    assert not library.calls


def test_of_mapped_experts_nothing_is_held(answering, index):
    library = answering(lock=0)
    network = build(index, EXACT, options=LoadOptions(lock_memory=True, experts="mapped"))
    files = {m.data.data_ptr() for m in network.bank.weights("layers.1").w1.matrices}
    assert library.calls and files.isdisjoint(begin for _, begin, _ in library.calls)
    assert not network.bank.tiles()


def test_without_kernels_it_says_so(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    assert "pyrosome doctor" in native.lock([torch.ones(9)])


@pytest.mark.parametrize(
    ("field", "value"), [("experts", "disk"), ("experts", None), ("numa", "on"), ("lock_memory", 1)]
)
def test_a_value_out_of_range_names_its_field(field, value):
    with pytest.raises(RequestError, match=field):
        LoadOptions(**{field: value})
