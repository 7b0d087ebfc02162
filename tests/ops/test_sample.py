"""Choosing a token, against naive references in Python floats; every draw has a fixed seed."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from pyrosome.errors import EngineError
from pyrosome.ops.sample import adjust_logits, distribution, first_argmax, race, sample
from pyrosome.ops.sample.noise import seed_of, uniforms
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
    highest = max(scaled)
    mass = [math.exp(v - highest) for v in scaled]
    whole = math.fsum(mass)
    probs = [m / whole for m in mass]
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
    best = max(probs)
    close |= any(p != best and abs(p - params.min_p * best) < 1e-12 for p in probs)
    kept = {i for i in kept if probs[i] >= params.min_p * best}
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
    for seed in range(3):
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


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("logits", [[0.0, NAN, 1.0], [-INF] * 3, [0.0, INF, 1.0]], ids=str)
def test_there_is_no_distribution_of_what_is_no_number(logits, filters):
    with pytest.raises(EngineError, match=r"the logits hold (nan|inf|-inf): there are no probabilities"):
        distribution(torch.tensor(logits), SamplingParams(**filters))


def test_impossible_tokens_are_never_left():
    probs = distribution(torch.tensor([-INF, 0.0, -INF, 0.0]), SamplingParams(temperature=100.0, top_k=3, top_p=0.999))
    assert probs.tolist() == [0.0, 0.5, 0.0, 0.5]


@pytest.mark.parametrize("make", [noise, levels])
@pytest.mark.parametrize(
    "filters", [{"top_p": 0.9}, {"top_p": 0.999999}, {"top_k": 700}, {"min_p": 1e-4}, {"top_k": 900, "top_p": 0.4321}]
)
def test_filters_over_a_large_vocabulary(make, filters):
    """Where only some ids are put in order."""
    logits = make(1500, seed=3)
    expected, close = reference(logits, SamplingParams(**filters))
    assert not close
    torch.testing.assert_close(
        distribution(logits, SamplingParams(**filters)),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )


def test_the_caller_s_double_logits_are_left_alone():
    logits = noise(8).double()
    before = logits.clone()
    distribution(logits, SamplingParams(temperature=0.5, top_p=0.9))
    assert torch.equal(logits, before)


def test_a_distribution_is_the_same_whatever_the_threads():
    logits, found = noise(129_280, 3.0), []
    threads = torch.get_num_threads()
    try:
        for num in (1, 2, 4):
            torch.set_num_threads(num)
            found.append([distribution(logits, SamplingParams(**f)) for f in ({}, {"top_p": 0.99}, {"min_p": 1e-6})])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def winner(probs, seed, position):
    """The race in Python floats, over all ids."""
    u = uniforms(seed, position, np.arange(len(probs))).tolist()
    times = {i: -math.log1p(-u[i]) / p for i, p in enumerate(probs) if p > 0}
    return min(times, key=times.get)


@pytest.mark.parametrize("size", [2, 17, 1000, 16_384, 16_385, 50_000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 40.0])
def test_the_race_is_won_by_the_least_time_of_all(size, scale):
    for position in range(3):
        probs = noise(size, scale, seed=position).double().softmax(-1)
        probs[::3] = 0
        assert race(probs, 9, position) == winner(probs.tolist(), 9, position)


@pytest.mark.parametrize(
    ("probs", "expected"),
    [([0.0, 1.0], 1), ([1.0, 0.0], 0), ([0.0] * 20_000 + [0.5], 20_000), ([0.0, 5e-324, 0.0], 1), ([1e-300, 1.0], 1)],
)
def test_ids_without_probability_never_win(probs, expected):
    for position in range(50):
        assert race(torch.tensor(probs, dtype=torch.float64), 0, position) == expected


def test_a_scale_of_all_probabilities_changes_nothing():
    probs = noise(300).double().softmax(-1)
    for position in range(50):
        assert race(probs, 1, position) == race(probs * 2.0**-600, 1, position)


def test_a_race_among_values_that_are_no_numbers_names_an_id_still():
    """A drafter's values may be anything; the target's are checked."""
    assert race(torch.full((9,), NAN, dtype=torch.float64), 0, 0) in range(9)


def chi_square(counts, expected):
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


def noise_of(seed, position, *ids):
    return uniforms(seed, position, np.array(ids)).tolist()


EVERY_ID = np.arange(100_000)


@pytest.mark.parametrize(
    "numbers",
    [
        uniforms(1, 0, EVERY_ID),
        uniforms(0, 1_048_575, EVERY_ID + 29_280),
        np.array([noise_of(1, p, 77)[0] for p in range(20_000)]),
        np.array([noise_of(s, 0, 0)[0] for s in range(20_000)]),
        np.array([noise_of(s, 20_000 - s, s % 7)[0] for s in range(20_000)]),
        np.array([noise_of(0, p << 20, 5)[0] for p in range(20_000)]),
    ],
    ids=["ids", "far ids", "positions", "seeds", "all", "strides"],
)
def test_noise_is_uniform_and_one_number_tells_nothing_of_the_next(numbers):
    assert numbers.min() > 0 and numbers.max() < 1
    assert len(set(numbers.tolist())) == numbers.size
    bins = np.bincount((numbers * 20).astype(int), minlength=20)
    assert chi_square(bins, [numbers.size / 20] * 20) < 43.8  # one in a thousand, 19 degrees
    pairs = np.bincount((numbers[:-1] * 8).astype(int) * 8 + (numbers[1:] * 8).astype(int), minlength=64)
    assert chi_square(pairs, [(numbers.size - 1) / 64] * 64) < 103.4  # 63 degrees


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((5, 1000), (6, 999)), ((-1, 3), (0, 3)), ((0, 1 << 20), (0, 0))],
)
def test_noise_of_other_positions_and_seeds_is_unrelated(one, other):
    a, b = uniforms(*one, EVERY_ID), uniforms(*other, EVERY_ID)
    assert abs(np.corrcoef(a, b)[0, 1]) < 3.9 / math.sqrt(a.size)  # one in ten thousand
    for shift in (1, 2, 1000):
        assert abs(np.corrcoef(a[shift:], b[:-shift])[0, 1]) < 3.9 / math.sqrt(a.size)
    assert not set(a.tolist()) & set(b.tolist())


PINNED = {  # by the same steps in Python integers
    (0, 0, 0): "0x1.693568ef770d1p-1",
    (0, 0, 1): "0x1.1c13ade1c7e5cp-3",
    (0, 1, 0): "0x1.2b10890b2b48fp-1",
    (1, 0, 0): "0x1.4fdb1043b9421p-1",
    (42, 1000, 129_279): "0x1.d08ebac281b2bp-1",
    (-1, 7, 3): "0x1.49f0f892b6371p-1",
    (2**64 - 1, 1_048_575, 77): "0x1.29d929be96e33p-1",
}


def test_noise_is_the_same_everywhere_and_always():
    """A session that is resumed elsewhere goes on with these very numbers."""
    assert {at: noise_of(*at)[0].hex() for at in PINNED} == PINNED


def test_noise_is_an_odd_multiple_of_a_power_of_two():
    scaled = [int(u * 2**53) for u in uniforms(3, 4, EVERY_ID[:1000]).tolist()]
    assert all(n % 2 for n in scaled)


def test_noise_of_an_id_does_not_depend_on_the_ids_beside_it():
    ids = np.array([129_279, 3, 3, 0])
    before = ids.copy()
    assert uniforms(8, 8, ids).tolist() == [noise_of(8, 8, i)[0] for i in ids]
    assert ids.tolist() == before.tolist()


def test_noise_tells_every_seed_and_position_apart():
    seeds = [0, 1, 2, -1, 2**63, 2**64 - 2, -(2**63) + 1]
    assert len({noise_of(s, p, 1)[0] for s in seeds for p in range(100)}) == 100 * len(seeds)
    assert noise_of(-1, 5, 2) == noise_of(2**64 - 1, 5, 2)  # a seed is 64 bits


def test_the_first_completion_has_the_request_s_seed_and_the_others_their_own():
    for seed in (0, 1, -1, 2**64 - 1):
        assert seed_of(seed, 0) == seed
        assert len({seed_of(seed, i) for i in range(128)}) == 128
    assert len({seed_of(s, i) for s in range(100) for i in range(100)}) == 10_000
    assert [seed_of(7, i) for i in (1, 2)] == [4414019431610648415, 5090977316425868581]


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


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.95),
        SamplingParams(temperature=1.5, top_k=30, min_p=0.01),
    ],
)
def test_frequencies_over_other_logits_at_every_position(params):
    """Logits change from position to position, as they do: what is drawn has the rank it should have as often."""
    num, expected, drawn = 1500, np.zeros(40), np.zeros(40)
    for position in range(num):
        probs = distribution(noise(40, 1.5, seed=position), params)
        order = probs.argsort(descending=True, stable=True)
        expected += probs[order].numpy()
        drawn[order.tolist().index(race(probs, 3, position))] += 1
    likely = expected >= 5
    assert drawn[expected == 0].sum() == 0
    assert chi_square(drawn[likely], expected[likely]) < 73.4  # one in a thousand, 40 degrees


def agreement(p, q):
    """How often two races with one noise have one winner: the sum over v of 1 / sum over w max(p_w/p_v, q_w/q_v)."""
    return sum(1 / torch.maximum(p / p[v], q / q[v]).sum().item() for v in range(len(p)) if p[v] > 0 and q[v] > 0)


@pytest.mark.parametrize("distance", [0.0, 0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0])
def test_two_that_are_alike_agree_as_often_as_promised(scale, distance):
    logits, num = noise(60, scale), 1500
    p = logits.double().softmax(-1)
    q = (logits + noise(60, distance, seed=1)).double().softmax(-1)
    expected, tv = agreement(p, q), 0.5 * (p - q).abs().sum().item()
    assert (1 - tv) / (1 + tv) - 1e-12 <= expected <= 1 - tv + 1e-12
    found = sum(race(p, 5, t) == race(q, 5, t) for t in range(num)) / num
    assert abs(found - expected) <= 3.9 * math.sqrt(expected * (1 - expected) / num) + 1e-9


def test_a_certain_draft_is_accepted_as_often_as_it_is_probable():
    p = noise(20, 2.0).double().softmax(-1)
    certain = torch.zeros(20, dtype=torch.float64)
    certain[p.argmax()] = 1
    assert agreement(p, certain) == pytest.approx(p.max().item())


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_mask_is_applied_after_penalties_and_before_filters(temperature):
    logits = torch.tensor([9.0, 5.0, 4.0, 8.0, 1.0])
    mask = torch.tensor([False, True, True, False, True])
    for position in range(20):
        found = sample(logits, SamplingParams(temperature=temperature, top_k=1), {}, {}, 0, position, mask)
        assert found == (1, {})
        params = SamplingParams(temperature=temperature, top_k=1, presence_penalty=2.0)
        assert sample(logits, params, {}, {1: 1}, 0, position, mask)[0] == 2


class Elsewhere:
    """A mask on another device than the logits: it can only be taken to theirs."""

    def __init__(self, mask_V):
        self.mask_V = mask_V

    def to(self, device):
        assert device == self.mask_V.device
        return self.mask_V


def test_a_mask_may_be_on_another_device():
    mask = Elsewhere(torch.arange(5) == 3)
    assert sample(noise(5), SamplingParams(), {}, {}, 4, 0, mask)[0] == 3
    with pytest.raises(EngineError, match="0 of 5 ids allowed"):
        sample(noise(5), SamplingParams(), {}, {}, 4, 0, Elsewhere(torch.zeros(5, dtype=torch.bool)))


def test_a_mask_renormalises_what_it_leaves():
    logits, mask = noise(12, 1.0), torch.arange(12) % 2 == 0
    expected = torch.where(mask, logits.double().exp(), 0.0)
    expected = (expected / expected.sum()).tolist()
    drawn = Counter(sample(logits, SamplingParams(), {}, {}, 4, p, mask)[0] for p in range(3000))
    assert set(drawn) == set(range(0, 12, 2))
    assert chi_square([drawn[i] for i in range(0, 12, 2)], [3000 * expected[i] for i in range(0, 12, 2)]) < 20.5


def test_log_probabilities_do_not_see_the_mask():
    logits, mask = noise(12), torch.arange(12) == 4
    token, found = sample(logits, SamplingParams(logprobs=2, temperature=0), {}, {}, 0, 0, mask)
    raw = log_softmax(logits)
    assert token == 4 and found == pytest.approx({i: raw[i] for i in found}, abs=1e-5) and len(found) == 3


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("mask", [[False] * 3, [True, False, False]], ids=["nothing allowed", "nothing finite allowed"])
def test_a_mask_that_leaves_nothing_is_an_error(mask, temperature):
    with pytest.raises(EngineError, match=rf"{sum(mask)} of 3 ids allowed.*position 41"):
        sample(
            torch.tensor([-INF, 1.0, 2.0]), SamplingParams(temperature=temperature), {}, {}, 0, 41, torch.tensor(mask)
        )


def test_penalties_that_leave_no_number_are_an_error():
    with pytest.raises(EngineError, match="penalties"):
        sample(torch.tensor([3.0, 1.0]), SamplingParams(repetition_penalty=1e-300), {0: 1}, {}, 0, 41)


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
