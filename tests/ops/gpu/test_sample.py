"""`choose_tokens` names the tokens that `sample` does, row by row; by Triton too, and so does the engine's sampler."""

from __future__ import annotations

import pytest
import torch

from pyrosome.engine import sampler
from pyrosome.engine.sampler import Row, SamplerState, choose_all, draw_drafts
from pyrosome.errors import EngineError
from pyrosome.ops.sample import sample
from pyrosome.ops.sample.batch import choose_tokens
from pyrosome.options import SamplingParams
from tests.ops.gpu.held import DEVICE, kernels

INF, NAN = float("inf"), float("nan")
MANY = 2000 if DEVICE.type == "cuda" else 12  # rows; the interpreter takes half a second for a filtered one


def noise(*shape, scale=2.0, seed=0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def levels(*shape, seed=0):
    """Few distinct values: ties everywhere."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)


def columns(params, seeds, positions):
    """The op's arguments for rows of these parameters; a filter that none of them asks for is left out."""

    def column(values, dtype):
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    def asked(field, default, dtype):
        values = [getattr(p, field) for p in params]
        return None if all(v == default for v in values) else column(values, dtype)

    wrapped = [s - (1 << 64) if s >= 1 << 63 else s for s in seeds]
    return (
        column([p.temperature for p in params], torch.float64),
        asked("top_k", 0, torch.int64),
        asked("top_p", 1.0, torch.float64),
        asked("min_p", 0.0, torch.float64),
        column(wrapped, torch.int64),
        column(positions, torch.int64),
    )


def chosen(logits, *args):
    with kernels(choose_tokens):
        assert choose_tokens.chosen(logits, *args) == "triton"
        found = choose_tokens(logits, *args)
    assert found.dtype == torch.int64 and found.device == logits.device
    return found.tolist()


def check(logits, params, seeds=None, positions=None):
    """Kernel, definition and `sample` agree about every row."""
    N = len(logits)
    params = [params] * N if isinstance(params, SamplingParams) else params
    seeds, positions = seeds or list(range(N)), positions or [3 * i for i in range(N)]
    args = columns(params, seeds, positions)
    rows = zip(logits.cpu(), params, seeds, positions, strict=True)
    wanted = [sample(row, p, {}, {}, seed, position)[0] for row, p, seed, position in rows]
    assert choose_tokens.definition(logits.cpu(), *(x if x is None else x.cpu() for x in args)).tolist() == wanted
    assert chosen(logits, *args) == wanted
    return wanted


@pytest.mark.parametrize("V", [1, 2, 1000, 1024, 1025, 5000])
@pytest.mark.parametrize("make", [noise, levels])
def test_greedy_takes_the_first_of_the_best(V, make):
    logits = make(3, V)
    assert chosen(logits) == [row.argmax().item() for row in logits.cpu()]
    check(logits, SamplingParams(temperature=0))
    assert chosen(torch.tensor([[-INF, -3.0, -3.0], [-0.0, 0.0, -1.0], [0.0, -0.0, -INF]], device=DEVICE)) == [1, 0, 0]


@pytest.mark.parametrize("V", [1, 3, 1024, 2500])
@pytest.mark.parametrize("temperature", [1e-308, 0.3, 1.0, 100.0])
def test_draws(V, temperature):
    seeds = [0, 1, -1, 2**63, 2**64 - 1, -(2**63)]
    check(noise(6, V, seed=V), SamplingParams(temperature=temperature), seeds, [0, 1, 7, 1_048_575, 5, 2**40])


@pytest.mark.parametrize("make", [noise, levels])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 5}, {"top_k": 1}, {"top_p": 0.8}, {"top_p": 1e-12}, {"top_p": 5e-324}, {"min_p": 0.1}, {"min_p": 1.0},
        {"top_k": 9, "top_p": 0.6, "min_p": 0.05}, {"top_k": 2000, "top_p": 0.999999},
    ],
    ids=str,
)  # fmt: skip
def test_filters(make, filters):
    check(make(1, 1100, seed=len(str(filters))), SamplingParams(temperature=0.9, **filters))


def test_rows_ask_for_different_things():
    params = [
        SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.5),
        SamplingParams(min_p=0.5), SamplingParams(temperature=2.0, top_k=12), SamplingParams(top_p=0.3, top_k=4),
    ]  # fmt: skip
    check(levels(7, 12), params)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 3}, [1, 3, 0]), ({"top_k": 1}, [1]), ({"top_k": 4}, [1, 3, 0, 2]), ({"top_p": 0.26}, None),
        ({"min_p": 1.0}, [1, 3]),
    ],
)  # fmt: skip
def test_ties_at_an_edge_are_kept_from_the_lowest_id_on(filters, kept):
    """Every kept id wins some position, and no other does; of four equal ones top-p 0.26 keeps two."""
    logits = [0.0] * 4 if kept is None else [1.0, 3.0, 1.0, 3.0, 1.0]
    rows = torch.tensor([logits] * 8, device=DEVICE)
    found = set(check(rows, SamplingParams(temperature=100.0, **filters), [4] * 8, list(range(8))))
    assert found == set([0, 1] if kept is None else kept)


def test_ties_of_a_row_that_does_not_ask_for_top_p_beside_one_that_does():
    params = [*[SamplingParams(top_k=1)] * 4, SamplingParams(top_p=0.5)]
    rows = torch.zeros(5, 6, device=DEVICE)
    assert check(rows, params, [4] * 5, list(range(5)))[:4] == [0] * 4


def test_ties_at_an_edge_in_several_pieces():
    """The last id that stays stands in the second piece of a vocabulary, behind ties of the first."""
    logits = torch.full((1, 2100), -30.0, device=DEVICE)
    logits[:, 1000:1300] = 1.0
    logits[:, 5] = 1.1
    check(logits, SamplingParams(top_k=40, temperature=50.0))
    check(logits, SamplingParams(top_p=0.37, temperature=0.5))
    check(logits, SamplingParams(top_p=0.37, top_k=200))


def test_many_rows():
    """The filters in turn, at temperatures and over distributions of every kind."""
    scales = 10 ** noise(MANY, 1, scale=0.5)
    logits = noise(MANY, 300, seed=1) * scales
    made = [
        SamplingParams(temperature=0.2 + i % 7 / 4, top_k=i % 5 * 10, top_p=1 - i % 3 / 5, min_p=i % 4 / 50)
        for i in range(MANY)
    ]
    check(logits, made, [i * 77_777_777_777 for i in range(MANY)])


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5)])
def test_logits_that_allow_no_choice(params):
    bad = [[0.0, NAN, 1.0], [NAN] * 3, [-INF, NAN, -INF], [-INF] * 3, [0.0, INF, 1.0], [-INF, 2.0, -INF]]
    args = columns([params] * 6, [0] * 6, [0] * 6)
    logits = torch.tensor(bad, device=DEVICE)
    assert choose_tokens.definition(logits, *args).tolist() == [-1] * 5 + [1]
    assert chosen(logits, *args) == [-1] * 5 + [1]


def test_a_row_does_not_depend_on_the_others():
    logits, params = noise(3, 1200), SamplingParams(top_p=0.9)
    args = columns([params] * 3, range(3), range(3))
    together = chosen(logits, *args)
    assert [chosen(logits[i : i + 1], *(x if x is None else x[i : i + 1] for x in args))[0] for i in (2, 0)] == [
        together[2],
        together[0],
    ]


def test_no_rows_and_rows_that_are_not_contiguous():
    assert chosen(noise(0, 9)) == []
    params = [SamplingParams(temperature=0.7)] * 6
    logits, args = noise(6, 80), columns(params, range(6), range(6))
    strided = torch.stack([logits, logits], 2)[..., 0]
    spread = [x if x is None else torch.stack([x, x], 1)[:, 0] for x in args]
    assert chosen(strided, *spread) == chosen(logits.t().contiguous().t(), *args) == chosen(logits, *args)
    shifted = torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view(6, 80)
    assert chosen(shifted, *args) == chosen(logits, *args)


def test_parameters_that_do_not_go_together_are_told():
    logits, args = noise(3, 8), columns([SamplingParams()] * 3, range(3), range(3))
    for wrong, what in (
        ((args[0][:2], *args[1:]), "need 3 of each"),
        ((args[0], None, None, None, None, args[5]), "the seed and the position"),
    ):
        with pytest.raises(RuntimeError, match=what):
            chosen(logits, *wrong)
    with pytest.raises(RuntimeError, match="an id to choose"):
        chosen(logits[:, :0])


def rows_of(logits, *params, mask=None):
    return [
        Row(v, SamplerState(p, [1, 2], 40 + i), mask, 9 + i)
        for i, (v, p) in enumerate(zip(logits, params, strict=True))
    ]


def told(choices):
    return [str(c) if isinstance(c, Exception) else c for c in choices]


def test_the_engine_s_sampler_takes_the_kernel_where_nothing_else_is_asked(monkeypatch):
    logits = noise(8, 60)
    logits[3, 4] = NAN
    params = (
        SamplingParams(temperature=0), SamplingParams(top_p=0.8), SamplingParams(seed=4, top_k=3), SamplingParams(),
        SamplingParams(logprobs=2), SamplingParams(repetition_penalty=1.5), SamplingParams(min_p=0.2),
        SamplingParams(temperature=0),
    )  # fmt: skip
    wanted = told(choose_all(rows_of(logits.cpu(), *params)))
    asked = []

    def seen(logits_NV, states, positions):
        asked.append(len(states))
        return tokens(logits_NV, states, positions)

    tokens = sampler._tokens
    monkeypatch.setattr(sampler, "_tokens", seen)
    with kernels(choose_tokens):
        assert told(choose_all(rows_of(logits, *params))) == wanted
        assert asked == [6]
        mask = torch.arange(60) % 2 == 0  # made on the CPU, as grammars make them
        masked = told(choose_all(rows_of(logits[:1], SamplingParams(), mask=mask)))
        assert asked == [6] and masked[0].token % 2 == 0
        assert choose_all([]) == []
    assert isinstance(choose_all(rows_of(logits.cpu(), *params))[3], EngineError)


def test_drafts_are_drawn_by_the_kernel_too(monkeypatch):
    logits = noise(4, 70)
    logits[1, 3] = NAN
    params = (
        SamplingParams(temperature=0),
        SamplingParams(top_p=0.7),
        SamplingParams(presence_penalty=1.0),
        SamplingParams(top_p=0.7),
    )
    states, positions = [SamplerState(p, [], 5) for p in params], [30, 31, 32, 33]
    states[2].accept(7)
    wanted = draw_drafts(logits.cpu(), states, positions)
    asked = []

    def seen(logits_NV, *of):
        asked.append(len(logits_NV))
        return tokens(logits_NV, *of)

    tokens = sampler._tokens
    monkeypatch.setattr(sampler, "_tokens", seen)
    with kernels(choose_tokens):
        assert draw_drafts(logits, states, positions) == wanted
    assert asked == [3]
