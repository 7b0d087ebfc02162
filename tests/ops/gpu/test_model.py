"""The whole network by Triton's kernels: the official vectors, every way to cut a sequence, drafts, and an engine."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from pyrosome.engine.loaded import LoadedModel, load_model
from pyrosome.engine.request import Request
from pyrosome.ops import gpu, native
from pyrosome.ops.seam import OPS, use
from pyrosome.options import EngineOptions, SamplingParams
from pyrosome.quant.tiles import TiledWeight
from pyrosome.testing.on_meta import every_kernel
from tests.engine.engines import run
from tests.golden.vectors import GOLDEN, assert_logits, ids, vectors
from tests.ops.gpu.held import CAPABILITIES, DEVICE, rms, same_bits

# Every kernel is watched in tests of its own; here there are thousands of launches.
pytestmark = pytest.mark.unwatched
# Tokens before what the kernels read, by the definitions; and what they read: past an HCA row and several CSA rows.
BEFORE, READ = 124, 7


@functools.cache
def stored(name: str, numerics: str = "exact", kv_format: str | None = None) -> LoadedModel:
    """A checkpoint with weights as a GPU holds them: as stored, in no tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        model = load_model(GOLDEN / name, str(DEVICE), numerics, kv_format, unpack=False)
    assert not any(isinstance(getattr(m, "value", None), TiledWeight) for m in model.network.modules())
    return model


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["bf16", "fp8fp4"])
def test_logits_are_the_official_ones(name, capability):
    wanted = vectors(f"{name}_vectors")["logits_prefill" if name == "bf16" else "logits_exact"][0]
    assert_logits(read(stored(name), ids(name), capability=capability), wanted[BEFORE : BEFORE + READ])


@pytest.mark.parametrize("kv_format", ["f32", "bf16", "fp8"])
def test_trained_logits_are_the_definitions(kv_format):
    model, tokens = stored("fp8fp4", "trained", kv_format), ids("fp8fp4")
    found = whole_by_kernels("trained") if kv_format == "fp8" else read(model, tokens)
    with by_definitions():
        wanted = model.logits(tokens[: BEFORE + READ])[BEFORE:]
    assert rms(found, wanted) < 1e-2


@functools.cache
def whole_by_kernels(numerics: str) -> Tensor:
    return read(stored("fp8fp4", numerics), ids("fp8fp4"))


@pytest.mark.parametrize(
    ("numerics", "cuts"), [("exact", [2, 4]), ("trained", [4]), ("trained", range(1, READ))], ids=str
)
def test_a_sequence_may_be_cut_anywhere(numerics, cuts):
    whole, pieces = whole_by_kernels(numerics), read(stored("fp8fp4", numerics), ids("fp8fp4"), cuts)
    if DEVICE.type == "cuda":
        assert same_bits(pieces, whole)
    else:  # the interpreter multiplies by numpy, whose sums may differ with the shape of a tile
        assert rms(pieces, whole) < (1e-5 if numerics == "exact" else 1e-2)


def test_sequences_beside_each_other_are_as_alone():
    model, tokens = stored("fp8fp4", "trained"), ids("fp8fp4")
    runner = model.runner(2, 200)
    one, other = runner.open(), runner.open()
    with by_definitions():
        runner.step([(one, tokens[:BEFORE])])
        runner.step([(other, tokens[40:93])])
    with every_kernel():
        both = runner.step([(one, tokens[BEFORE : BEFORE + 1]), (other, tokens[93:96])], every_row=True)
    with by_definitions():
        wanted = model.logits(tokens[: BEFORE + 1])[-1:], model.logits(tokens[40:96])[-3:]
    assert all(rms(found, w) < 1e-2 for found, w in zip(both, wanted, strict=True))


def test_an_engine_says_what_it_says_by_the_definitions():
    """Greedy and drawn tokens, chosen on the device; drafts, penalties and log probabilities."""
    model, prompt = stored("fp8fp4"), tuple(ids("fp8fp4")[:4])
    asked = [
        Request("greedy", prompt, SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)),
        Request("drawn", prompt[:2], SamplingParams(max_tokens=2, temperature=0.8, top_p=0.9, seed=7, ignore_eos=True)),
        Request("told", prompt[1:], SamplingParams(max_tokens=1, temperature=0, logprobs=2, presence_penalty=1.0)),
    ]
    said = []
    for choose in (by_definitions, every_kernel):
        engine = model.engine(EngineOptions(cache_bytes=8 << 20, drafter="mtp"))
        with choose():
            said.append({who: (found.tokens, found.end.reason) for who, found in run(engine, asked).items()})
    assert said[0] == said[1] and sorted(len(tokens) for tokens, _ in said[0].values()) == [1, 2, 3]


def read(model: LoadedModel, tokens: list[int], cuts: Iterable[int] = (), *, capability: int = 90) -> Tensor:
    """Logits of `READ` tokens by the kernels, in pieces, behind `BEFORE` tokens by the definitions."""
    runner = model.runner(1, 200)
    sequence = runner.open()
    with by_definitions():
        runner.step([(sequence, tokens[:BEFORE])])
    rows, edges = [], [0, *cuts, READ]
    with every_kernel(), gpu.pretend(capability):
        for first, last in itertools.pairwise(edges):
            rows += runner.step([(sequence, tokens[BEFORE + first : BEFORE + last])], every_row=True)
    return torch.cat(rows).float().cpu()


@contextlib.contextmanager
def by_definitions() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for op in OPS.values():
            stack.enter_context(use(op, "torch"))
        yield
