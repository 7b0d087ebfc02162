"""Hyper-connections against the formulas written out, a token at a time in float64."""

import math

import pytest
import torch

from pyrosome.ops.hyper_connection import hyper_connection_head, hyper_connection_in, hyper_connection_out

J, D, T = 4, 3, 5
NORM_EPS, HC_EPS, ITERS = 1e-6, 1e-6, 20


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def example(dtype=torch.float32, streams=J, outs=None):
    outs = (2 + streams) * streams if outs is None else outs
    weights = draw(outs, streams * D, seed=1), draw(outs, seed=2), draw(3, seed=3)
    return [draw(T, streams, D).to(dtype), *(w.to(torch.promote_types(dtype, torch.float32)) for w in weights)]


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def mixed(X, fn, norm_eps):
    v = [x for stream in X for x in stream]
    rms = math.sqrt(math.fsum(x * x for x in v) / len(v) + norm_eps)
    return [math.fsum(w * x for w, x in zip(row, v, strict=True)) / rms for row in fn]


def sinkhorn(A, eps, iters, columns_first=False):
    n = range(len(A))
    C = []
    for row in A:
        e = [math.exp(a - max(row)) for a in row]
        C.append([v / math.fsum(e) + eps for v in e])
    for i in range(iters):
        if i or columns_first:
            C = [[v / (math.fsum(row) + eps) for v in row] for row in C]
        total = [math.fsum(C[j][k] for j in n) + eps for k in n]
        C = [[C[j][k] / total[k] for k in n] for j in n]
    return C


def written_out(X, fn, base, scale, norm_eps=NORM_EPS, hc_eps=HC_EPS, iters=ITERS):
    """(u, post, comb) of one token, lists of floats."""
    n = len(X)
    mix = mixed(X, fn, norm_eps)
    pre = [sigmoid(mix[j] * scale[0] + base[j]) + hc_eps for j in range(n)]
    post = [2 * sigmoid(mix[n + j] * scale[1] + base[n + j]) for j in range(n)]
    at = [[2 * n + n * j + k for k in range(n)] for j in range(n)]
    C = sinkhorn([[mix[i] * scale[2] + base[i] for i in row] for row in at], hc_eps, iters)
    u = [math.fsum(pre[j] * X[j][d] for j in range(n)) for d in range(len(X[0]))]
    return u, post, C


def assert_written_out(found, streams, fn, base, scale, rtol=1e-5, **eps):
    weights = [w.tolist() for w in (fn, base, scale)]
    expected = zip(*(written_out(X, *weights, **eps) for X in streams.tolist()), strict=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), torch.tensor(theirs, dtype=torch.float64), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("iters", [1, 2, 3, 20])
@pytest.mark.parametrize(("norm_eps", "hc_eps"), [(NORM_EPS, HC_EPS), (0.5, NORM_EPS), (NORM_EPS, 0.05)])
def test_in_against_the_formula(iters, norm_eps, hc_eps):
    args = example()
    found = hyper_connection_in(*args, norm_eps, hc_eps, iters)
    assert_written_out(found, *args, norm_eps=norm_eps, hc_eps=hc_eps, iters=iters)


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_any_number_of_streams(streams):
    args = example(streams=streams)
    assert_written_out(hyper_connection_in(*args, NORM_EPS, HC_EPS, 7), *args, iters=7)


def test_float64_throughout():
    args = example(torch.float64)
    found = hyper_connection_in(*args, NORM_EPS, HC_EPS, ITERS)
    assert {x.dtype for x in found} == {torch.float64}
    assert_written_out(found, *args, rtol=1e-12)


def test_bfloat16_streams_are_mixed_in_float32():
    args = example(torch.bfloat16)
    u, post, comb = hyper_connection_in(*args, NORM_EPS, HC_EPS, ITERS)
    assert (u.dtype, post.dtype, comb.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    wide = hyper_connection_in(args[0].float(), *args[1:], NORM_EPS, HC_EPS, ITERS)
    assert torch.equal(u, wide[0].to(torch.bfloat16))
    assert torch.equal(post, wide[1])
    assert torch.equal(comb, wide[2])
    new = hyper_connection_out(args[0], u, post, comb)
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, hyper_connection_out(args[0].float(), u.float(), post, comb).to(torch.bfloat16))


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_sinkhorn_ends_on_columns(iters):
    _, _, comb = hyper_connection_in(*example(), NORM_EPS, HC_EPS, iters)
    torch.testing.assert_close(comb.sum(1), torch.ones(T, J), rtol=0, atol=1e-5)
    off_rows = (comb.sum(2) - 1).abs().max()
    assert off_rows > 1e-2 if iters == 1 else off_rows < 0.2


def test_sinkhorn_begins_with_a_row_softmax():
    """After one round the order still shows: columns of a row softmax, not the other way about."""
    streams, fn, base, scale = example()
    _, _, comb = hyper_connection_in(streams, fn, base, scale, NORM_EPS, HC_EPS, 1)
    for t in range(T):
        mix = mixed(streams[t].tolist(), fn.tolist(), NORM_EPS)[2 * J :]
        A = [[mix[J * j + k] * scale[2].item() + base[2 * J + J * j + k].item() for k in range(J)] for j in range(J)]
        torch.testing.assert_close(comb[t], torch.tensor(sinkhorn(A, HC_EPS, 1)), rtol=1e-5, atol=1e-5)
        transposed = sinkhorn([list(column) for column in zip(*A, strict=True)], HC_EPS, 1)
        assert (comb[t] - torch.tensor(transposed).t()).abs().max() > 1e-2


def test_pre_has_its_eps_and_post_has_none_and_a_factor_of_two():
    streams, fn, base, scale = example()
    base[:J], base[J : 2 * J] = -1e4, -1e4
    u, post, _ = hyper_connection_in(streams, fn, base, scale, NORM_EPS, 0.125, ITERS)
    torch.testing.assert_close(u, 0.125 * streams.sum(1))
    assert not post.any()
    base[J : 2 * J] = 1e4
    assert (hyper_connection_in(streams, fn, base, scale, NORM_EPS, HC_EPS, ITERS)[1] == 2).all()


def test_the_statistic_is_one_for_all_streams():
    """Scaling every stream changes no mix; scaling one stream changes the mix of all."""
    streams, fn, base, scale = example()
    _, post, comb = hyper_connection_in(streams, fn, base, scale, 0.0, HC_EPS, ITERS)
    for factor in (100.0, 0.01):
        _, post_scaled, comb_scaled = hyper_connection_in(streams * factor, fn, base, scale, 0.0, HC_EPS, ITERS)
        torch.testing.assert_close(post_scaled, post, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(comb_scaled, comb, rtol=1e-4, atol=1e-5)
    fn[:, :D] = 0.0  # stream 0 now enters through the statistic alone
    before = hyper_connection_in(streams, fn, base, scale, 0.0, HC_EPS, ITERS)[1]
    streams[:, 0] *= 10
    after = hyper_connection_in(streams, fn, base, scale, 0.0, HC_EPS, ITERS)[1]
    assert (after != before).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_out_sums_over_the_first_index_of_comb(dtype):
    X, out, post, comb = (draw(*s, dtype=dtype, seed=i) for i, s in enumerate([(T, J, D), (T, D), (T, J), (T, J, J)]))
    new = hyper_connection_out(X, out, post, comb)
    assert new.dtype == dtype
    for t in range(T):
        for k in range(J):
            for d in range(D):
                expected = post[t, k] * out[t, d] + sum(comb[t, j, k] * X[t, j, d] for j in range(J))
                assert new[t, k, d].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    transposed = hyper_connection_out(X, out, post, comb.transpose(1, 2))
    assert (transposed - new).abs().max() > 0.1


def test_an_entry_of_comb_moves_its_row_s_stream_to_its_column_s():
    X, comb = draw(1, J, D), torch.zeros(1, J, J)
    comb[0, 0, 2] = 1.0
    new = hyper_connection_out(X, torch.zeros(1, D), torch.ones(1, J), comb)
    assert torch.equal(new[0, 2], X[0, 0])
    assert not new[0, [0, 1, 3]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_head_against_the_formula(dtype):
    streams, fn, base, scale = example(dtype, outs=J)
    y = hyper_connection_head(streams, fn, base, scale[:1], NORM_EPS, 0.125)
    assert y.dtype == dtype
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    for t, X in enumerate(streams.tolist()):
        mix = mixed(X, fn.tolist(), NORM_EPS)
        pre = [sigmoid(m * scale[0].item() + b) + 0.125 for m, b in zip(mix, base.tolist(), strict=True)]
        expected = [math.fsum(pre[j] * X[j][d] for j in range(J)) for d in range(D)]
        assert y[t].tolist() == pytest.approx(expected, rel=rtol, abs=rtol)


def test_no_tokens():
    streams, *weights = example()
    u, post, comb = hyper_connection_in(streams[:0], *weights, NORM_EPS, HC_EPS, ITERS)
    assert (u.shape, post.shape, comb.shape) == ((0, D), (0, J), (0, J, J))
    assert hyper_connection_out(streams[:0], u, post, comb).shape == (0, J, D)


def test_a_first_call_that_serves_does_not_spoil_one_that_trains():
    args, unusual_eps = example(), 1.25e-6
    with torch.inference_mode():
        served = hyper_connection_in.definition(*args, NORM_EPS, unusual_eps, 3)[2].clone()
    args[1].requires_grad_(True)
    trained = hyper_connection_in(*args, NORM_EPS, unusual_eps, 3)[2]
    trained.square().sum().backward()
    torch.testing.assert_close(trained, served)
    assert args[1].grad.abs().any()


def test_gradients():
    n = 2
    args = [x[:2] if i == 0 else x for i, x in enumerate(example(torch.float64, streams=n))]
    for x in args:
        x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda *a: hyper_connection_in(*a, NORM_EPS, HC_EPS, 3), args)
    head = [args[0], args[1][:n].detach().requires_grad_(), args[2][:n].detach().requires_grad_(), args[3][:1]]
    assert torch.autograd.gradcheck(lambda *a: hyper_connection_head(*a, NORM_EPS, HC_EPS), head)
    parts = [draw(*s, dtype=torch.float64).requires_grad_() for s in [(2, n, D), (2, D), (2, n), (2, n, n)]]
    assert torch.autograd.gradcheck(hyper_connection_out, parts)
