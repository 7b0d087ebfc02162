"""Hyper-connections with gradients by the native library, against the definition."""

import contextlib

import pytest
import torch

from pyrosome.ops import native
from pyrosome.ops.hyper_connection import hyper_connection_in, hyper_connection_out, hyper_connection_turn
from pyrosome.ops.seam import use

OPS = (hyper_connection_in, hyper_connection_out, hyper_connection_turn)
NUMBERS = 1e-6, 1e-6, 20
pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernels here")


def draw(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def example(op, T=5, J=4, D=32, numbers=NUMBERS, norm=True, dtype=torch.float32):
    """Arguments in order; all tensors ask for gradients."""
    wide = (2 + J) * J
    written = [draw(T, J, D, seed=1), draw(T, D, seed=2), draw(T, J, seed=3), draw(T, J, J, seed=4)]
    fn, base, scale = draw(wide, J * D, seed=5) / (J * D) ** 0.5, draw(wide, seed=6), draw(3, seed=7)
    weight = [draw(D, seed=8) / 4 + 1] if norm else []
    read = [fn, base, scale, *numbers, *weight]
    args = {"in": [written[0], *read], "out": written, "turn": [*written, *read]}[op.name.split("_")[-1]]
    return [x.to(dtype).requires_grad_() if torch.is_tensor(x) else x for x in args]


def results(op, args, version):
    """Values, then gradients of every tensor that asks for one."""
    with contextlib.ExitStack() as held:
        for each in OPS:  # the definition of one calls the others
            held.enter_context(use(each, version))
        out = op(*args)
    out = list(out) if isinstance(out, tuple) else [out]
    asking = [x for x in args if torch.is_tensor(x) and x.requires_grad]
    weights = [draw(*x.shape, seed=20 + i, dtype=x.dtype) for i, x in enumerate(out)]
    return [x.detach() for x in out] + list(torch.autograd.grad(out, asking, weights))


def assert_same(op, args, tolerance=1e-5):
    found, expected = results(op, args, "cpu-train"), results(op, args, "torch")
    assert len(found) == len(expected)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.shape == theirs.shape
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * largest, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_it_runs_where_gradients_are_on_and_only_there(op):
    args = example(op)
    assert op.chosen(*args) == "cpu-train"
    with torch.no_grad():
        assert op.chosen(*args) == "cpu"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("D", [16, 48, 128])
@pytest.mark.parametrize("T", [1, 3, 4, 8, 13, 64, 150])
def test_values_and_gradients(op, T, D):
    assert_same(op, example(op, T, D=D))


@pytest.mark.parametrize("op", [hyper_connection_in, hyper_connection_turn], ids=lambda op: op.name)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("numbers", [(1e-6, 1e-6, 1), (1e-6, 1e-6, 2), (0.5, 1e-6, 3), (1e-6, 0.05, 20)])
def test_numbers_and_no_norm(op, numbers, norm):
    assert_same(op, example(op, 9, numbers=numbers, norm=norm))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_tokens(op):
    args = example(op, 0)
    found = results(op, args, "cpu-train")
    assert [x.shape for x in found] == [x.shape for x in results(op, args, "torch")]
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_each_gradient_alone(op):
    """What is not asked for is left out, and changes nothing of the rest."""
    args = example(op, 13)
    tensors = [i for i, x in enumerate(args) if torch.is_tensor(x)]
    num_out = len(results(op, args, "torch")) - len(tensors)
    every = results(op, args, "cpu-train")
    for place, i in enumerate(tensors):
        alone = [x.detach().requires_grad_(k == i) if torch.is_tensor(x) else x for k, x in enumerate(args)]
        found = results(op, alone, "cpu-train")
        assert torch.equal(found[-1], every[num_out + place]), f"argument {i}"


def test_an_output_that_nobody_used():
    args = example(hyper_connection_turn, 9)
    found = []
    for version in ("cpu-train", "torch"):
        with contextlib.ExitStack() as held:
            for op in OPS:
                held.enter_context(use(op, version))
            _, u, _, comb = hyper_connection_turn(*args)
        found.append(torch.autograd.grad((u.sum() + (comb * comb).sum()), [x for x in args if torch.is_tensor(x)]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_tensors_that_do_not_lie_in_a_row(op):
    args = [
        x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() if torch.is_tensor(x) else x
        for x in example(op, 9)
    ]
    assert not args[0].is_contiguous()
    assert_same(op, args)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(("J", "D"), [(4, 24), (2, 32)])
def test_other_shapes_run_the_definition(op, J, D):
    assert_same(op, example(op, 5, J, D), tolerance=0)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_threads_are_added_in_order(op, monkeypatch):
    args = example(op, 200)
    monkeypatch.setattr(native, "threads", lambda: 3)
    found = results(op, args, "cpu-train")
    assert all(torch.equal(a, b) for a, b in zip(found, results(op, args, "cpu-train"), strict=True))
    assert_same(op, args)


@pytest.mark.parametrize("level", native.toolchain.supported())
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_levels_give_the_same_bits(op, level):
    args = example(op, 13, D=48)
    expected = results(op, args, "cpu-train")
    with native.use_level(level):
        found = results(op, args, "cpu-train")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_of_gradients_are_refused():
    args = example(hyper_connection_out)
    made = torch.autograd.grad(hyper_connection_out(*args).square().sum(), args, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        made[0].sum().backward()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_definition_against_finite_differences(op):
    args = example(op, 2, D=3, numbers=(1e-6, 1e-3, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(op, args)
