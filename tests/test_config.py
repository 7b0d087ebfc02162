"""ModelConfig: what is read, what is kept, and what is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyrosome.config import DSparkConfig, ModelConfig, QuantizationConfig, YarnScaling
from pyrosome.errors import CheckpointError, UnsupportedFormat

DATA = Path(__file__).parent / "data"
SETS = ["golden/bf16", "golden/fp8fp4", "golden_dspark/bf16", "golden_dspark/fp8fp4"]


def published(name: str = "golden/fp8fp4") -> dict[str, Any]:
    return json.loads((DATA / name / "config.json").read_text())


def refusal(d: dict[str, Any]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(d, source="here.json")
    assert str(caught.value).startswith("here.json: ")
    return caught.value


@pytest.mark.parametrize("name", SETS)
def test_round_trip_is_the_file(name: str) -> None:
    config = ModelConfig.from_json(DATA / name / "config.json")
    assert config.to_dict() == published(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.unknown_keys == ()


def test_unknown_keys_are_kept_and_reported() -> None:
    d = published() | {"a_new_key": {"deep": [1]}, "another": None}
    config = ModelConfig.from_dict(d)
    assert config.unknown_keys == ("a_new_key", "another")
    assert config.extra["a_new_key"] == {"deep": [1]}
    assert config.to_dict() == d


def test_values_of_a_small_file() -> None:
    config = ModelConfig.from_json(DATA / "golden/fp8fp4/config.json")
    assert (config.hidden_size, config.head_dim, config.qk_rope_head_dim, config.nope_dim) == (128, 96, 32, 64)
    assert config.rope_scaling == YarnScaling(16.0, 32.0, 1.0, 64)
    assert config.quantization == QuantizationConfig("fp8", "e4m3", "ue8m0", (128, 128), "dynamic")
    assert config.expert_dtype == "fp4"
    assert config.compress_ratios == (0, 4, 128, 0)
    assert config.layer_ratios == (0, 4, 128)
    assert config.draft_ratios == (0,)
    assert [config.ratio_of(i) for i in range(3)] == [0, 4, 128]
    assert [config.is_hash(i) for i in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    ("name", "release", "drafts"), [(SETS[0], "preview", 1), (SETS[2], "0731", 3), (SETS[3], "0731", 2)]
)
def test_release_is_told_by_dspark_keys_alone(name: str, release: str, drafts: int) -> None:
    config = ModelConfig.from_json(DATA / name / "config.json")
    assert config.num_nextn_predict_layers == 1  # in every release
    assert config.release == release
    assert len(config.draft_ratios) == drafts


def test_dspark_values() -> None:
    config = ModelConfig.from_json(DATA / "golden_dspark/fp8fp4/config.json")
    assert config.dspark == DSparkConfig(block_size=5, noise_token_id=70, target_layer_ids=(0, 1), markov_rank=16)


def test_no_draft_entries_at_all() -> None:
    for d in (published(), published("golden_dspark/bf16")):
        d["compress_ratios"] = d["compress_ratios"][: d["num_hidden_layers"]]
        assert ModelConfig.from_dict(d).draft_ratios == ()


def test_what_is_not_there_and_need_not_be() -> None:
    d = published("golden/bf16")
    for key in ("num_nextn_predict_layers", "n_shared_experts", "rope_scaling", "attention_bias", "scoring_func"):
        del d[key]
    d["compress_ratios"].pop()
    config = ModelConfig.from_dict(d)
    assert (config.num_nextn_predict_layers, config.n_shared_experts, config.rope_scaling) == (0, 1, None)
    assert (config.expert_dtype, config.quantization, config.dspark) == (None, None, None)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig.preset("flash").hidden_size = 1  # type: ignore[misc]
    with pytest.raises(CheckpointError, match="o_groups"):
        dataclasses.replace(ModelConfig.preset("flash"), o_groups=7)


# Presets: the published values, one by one.

FLASH = {
    "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64,
    "q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128, "index_n_heads": 64,
    "index_head_dim": 128, "index_topk": 512, "n_routed_experts": 256, "num_experts_per_tok": 6, "n_shared_experts": 1,
    "moe_intermediate_size": 2048, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "num_hash_layers": 3,
    "num_nextn_predict_layers": 1, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "max_position_embeddings": 1048576, "vocab_size": 129280,
    "bos_token_id": 0, "eos_token_id": 1, "expert_dtype": "fp4",
}  # fmt: skip
PRO = FLASH | {
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16,
    "index_topk": 1024, "n_routed_experts": 384, "moe_intermediate_size": 3072, "routed_scaling_factor": 2.5,
}  # fmt: skip


@pytest.mark.parametrize(("name", "values"), [("flash", FLASH), ("pro", PRO)])
def test_preset_values(name: str, values: dict[str, Any]) -> None:
    config = ModelConfig.preset(name)
    assert {key: getattr(config, key) for key in values} == values
    assert config.rope_scaling == YarnScaling(16.0, 32.0, 1.0, 65536)
    assert config.quantization == QuantizationConfig("fp8", "e4m3", "ue8m0", (128, 128), "dynamic")
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_preset_layers() -> None:
    flash, pro = ModelConfig.preset("flash"), ModelConfig.preset("pro")
    assert len(flash.compress_ratios) == 44
    assert [i for i in range(43) if flash.ratio_of(i) == 0] == [0, 1]
    assert [i for i in range(43) if flash.ratio_of(i) == 4] == list(range(2, 43, 2))
    assert [i for i in range(43) if flash.ratio_of(i) == 128] == list(range(3, 42, 2))
    assert [i for i in range(43) if flash.is_hash(i)] == [0, 1, 2]
    assert len(pro.compress_ratios) == 62
    assert [i for i in range(61) if pro.ratio_of(i) == 4] == list(range(2, 61, 2))
    assert [i for i in range(61) if pro.ratio_of(i) == 128] == [0, 1, *range(3, 60, 2)]
    assert flash.draft_ratios == pro.draft_ratios == (0,)


def test_preset_overrides() -> None:
    config = ModelConfig.preset("flash", num_hidden_layers=3, compress_ratios=[0, 4, 128, 0], n_routed_experts=8)
    assert config.layer_ratios == (0, 4, 128)
    assert config.n_routed_experts == 8
    with pytest.raises(CheckpointError, match=r"mini.*flash"):
        ModelConfig.preset("mini")
    with pytest.raises(CheckpointError, match="hidden_sizes"):
        ModelConfig.preset("flash", hidden_sizes=1)
    with pytest.raises(CheckpointError, match="compress_ratios"):
        ModelConfig.preset("flash", num_hidden_layers=3)


# Refusals.  Every message names the key and what was found.

FLOATS = ["routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta"]
INTEGERS = [key for key, value in FLASH.items() if type(value) is int and key not in ("n_shared_experts",)]
REQUIRED = [key for key in INTEGERS if key != "num_nextn_predict_layers"] + [*FLOATS, "compress_ratios", "model_type"]


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key(key: str) -> None:
    d = published()
    del d[key]
    assert f"{key} missing" in str(refusal(d))


def test_several_missing_keys_are_told_at_once() -> None:
    d = published()
    del d["hidden_size"], d["hc_mult"]
    assert "hidden_size, hc_mult missing" in str(refusal(d))


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize("value", [True, "64", 64.0, None, [64], -1, 2**40])
def test_not_an_integer_in_range(key: str, value: Any) -> None:
    message = str(refusal(published() | {key: value}))
    assert f"{key} is {value!r}" in message


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [True, "1", None, 0.0, -1.0, float("nan"), float("inf"), 10**400])
def test_not_a_positive_finite_number(key: str, value: Any) -> None:
    assert f"{key} is " in str(refusal(published() | {key: value}))


def test_integers_will_do_for_floats() -> None:
    assert ModelConfig.from_dict(published() | {"rope_theta": 10000}).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 6, "o_groups": 4}, ["num_attention_heads is 6", "o_groups is 4"]),
        ({"qk_rope_head_dim": 31}, ["qk_rope_head_dim is 31", "head_dim is 96"]),
        ({"qk_rope_head_dim": 98}, ["qk_rope_head_dim is 98", "head_dim is 96"]),
        ({"num_experts_per_tok": 5}, ["num_experts_per_tok is 5", "n_routed_experts is 4"]),
        ({"num_hash_layers": 4}, ["num_hash_layers is 4", "num_hidden_layers is 3"]),
        ({"bos_token_id": 160}, ["bos_token_id is 160", "vocab_size is 160"]),
        ({"eos_token_id": 999}, ["eos_token_id is 999"]),
        ({"eos_token_id": [1, 2]}, ["eos_token_id is [1, 2]"]),
        ({"index_head_dim": 48}, ["index_head_dim is 48", "power of two"]),
        ({"index_head_dim": 16}, ["index_head_dim is 16", "qk_rope_head_dim is 32"]),
        ({"n_shared_experts": 2}, ["n_shared_experts is 2"]),
        ({"num_nextn_predict_layers": 2}, ["num_nextn_predict_layers is 2"]),
    ],
)
def test_contradictions(change: dict[str, Any], said: list[str]) -> None:
    message = str(refusal(published() | change))
    assert all(words in message for words in said)


def test_index_width_is_free_without_csa_layers() -> None:
    config = ModelConfig.from_dict(published() | {"index_head_dim": 48, "compress_ratios": [0, 128, 128, 0]})
    assert config.index_head_dim == 48


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([0, 4], "2 entries and num_hidden_layers is 3"),
        ([], "0 entries"),
        ([0, 4, 128, 0, 0], "no dspark_ keys"),
        ([0, 4, 128, 4], "must be 0"),
        ([0, 4, 3, 0], "compress_ratios[2] is 3"),
        ([0, 4, 1, 0], "compress_ratios[2] is 1"),  # a page of 64 rows would hold half a block
        ([0, 4, 256, 0], "compress_ratios[2] is 256"),
        ([0, -4, 128, 0], "compress_ratios[1] is -4"),
        ([0, 4.0, 128, 0], "compress_ratios[1] is 4.0"),
        ([False, 4, 128, 0], "compress_ratios[0] is False"),
        ("0,4,128", "compress_ratios is '0,4,128'"),
        ({"0": 4}, "list of integers"),
    ],
)
def test_bad_ratios(ratios: Any, said: str) -> None:
    assert said in str(refusal(published() | {"compress_ratios": ratios}))


@pytest.mark.parametrize("ratio", [2, 8, 16, 32, 64, 128])
def test_every_divisor_of_a_block_is_a_ratio(ratio: int) -> None:
    assert ModelConfig.from_dict(published() | {"compress_ratios": [0, 4, ratio, 0]}).ratio_of(2) == ratio


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "sigmoid"),
        ("topk_method", "greedy"),
        ("num_key_value_heads", 8),
        ("num_key_value_heads", True),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
        ("tie_word_embeddings", 0),
        ("norm_topk_prob", False),
        ("attention_bias", True),
        ("expert_dtype", "int4"),
        ("expert_dtype", ["fp4"]),
        ("model_type", "deepseek_v3"),
        ("model_type", 4),
    ],
)
def test_other_architectures_are_refused_by_name(key: str, value: Any) -> None:
    error = refusal(published() | {key: value})
    assert isinstance(error, UnsupportedFormat)
    assert f"{key} is {value!r}" in str(error)


def test_v41_is_refused_with_the_reason() -> None:
    nested = {"model_type": "deepseek_v41", "text_config": {}, "vision_config": {}}
    error = refusal(nested)
    assert isinstance(error, UnsupportedFormat)
    assert "V4.1 is a different architecture" in str(error)


def test_files_rewritten_by_newer_tools() -> None:
    d = published()
    d["rope_parameters"] = d.pop("rope_scaling")
    assert "rope_parameters" in str(refusal(d))
    d = published()
    del d["compress_ratios"]
    assert "layer_types" in str(refusal(d | {"layer_types": ["sliding_attention"]}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "linear"}, "rope_scaling.type is 'linear'"),
        ({"type": None}, "rope_scaling.type is None"),
        ({"factor": 0.5}, "factor 0.5"),
        ({"factor": float("nan")}, "rope_scaling.factor is nan"),
        ({"factor": True}, "rope_scaling.factor is True"),
        ({"beta_fast": 1}, "beta_fast 1.0"),
        ({"original_max_position_embeddings": 0}, "rope_scaling.original_max_position_embeddings is 0"),
        ({"mscale": 1.0}, "rope_scaling.mscale is 1.0"),
    ],
)
def test_bad_rope_scaling(change: dict[str, Any], said: str) -> None:
    d = published()
    d["rope_scaling"] |= change
    assert said in str(refusal(d))


@pytest.mark.parametrize("key", ["type", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings"])
def test_rope_scaling_without_a_key(key: str) -> None:
    d = published()
    del d["rope_scaling"][key]
    assert f"rope_scaling.{key}" in str(refusal(d))


def test_rope_scaling_under_its_newer_name() -> None:
    d = published()
    d["rope_scaling"]["rope_type"] = d["rope_scaling"].pop("type")
    assert ModelConfig.from_dict(d) == ModelConfig.from_dict(published())
    assert "rope_scaling is 'yarn'" in str(refusal(published() | {"rope_scaling": "yarn"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq'"),
        ({"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'"),
        ({"scale_fmt": "float"}, "quantization_config.scale_fmt is 'float'"),
        ({"activation_scheme": "static"}, "quantization_config.activation_scheme is 'static'"),
        ({"weight_block_size": [32, 32]}, "quantization_config.weight_block_size is (32, 32)"),
        ({"weight_block_size": 128}, "quantization_config.weight_block_size is 128"),
    ],
)
def test_bad_quantization(change: dict[str, Any], said: str) -> None:
    d = published()
    d["quantization_config"] |= change
    assert said in str(refusal(d))


def test_quantization_shape_and_extras() -> None:
    d = published()
    d["quantization_config"]["modules_to_not_convert"] = ["head"]
    assert ModelConfig.from_dict(d).to_dict() == d
    del d["quantization_config"]["quant_method"]
    assert "quantization_config.quant_method missing" in str(refusal(d))
    assert "quantization_config is 'fp8'" in str(refusal(published() | {"quantization_config": "fp8"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dspark_noise_token_id": 112}, "dspark_noise_token_id is 112"),
        ({"dspark_block_size": 0}, "dspark_block_size is 0"),
        ({"dspark_markov_rank": 16.0}, "dspark_markov_rank is 16.0"),
        ({"dspark_target_layer_ids": []}, "dspark_target_layer_ids is []"),
        ({"dspark_target_layer_ids": [2, 1]}, "dspark_target_layer_ids is [2, 1]"),
        ({"dspark_target_layer_ids": [1, 1]}, "dspark_target_layer_ids is [1, 1]"),
        ({"dspark_target_layer_ids": [1, 3]}, "dspark_target_layer_ids is [1, 3]"),
        ({"dspark_target_layer_ids": [-1, 2]}, "dspark_target_layer_ids is [-1, 2]"),
        ({"dspark_target_layer_ids": 2}, "dspark_target_layer_ids is 2"),
    ],
)
def test_bad_dspark(change: dict[str, Any], said: str) -> None:
    assert said in str(refusal(published("golden_dspark/bf16") | change))


def test_half_of_the_dspark_keys() -> None:
    d = published("golden_dspark/bf16")
    del d["dspark_markov_rank"]
    assert "dspark_markov_rank missing" in str(refusal(d))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"model_type": "deepseek_v4", "model_type": "x"}', "'model_type' appears twice"),
        (b"[]", "a JSON list"),
        (b"null", "a JSON NoneType"),
    ],
)
def test_not_a_configuration(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_json(tmp_path / "config.json")
    assert said in str(caught.value)
    assert "config.json" in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        ModelConfig.from_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelConfig.from_json(tmp_path)


def test_json_that_spells_nan(tmp_path: Path) -> None:
    text = (DATA / "golden/bf16/config.json").read_text().replace('"rope_theta": 10000.0', '"rope_theta": NaN')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="rope_theta is nan"):
        ModelConfig.from_json(tmp_path / "config.json")


def test_the_input_is_left_alone() -> None:
    d = published("golden_dspark/fp8fp4")
    before = copy.deepcopy(d)
    ModelConfig.from_dict(d)
    assert d == before


def test_no_torch() -> None:
    code = "import sys, pyrosome.config, pyrosome.checkpoint.index; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.strip() == "False"


def _environment() -> dict[str, str]:
    """So that a child imports what this process imports, installed or not."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
