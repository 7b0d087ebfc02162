"""On the native kernels routes agree to the last bit: both arithmetics, every format of rows and of weights."""

import copy
import ctypes

import pytest
import torch

from pyrosome.engine.loaded import load_model
from pyrosome.engine.runner import Runner
from pyrosome.model.layers import Weight
from pyrosome.model.step import Span, Step
from pyrosome.ops import native
from pyrosome.ops.seam import OPS, use
from pyrosome.quant.tiles import TiledWeight, untile
from pyrosome.testing.shapes import tiny
from tests.golden.vectors import GOLDEN, ids, model
from tests.networks import network, run, tokens

try:
    native.library()
except OSError as error:
    pytest.skip(f"no native library here: {error}", allow_module_level=True)

NUMERICS = [("exact", "f32"), ("exact", "bf16"), ("trained", "f32"), ("trained", "fp8")]
on_every_arithmetic = pytest.mark.parametrize(("numerics", "kv_format"), NUMERICS, ids=["-".join(n) for n in NUMERICS])
on_both_checkpoints = pytest.mark.parametrize("name", ["bf16", "fp8fp4"])


def test_the_kernels_run_here():
    for op in OPS.values():
        op._picked.clear()  # what gradients made other tests choose
    run(model("fp8fp4", "trained").network, ids("fp8fp4")[:9], kv_format="fp8")
    chosen = {name: {version.__module__ for version in op._picked.values()} for name, op in OPS.items() if op.kernels}
    assert all(modules <= {f"pyrosome.ops.{m}.cpu" for m in ALL} for name, modules in chosen.items() if name in ALWAYS)


ALL = ("compress", "experts", "hyper_connection", "index_topk", "linear", "rope", "route", "sparse_attention")
ALWAYS = {
    "linear",
    "grouped_linear",
    "routed_experts",
    "sparse_attention",
    "finish_attention",
    "index_scores",
    "compress",
}


@on_both_checkpoints
@on_every_arithmetic
@pytest.mark.parametrize("unpack", [True, False], ids=["unpacked", "stored"])
def test_whole_equals_chunks_equals_token_by_token(name, numerics, kv_format, unpack):
    network, prompt = model(name, numerics, kv_format, unpack).network, ids(name)
    whole = run(network, prompt, kv_format=kv_format)
    for cuts in (
        range(1, len(prompt)),
        [1],
        [4],
        [127],
        [128],
        [129],
        [131],
        [100, 233],
        [5, 6, 7, 8, 9, 37, 111, 112],
    ):
        pieces = run(network, prompt, [c for c in cuts if c < len(prompt)], kv_format=kv_format)
        assert torch.equal(pieces, whole), f"cuts {cuts}"


@pytest.mark.parametrize("numerics", ["exact", "trained"])
def test_weights_in_tiles_equal_those_in_rows(numerics):
    in_tiles = load_model(GOLDEN / "fp8fp4", numerics=numerics, unpack=False).network
    in_rows = copy.deepcopy(in_tiles)
    for module in in_rows.modules():
        if isinstance(module, Weight) and isinstance(module.value, TiledWeight):
            module.value = untile(module.value)
    stacks = in_rows.bank._stacks
    stacks.update({k: untile(v) for k, v in stacks.items() if isinstance(v, TiledWeight)})
    assert in_rows.layers[1].attn.wq_a.value.scale.numel()
    prompt = ids("fp8fp4")
    assert torch.equal(run(in_tiles, prompt, kv_format="fp8"), run(in_rows, prompt, kv_format="fp8"))


@on_both_checkpoints
def test_drafts_in_pieces(name):
    m, prompt = model(name, "trained", "fp8"), ids(name)[:140]
    whole = m.draft_logits(prompt)
    for cuts in ([7, 120], range(1, 140)):
        assert torch.equal(m.draft_logits(prompt, cuts), whole)


@on_every_arithmetic
def test_company_order_and_padding(numerics, kv_format):
    """Sequences of many lengths in one step, in another order with padding in the next: each as it is alone."""
    net, prompt = model("fp8fp4", numerics, kv_format).network, ids("fp8fp4")
    lengths, grown = [1, 3, 200, 4, 127, 128, 129], 9
    runner = Runner(net, kv_format, len(lengths), 240)
    runner.pool.poison()
    holdings = [runner.pool.open() for _ in lengths]
    rows = [[] for _ in lengths]
    with torch.inference_mode():
        for start, stop, padding in ((0, 0, 0), (0, 2, 0), (2, grown, 11)):
            order = list(range(len(lengths)))[:: -1 if padding else 1]
            spans = []
            for i in order:
                a, b = (lengths[i] + start, lengths[i] + stop) if stop else (0, lengths[i])
                runner.pool.prepare(holdings[i], a, b)
                spans.append(Span(holdings[i].slot, a, prompt[i + a : i + b]))
            step = Step.of(
                spans, pad_lengths_to=padding, pad_spans_to=len(spans) + (padding > 0), context=240 if padding else 0
            )
            logits = net.logits(net(step, cache=runner.pool.layers(step)).streams)
            for i, span, (first, _) in zip(order, spans, step.layout, strict=False):
                rows[i].append(logits[first : first + len(span.ids)])
    for i, length in enumerate(lengths):
        alone = run(net, prompt[i : i + length + grown], kv_format=kv_format)
        assert torch.equal(torch.cat(rows[i]), alone), f"{length} tokens"


@pytest.mark.parametrize("drafts", [1, 3])
def test_rejected_drafts_leave_no_trace(drafts):
    net, prompt = network(tiny((0, 4, 128, 4))), tokens(200)
    whole = run(net, prompt)
    runner = Runner(net, "f32", 1, 200 + drafts, num_drafts=drafts)
    runner.pool.poison()
    sequence, rows = runner.open(), []
    rows += list(runner.step([(sequence, prompt[:120])], every_row=True)[0])
    for p in range(120, 200):
        wrong = [(t + p) % 160 for t in prompt[:drafts]]
        rows.append(runner.step([(sequence, [prompt[p], *wrong])], every_row=True)[0][0])
        sequence.length = p + 1
    assert torch.equal(torch.stack(rows), whole)


def test_more_threads_change_no_bit(monkeypatch):
    m, prompt = model("fp8fp4", "trained", "fp8"), ids("fp8fp4")
    alone = m.logits(prompt, cuts=[100])
    monkeypatch.setattr(native, "threads", lambda: 3)
    native.library().pyrosome_set_grain(ctypes.c_int64(1))  # or such a small network would stay on one thread
    try:
        assert torch.equal(m.logits(prompt, cuts=[7, 200]), alone)
    finally:
        native.library().pyrosome_set_grain(ctypes.c_int64(0))


def test_a_step_leaves_torch_its_threads():
    """Within a step only the kernels use several threads; after it, also after one that failed, torch has its own."""
    before, seen = torch.get_num_threads(), []
    m = model("fp8fp4")
    hook = m.network.register_forward_hook(lambda *_: seen.append((torch.get_num_threads(), native.threads())))
    torch.set_num_threads(2)
    try:
        m.logits(ids("fp8fp4")[:5])
        assert torch.get_num_threads() == native.threads() == 2
        with pytest.raises(ZeroDivisionError), native.one_pool():
            _ = 1 // 0
        assert torch.get_num_threads() == native.threads() == 2
    finally:
        hook.remove()
        torch.set_num_threads(before)
    assert seen == [(1, 2)]


def test_where_the_definitions_run_torch_keeps_its_threads():
    before, seen = torch.get_num_threads(), []
    m = model("fp8fp4")
    hook = m.network.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        with use(OPS["linear"], "torch"):
            m.logits(ids("fp8fp4")[:5])
    finally:
        hook.remove()
        torch.set_num_threads(before)
    assert seen == [2]
