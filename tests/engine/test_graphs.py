"""Captured decode steps: the bits of plain ones, whatever comes between, and plain ones wherever capture cannot be."""

from types import SimpleNamespace

import pytest
import torch

from pyrosome.engine import graphs
from pyrosome.engine.runner import Runner
from pyrosome.model.deepseek_v4 import Rotations
from pyrosome.model.step import Span, Step
from pyrosome.ops import native, toolchain
from pyrosome.ops.rope import frequencies, rotation
from pyrosome.ops.route import route
from pyrosome.ops.seam import use
from tests.golden.vectors import ids, model
from tests.networks import tokens

try:
    native.library()
except OSError as error:
    pytest.skip(f"no native library here: {error}", allow_module_level=True)

# Keys that are not in FP4 are chosen by the definition, and such steps are not captured.
CASES = [("bf16", "exact", "f32", False), ("fp8fp4", "trained", "fp8", True), ("bf16", "trained", "fp8", True)]


def runner(name="fp8fp4", numerics="trained", kv_format="fp8", sequences=4, context=700, captures=True):
    made = Runner(model(name, numerics, kv_format).network, kv_format, sequences, context)
    made.pool.poison()
    if not captures:
        made.graphs = None
    return made


def captured(runner):
    """The shapes whose steps are captured, of those that were seen."""
    return [key for key, what in runner.graphs.kept.items() if isinstance(what, graphs.Graph)]


@pytest.mark.parametrize(("name", "numerics", "kv_format", "is_captured"), CASES)
def test_a_captured_step_has_the_bits_of_a_plain_one(name, numerics, kv_format, is_captured):
    """Past windows of 4 and of 128, past a bound of 512 on the context, and past where all rows are chosen."""
    prompt = (ids(name) * 3)[:540]
    ours, plain = runner(name, numerics, kv_format), runner(name, numerics, kv_format, captures=False)
    a, b = ours.open(), plain.open()
    for r, s in ((ours, a), (plain, b)):
        r.step([(s, prompt[:120])])
    for token in prompt[120:]:
        (x,), (y,) = ours.step([(a, [token])]), plain.step([(b, [token])])
        assert torch.equal(x, y), a.length
    assert ours.graphs.num_run > 380 if is_captured else not ours.graphs.num_run
    assert bool(ours.graphs.refused) != is_captured


def test_sequences_come_and_go_between_captured_steps():
    ours, plain = runner(), runner(captures=False)
    prompts = [tokens(260, seed=i) for i in range(4)]
    held = [[r.open() for _ in range(4)] for r in (ours, plain)]
    for i, prompt in enumerate(prompts):
        for r, s in zip((ours, plain), held, strict=True):
            r.step([(s[i], prompt[: 30 + 17 * i])])
    for step in range(150):
        taken = [i for i in range(4) if (step // 10 + i) % 4 or step < 30]
        x, y = (
            r.step([(s[i], [prompts[i][s[i].length]]) for i in taken]) for r, s in zip((ours, plain), held, strict=True)
        )
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True)), step
        if step == 80:  # another sequence in the place of one that left
            for r, s in zip((ours, plain), held, strict=True):
                r.close(s[2])
                s[2] = r.open()
                r.step([(s[2], prompts[3][:5])])
            prompts[2] = prompts[3]
    assert ours.graphs.num_run > 90


def test_threads_have_captures_of_their_own(monkeypatch):
    ours, plain = runner(), runner(captures=False)
    a, b = ours.open(), plain.open()
    for r, s in ((ours, a), (plain, b)):
        r.step([(s, ids("fp8fp4")[:50])])
    for at in range(50, 90):
        monkeypatch.setattr(native, "threads", lambda at=at: 1 + at // 10 % 2)
        (x,), (y,) = ours.step([(a, [at])]), plain.step([(b, [at])])
        assert torch.equal(x, y)
    assert {key[3] for key in captured(ours)} == {1, 2}


def test_hooks_see_every_step():
    ours, seen = runner(), []
    s = ours.open()
    hook = ours.model.layers[1].attn.register_forward_hook(lambda *_: seen.append(1))
    for at in range(6):
        ours.step([(s, [at])])
    hook.remove()
    assert len(seen) == 6 and not captured(ours)
    for at in range(6):
        ours.step([(s, [at])])
    assert len(seen) == 6 and captured(ours)


def test_what_torch_computes_is_not_captured():
    with use(route, "torch"):
        ours, plain = runner(), runner(captures=False)
        a, b = ours.open(), plain.open()
        for at in range(20):
            (x,), (y,) = ours.step([(a, [at])]), plain.step([(b, [at])])
            assert torch.equal(x, y)
    assert ours.graphs.refused and not captured(ours)


def test_no_more_captures_are_kept_than_that(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_KEPT", 2)
    ours = runner()
    held = [ours.open() for _ in range(4)]
    for count in (1, 2, 3, 4, 1):
        for _ in range(5):
            ours.step([(s, [7]) for s in held[:count]])
        assert len(ours.graphs.kept) <= 3
    assert ours.graphs.num_run


def test_captures_hold_no_more_bytes_than_that_and_none_of_them_a_quarter_of_it(monkeypatch):
    ours = runner()
    held = [ours.open() for _ in range(4)]

    def steps(count):
        for _ in range(12):
            ours.step([(s, [7]) for s in held[:count]])

    steps(1)
    one = max(graph.num_bytes for graph in ours.graphs.kept.values() if isinstance(graph, graphs.Graph))
    monkeypatch.setattr(graphs, "MOST_BYTES", 2 * one + one // 2)
    monkeypatch.setattr(graphs, "MOST_BYTES_EACH", one + one // 2)
    for count in (1, 2, 3, 4, 1):
        steps(count)
        assert ours.graphs.num_bytes <= graphs.MOST_BYTES
    assert {len(key) and key[0] for key in ours.graphs.refused} == {2, 3, 4}
    run = ours.graphs.num_run
    steps(1)
    assert ours.graphs.num_run > run


def test_long_spans_and_large_batches_are_run_plainly(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_TOKENS", 2)
    ours = runner()
    held = [ours.open() for _ in range(3)]
    for _ in range(4):
        ours.step([(s, [7]) for s in held])
        ours.step([(held[0], [7, 8])])
    assert not ours.graphs.kept


@pytest.mark.parametrize("level", toolchain.supported())
@pytest.mark.parametrize("positions", [[0], [127], [4_095, 3, 3, 127, 511], [1_000_003, 255, 7, 8, 0, 2, 1]])
def test_what_is_derived_of_a_step_is_what_the_step_itself_says(positions, level):
    slots = torch.randperm(len(positions)).add(1).tolist()
    floors = [max(0, p - 9) * (i % 2) for i, p in enumerate(positions)]
    spans = [
        Span(slot, p, [i + 3], floor) for i, (slot, p, floor) in enumerate(zip(slots, positions, floors, strict=True))
    ]
    step, frequency = Step.of(spans), frequencies(10_000.0, 64, None)
    pages = torch.randint(1, 999, (len(positions) + 1, -(-max(positions) // (4 * 64)) + 1))
    tables = torch.randint(0, 99, (20, 6))
    step.picked(tables, "ids_T"), step.picked(pages, "slot_B"), step.window_index(128, 136), step.window_index(16, 16)
    step.ring_place(136), step.flat_place(8), step.flat_place(128)
    for ratio in (4, 128):
        step.emit(ratio), step.visible_T(ratio), step.all_rows(ratio), step.page_place(pages, ratio)
    with torch.no_grad(), native.use_level(level):
        token = rotation(frequency, step.position_T)
        turns = {r: Rotations(token, rotation(frequency, step.emit(r).end - (r - 1))) for r in (4, 128)}
    wanted = [value for value, _ in step.derived.values()] + list(turns.values())
    kinds = {key[0] for key in step.derived}
    assert kinds == set(graphs._KINDS)  # nothing that a step derives is left out here
    empty = [graphs._clone(value) for value in wanted]
    told = []
    for (make, *_), (_, about), buffers in zip(step.derived, step.derived.values(), empty, strict=False):
        told.append(graphs._derived(make, about, buffers))
    far = SimpleNamespace(rotary=SimpleNamespace(far=frequency, near=frequency))
    told += graphs._rotations(far, dict(zip(turns, empty[len(step.derived) :], strict=True)))
    for x in _tensors(empty):
        x.fill_(-77)
    kept = torch.empty_like(step.packed)
    with native.use_level(level):
        native.library().derive(
            step.packed.data_ptr(), kept.data_ptr(), len(spans), (graphs.Derived * len(told))(*told), len(told)
        )
    assert torch.equal(kept, step.packed)
    for ours, theirs in zip(_tensors(empty), _tensors(wanted), strict=True):
        assert torch.equal(ours, theirs)


def _tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [x for part in value for x in _tensors(part)]
