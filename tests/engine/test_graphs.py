"""Captured decode steps: the bits of plain ones, whatever comes between, and plain ones wherever capture cannot be."""

import pytest
import torch

from pyrosome.engine import graphs
from pyrosome.engine.runner import Runner
from pyrosome.ops import native
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
            r.step([(s[i], [prompts[i][s[i].length]]) for i in taken])
            for r, s in zip((ours, plain), held, strict=True)
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


def test_long_spans_and_large_batches_are_run_plainly(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_TOKENS", 2)
    ours = runner()
    held = [ours.open() for _ in range(3)]
    for _ in range(4):
        ours.step([(s, [7]) for s in held])
        ours.step([(held[0], [7, 8])])
    assert not ours.graphs.kept
