"""End to end against the vectors of the official inference code: logits of whole checkpoints.

Everything here runs through the cached, ragged forward; `test_spans_are_really_run` counts the forwards.
"""

import contextlib

import pytest
import torch

from pyrosome.model.step import Span, Step
from pyrosome.ops.seam import OPS, use
from tests.golden.vectors import assert_logits, ids, model, vectors

BF16, QUANT = "bf16_vectors", "fp8fp4_vectors"


@pytest.fixture(autouse=True, params=["chosen", "definitions"])
def versions(request):
    """Everything once as this machine would run it, and once by the definitions alone."""
    ops = list(OPS.values()) if request.param == "definitions" else []
    with contextlib.ExitStack() as forced:
        for op in ops:
            forced.enter_context(use(op, "torch"))
        yield request.param


stored_or_unpacked = pytest.mark.parametrize("unpack", [False, True], ids=["stored", "unpacked"])


@stored_or_unpacked
def test_bf16_whole_prompt(unpack):
    assert_logits(model("bf16", unpack=unpack).logits(ids("bf16")), vectors(BF16)["logits_prefill"][0])


def test_bf16_chunked_at_the_given_bounds():
    v = vectors(BF16)
    bounds = v["chunk_bounds"].tolist()
    ours = model("bf16").logits(ids("bf16"), cuts=bounds[1:-1])
    assert_logits(ours[v["chunked_positions"]], v["logits_chunked_hf"][0])
    assert_logits(ours, v["logits_prefill"][0])


def test_bf16_token_by_token():
    v, tokens = vectors(BF16), ids("bf16")
    ours = model("bf16").logits(tokens, cuts=range(1, len(tokens)))
    assert_logits(ours, v["logits_prefill"][0])
    assert_logits(ours[v["decode_positions"]], v["logits_decode"][0])


def test_bf16_drafts_whole_and_in_pieces():
    v, tokens = vectors(BF16), ids("bf16")
    rows = v["chunked_positions"][:-1]
    for cuts in (None, [100, 233], range(1, len(tokens))):
        ours = model("bf16").draft_logits(tokens, cuts=cuts)
        assert ours.shape == (len(tokens) - 1, 160)
        assert_logits(ours[rows], v["mtp_logits_prefill_sel"][0])
        assert_logits(ours[-8:], v["mtp_logits_decode_last8"][0])


@stored_or_unpacked
def test_fp8fp4_whole_prompt(unpack):
    assert_logits(model("fp8fp4", unpack=unpack).logits(ids("fp8fp4")), vectors(QUANT)["logits_exact"][0])


@pytest.mark.parametrize("cuts", [[120], [1, 2, 3, 127, 128, 129], "token by token"], ids=str)
def test_fp8fp4_in_pieces(cuts):
    tokens = ids("fp8fp4")
    ours = model("fp8fp4").logits(tokens, range(1, len(tokens)) if cuts == "token by token" else cuts)
    assert_logits(ours, vectors(QUANT)["logits_exact"][0])
    assert_logits(ours[-32:], vectors(QUANT)["logits_decode_exact_last32"][0])


def test_fp8fp4_drafts():
    v, tokens = vectors(QUANT), ids("fp8fp4")
    rows = v["positions_sel"][:-1]
    for cuts in (None, [7, 120], range(1, len(tokens))):
        assert_logits(model("fp8fp4").draft_logits(tokens, cuts)[rows], v["mtp_logits_exact_sel"][0])


def test_trained_end_to_end_agrees_as_far_as_two_runs_of_the_reference_do():
    v = vectors(QUANT)
    ours = model("fp8fp4", "trained", "f32").logits(ids("fp8fp4"))[v["positions_sel"]]
    theirs = v["logits_qsim32_sel"][0]
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.85
    assert (ours - theirs).abs().median() <= 0.3
    # and it is not the exact arithmetic in disguise
    exact = v["logits_exact"][0][v["positions_sel"]]
    assert (ours - theirs).abs().median() < 0.2 * (theirs - exact).abs().median()


def test_trained_on_unquantised_weights_keeps_the_kv_and_index_roundings():
    v = vectors(BF16)
    ours = model("bf16", "trained", "f32").logits(ids("bf16"))[v["chunked_positions"]]
    theirs = v["logits_prefill_sim32_sel"][0]
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.85
    assert (ours - theirs).abs().median() <= 0.3


def test_spans_are_really_run():
    """A route in pieces must not be a whole-sequence forward in disguise."""
    m, tokens, sizes = model("bf16"), ids("bf16")[:40], []
    hook = m.network.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append((args[0].ids_T.numel(), kwargs["cache"] is not None)), with_kwargs=True
    )
    try:
        m.logits(tokens, cuts=range(1, 40))
        m.logits(tokens, cuts=[13])
        m.logits(tokens)
    finally:
        hook.remove()
    assert sizes == [(1, True)] * 40 + [(13, True), (27, True), (40, True)]


@pytest.mark.parametrize("name", ["bf16", "fp8fp4"])
def test_the_forward_without_a_cache_agrees(name):
    """The second route: whole sequences, no pool, nothing written."""
    m, tokens = model(name), ids(name)
    with torch.no_grad():
        ours = m.network.logits(m.network(Step.of([Span(0, 0, tokens)])).streams)
    assert_logits(ours, vectors(BF16)["logits_prefill"][0] if name == "bf16" else vectors(QUANT)["logits_exact"][0])


@pytest.mark.parametrize("name", ["bf16", "fp8fp4"])
def test_training_agrees_with_the_official_logits_and_drafts(name):
    """With gradients on other versions of the ops run; the network they make is the same."""
    m, tokens = model(name, unpack=True), ids(name)
    step, ahead = Step.of([Span(0, 0, tokens)]), Step.of([Span(0, 0, [*tokens[1:], 0])])
    embedded = m.network.embed_ids(step.ids_T)[:, None].expand(-1, m.config.hc_mult, -1)
    streams = m.network(step, streams=embedded.detach().clone().requires_grad_(True)).streams
    assert streams.requires_grad
    v = vectors(BF16 if name == "bf16" else QUANT)
    assert_logits(m.network.logits(streams).detach(), v["logits_prefill" if name == "bf16" else "logits_exact"][0])
    drafts = m.network.draft_stage.draft(m.network, ahead, streams)[0].detach()
    rows = v["chunked_positions" if name == "bf16" else "positions_sel"][:-1]
    assert_logits(drafts[rows], v["mtp_logits_prefill_sel" if name == "bf16" else "mtp_logits_exact_sel"][0])


def test_training_forward_is_causal():
    """No logit feels a later token, whatever version of the ops runs."""
    m, tokens = model("bf16", unpack=True), ids("bf16")
    made = []
    for last in (tokens[200], tokens[200] ^ 1):
        step = Step.of([Span(0, 0, [*tokens[:200], last, *tokens[201:260]])])
        embedded = m.network.embed_ids(step.ids_T)[:, None].expand(-1, m.config.hc_mult, -1)
        streams = m.network(step, streams=embedded.detach().clone().requires_grad_(True)).streams
        made.append(m.network.logits(streams).detach())
    assert torch.equal(made[0][:200], made[1][:200])
    assert not torch.equal(made[0][200:], made[1][200:])
