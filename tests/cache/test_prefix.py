"""The prefix tree: a hit gives the bits a fresh computation gives.

The cache starts out poisoned with NaN, so a row that is read without having been written shows at once.
"""

from __future__ import annotations

import random

import pytest
import torch

from pyrosome.cache.nodes import Node, common_tokens
from pyrosome.cache.streams import BLOCK_TOKENS
from pyrosome.testing.shapes import tiny
from tests.cache.serving import CONFIG, IDS, LONG, Serving, branch, fresh
from tests.networks import network, run, tokens


@pytest.fixture(scope="module")
def whole():
    return run(network(CONFIG), IDS)


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
