"""A kernel with gradients beside its definition."""

import contextlib

import torch

from pyrosome.ops.seam import use


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def turns(T, F, dtype=torch.complex64):
    angle = torch.rand(T, F, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 6.3
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


def results(version, ops, run, leaves):
    """The value of run() where `ops` run in one version, and the gradients of a weighted sum of it; None where it has
    none.  What is infinite has no part in the sum."""
    with contextlib.ExitStack() as stack:
        for op in ops:
            stack.enter_context(use(op, version))
        out = run()
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(8))
        gradients = torch.autograd.grad(out, leaves, weight, allow_unused=True) if out.numel() else [None] * len(leaves)
    return [out.detach(), *gradients]


def assert_close(found, expected, relative=1e-5):
    """Within that much of the largest of each tensor."""
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), i
        if b is not None:
            finite = b[b.isfinite()]
            most = finite.abs().max().item() if finite.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=relative * most, msg=lambda m, i=i: f"result {i}: {m}")


def assert_as_defined(ops, run, leaves, relative=1e-5):
    """Values and gradients of the kernels are those of the definitions."""
    assert_close(results("cpu-train", ops, run, leaves), results("torch", ops, run, leaves), relative)
