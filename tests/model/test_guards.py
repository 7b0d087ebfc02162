"""A step reads nothing back to the host, so that a captured graph can replay it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyrosome.cache.pool import CachePool
from pyrosome.model.mtp import keep_streams, streams_at
from pyrosome.model.step import Span, Step
from pyrosome.ops.experts import routed_experts
from pyrosome.ops.seam import use
from pyrosome.testing.shapes import tiny
from tests.networks import build_network, network, tokens

FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "unique2", "bincount")


class NoHostRead(TorchDispatchMode):
    """Fails on every operation whose result, or whose result's shape, depends on values."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in FORBIDDEN, func
        if name in ("index", "index_put", "index_put_"):  # a mask as index has as many rows as it has ones
            assert all(i is None or i.dtype != torch.bool for i in args[1]), func
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_the_guard_sees_what_it_should():
    for read in (lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x[0])):
        with pytest.raises(AssertionError), NoHostRead():
            read(torch.ones(3))


@pytest.mark.parametrize("numerics", ["exact", "trained"])
@pytest.mark.parametrize("unpack", [True, False], ids=["unpacked", "stored"])
def test_a_cached_step_reads_nothing_back(numerics, unpack):
    config = tiny((0, 4, 128), hidden_size=128, o_lora_rank=64, moe_intermediate_size=64)
    model = network(config, numerics, layout="fp8fp4") if unpack else _stored(config, numerics)
    pool = CachePool(config, "fp8" if numerics == "trained" else "f32", 3, 300, drafts=True)
    holdings = [pool.open() for _ in range(3)]
    for holding in holdings:
        pool.prepare(holding, 0, 300)
    slots = [holding.slot for holding in holdings]
    ids = tokens(300)
    with torch.inference_mode():
        for lengths, starts in (([130, 1, 7], [0, 0, 0]), ([1, 5, 1], [130, 1, 7]), ([2, 130, 1], [131, 6, 8])):
            step = Step.of(
                [Span(s, a, ids[a : a + n]) for s, a, n in zip(slots, starts, lengths, strict=True)], pad_lengths_to=3
            )
            draft_step = Step.of(
                [Span(s, a, ids[a + 1 : a + n]) for s, a, n in zip(slots, starts, lengths, strict=True)]
            )
            with NoHostRead() as guard:
                streams = model(step, cache=pool.layers(step)).streams
                model.logits(streams[step.last_token_B()])
                hidden = streams_at(draft_step, step, streams, pool.draft_hidden[draft_step.slot_B])
                model.draft_stage.draft(model, draft_step, hidden, pool.draft_layer(draft_step))
                keep_streams(step, streams, pool.draft_hidden)
            assert guard.seen > 200  # operations of torch: those of the native kernels are not seen


def _stored(config, numerics):
    from pyrosome.model.build import Network, fill
    from pyrosome.model.numerics import numerics_named
    from pyrosome.testing.checkpoints import random_tensors

    model = Network(config, numerics_named(numerics), drafts=True)
    fill(model, random_tensors(config, 0, "fp8fp4"), unpack=False)
    return model.eval()


def test_a_training_step_reads_nothing_back():
    model = build_network(tiny((0, 4, 128)))
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    # On the CPU, where reading waits for nobody, the experts' training version reads how many rows each of them has.
    with NoHostRead(), use(routed_experts, "torch"):
        model.logits(model(Step.of([Span(0, 0, tokens(140)), Span(0, 0, tokens(30))])).streams).sum().backward()
