"""The prefix tree: a hit gives the bits a fresh computation gives, and what it keeps is worth most.

The cache starts out poisoned with NaN, so a row that is read without having been written shows at once.
"""

from __future__ import annotations

import random

import pytest
import torch

from pyrosome.cache.nodes import Node, common_tokens
from pyrosome.cache.pool import Shortage
from pyrosome.cache.prefix import MAX_USES, depth_cost
from pyrosome.cache.state import Snapshot
from pyrosome.cache.streams import BLOCK_TOKENS
from pyrosome.config import ModelConfig
from pyrosome.testing.shapes import tiny
from tests.cache.serving import CONFIG, Serving
from tests.networks import network, run, tokens

IDS = tokens(1400)
LONG = 8192 + 3 * BLOCK_TOKENS  # past one page of HCA rows


@pytest.fixture(scope="module")
def whole():
    return run(network(CONFIG), IDS)


def fresh(ids: list[int], config: ModelConfig = CONFIG, kv_format: str = "f32") -> torch.Tensor:
    """Logits after the last id, computed alone."""
    return run(network(config), ids, kv_format=kv_format)[-1]


def branch(at: int, length: int = 150, seed: int = 9) -> list[int]:
    """IDS up to `at`, then something else."""
    return IDS[:at] + tokens(length, seed=seed + at)


# A hit gives the same bits.


@pytest.mark.parametrize("snapshot_bytes", [64 << 20, 0], ids=["state kept", "state replayed"])
def test_every_shared_length_gives_the_bits_of_a_fresh_computation(whole, snapshot_bytes):
    """All residues mod 128, and the lengths around whole blocks, where at least one token is computed."""
    served = Serving(snapshot_bytes=snapshot_bytes)
    served.serve(IDS[:600])
    for length in [*range(1, 4), *range(120, 136), *range(250, 387, 1 if snapshot_bytes else 3), 511, 512, 513]:
        hit = served.serve(IDS[:length])
        reusable = (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert hit.match.length == reusable < length
        assert hit.match.limit == ("all" if snapshot_bytes or not reusable else "no snapshot")
        assert hit.num_computed == length - reusable
        assert (hit.replayed > 0) == (snapshot_bytes == 0 and reusable > 0)
        assert torch.equal(hit.logits, whole[length - 1]), length
    served.assert_nothing_is_held()


@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
def test_rows_of_every_format_come_back_as_they_were(kv_format):
    # Rows of 64 + 16 channels, which fp8 stores in one group.
    served = Serving(kv_format=kv_format, host_blocks=100)
    served.serve(branch(384, 200))
    served.evict()
    for length in (129, 300, 385, 500):
        hit = served.serve(IDS[:length])
        assert hit.match.length >= min(384, length - 1) // 128 * 128
        assert torch.equal(hit.logits, fresh(IDS[:length], kv_format=kv_format))
    assert served.tree.counters.restored_blocks == 3


def test_a_prompt_of_a_thousand_tokens_is_reused_but_for_its_last_block():
    served = Serving()
    served.serve(IDS[:1000])
    again = served.serve(IDS[:1000])
    assert again.match.length == 896
    assert again.num_computed == 104


@pytest.mark.parametrize("order", [1, -1, 7])
def test_branches_at_every_block_of_a_page_keep_to_themselves(order):
    """Pages of 2, 4 and 64 blocks, so branches part inside pages and at their ends; then one after another goes."""
    served = Serving(cache_tokens=32768)
    prompts = [branch(at, 170) for at in range(0, 9 * BLOCK_TOKENS, BLOCK_TOKENS)] + [
        branch(300),
        branch(513),
        IDS[:1300],
    ]
    expected = [fresh(p) for p in prompts]
    at = list(range(len(prompts)))
    random.Random(order).shuffle(at)
    for i in at:
        assert torch.equal(served.serve(prompts[i]).logits, expected[i])
    for i in reversed(at):
        hit = served.serve(prompts[i])
        assert hit.match.limit == "all"
        assert torch.equal(hit.logits, expected[i])
    for blocks in (3, 5, 9, 1):
        served.evict(blocks)
        for i in at[:6]:
            assert torch.equal(served.serve(prompts[i]).logits, expected[i])
    served.assert_nothing_is_held()


@pytest.mark.parametrize("host_blocks", [0, 100], ids=["evicted", "spilled"])
def test_a_branch_that_goes_takes_nothing_from_the_other(host_blocks):
    for at in range(1, 6):
        served = Serving(host_blocks=host_blocks)
        one, other = IDS[: at * 128 + 400], branch(at * 128, 400)
        served.serve(one)
        served.serve(other)
        served.evict(2)
        for prompt in (other, one, other):
            assert torch.equal(served.serve(prompt).logits, fresh(prompt)), at


@pytest.mark.parametrize("cut", [8191, 8192, 8193, 8192 + 129])
def test_pages_of_eight_thousand_tokens_are_left_at_their_end(cut):
    config = tiny((4, 128), max_position_embeddings=16384)
    ids = tokens(LONG)
    served = Serving(config, max_context=16384, cache_tokens=3 * LONG)
    served.serve(ids, cuts=range(2048, LONG, 2048))
    prompt = ids[:cut] + tokens(140, seed=3)
    hit = served.serve(prompt)
    assert hit.match.length == cut // 128 * 128
    assert torch.equal(hit.logits, fresh(prompt, config))
    again = served.serve(ids)
    assert torch.equal(again.logits, fresh(ids, config))
    assert again.match.length == (LONG - 1) // 128 * 128


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 4, 5, 7])
def test_blocks_brought_back_beside_others_of_their_page(whole, keep):
    """Of 8 blocks the first `keep` never left: the rest goes into pages that begin with copies of their rows."""
    served = Serving(host_blocks=100)
    served.serve(IDS[:1100])
    served.evict(served.tree.num_blocks - keep)
    other = branch(keep * 128, 300)  # and somebody writes where they were
    assert torch.equal(served.serve(other).logits, fresh(other))
    hit = served.serve(IDS[:1100])
    assert (hit.match.length, hit.match.limit) == (1024, "all")
    assert served.tree.counters.restored_blocks == 8 - keep
    assert torch.equal(hit.logits, whole[1099])
    assert torch.equal(served.serve(other).logits, fresh(other))
    served.assert_nothing_is_held()


@pytest.mark.parametrize("host_blocks", [0, 3])
def test_another_process_finds_what_was_stored(whole, tmp_path, host_blocks):
    first = Serving(disk_path=str(tmp_path), host_blocks=host_blocks)
    first.serve(IDS[:700])
    first.tree.store()
    second = Serving(disk_path=str(tmp_path), host_blocks=host_blocks)
    hit = second.serve(IDS[:700])
    assert (hit.match.length, hit.match.limit, hit.num_computed) == (640, "all", 60)
    assert torch.equal(hit.logits, whole[699])
    assert second.tree.counters.restored_blocks == 5
    assert second.serve(IDS[:700], salt="tenant").match.length == 0
    second.assert_nothing_is_held()


def test_two_sequences_of_one_prompt_at_once_share_and_part(whole):
    """Both compute the same blocks, the second finds them published; then each goes its own way."""
    served = Serving()
    one, other = served.enter(IDS[:400]), served.enter(branch(390, 200))
    for sequence, cursor, ids in ((one[0], one[1], IDS[:400]), (other[0], other[1], branch(390, 200))):
        served.go_on(sequence, cursor, ids[:300])
    assert served.tree.num_blocks == 2
    assert torch.equal(served.go_on(other[0], other[1], branch(390, 200)), fresh(branch(390, 200)))
    assert torch.equal(served.go_on(one[0], one[1], IDS[:400]), whole[399])
    for s in (one[0], other[0]):
        served.runner.close(s)
    for prompt in (IDS[:400], branch(390, 200)):
        assert torch.equal(served.serve(prompt).logits, fresh(prompt))


@pytest.mark.parametrize("back", [1, 2, 3, 8])
def test_a_sequence_cut_back_over_a_boundary_publishes_what_it_says_then(back):
    """Its cursor stands behind a block whose last ids it took back: what follows is not put under the old ones."""
    served = Serving()
    served.runner = type(served.runner)(network(CONFIG), "f32", 3, 4096, num_drafts=8, cache_tokens=4096)
    served.pool = served.tree.pool = served.runner.pool
    sequence, cursor, _, _ = served.enter(IDS[:258])
    served.go_on(sequence, cursor, IDS[:257])
    sequence.length = 257 - back
    changed = branch(257 - back, 300)
    served.go_on(sequence, cursor, changed)
    served.runner.close(sequence)
    for prompt in (changed, IDS[:256] + changed[256:], IDS[:300]):
        assert torch.equal(served.serve(prompt).logits, fresh(prompt))


# Salts.


def test_nothing_is_shared_between_salts():
    served = Serving(host_blocks=10)
    served.serve(IDS[:300], salt="a")
    for salt in ("", "b", "a ", "A"):
        assert served.serve(IDS[:300], salt=salt).match.limit == "no common prefix"
    assert served.serve(IDS[:300], salt="a").match.length == 256
    served.tree.forget("a")
    assert served.serve(IDS[:300], salt="a").match.length == 0
    assert served.serve(IDS[:300], salt="b").match.length == 256


# Why not more.


def test_the_reasons_of_a_match_name_where_and_how_far(whole):
    served = Serving(snapshot_bytes=0)
    assert served.serve(IDS[:700]).match.limit == "no common prefix"
    tree = served.tree

    parts = tree.match(branch(300, 200), "", 499)
    assert (parts.length, parts.limit, parts.stream) == (256, "no common prefix", "")
    assert parts.reason.startswith("the prompt leaves what is known at token 300; 256 tokens before that")

    full = tree.match(IDS[:700], "", 699)
    assert (full.length, full.limit, full.stream, full.snapshot) == (640, "no snapshot", "window_kv", None)
    assert "640" in full.reason and "token 0" in full.reason

    served.evict(2)
    gone = tree.match(IDS[:700], "", 699)
    assert (gone.length, gone.limit, gone.stream) == (384, "evicted", "index_k")
    assert gone.reason.startswith("384 tokens are known; 2 blocks of 128 after them were, and had to leave the cache")

    short = tree.match(IDS[:128], "", 127)
    assert (short.length, short.limit) == (0, "all") and "128" in short.reason


def test_a_limit_is_rounded_down_and_never_beyond_the_ids():
    served = Serving()
    served.serve(IDS[:700])
    for limit, length in ((-5, 0), (0, 0), (127, 0), (128, 128), (255, 128), (10_000, 640)):
        assert served.tree.match(IDS[:700], "", limit).length == length
    assert served.tree.match([], "", -1).length == 0


def test_common_tokens_counts_ids_and_not_bytes():
    def key(*ids: int) -> bytes:
        return torch.tensor([*ids, *range(BLOCK_TOKENS - len(ids))], dtype=torch.int32).numpy().tobytes()

    assert common_tokens(key(1, 2, 3), []) == 0
    assert common_tokens(key(1, 2, 3), [key(5), key(1, 2, 4), key(1, 7)]) == 2
    assert common_tokens(key(1, 2, 3), [key(257, 2, 3)]) == 0  # their low bytes are equal


def test_blocks_are_compared_id_by_id():
    """Ids that differ in their high bytes alone are other ids."""
    served = Serving(tiny((0, 4), vocab_size=70_000))
    served.serve([5] * 300)
    for token in (5 + 256, 5 + 65_536):
        assert served.serve([5] * 127 + [token] + [5] * 172).match.length == 0


# What has to leave, and in which order.


def known(served: Serving, prompt: list[int]) -> int:
    return served.tree.match(prompt, "", len(prompt)).length


def test_the_last_blocks_of_what_was_not_used_longest_go_first():
    served = Serving()
    prompts = [tokens(300, seed=s) for s in (1, 2, 3)]
    for p in prompts:
        served.serve(p)
    served.serve(prompts[0])  # used again
    served.evict(1)
    assert [known(served, p) for p in prompts] == [256, 128, 256]
    served.evict(1)
    assert [known(served, p) for p in prompts] == [256, 0, 256]
    served.evict(2)
    assert [known(served, p) for p in prompts] == [256, 0, 0]


def test_what_was_used_often_grows_old_too():
    served = Serving()
    often = tokens(200, seed=50)
    for _ in range(5):
        served.serve(often)
    for seed in range(60, 60 + 2 * MAX_USES):
        served.serve(tokens(200, seed=seed))
        served.evict(1)
        if not known(served, often):
            break
    assert not known(served, often)
    assert seed > 62, "but not before others that were used once"


def test_a_block_far_behind_is_worth_more_than_one_at_the_beginning():
    served = Serving()
    served.serve(IDS[:900])
    served.serve(tokens(200, seed=4))  # came later, and is cheaper
    served.evict(1)
    assert (known(served, IDS[:900]), known(served, tokens(200, seed=4))) == (896, 0)


@pytest.mark.parametrize(("tokens_before", "gflop"), [(4096, 29.1), (32768, 32.2), (131072, 42.7), (1_048_576, 141.4)])
def test_the_cost_of_a_block_grows_as_the_flops_of_a_token_do(tokens_before, gflop):
    """Against model.md section 12: per token of Flash at some contexts."""
    share = depth_cost(ModelConfig.preset("flash"))
    ours = 1 + share * tokens_before / BLOCK_TOKENS
    assert ours == pytest.approx(gflop / 28.6, rel=0.1)


def test_blocks_that_somebody_runs_on_are_passed_over():
    served = Serving(cache_tokens=2048)
    sequence, cursor, _, _ = served.enter(IDS[:600])
    served.go_on(sequence, cursor, IDS[:600])
    served.serve(tokens(700, seed=2))
    pages = {r: served.pool.num_free_pages(r) for r in served.pool.ratios}
    assert not served.tree.make_room(Shortage(0, {4: 100}))
    assert known(served, IDS[:600]) == 512  # nothing to be had from it, so it stays
    assert known(served, tokens(700, seed=2)) == 0
    assert served.pool.num_free_pages(4) == pages[4] + 3
    assert not served.tree.make_room(Shortage(1, {}))  # a slot is not the tree's to give
    served.runner.close(sequence)


def test_blocks_under_those_somebody_runs_on_are_reached_in_need():
    """Two compute one prompt at once: the tree has the first one's pages, and the second's blocks after them."""
    served = Serving(cache_tokens=2048)
    first, second = served.enter(IDS[:700]), served.enter(IDS[:900])
    served.go_on(first[0], first[1], IDS[:700])
    served.go_on(second[0], second[1], IDS[:900])
    served.runner.close(first[0])
    free = served.pool.num_free_pages(4)
    assert served.tree.make_room(Shortage(0, {4: free and 1}))
    assert served.pool.num_free_pages(4) == free + 1
    logits = served.go_on(second[0], second[1], IDS[:1050])
    assert torch.equal(logits, fresh(IDS[:1050]))
    served.runner.close(second[0])
    assert known(served, IDS[:1050]) == 1024, "who goes on is published again from the beginning"
    assert torch.equal(served.serve(IDS[:1050]).logits, fresh(IDS[:1050]))


def test_a_match_is_shortened_where_there_is_no_room_and_its_own_blocks_stay():
    served = Serving(cache_tokens=1280, host_blocks=100)
    served.serve(IDS[:1200])
    served.evict(4)
    holder, cursor, _, _ = served.enter(tokens(500, seed=8))
    served.go_on(holder, cursor, tokens(500, seed=8))
    match = served.tree.match(IDS[:1200], "", 1199)
    assert match.length == 1152
    while served.pool.num_free_pages(4):
        served.pool.take(4)
    holding, shorter = served.tree.adopt(match)
    assert (shorter.length, shorter.limit) == (640, "evicted")
    assert "640 of 1152" in shorter.reason
    assert shorter.snapshot is None or shorter.snapshot.length <= 640
    assert known(served, IDS[:640]) == 640
    served.pool.release(holding)
    served.runner.close(holder)


def test_a_talk_of_many_turns_holds_a_coarse_page_once():
    """Each turn copies the page it goes on in; what came before moves to the copy."""
    served = Serving(cache_tokens=4096)
    for length in range(200, 2400, 200):
        served.serve(IDS[:length] if length <= 1400 else IDS + tokens(length - 1400))
    total = served.pool.plan.num_pages[128] - 1
    assert total - served.pool.num_free_pages(128) == 1
    assert served.pool.plan.num_pages[4] - 1 - served.pool.num_free_pages(4) == 9
    served.assert_nothing_is_held()


def test_names_of_what_left_are_bounded():
    served = Serving(max_shadows=6)
    for seed in range(8):
        served.serve(tokens(400, seed=seed))
        served.evict()
    assert served.tree.num_shadows == 6
    assert served.tree.match(tokens(400, seed=7), "", 399).limit == "evicted"
    assert served.tree.match(tokens(400, seed=1), "", 399).limit == "no common prefix"


def test_eviction_s_list_does_not_grow_with_time():
    served = Serving()
    for _ in range(1500):
        holding, _ = served.tree.adopt(served.tree.match(IDS[:300], "", 299))
        served.pool.release(holding)
    served.serve(IDS[:300])
    for _ in range(3000):
        holding, _ = served.tree.adopt(served.tree.match(IDS[:300], "", 299))
        served.pool.release(holding)
    assert len(served.tree._heap) <= 2 * served.tree.num_blocks + 1025


# Forgetting.


def test_a_prefix_found_wrong_is_gone_with_all_that_was_computed_from_it(tmp_path):
    served = Serving(disk_path=str(tmp_path))
    served.serve(IDS[:500])
    served.serve(branch(300, 300))
    running = served.enter(IDS[:650])
    served.tree.store()
    served.tree.drop_path(IDS[:500], "")
    served.go_on(running[0], running[1], IDS[:650])
    served.runner.close(running[0])
    for prompt in (IDS[:500], IDS[:650], branch(300, 300)):
        assert served.tree.match(prompt, "", len(prompt)).limit == "no common prefix"
        assert served.tree.match(prompt, "", len(prompt)).length == 0, "who ran on it publishes nothing more of it"
    other = Serving(disk_path=str(tmp_path))
    assert other.tree.match(IDS[:500], "", 499).length == 0
    assert torch.equal(served.serve(IDS[:500]).logits, fresh(IDS[:500]))
    assert served.serve(IDS[:500]).match.length == 384
    served.tree.drop_path(IDS[:5], "")  # no whole block: nothing is named by it
    assert served.serve(IDS[:500]).match.length == 384


# State.


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
    assert not path.keep(64, num_bytes=5)
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


# What it costs.


def test_publishing_costs_what_is_new(monkeypatch):
    """Blocks looked at, as a sequence grows by a token at a time."""
    served = Serving()
    sequence, cursor, _, _ = served.enter(IDS[:900])
    served.go_on(sequence, cursor, IDS[:900])
    made = []
    monkeypatch.setattr(Node, "__init__", lambda self, *a, _real=Node.__init__: (made.append(a), _real(self, *a))[1])
    holdings = dict(sequence.holding.pages)
    for length in range(901, 1030):
        served.runner.step([(sequence, IDS[length - 1 : length])])
        served.tree.publish(cursor, IDS[:length], sequence.holding, length)
    assert len(made) == 2 - 1
    assert sequence.holding.pages.keys() == holdings.keys()
    served.runner.close(sequence)


def test_a_sequence_goes_on_in_its_own_pages_after_it_has_published_them():
    """What others may read is sealed; what comes after it is written in place, nothing is copied."""
    served = Serving()
    sequence, cursor, _, _ = served.enter(IDS[:200])
    served.go_on(sequence, cursor, IDS[:200])
    before = {r: list(p) for r, p in sequence.holding.pages.items()}
    served.go_on(sequence, cursor, IDS[:300])
    for ratio, pages in before.items():
        assert sequence.holding.pages[ratio][: len(pages)] == pages
    served.runner.close(sequence)


@pytest.mark.parametrize("salt", ["", "s"])
def test_pages_return_to_what_was_free_before(salt):
    served = Serving(host_blocks=4)
    sequences = []
    for ids in (IDS[:700], branch(300)):
        sequences.append((served.enter(ids, salt), ids))
        served.go_on(sequences[-1][0][0], sequences[-1][0][1], ids)
    fork = served.runner.fork(sequences[0][0][0])
    served.runner.step([(fork, tokens(40))])
    for s in [fork, *(e[0] for e, _ in sequences)]:
        served.runner.close(s)
    held = [served.pool.plan.num_pages[r] - 1 - served.pool.num_free_pages(r) for r in served.pool.ratios]
    pages = {(r, p) for (r, p) in served.tree._held}
    assert sum(held) == len(pages)
    served.assert_nothing_is_held()


def test_networks_without_history_match_by_state_alone():
    config = tiny((0, 0))
    served = Serving(config)
    served.serve(IDS[:300])
    hit = served.serve(IDS[:290])
    assert (hit.match.length, hit.match.limit) == (256, "all")
    assert torch.equal(hit.logits, fresh(IDS[:290], config))
