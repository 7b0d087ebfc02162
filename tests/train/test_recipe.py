"""Recipes: read strictly, overridden, written back, told apart."""

from __future__ import annotations

import tomllib

import pytest

from pyrosome.config import CheckpointError, ModelConfig
from pyrosome.errors import RequestError
from pyrosome.train.recipe import RECIPES, Recipe, builtin_names, differences

SMOKE = RECIPES / "smoke.toml"


def smoke() -> dict:
    return tomllib.loads(SMOKE.read_text())


def refused(*overrides: str) -> str:
    with pytest.raises(RequestError) as caught:
        Recipe.load("smoke", overrides)
    return str(caught.value)


def test_a_file_and_a_name_give_the_same_recipe():
    recipe = Recipe.load("smoke")
    assert recipe == Recipe.load(SMOKE) == Recipe.load(str(SMOKE))
    assert recipe.name == "smoke" and recipe.seed == 1 and recipe.max_length == 256
    assert recipe.optimizer.muon_lr == 0.02 and recipe.loss.balance == 1e-4 and recipe.run.dtype == "float32"
    stage = recipe.stages[0]
    assert (stage.name, stage.selection, stage.max_tokens, stage.min_tokens) == ("dense", "dense", 30_000, 0)
    assert stage.gate and (stage.gate.kind, stage.gate.accuracy) == ("records", 0.9)
    assert recipe.stages[1].gate is None
    records, copy = stage.mix
    assert (records.kind, records.share, records.length, records.knobs) == (
        "records",
        0.8,
        (64, 128),
        {"facts": (2, 6)},
    )
    assert (copy.length, copy.knobs) == ((64, 64), {})


def test_every_recipe_of_the_package_is_sound():
    assert "smoke" in builtin_names()
    for name in builtin_names():
        assert Recipe.load(name).name == name


def test_the_configuration_has_the_tokenizers_ids():
    config = Recipe.load("smoke", ["tokenizer.vocab_size=512"]).config
    assert isinstance(config, ModelConfig)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (512, 0, 1)
    assert config.hidden_size == 64 and config.compress_ratios == (0, 4, 32, 0)


def test_a_nested_table_of_the_model_reaches_the_configuration():
    yarn = 'model.rope_scaling={type="yarn", factor=4, beta_fast=32, beta_slow=1, original_max_position_embeddings=512}'
    recipe = Recipe.load("smoke", [yarn, "model.rope_scaling.factor=8"])
    assert recipe.config.rope_scaling and recipe.config.rope_scaling.factor == 8
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("optimizer.muon_lr=0.01", lambda r: r.optimizer.muon_lr, 0.01),
        ("optimizer.clip = 2", lambda r: r.optimizer.clip, 2.0),
        ("stages.0.max_tokens=100", lambda r: r.stages[0].max_tokens, 100),
        ("stages.2.mix.1.length=[8, 16]", lambda r: r.stages[2].mix[1].length, (8, 16)),
        ("stages.2.mix.1.thinking=off", lambda r: r.stages[2].mix[1].knobs["thinking"], "off"),
        ("stages.2.mix.1.thinking='off'", lambda r: r.stages[2].mix[1].knobs["thinking"], "off"),
        ("seed=3", lambda r: r.seed, 3),
        ("stages.2.mix.1.thinking=a=b", lambda r: r.stages[2].mix[1].knobs["thinking"], "a=b"),
        ("run.dtype=bfloat16", lambda r: r.run.dtype, "bfloat16"),
        ("model.index_topk=8", lambda r: r.config.index_topk, 8),
    ],
)
def test_overrides(text, found, expected):
    got = found(Recipe.load("smoke", [text]))
    assert got == expected and type(got) is type(expected)


def test_the_last_of_two_overrides_holds():
    assert Recipe.load("smoke", ["seed=3", "seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optimizer.muon_rl=0.1", ["override 'optimizer.muon_rl=0.1'", "optimizer.muon_rl", "did you mean 'muon_lr'"]),
        ("optimizer.muon_lr=0", ["optimizer.muon_lr is 0", "a number above 0"]),
        ("optimizer.muon_lr=inf", ["optimizer.muon_lr is inf", "above 0"]),
        ("optimizer.beta1=1.0", ["optimizer.beta1 is 1.0", "from 0 below 1"]),
        ("optimizer.warmup_steps=2.0", ["optimizer.warmup_steps is 2.0", "an integer from 0"]),
        ("optimizer.warmup_steps=true", ["optimizer.warmup_steps is True", "an integer"]),
        ("loss.background=1.5", ["loss.background is 1.5", "to 1"]),
        ("run.dtype=float16", ["run.dtype is 'float16'", "'float32' or 'bfloat16'"]),
        ("run=4", ["run is 4", "a table"]),
        ("run.decay_tokens=60001", ["run.decay_tokens is 60001", "run.max_tokens is 60000"]),
        ("run.quantize_tokens=60001", ["run.quantize_tokens is 60001", "run.max_tokens is 60000"]),
        ("seed=1.5", ["seed is 1.5", "an integer"]),
        ("name=../x", ["name is '../x'", "letters"]),
        ("name=''", ["name is ''", "letters"]),
        ("sed=1", ["sed is not known", "did you mean 'seed'"]),
        ("tokenizer.vocab_size=100", ["tokenizer.vocab_size is 100", "from 320"]),
        ("model.hiden_size=3", ["model.hiden_size is not known", "did you mean 'hidden_size'"]),
        ("model.head_dim=x", ["override 'model.head_dim=x'", "head_dim is 'x'", "an integer"]),
        ("model.o_groups=3", [str(SMOKE), "num_attention_heads is 2 and o_groups is 3"]),
        ("model.vocab_size=512", ["model.vocab_size", "set tokenizer.vocab_size"]),
        ("model.max_position_embeddings=255", ["model.max_position_embeddings is 255", "256 tokens"]),
        ("stages=3", ["stages is 3", "[[stages]]"]),
        ("stages.0.mix=[]", ["stages.0.mix is []", "[[stages.mix]]"]),
        ("stages.0.selection=all", ["stages.0.selection is 'all'", "'dense' or 'warmup' or 'sparse'"]),
        ("stages.0.min_tokens=30001", ["stages.0.min_tokens is 30001", "max_tokens is 30000"]),
        ("stages.0.gate.kind=recods", ["stages.0.gate.kind is 'recods'", "did you mean 'records'"]),
        ("stages.0.gate.kind=copy/high", ["did you mean 'copy'"]),
        ("stages.0.mix.0.kind=text", ["stages.0.gate.kind is 'records'", "allowed: copy"]),
        ("stages.0.gate.accuracy=0", ["stages.0.gate.accuracy is 0", "above 0 to 1"]),
        ("stages.0.gate.kin=a", ["stages.0.gate.kin is not known", "did you mean 'kind'"]),
        ("stages.1.name=dense", ["stages are named dense, dense, sparse"]),
        ("stages.0.mix.0.share=0", ["stages.0.mix.0.share is 0", "above 0"]),
        ("stages.0.mix.0.length=[5, 2]", ["stages.0.mix.0.length is [5, 2]", "[lowest, highest]"]),
        ("stages.0.mix.0.length=[0, 2]", ["stages.0.mix.0.length is [0, 2]"]),
        ("stages.0.mix.0.length=[1, 2, 3]", ["stages.0.mix.0.length is [1, 2, 3]"]),
        ("stages.0.mix.0.facts=nan", ["stages.0.mix.0.facts holds nan"]),
        ("stages.0.mix.0.when=2026-01-01", ["stages.0.mix.0.when holds datetime.date"]),
        ("stages.3.name=x", ["'stages.3.name=x'", "entries 0 to 2", "'3'"]),
        ("stages.first.name=x", ["entries 0 to 2", "'first'"]),
        ("stages.3=x", ["entries 0 to 2", "'3'"]),
        ("seed.x=4", ["seed is 1", "no keys below it"]),
        ("seed", ["'seed'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("run..x=3", ["key=value"]),
        ("tokenizer.vocab_size=[1", ["not TOML"]),
    ],
)
def test_what_is_wrong_is_named(text, parts):
    message = refused(text)
    for part in parts:
        assert part in message


def test_a_value_cannot_bring_a_second_key():
    assert "seed is '1\\nname" in refused('seed=1\nname="other"')


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (("name",), "name is missing"),
        (("stages",), "stages is missing"),
        (("model",), "hidden_size"),
        (("model", "head_dim"), "head_dim missing"),
        (("tokenizer",), "tokenizer.vocab_size is missing"),
        (("run", "max_tokens"), "run.max_tokens is missing"),
        (("stages", 0, "selection"), "stages.0.selection is missing"),
        (("stages", 0, "mix"), "stages.0.mix is missing"),
        (("stages", 0, "mix", 0, "length"), "stages.0.mix.0.length is missing"),
        (("stages", 0, "mix", 0, "kind"), "stages.0.mix.0.kind is missing"),
        (("stages", 0, "gate", "accuracy"), "stages.0.gate.accuracy is missing"),
    ],
)
def test_what_is_missing_is_named(path, part):
    found = smoke()
    at = found
    for step in path[:-1]:
        at = at[step]
    del at[path[-1]]
    with pytest.raises(RequestError, match=r"^here: ") as caught:
        Recipe.from_dict(found, "here")
    assert part in str(caught.value)


def test_a_gate_is_on_what_accuracy_is_told_of():
    sums = Recipe.load("smoke", ["stages.2.gate={kind='sums/high', accuracy=0.5}"]).stages[2]
    assert sums.gate and sums.gate.kind == sums.mix[1].label == "sums/high" and sums.mix[0].label == "records"
    assert "allowed: records, sums/high" in refused("stages.2.gate={kind='sums', accuracy=0.5}")
    off = Recipe.load("smoke", ["stages.2.mix.1.thinking=off", "stages.2.gate={kind='sums', accuracy=0.5}"])
    assert off.stages[2].mix[1].label == "sums"


def test_sections_that_may_be_left_out_have_the_defaults():
    found = smoke()
    del found["stages"][0]["gate"]
    recipe = Recipe.from_dict(found)
    assert recipe.run.dtype == "float32" and recipe.optimizer.beta2 == 0.95 and recipe.stages[0].gate is None


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(RequestError, match=r"'nanu' cannot be read .*No such file.* smoke"):
        Recipe.load("nanu")
    bad = tmp_path / "bad.toml"
    bad.write_text("name = ")
    with pytest.raises(RequestError, match=r"bad\.toml is not TOML"):
        Recipe.load(bad)
    bad.write_bytes(b'name = "\xff"')
    with pytest.raises(RequestError, match=r"bad\.toml is not TOML"):
        Recipe.load(bad)
    with pytest.raises(RequestError, match="cannot be read"):
        Recipe.load(tmp_path)


def test_what_is_written_reads_back_the_same(tmp_path):
    odd = "stages.0.mix.0.words=['a\"b', 'c\\\\d', 'é\\u007f', '']"
    recipe = Recipe.load("smoke", [odd, "stages.0.mix.0.deep={a=[1, [2.5, true]], 'b c'=1e-30}", "loss.balance=1e-300"])
    assert recipe.stages[0].mix[0].knobs["deep"] == {"a": (1, (2.5, True)), "b c": 1e-30}
    assert tomllib.loads(recipe.to_toml()) == recipe.to_dict()
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml())
    again = Recipe.load(file)
    assert again == recipe and again.fingerprint() == recipe.fingerprint()


def test_the_fingerprint_is_of_what_changes_the_result():
    recipe = Recipe.load("smoke")
    same = ["name=other", "run.checkpoint_seconds=5"]
    other = [
        "seed=2",
        "optimizer.clip=2",
        "stages.2.mix.1.thinking=off",
        "stages.0.gate.accuracy=0.8",
        "run.dtype=bfloat16",
    ]
    other += ["model.index_topk=8", "tokenizer.vocab_size=2048", "run.evaluate_steps=11", "stages.0.name=x"]
    assert all(Recipe.load("smoke", [o]).fingerprint() == recipe.fingerprint() for o in same)
    prints = {Recipe.load("smoke", [o]).fingerprint() for o in other}
    assert len(prints) == len(other) and recipe.fingerprint() not in prints
    reordered = dict(reversed(smoke().items()))
    assert Recipe.from_dict(reordered).fingerprint() == recipe.fingerprint()


def test_differences_name_keys_and_values():
    before = Recipe.load("smoke").to_dict()
    now = Recipe.load("smoke", ["seed=2", "name=x", "stages.0.mix.0.facts=3", "stages.0.mix.0.asks=1"]).to_dict()
    assert differences(before, before) == []
    assert differences(before, now) == [
        "seed: 1 -> 2",
        "stages.0.mix.0.facts: [2, 6] -> 3",
        "stages.0.mix.0.asks: 'absent' -> 1",
    ]


def test_every_source_is_tried_before_a_run():
    Recipe.load("smoke").check_samples()
    Recipe.load("smoke", ["stages.0.mix.1.kind=text"]).check_samples()
    for text, part in [
        ("stages.2.mix.1.kind=sum", "sum"),
        ("stages.2.mix.1.thnking=off", "thnking"),
        ("stages.2.mix.1.thinking=deep", "deep"),
    ]:
        with pytest.raises(RequestError, match=r"^stages\.2\.mix\.1 of recipe 'smoke': ") as caught:
            Recipe.load("smoke", [text]).check_samples()
        assert part in str(caught.value)


def test_a_model_that_is_no_network_is_the_callers_fault():
    found = smoke()
    found["model"]["compress_ratios"] = [0, 3, 32, 0]
    with pytest.raises(RequestError, match=r"compress_ratios\[1\] is 3") as caught:
        Recipe.from_dict(found)
    assert not isinstance(caught.value, CheckpointError)
