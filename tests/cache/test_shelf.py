"""State beside the prefix tree: where it is kept, what it may take, and who makes way."""

from __future__ import annotations

import pytest
import torch

from pyrosome.cache.state import Snapshot
from pyrosome.testing.shapes import tiny
from tests.cache.serving import CONFIG, IDS, Serving, branch, fresh
from tests.networks import network, run, tokens


@pytest.fixture(scope="module")
def whole():
    return run(network(CONFIG), IDS)


class Path:
    """A chain of blocks with fake state."""

    def __init__(self, budget: int, num_bytes: int = 1) -> None:
        self.served = Serving(tiny((4,)), snapshot_bytes=budget, cache_tokens=16384, max_context=8192)
        self.num_bytes = num_bytes
        tree, pool = self.served.tree, self.served.pool
        self.holding, self.cursor = pool.open(), tree.cursor("")
        pool.prepare(self.holding, 0, 8192, with_slot=False)
        self.ids = tokens(8192)

    def keep(self, block: int, pinned: bool = False, num_bytes: int = 0, draft_from: int = 0) -> bool:
        self.served.tree.publish(self.cursor, self.ids, self.holding, max(block * 128, self.cursor.node.length))
        data = torch.zeros(num_bytes or self.num_bytes, dtype=torch.uint8)
        return self.served.tree.keep_snapshot(self.cursor, Snapshot(block * 128, draft_from, data), pinned=pinned)

    @property
    def kept(self) -> list[int]:
        node, found = self.cursor.node, []
        while node.parent:
            found += [node.depth] if node.snapshot else []
            node = node.parent
        return found[::-1]


def test_state_is_dense_near_the_end_and_sparse_before():
    path = Path(1 << 20)
    for block in range(1, 33):
        path.keep(block)
        ages = [block - b for b in path.kept]
        assert ages[-3:] == [2, 1, 0][-block:]
        # Whoever goes back by any distance finds state no farther than that distance again before it.
        for back in range(block):
            assert min(block - back - b for b in [0, *path.kept] if b <= block - back) <= max(1, back)
    assert len(path.kept) <= 10


def test_state_where_requests_part_stays_when_the_path_is_thinned():
    path = Path(1 << 20)
    for block in range(1, 33):
        path.keep(block, pinned=block in (3, 4, 5, 9))
    assert {3, 4, 5, 9} <= set(path.kept)


def test_a_prompt_that_leaves_a_known_path_pins_the_state_there():
    served = Serving()
    served.serve(IDS[:400], cuts=(128, 256))
    assert served.serve(branch(256, 200)).match.snapshot.length == 256
    node = served.tree.match(IDS[:256], "", 256).nodes[-1]
    assert node.pinned and not node.parent.pinned


def test_a_divergence_met_once_has_state_the_next_time():
    served = Serving()
    sequence, cursor, _, _ = served.enter(IDS[:600])
    served.runner.step([(sequence, IDS[:600])])
    served.tree.publish(cursor, IDS, sequence.holding, 600)
    served.runner.close(sequence)
    first, second = served.serve(branch(300)), served.serve(branch(300, seed=77))
    assert (first.match.length, second.match.length) == (256, 256)
    assert (first.replayed > 0, second.replayed) == (True, 0)
    assert torch.equal(second.logits, fresh(branch(300, seed=77)))


def test_state_keeps_to_its_budget_and_pins_outlive_the_rest_for_a_while_only():
    path = Path(4)
    assert path.keep(1, pinned=True)
    for block in (8, 9, 10, 11, 12):
        assert path.keep(block)
        assert path.served.tree.snapshot_bytes <= 4
    assert path.kept == [1, 10, 11, 12]
    for block in range(13, 64):
        assert path.keep(block), "pins never keep new state out"
        assert path.kept[0] == 1 or block > 20
    assert path.kept[0] > 1
    before = path.kept
    assert not path.keep(64, num_bytes=5)
    assert path.kept == before, "what can never fit drives nothing out"
    counters = path.served.tree.counters
    assert counters.snapshots_kept - counters.snapshots_dropped == path.served.tree.num_snapshots


def test_pins_alone_fill_a_budget_and_the_oldest_makes_way():
    path = Path(3)
    for block in (1, 5, 9, 13):
        path.keep(block, pinned=True)
    assert path.kept == [5, 9, 13]
    assert path.keep(20)
    assert path.kept == [9, 13, 20]


def test_state_of_a_block_nobody_has_is_not_kept():
    path = Path(10)
    assert path.keep(3)
    path.served.pool.release(path.holding)
    path.served.evict()
    assert path.served.tree.snapshot_bytes == 0
    tree = path.served.tree
    assert not tree.keep_snapshot(path.cursor, Snapshot(384, 0, torch.zeros(1, dtype=torch.uint8)))
    assert not tree.keep_snapshot(path.cursor, Snapshot(130, 0, torch.zeros(1, dtype=torch.uint8)))
    assert not tree.keep_snapshot(path.cursor, Snapshot(0, 0, torch.zeros(1, dtype=torch.uint8)))
    tree.forget()
    assert not tree.keep_snapshot(path.cursor, Snapshot(384, 0, torch.zeros(1, dtype=torch.uint8)))


def test_of_two_states_of_one_block_the_one_with_more_of_the_draft_window_stays():
    path = Path(10)
    for draft_from, kept in ((200, 200), (300, 200), (0, 0), (100, 0)):
        path.keep(3, draft_from=draft_from)
        assert path.cursor.node.snapshot.draft_from == kept
    assert path.served.tree.snapshot_bytes == 1


def test_state_that_leaves_memory_for_want_of_room_is_found_in_its_tier(whole):
    served = Serving(host_blocks=1000, snapshot_bytes=200_000)
    served.serve(IDS[:600])
    first = served.tree.snapshot_bytes
    for seed in range(6):
        served.serve(tokens(600, seed=50 + seed))
    assert first and served.tree.snapshot_bytes <= 200_000
    assert served.tree.counters.snapshots_dropped
    hit = served.serve(IDS[:513])
    assert (hit.match.limit, hit.num_computed, hit.replayed) == ("all", 1, 0)
    assert torch.equal(hit.logits, whole[512])
