"""What has to leave the prefix tree, and in which order."""

from __future__ import annotations

import pytest
import torch

from pyrosome.cache.pool import Shortage
from pyrosome.cache.prefix import MAX_USES, depth_cost
from pyrosome.cache.streams import BLOCK_TOKENS
from pyrosome.config import ModelConfig
from pyrosome.testing.shapes import tiny
from tests.cache.serving import CONFIG, IDS, Serving, branch, fresh
from tests.networks import network, run, tokens


@pytest.fixture(scope="module")
def whole():
    return run(network(CONFIG), IDS)


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


def test_a_sequence_set_aside_is_known_whole_even_if_its_blocks_had_to_leave_while_it_ran():
    served = Serving()
    sequence, cursor, _, _ = served.enter(IDS[:400])
    served.go_on(sequence, cursor, IDS[:400])
    served.evict()
    assert known(served, IDS[:400]) == 0
    served.tree.publish(cursor, IDS[:400], sequence.holding, 400)  # as on setting it aside: no block is new
    served.runner.close(sequence)
    assert known(served, IDS[:400]) == 384
    assert torch.equal(served.serve(IDS[:400]).logits, fresh(IDS[:400]))


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


def test_blocks_are_never_brought_back_at_the_cost_of_those_before_them():
    """One branch runs on pages of its own, and under it lies a page nobody else holds, that the match leans on."""
    config = tiny((0, 4))
    served = Serving(config, cache_tokens=4096, host_blocks=100)
    other = branch(384, 300)
    running = served.enter(other)
    served.serve(IDS[:700])
    served.evict(1)
    served.serve(other[:520])
    served.go_on(running[0], running[1], other)
    while served.pool.num_free_pages(4):
        served.pool.take(4)
    holding, match = served.tree.adopt(served.tree.match(IDS[:700], "", 699))
    assert match.length == 512
    assert known(served, IDS[:512]) == 512 and known(served, other) == 640
    served.pool.release(holding)
    served.runner.close(running[0])


def test_a_talk_of_many_turns_holds_a_coarse_page_once():
    """Each turn copies the page it goes on in; what came before moves to the copy."""
    served = Serving(cache_tokens=4096)
    for length in range(200, 2400, 200):
        served.serve(IDS[:length] if length <= 1400 else IDS + tokens(length - 1400))
    total = served.pool.plan.num_pages[128] - 1
    assert total - served.pool.num_free_pages(128) == 1
    assert served.pool.plan.num_pages[4] - 1 - served.pool.num_free_pages(4) == 9
    served.assert_nothing_is_held()


def test_a_branch_that_goes_leaves_its_page_only_to_what_came_before_it():
    """Blocks before two branches lean on one of them, and on the other once that is gone."""
    served = Serving(tiny((0, 128)))
    served.serve(IDS[:700])
    served.serve(branch(300, 500))
    taken = served.pool.plan.num_pages[128] - 1
    assert taken - served.pool.num_free_pages(128) == 2
    served.serve(IDS[:700])
    served.evict(4)  # the second branch
    assert known(served, branch(300, 500)) == 256
    assert taken - served.pool.num_free_pages(128) == 1
    assert torch.equal(served.serve(IDS[:700]).logits, fresh(IDS[:700], tiny((0, 128))))


def test_a_chain_on_disk_longer_than_what_is_remembered_comes_back_whole(tmp_path, whole):
    first = Serving(disk_path=str(tmp_path))
    first.serve(IDS[:1100])
    first.tree.store()
    second = Serving(disk_path=str(tmp_path), max_shadows=3)
    for _ in range(2):
        assert second.tree.match(IDS[:1100], "", 1099).length == 1024
    hit = second.serve(IDS[:1100])
    assert (hit.match.length, hit.match.limit) == (1024, "all")
    assert torch.equal(hit.logits, whole[1099])
    assert second.tree.num_shadows == 0 and second.tree.num_blocks == 8
    second.assert_nothing_is_held()
    third = Serving(disk_path=str(tmp_path), max_shadows=3)
    assert third.tree.match(IDS[:1100], "", 1099).length == 0, "what is forgotten is forgotten on disk too"
    assert second.tree.snapshot_bytes == 0


def test_what_is_looked_at_and_not_taken_leaves_nothing_behind(tmp_path):
    first = Serving(disk_path=str(tmp_path))
    first.serve(IDS[:1100])
    first.tree.store()
    second = Serving(disk_path=str(tmp_path), max_shadows=4)
    assert second.tree.match(IDS[:1100], "", 1099).snapshot is not None
    second.tree.forget()
    assert second.tree.num_shadows == second.tree.snapshot_bytes == 0


def test_a_state_of_another_size_in_a_tier_is_as_none():
    served = Serving(host_blocks=100)
    served.serve(IDS[:400])
    served.evict()
    for (_, kind), (_, state) in served.tree.tiers._host.items():
        if kind == "state":
            state.resize_(state.numel() - 1)
    hit = served.serve(IDS[:400])
    assert (hit.match.length, hit.match.limit, hit.match.snapshot) == (384, "no snapshot", None)
    assert torch.equal(hit.logits, fresh(IDS[:400]))


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
