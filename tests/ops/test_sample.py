"""Choosing a token, against naive references in Python floats; every draw has a fixed seed."""

import math
from collections import Counter

import pytest
import torch

from pyrosome.errors import EngineError
from pyrosome.ops.sample import adjust_logits, distribution, draw, first_argmax, sample, uniform
from pyrosome.options import SamplingParams

INF, NAN = float("inf"), float("nan")


def noise(n, scale=2.0, seed=0):
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def levels(n, seed=0):
    """Few distinct values: ties everywhere."""
    return torch.randint(-2, 3, (n,), generator=torch.Generator().manual_seed(seed)).float()


def reference(logits, params):
    """(probabilities, whether a filter's edge was too close to call)."""
    scaled = [v / params.temperature for v in logits.double().tolist()]
    mass = [math.exp(v - max(scaled)) for v in scaled]
    probs = [m / math.fsum(mass) for m in mass]
    order = sorted(range(len(probs)), key=lambda i: (-scaled[i], i))
    kept = order[: params.top_k] if params.top_k else order
    close = False
    if params.top_p < 1:
        total, before, nucleus = math.fsum(probs[i] for i in kept), 0.0, []
        for i in kept:
            close |= abs(before - params.top_p * total) < 1e-12
            if not nucleus or before < params.top_p * total:
                nucleus.append(i)
            before += probs[i]
        kept = nucleus
    close |= any(p != max(probs) and abs(p - params.min_p * max(probs)) < 1e-12 for p in probs)
    kept = {i for i in kept if probs[i] >= params.min_p * max(probs)}
    total = math.fsum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))], close


PROMPT, OUTPUT = {0: 3, 2: 1, 5: 1}, {1: 1, 3: 4, 5: 2}  # how often each token was seen


def adjusted(logits, **params):
    return adjust_logits(logits, SamplingParams(**params), PROMPT, OUTPUT).tolist()


def test_without_penalties_nothing_changes():
    logits = noise(8)
    assert adjusted(logits) == logits.tolist()
    assert adjust_logits(logits.to(torch.bfloat16), SamplingParams(), {}, {}).dtype == torch.float32


def test_the_repetition_penalty_scales_what_prompt_and_output_hold():
    logits = torch.tensor([2.0, -2.0, 0.0, 3.0, 5.0, -1.0, 6.0, -7.0])
    assert adjusted(logits, repetition_penalty=2.0) == [1.0, -4.0, 0.0, 1.5, 5.0, -2.0, 6.0, -7.0]
    assert adjusted(logits, repetition_penalty=0.5) == [4.0, -1.0, 0.0, 6.0, 5.0, -0.5, 6.0, -7.0]


def test_the_presence_penalty_is_taken_once_from_what_the_output_holds():
    assert adjusted(torch.ones(8), presence_penalty=0.5) == [1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 1.0]
    assert adjusted(torch.ones(8), presence_penalty=-2.0) == [1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 1.0]


def test_the_frequency_penalty_is_taken_for_each_time_in_the_output():
    assert adjusted(torch.ones(8), frequency_penalty=0.25) == [1.0, 0.75, 1.0, 0.0, 1.0, 0.5, 1.0, 1.0]


def test_penalties_add_up_after_repetition():
    together = adjusted(torch.full((8,), 8.0), repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5)
    assert together == [4.0, 2.5, 4.0, 1.0, 8.0, 2.0, 8.0, 8.0]


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_the_caller_s_logits_are_left_alone_and_impossible_tokens_stay_so(penalty):
    logits = noise(8)
    logits[3] = -INF
    before = logits.clone()
    assert adjusted(logits, **{penalty: 1.5})[3] == -INF
    assert torch.equal(logits, before)
    params = SamplingParams(**{penalty: 1.5})
    assert torch.equal(adjust_logits(logits, params, {}, {}), before)
    if penalty != "repetition_penalty":
        assert torch.equal(adjust_logits(logits, params, PROMPT, {}), before)


def test_temperature_zero_takes_the_first_of_the_best():
    for seed in range(30):
        logits = levels(50, seed)
        best = min(i for i in range(50) if logits[i] == logits.max())
        assert first_argmax(logits) == best
        assert sample(logits, SamplingParams(temperature=0), {}, {}, seed, 7) == (best, {})
    assert first_argmax(torch.tensor([-INF, -3.0, -3.0])) == 1
    assert first_argmax(torch.tensor([-0.0, 0.0])) == 0


def test_temperature_zero_sees_penalties():
    params = SamplingParams(temperature=0, presence_penalty=1.0)
    assert sample(torch.tensor([1.0, 1.5, 0.0]), params, {}, {1: 1}, 0, 0)[0] == 0


@pytest.mark.parametrize("make", [noise, levels])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 11, 12, 40])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.77, 0.9999, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.07, 1.0])
def test_filters_against_a_reference(make, temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    called = 0
    for seed in range(4):
        logits = make(12, seed=seed)
        expected, close = reference(logits, params)
        if close:
            continue
        called += 1
        probs = distribution(logits, params)
        assert probs.dtype == torch.float64
        assert probs.sum().item() == pytest.approx(1, abs=1e-12)
        assert [p > 0 for p in probs.tolist()] == [p > 0 for p in expected]
        assert probs.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert called


def kept(logits, **params):
    return distribution(torch.tensor(logits), SamplingParams(**params)).nonzero().flatten().tolist()


@pytest.mark.parametrize("k", range(1, 6))
def test_a_tie_at_the_edge_of_top_k_goes_to_the_lowest_ids(k):
    assert kept([1.0, 3.0, 1.0, 3.0, 1.0], top_k=k) == sorted([1, 3, 0, 2, 4][:k])


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)]
)
def test_a_tie_at_the_edge_of_top_p_goes_to_the_lowest_ids(top_p, expected):
    """Four equal tokens hold exactly a quarter each: the set ends where it first reaches top_p."""
    assert kept([0.0] * 4, top_p=top_p) == list(range(expected))


def test_top_p_counts_what_top_k_left():
    assert kept([0.0] * 8, top_k=4, top_p=0.5) == [0, 1]


def test_min_p_keeps_all_that_tie_with_its_edge():
    assert kept([2.0, 0.0, 2.0, 1.0], min_p=1.0) == [0, 2]


@pytest.mark.parametrize(
    "filters",
    [{"top_k": 1}, {"top_p": 1e-12}, {"top_p": 5e-324}, {"min_p": 1.0}, {"top_k": 1, "top_p": 1e-12, "min_p": 1.0}],
)
@pytest.mark.parametrize("temperature", [1e-308, 1e-3, 1.0, 100.0])
def test_at_least_one_token_remains(filters, temperature):
    for seed in range(5):
        logits = noise(40, seed=seed)
        probs = distribution(logits, SamplingParams(temperature=temperature, **filters))
        assert probs.nonzero().tolist() == [[logits.argmax().item()]]
        assert probs.max() == 1


def test_impossible_tokens_are_never_left():
    probs = distribution(torch.tensor([-INF, 0.0, -INF, 0.0]), SamplingParams(temperature=100.0, top_k=3, top_p=0.999))
    assert probs.tolist() == [0.0, 0.5, 0.0, 0.5]


JUST_BELOW_ONE = 1 - 2.0**-53


@pytest.mark.parametrize(
    ("probs", "first", "last"),
    [
        ([0.25, 0.25, 0.5], 0, 2),
        ([0.0, 0.0, 0.5, 0.5, 0.0, 0.0], 2, 3),
        ([0.0, 1.0], 1, 1),
        ([1.0, 0.0], 0, 0),
        ([0.3, 0.0, 0.7, 0.0], 0, 2),
        ([0.1] * 10 + [0.0] * 3, 0, 9),
        ([1e-300, 1.0, 1e-300, 0.0], 0, 1),
        ([5e-324, 0.0, 0.0], 0, 0),  # u times the total rounds up to the total
    ],
)
def test_draws_at_both_ends_and_over_tails_of_nothing(probs, first, last):
    probs = torch.tensor(probs, dtype=torch.float64)
    assert draw(probs, 0.0) == first
    assert draw(probs, JUST_BELOW_ONE) == last
    for i in range(200):
        assert probs[draw(probs, i / 200)] > 0


def test_a_draw_follows_the_edges_in_id_order():
    probs = torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64)
    below = 0.25 - 2.0**-54, 0.75 - 2.0**-53
    for scale in (1.0, 4.0, 2.0**-600):  # a total that rounding left off one is made up for
        assert [draw(probs * scale, u) for u in (below[0], 0.25, 0.5, below[1], 0.75)] == [0, 2, 2, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_a_draw_at_the_end_of_many_small_probabilities_is_a_token_that_has_some(seed):
    probs = distribution(noise(5000, 6.0, seed), SamplingParams(top_p=0.9))
    for u in (0.0, 0.5, JUST_BELOW_ONE):
        assert probs[draw(probs, u)] > 0


def chi_square(counts, expected):
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


@pytest.mark.parametrize(
    "numbers",
    [
        [uniform(1, p) for p in range(10_000)],
        [uniform(s, 0) for s in range(10_000)],
        [uniform(s, 10_000 - s) for s in range(10_000)],
        [uniform(0, p << 20) for p in range(10_000)],
    ],
    ids=["positions", "seeds", "both", "strides"],
)
def test_uniform_is_roughly_uniform(numbers):
    assert all(0 <= u < 1 for u in numbers)
    assert len(set(numbers)) == len(numbers)
    bins = Counter(int(u * 20) for u in numbers)
    assert chi_square([bins[i] for i in range(20)], [500] * 20) < 43.8  # one in a thousand, 19 degrees
    pairs = Counter((int(a * 4), int(b * 4)) for a, b in zip(numbers[::2], numbers[1::2], strict=True))
    assert chi_square([pairs[i, j] for i in range(4) for j in range(4)], [312.5] * 16) < 37.7  # 15 degrees


PINNED = {
    (0, 0): "0x1.4e0dba5e9a32fp-1",
    (0, 1): "0x1.f647530ffa1bcp-2",
    (1, 0): "0x1.7906ac21d0e58p-2",
    (42, 1000): "0x1.9794b5046ef26p-1",
    (-1, 7): "0x1.86a4de219d160p-5",
    (2**64 - 1, 1_048_575): "0x1.cd74feedce608p-1",
}


def test_uniform_is_the_same_everywhere_and_always():
    """A session that is resumed elsewhere goes on with these very numbers."""
    assert {at: uniform(*at).hex() for at in PINNED} == PINNED


def test_uniform_tells_every_seed_and_position_apart():
    seeds = [0, 1, 2, -1, 2**63, 2**64 - 2, -(2**63) + 1]
    assert len({uniform(s, p) for s in seeds for p in range(100)}) == 100 * len(seeds)
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)  # a seed is 64 bits


def test_a_choice_depends_on_its_own_arguments_alone():
    logits, params = noise(100), SamplingParams(temperature=1.5)
    first = [sample(logits, params, {}, {}, 3, p)[0] for p in range(50)]
    torch.manual_seed(99)
    sample(noise(7), params, {}, {}, 4, 4)
    assert [sample(logits, params, {}, {}, 3, p)[0] for p in reversed(range(50))] == first[::-1]
    assert [sample(logits, params, {}, {}, 4, p)[0] for p in range(50)] != first
    assert len(set(first)) > 10


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.4, top_k=8, top_p=0.95, min_p=0.05),
    ],
)
def test_frequencies_follow_the_distribution(params):
    logits, num = noise(10, 1.0), 3000
    probs, _ = reference(logits, params)
    drawn = Counter(sample(logits, params, {}, {}, 11, position)[0] for position in range(num))
    assert set(drawn) <= {i for i in range(10) if probs[i] > 0}
    likely = [i for i in range(10) if probs[i] * num >= 5]
    assert (
        chi_square([drawn[i] for i in likely], [probs[i] * num for i in likely]) < 27.9
    )  # one in a thousand, 9 degrees


def log_softmax(logits):
    values = logits.tolist()
    total = max(values) + math.log(math.fsum(math.exp(v - max(values)) for v in values))
    return [v - total for v in values]


@pytest.mark.parametrize("num_top", [0, 1, 3, 12, 100])
@pytest.mark.parametrize("temperature", [0, 2.0])
def test_log_probabilities_are_the_model_s_own(num_top, temperature):
    params = SamplingParams(
        logprobs=num_top, temperature=temperature, top_k=6, presence_penalty=2.0, repetition_penalty=3.0
    )
    logits = levels(12, seed=4)
    raw = log_softmax(logits)
    top = sorted(range(12), key=lambda i: (-logits[i].item(), i))[:num_top]
    for position in range(10):
        token, found = sample(logits, params, {3: 1}, {top[0] if top else 1: 2}, 0, position)
        assert next(iter(found)) == token
        assert set(found) == {token, *top}
        assert found == pytest.approx({i: raw[i] for i in found}, abs=1e-5)


def test_log_probabilities_are_given_only_where_asked_for():
    assert sample(noise(5), SamplingParams(), {}, {}, 0, 0)[1] == {}
    assert sample(noise(5), SamplingParams(logprobs=0), {}, {}, 0, 0)[1].keys() == {
        sample(noise(5), SamplingParams(), {}, {}, 0, 0)[0]
    }


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    "logits", [[0.0, NAN, 1.0], [NAN, NAN], [-INF, NAN], [-INF, -INF], [0.0, INF]], ids=lambda v: "_".join(map(str, v))
)
def test_logits_that_allow_no_choice_are_an_error(logits, temperature):
    with pytest.raises(EngineError, match="position 41"):
        sample(torch.tensor(logits), SamplingParams(temperature=temperature), {}, {}, 0, 41)


def test_one_possible_token_is_chosen():
    logits = torch.tensor([-INF, -INF, -5.0, -INF])
    for temperature in (0, 0.01, 1.0, 100.0):
        assert sample(logits, SamplingParams(temperature=temperature, logprobs=1), {}, {}, 0, 0) == (2, {2: 0.0})
