"""Each module alone, fed the official inputs: what end-to-end equality could hide.

In `exact` outputs agree to 2e-5; in `trained` the relative RMS error is at most 1e-2 (teacher-forced, since
random tiny networks are chaotic under rounding).
"""

import pytest
import torch

from pyrosome.cache.views import FreshLayer
from pyrosome.model.deepseek_v4 import CSA_RATIO
from pyrosome.model.step import Span, Step
from pyrosome.ops.hyper_connection import hyper_connection_in, hyper_connection_out
from pyrosome.quant import hadamard
from tests.golden.vectors import ids, layer_numbers, model, vectors

INTER, QUANT = "bf16_intermediates", "fp8fp4_vectors"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def whole(length, tokens=None):
    return Step.of([Span(0, 0, tokens or [0] * length)])


def turns(network, step, ratio):
    return network.rotary(step, {ratio})[ratio]


def close(ours, theirs, atol=2e-5):
    assert ours.shape == theirs.shape
    worst = (ours - theirs).abs().max().item()
    assert worst <= atol, f"differs by up to {worst:.2e}"


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_attention(kind):
    v, network = vectors(INTER), model("bf16").network
    block = network.layers[layer_numbers()[kind]]
    x = v[f"{kind}.attn.in"]
    step = whole(len(x))
    ours = block.attn(x, step, turns(network, step, block.ratio), FreshLayer(step), [])
    close(ours, v[f"{kind}.attn.out"])


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_compressor(kind):
    v, network = vectors(INTER), model("bf16").network
    block = network.layers[layer_numbers()[kind]]
    x = v[f"{kind}.attn.in"]
    step = whole(len(x))
    turn = turns(network, step, block.ratio).emitted
    compressor = block.attn.compressor
    kv, gate = compressor.wkv(x), compressor.wgate(x)
    ours = compressor(kv, gate, step.emit(block.ratio), turn, FreshLayer(step), "tail")
    close(ours, v[f"{kind}.compressor.out"])


def test_indexer_rows_scores_and_choice():
    v, network = vectors(INTER), model("bf16").network
    block = network.layers[layer_numbers()["csa"]]
    x = v["csa.attn.in"]
    step = whole(len(x))
    turn = turns(network, step, CSA_RATIO)
    indexer, latent = block.attn.indexer, block.attn.q_norm(block.attn.wq_a(x))
    kv, gate = indexer.compressor.wkv(x), indexer.compressor.wgate(x)
    rows = indexer.compressor(kv, gate, step.emit(CSA_RATIO), turn.emitted, FreshLayer(step), "index_tail")
    close(hadamard(rows), v["csa.indexer.compressor.out"])

    weight = indexer.weights_proj(x)
    score, index, _ = indexer(indexer.wq_b(latent), kv, gate, weight, step, turn, FreshLayer(step))
    clear = v["csa.indexer.topk_gap"] > 1e-4
    assert clear.float().mean() > 0.9
    ours = torch.where(index < 0, 10_000, index)[clear].sort(-1).values  # unused entries last, as -1 sorts first
    theirs = v["csa.indexer.topk_sorted"].long()[clear]
    theirs = torch.where(theirs < 0, 10_000, theirs).sort(-1).values
    assert torch.equal(ours, theirs)

    at = v["positions_sel"]
    expected = v["csa.indexer.score_sel"].gather(1, index[at].clamp(min=0))
    real = index[at] >= 0
    close(score[at][real], expected[real], 1e-4)


@pytest.mark.parametrize("kind", ["moe", "hash"])
def test_experts(kind):
    v, network = vectors(INTER), model("bf16").network
    block = network.layers[layer_numbers()[kind]]
    x = v[f"{kind}.ffn.in"]
    step = whole(len(x), ids("bf16")[: len(x)])
    expert, weight = block.ffn.gate(x, step)
    order = v[f"{kind}.gate.indices"].long().argsort(-1)
    assert torch.equal(expert.sort(-1).values, v[f"{kind}.gate.indices"].long().sort(-1).values)
    close(weight.gather(1, expert.argsort(-1)), v[f"{kind}.gate.weights"].gather(1, order))
    close(block.ffn(x, step, network.bank, block.name), v[f"{kind}.ffn.out"])


def test_hyper_connection():
    v, network = vectors(INTER), model("bf16").network
    block = network.layers[layer_numbers()["csa"]]
    hc = block.hc_attn
    u, post, comb = hyper_connection_in(v["mhc.x"], hc.fn, hc.base, hc.scale, hc.eps, hc.hc_eps, hc.iters)
    close(u, v["mhc.pre_y"])
    close(post, v["mhc.post"])
    close(comb, v["mhc.comb"])
    out = hyper_connection_out(v["mhc.x"], v["csa.attn.out"][:64], post, comb)
    close(out, v["mhc.out_after_attn"])
    turned = hyper_connection_out(v["mhc.x"], v["csa.attn.out"][:64], post, comb.transpose(1, 2))
    assert (turned - v["mhc.out_after_attn"]).abs().max() > 1e-2, "the orientation of comb must matter here"


def test_streams_after_the_last_layer():
    v, network = vectors(INTER), model("bf16").network
    last = len(network.layers) - 1
    out = network(Step.of([Span(0, 0, ids("bf16"))]), taps=(0, last))
    assert set(out.taps) == {0, last}
    close(out.taps[last][v["positions_sel"]], v["final_hc_sel"], 1e-4)


def test_a_forward_in_two_stages_is_the_forward():
    """What a pipeline does: the second stage starts from the first one's streams."""
    network, step = model("bf16").network, Step.of([Span(0, 0, ids("bf16")[:150])])
    whole_run = network(step)
    first = network(step, layers=range(3))
    second = network(step, streams=first.streams, layers=range(3, len(network.layers)))
    assert torch.equal(second.streams, whole_run.streams)


def relative_rms(ours, theirs):
    return ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()


@pytest.mark.parametrize(("kind", "layer"), [("csa", 1), ("hca", 2)])
def test_trained_attention_teacher_forced(kind, layer):
    v, network = vectors(QUANT), model("fp8fp4", "trained", "f32").network
    block = network.layers[layer]
    x = v[f"tf.qsim32.{kind}.attn.in"]
    step = whole(len(x))
    ours = block.attn(x, step, turns(network, step, block.ratio), FreshLayer(step), [])
    assert relative_rms(ours, v[f"tf.qsim32.{kind}.attn.out"]) <= 1e-2
    exact = model("fp8fp4").network.layers[layer].attn
    assert relative_rms(exact(x, step, turns(network, step, block.ratio), FreshLayer(step), []), ours) > 1e-2


def test_trained_experts_teacher_forced():
    v, network = vectors(QUANT), model("fp8fp4", "trained", "f32").network
    x = v["tf.qsim32.moe.ffn.in"]
    step = whole(len(x), v["tf.ids"].tolist())
    ours = network.layers[2].ffn(x, step, network.bank, "layers.2")
    assert relative_rms(ours, v["tf.qsim32.moe.ffn.out"]) <= 1e-2
