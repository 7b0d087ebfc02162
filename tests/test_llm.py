"""`LLM` and `load_model` with the built-in model: text in, text out, and refusals before anything runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.errors import CheckpointError, ContextTooLong, MissingTensor, RequestError
from pyrosome.llm import LLM, load_model
from pyrosome.options import SamplingParams
from tests.networks import assert_same

BUILTIN = open_checkpoint("builtin:nano")
NANO, VOCABULARY = BUILTIN.path, BUILTIN.config.vocab_size
GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="module")
def llm():
    with LLM("builtin:nano", numerics="exact", drafter="off") as one:  # a draft that is checked would be a row more
        yield one


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The built-in model with a context of 16 positions."""
    directory = tmp_path_factory.mktemp("short") / "nano"
    shutil.copytree(NANO, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    return LLM(directory)


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 16, "seed": 1, "ignore_eos": True, **changes})


# Generating.


def test_text_and_the_ids_it_stands_for_are_the_same_prompt(llm):
    ids = llm.encode("Hello, world")
    assert ids[0] == llm.model.config.bos_token_id and ids[1:] == llm.tokenizer.encode("Hello, world")
    from_text, from_ids, from_tuple = llm.generate(["Hello, world", ids, tuple(ids)], params())
    assert from_text == from_ids == from_tuple
    assert len(from_text.token_ids) == 16 and from_text.finish_reason == "length" and from_text.logprobs is None
    assert from_text.text == llm.tokenizer.decode(from_text.token_ids)


def test_no_text_at_all_continues_the_beginning_of_a_sentence(llm):
    (empty,) = llm.generate([""], params())
    assert [empty] == llm.generate([[llm.model.config.bos_token_id]], params())


def test_outputs_come_in_the_order_of_their_prompts_each_with_its_own_params(llm):
    prompts = ["one", "two, and more of it", "three"] * 4
    each = [params(max_tokens=2 + i % 5, seed=i, temperature=0 if i % 3 else 1.0) for i in range(12)]
    outputs = llm.generate(prompts, each)
    assert [len(o.token_ids) for o in outputs] == [p.max_tokens for p in each]
    for i in (0, 5, 11):
        assert [outputs[i]] == llm.generate([prompts[i]], each[i])


def test_one_params_for_all_and_none_for_defaults(llm):
    a, b = llm.generate(["same", "same"], params())
    assert a == b
    assert llm.generate([]) == [] and llm.generate([], []) == []
    assert llm.generate(["x"], [params(max_tokens=1)])[0].finish_reason == "length"


def test_fewer_slots_and_smaller_steps_change_nothing(llm):
    prompts = ["a", "bc " * 40, "def", "g" * 90, ""]
    outputs = llm.generate(prompts, params(logprobs=1))
    with LLM("builtin:nano", numerics="exact", max_sequences=2, step_tokens=7, drafter="off") as small:
        assert small.generate(prompts, params(logprobs=1)) == outputs


@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, {"seed": 9, "max_tokens": 40}, {"stop": ("e",)}], ids=str)
def test_a_stream_joins_up_to_what_generate_gives(llm, changes):
    (whole,) = llm.generate(["Once upon"], params(**changes))
    pieces = list(llm.stream("Once upon", params(**changes)))
    assert "".join(p.text for p in pieces) == whole.text
    assert [t for p in pieces for t in p.token_ids] == whole.token_ids
    assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + [whole.finish_reason]


def test_a_stream_that_is_closed_computes_no_further(llm):
    before, aborted = llm.stats().requests, llm.stats().ended_by_reason.get("abort", 0)
    stream = llm.stream("Hello", params(max_tokens=100_000))
    assert llm.stats().requests == before
    next(stream)
    assert llm.stats().requests == before + 1 and llm.stats().running == 1
    stream.close()
    llm.generate(["x"], params(max_tokens=1))  # one step later
    assert llm.stats().running == 0 and llm.stats().ended_by_reason["abort"] == aborted + 1


# Log-probabilities.


def test_logprobs_are_those_of_the_model_whatever_was_sampled_with(llm):
    prompt = llm.encode("The sea")
    changed = params(logprobs=100, temperature=0.5, top_k=9, presence_penalty=1.0, repetition_penalty=1.5)
    (output,) = llm.generate([prompt], changed)
    raw = llm.model.logits(prompt + output.token_ids)[len(prompt) - 1 : -1].log_softmax(-1)
    assert len(output.logprobs) == len(output.token_ids) == 16
    for row, token, reported in zip(raw, output.token_ids, output.logprobs, strict=True):
        top = row.topk(100)
        assert token in reported and len(reported) in (100, 101)
        assert reported == pytest.approx({t: float(row[t]) for t in reported}, abs=1e-4)
        assert sum(map(math.exp, reported.values())) == pytest.approx(float(top.values.exp().sum()), abs=0.02)
        assert sum(map(math.exp, reported.values())) <= 1 + 1e-5


def test_a_greedy_token_is_the_most_probable(llm):
    (output,) = llm.generate(["The sea"], params(logprobs=3, temperature=0))
    for token, reported in zip(output.token_ids, output.logprobs, strict=True):
        assert len(reported) == 3 and next(iter(reported)) == token and max(reported, key=reported.get) == token


def test_no_top_tokens_still_reports_the_chosen_one(llm):
    (output,) = llm.generate(["The sea"], params(logprobs=0))
    assert [list(reported) for reported in output.logprobs] == [[t] for t in output.token_ids]


# Bytes of the cache.


@pytest.mark.parametrize("kv_format", ["f32", "bf16", "fp8"])
def test_kv_bytes_are_the_pool_s(kv_format):
    llm = LLM("builtin:nano", kv_format=kv_format)
    context = 8192  # whole pages of every stream
    one, two = (llm.model.runner(n, context).pool for n in (1, 2))
    per_sequence = two.allocated_bytes - one.allocated_bytes - two.plan.table_bytes + one.plan.table_bytes
    assert llm.kv_bytes(context)["sequence"] == per_sequence
    assert llm.kv_bytes(context)["per_token"] == one.plan.bytes_per_token
    grown = (llm.kv_bytes(context)["sequence"] - llm.kv_bytes(0)["sequence"]) / context
    assert grown == llm.kv_bytes()["per_token"] > 0
    assert llm.plan_cache(context, 2) == two.plan


# Refusals.


@pytest.mark.parametrize(
    ("prompts", "given", "said"),
    [
        ("a bare string", None, r"pass \[prompt\]"),
        ([[]], None, "empty prompt"),
        (["a", []], None, "empty prompt"),
        (["a", "b"], [SamplingParams()], "2 prompts and 1 SamplingParams"),
        (["a"], [SamplingParams()] * 2, "1 prompts and 2 SamplingParams"),
        (["a"], [], "1 prompts and 0 SamplingParams"),
        (
            [[0, VOCABULARY]],
            None,
            rf"token {VOCABULARY} at position 1 .*\(integers 0 to {VOCABULARY - 1}\).*own tokenizer",
        ),
        ([[-1]], None, "token -1 at position 0"),
        ([[0.5]], None, "token 0.5"),
        ([["a"]], None, "token 'a'"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_runs(llm, monkeypatch, prompts, given, said):
    monkeypatch.setattr(llm.model.network, "forward", None)
    with pytest.raises(RequestError, match=said):
        llm.generate(prompts, given)


def test_a_prompt_longer_than_the_context_says_both_lengths(short):
    for prompts in ([[5] * 17], ["fine", "x" * 40]):
        with pytest.raises(ContextTooLong, match="the context holds 16; shorten the prompt") as caught:
            short.generate(prompts)
        assert caught.value.asked_tokens == len(short.encode(prompts[-1]) if isinstance(prompts[-1], str) else [5] * 17)
        assert caught.value.max_tokens == 16
    for ask in (short.model.logits, short.model.draft_logits):
        with pytest.raises(ContextTooLong):
            ask([5] * 17)


@pytest.mark.parametrize("length", [1, 15, 16])
def test_generation_ends_with_the_context(short, length):
    (output,) = short.generate([[5] * length], params(max_tokens=100))
    assert len(output.token_ids) == 16 - length + 1 and output.finish_reason == "length"


@pytest.mark.parametrize("cuts", [[0], [3], [-1], [2, 1], [1, 1], [4]], ids=str)
def test_cuts_must_ascend_within_the_tokens(llm, cuts):
    for ask in (llm.model.logits, llm.model.draft_logits):
        with pytest.raises(RequestError, match=r"cuts must ascend within 1\.\.2 for 3 tokens"):
            ask([1, 2, 3], cuts=cuts)


def test_unknown_numerics_and_formats_are_refused_with_the_known_ones():
    with pytest.raises(RequestError, match="numerics 'fast' was asked for; this build offers exact, trained"):
        load_model("builtin:nano", numerics="fast")
    with pytest.raises(CheckpointError, match="kv_format 'fp4' is unknown; it is one of f32, bf16, fp8"):
        load_model("builtin:nano", kv_format="fp4")
    for wrong in ({"numerics": "fast"}, {"kv_format": "fp4"}):
        with pytest.raises((RequestError, CheckpointError)):
            LLM("builtin:nano", **wrong)


def test_a_format_this_shape_cannot_be_stored_in_is_refused_before_the_load(tmp_path, monkeypatch):
    shutil.copytree(NANO, tmp_path / "nano")
    config = json.loads((tmp_path / "nano/config.json").read_text())
    (tmp_path / "nano/config.json").write_text(json.dumps(config | {"head_dim": config["qk_rope_head_dim"] + 66}))
    monkeypatch.setattr("pyrosome.engine.loaded.build", None)
    with pytest.raises(CheckpointError, match=r"66 channels.*kv_format='f32' or 'bf16'"):
        LLM(tmp_path / "nano")


def test_a_directory_that_is_no_checkpoint_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LLM(tmp_path)
    shutil.copy(NANO / "config.json", tmp_path)
    with pytest.raises(MissingTensor, match=r"model\.safetensors\.index\.json"):
        LLM(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist.*builtin:nano"):
        LLM(tmp_path / "nowhere")


def test_a_checkpoint_without_a_tokenizer_reads_ids_alone():
    with pytest.raises(CheckpointError, match=r"tokenizer\.json was looked for .*or pass token ids"):
        LLM(GOLDEN / "bf16")
    assert load_model(GOLDEN / "bf16").logits([1, 2]).shape[0] == 2


# Loading.


def test_numerics_choose_their_rows_unless_told_otherwise():
    found = {
        (n, f): load_model("builtin:nano", numerics=n, kv_format=f)
        for n in ("exact", "trained")
        for f in (None, "bf16")
    }
    assert {key: (m.numerics, m.kv_format) for key, m in found.items()} == {
        ("exact", None): ("exact", "f32"),
        ("trained", None): ("trained", "fp8"),
        ("exact", "bf16"): ("exact", "bf16"),
        ("trained", "bf16"): ("trained", "bf16"),
    }
    assert LLM("builtin:nano").model.numerics == "trained"


def test_a_name_a_directory_and_a_file_are_the_same_model(llm):
    ids = list(range(2, 60))
    expected = llm.model.logits(ids)
    (shard,) = NANO.glob("*.safetensors")
    for source in (NANO, str(NANO), shard, str(shard)):
        model = load_model(source)
        assert model.path == NANO and model.has_drafts
        assert torch.equal(model.logits(ids), expected)
    assert_same(load_model(NANO, unpack=False).logits(ids), expected)


def test_logits_come_for_every_token_however_it_is_cut(llm):
    ids = list(range(3, 40))
    whole = llm.model.logits(ids)
    assert whole.shape == (37, VOCABULARY) and whole.dtype == torch.float32
    assert_same(llm.model.logits(torch.tensor(ids), cuts=[1, 7, 36]), whole)
    assert_same(llm.model.logits(ids, cuts=iter(range(1, 37))), whole)
    drafts = llm.model.draft_logits(ids)
    assert drafts.shape == (36, VOCABULARY)
    assert_same(llm.model.draft_logits(ids, cuts=[5]), drafts)
    assert llm.model.draft_logits(ids[:1]).shape == (0, VOCABULARY)


def test_progress_is_told_in_bytes_that_grow_to_the_whole():
    told = []
    load_model("builtin:nano", progress=lambda *call: told.append(call))
    total = open_checkpoint("builtin:nano").nbytes
    (shard,) = NANO.glob("*.safetensors")
    assert told == [(total, total, shard.name)]
    again = []
    LLM("builtin:nano", progress=lambda *call: again.append(call))
    assert again == told


@pytest.mark.parametrize("device", ["cuda:77", "banana", "meta:x"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(RequestError, match=f"device '{device}'"):
        load_model("builtin:nano", device=device)


@pytest.mark.parametrize("name", ["max_sequences", "step_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_counts_below_one_are_refused_before_the_load(name, value):
    with pytest.raises(RequestError, match=name):
        LLM("no such checkpoint", **{name: value})
