"""What a checkpoint is: DeepSeek-V4's `config.json`, read strictly and frozen.

Field names are the keys of the published file.  A value this package does not implement is refused by name rather than
guessed at; a key it does not know is kept in `extra`, so that a file survives a round trip.

Source of the keys and of the presets: the published configurations of DeepSeek-V4-Flash and V4-Pro.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from pyrosome.errors import CheckpointError, UnsupportedFormat

CSA_RATIO = 4
BLOCK_TOKENS = 128  # prefixes and pages are named in blocks of so many tokens, so every ratio divides it
MODEL_TYPE = "deepseek_v4"

# Keys whose value is part of the architecture implemented here.  Absent means this value; any other is refused.
_FIXED: dict[str, Any] = {
    "model_type": MODEL_TYPE,
    "attention_bias": False,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
# Keys known to change nothing here: kept for the round trip, not reported as unknown.
_NO_EFFECT = frozenset(
    {"architectures", "attention_dropout", "auto_map", "dtype", "initializer_range", "pad_token_id", "torch_dtype"}
    | {"transformers_version", "use_cache"}
)
_DSPARK = {
    "block_size": "dspark_block_size",
    "noise_token_id": "dspark_noise_token_id",
    "target_layer_ids": "dspark_target_layer_ids",
    "markov_rank": "dspark_markov_rank",
}
# Inclusive bounds.  The upper ones are far above any published model: they keep a corrupt file from asking for an
# inventory of billions of names.
_INTEGERS = {
    "hidden_size": (1, 2**20),
    "num_hidden_layers": (1, 4096),
    "num_attention_heads": (1, 2**16),
    "head_dim": (1, 2**16),
    "qk_rope_head_dim": (2, 2**16),
    "q_lora_rank": (1, 2**20),
    "o_groups": (1, 2**16),
    "o_lora_rank": (1, 2**20),
    "sliding_window": (1, 2**20),
    "index_n_heads": (1, 2**16),
    "index_head_dim": (1, 2**16),
    "index_topk": (1, 2**24),
    "n_routed_experts": (1, 2**14),
    "num_experts_per_tok": (1, 2**14),
    "moe_intermediate_size": (1, 2**20),
    "num_hash_layers": (0, 4096),
    "hc_mult": (1, 64),
    "hc_sinkhorn_iters": (1, 1000),
    "max_position_embeddings": (1, 2**31 - 1),
    "vocab_size": (1, 2**31 - 1),
    "bos_token_id": (0, 2**31 - 1),
    "eos_token_id": (0, 2**31 - 1),
    "num_nextn_predict_layers": (0, 1),
    "n_shared_experts": (1, 1),
}
_POSITIVE = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta")


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN of the compressed layers' rotation.  `original_max_position_embeddings` is in tokens."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for key in ("factor", "beta_fast", "beta_slow"):
            object.__setattr__(self, key, _positive(getattr(self, key), f"rope_scaling.{key}"))
        _integer(self.original_max_position_embeddings, "rope_scaling.original_max_position_embeddings", 1, 2**31 - 1)
        if self.factor < 1 or self.beta_fast <= self.beta_slow:
            raise CheckpointError(
                f"rope_scaling has factor {self.factor}, beta_fast {self.beta_fast}, beta_slow {self.beta_slow}; "
                "factor must be at least 1 and beta_fast above beta_slow"
            )


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """What `quantization_config` claims.  For information: formats are decided per tensor, from what is stored."""

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    scale_fmt: str = "ue8m0"
    weight_block_size: tuple[int, int] = (128, 128)  # output rows, input columns
    activation_scheme: str = "dynamic"
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_block_size", _integers(self.weight_block_size, _QUANT + "weight_block_size"))
        for f in fields(self):
            if f.name != "extra":
                _only(getattr(self, f.name), _QUANT + f.name, f.default)


_QUANT = "quantization_config."


@dataclass(frozen=True, slots=True)
class DSparkConfig:
    """The block-drafting head of the 0731 release.  How many stages it has is told by the tensors, not here."""

    block_size: int  # tokens drafted at once
    noise_token_id: int
    target_layer_ids: tuple[int, ...]  # trunk layers whose outputs feed the head
    markov_rank: int

    def __post_init__(self) -> None:
        _integer(self.block_size, "dspark_block_size", 1, 1024)
        _integer(self.noise_token_id, "dspark_noise_token_id", 0, 2**31 - 1)
        _integer(self.markov_rank, "dspark_markov_rank", 1, 2**20)
        targets = _integers(self.target_layer_ids, "dspark_target_layer_ids")
        object.__setattr__(self, "target_layer_ids", targets)
        if not targets or list(targets) != sorted(set(targets)):
            raise CheckpointError(
                f"dspark_target_layer_ids is {list(targets)}; at least one layer, in ascending order, is needed"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One checkpoint's hyper-parameters, under the names of its `config.json`.

    Widths and counts are in elements, lengths in tokens.  Construction checks every value and their agreement.

    Raises:
        CheckpointError: a value of the wrong type or out of range, or two that contradict each other.
        UnsupportedFormat: a value of an architecture this package does not run.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    num_hash_layers: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    max_position_embeddings: int
    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    compress_ratios: tuple[int, ...]  # one per trunk layer, then one per draft stage: 0 window only, 4 CSA, else HCA
    num_nextn_predict_layers: int = 0
    n_shared_experts: int = 1
    rope_scaling: YarnScaling | None = None
    expert_dtype: str | None = None
    quantization: QuantizationConfig | None = None
    dspark: DSparkConfig | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for key, (low, high) in _INTEGERS.items():
            _integer(getattr(self, key), key, low, high)
        for key in _POSITIVE:
            object.__setattr__(self, key, _positive(getattr(self, key), key))
        object.__setattr__(self, "compress_ratios", _integers(self.compress_ratios, "compress_ratios"))
        _check_agreement(self)
        _check_ratios(self)
        _check_drafts(self)

    @property
    def nope_dim(self) -> int:
        """Channels of a head without rotation; they come first."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each trunk layer."""
        return self.compress_ratios[: self.num_hidden_layers]

    @property
    def draft_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each draft stage the file speaks of; () where it speaks of none."""
        return self.compress_ratios[self.num_hidden_layers :]

    @property
    def release(self) -> str:
        """ "0731" with a DSpark head described, else "preview"."""
        return "0731" if self.dspark else "preview"

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """Keys of the file this package knows nothing about, sorted.  They are kept, and have no effect."""
        return tuple(sorted(k for k in self.extra if k not in _NO_EFFECT))

    def ratio_of(self, layer: int) -> int:
        """Compression ratio of trunk layer `layer`: 0 window only, 4 CSA, any other HCA."""
        return self.layer_ratios[layer]

    def is_hash(self, layer: int) -> bool:
        """Whether trunk layer `layer` chooses its experts by token id."""
        return layer < self.num_hash_layers

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read a `config.json`.

        Raises:
            CheckpointError: as the class; or the file cannot be read, or is not a JSON object.
        """
        path = Path(path)
        try:
            found = json.loads(path.read_bytes(), object_pairs_hook=_without_repeats)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror}); a checkpoint needs its config.json"
            ) from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: is not JSON ({error}); fetch the file again") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: holds a JSON {type(found).__name__}; config.json is a JSON object")
        return cls.from_dict(found, source=str(path))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Build from the keys of a `config.json`; `source` begins every error message.

        Raises:
            CheckpointError: as the class; or a key is missing.
        """
        try:
            return cls(**_arguments(dict(d)))
        except CheckpointError as error:
            raise type(error)(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of this configuration: `from_dict(c.to_dict()) == c`, keys in `extra` included."""
        d: dict[str, Any] = {**self.extra, **_FIXED}
        for key in (*_INTEGERS, *_POSITIVE):
            d[key] = getattr(self, key)
        d["compress_ratios"] = list(self.compress_ratios)
        d["rope_scaling"] = None
        if self.rope_scaling:
            yarn = {f.name: getattr(self.rope_scaling, f.name) for f in fields(YarnScaling)}
            d["rope_scaling"] = {"type": "yarn", **yarn}
        if self.expert_dtype is not None:
            d["expert_dtype"] = self.expert_dtype
        if self.quantization:
            q = self.quantization
            named = {f.name: getattr(q, f.name) for f in fields(q) if f.name != "extra"}
            d["quantization_config"] = {**q.extra, **named, "weight_block_size": list(q.weight_block_size)}
        if self.dspark:
            d |= {key: getattr(self.dspark, name) for name, key in _DSPARK.items()}
            d["dspark_target_layer_ids"] = list(self.dspark.target_layer_ids)
        return d

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """A published configuration ("flash", "flash-0731" or "pro"), with fields replaced.

        Raises:
            CheckpointError: unknown name or field, or the result contradicts itself.
        """
        if name not in _PRESETS:
            raise CheckpointError(f"preset {name!r} was asked for; there are {', '.join(sorted(_PRESETS))}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(overrides) - known):
            raise CheckpointError(f"preset {name!r} was given {', '.join(unknown)}, not fields of ModelConfig")
        return cls(**{**_PRESETS[name], **overrides})


def _arguments(d: dict[str, Any]) -> dict[str, Any]:
    """Split a config.json into constructor arguments; what is left is `extra`."""
    _check_architecture(d)
    for key, value in _FIXED.items():
        if key in d:
            _only(d.pop(key), key, value)
    values: dict[str, Any] = {
        "rope_scaling": _yarn(d.pop("rope_scaling", None)),
        "expert_dtype": d.pop("expert_dtype", None),
        "quantization": _quantization(d.pop("quantization_config", None)),
        "dspark": _dspark(d),
    }
    for f in fields(ModelConfig):
        if f.name in d and f.name not in (*values, "extra"):
            values[f.name] = d.pop(f.name)
    required = [f.name for f in fields(ModelConfig) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in required if key not in values]:
        raise CheckpointError(
            f"{', '.join(missing)} missing; DeepSeek-V4 needs {'it' if len(missing) == 1 else 'them'}: "
            "use the config.json published with the weights"
        )
    return {**values, "extra": d}


def _check_architecture(d: dict[str, Any]) -> None:
    found = d.get("model_type")
    if found is None:
        raise CheckpointError(f"model_type missing; this package reads {MODEL_TYPE!r}: is this a model's config.json?")
    if found == "deepseek_v41":
        raise UnsupportedFormat(
            "model_type is 'deepseek_v41'; DeepSeek-V4.1 is a different architecture (shared compressed rows, "
            f"single-pass hyper-connections, n-gram memory) and cannot be loaded as {MODEL_TYPE!r}: "
            "choose a V4 checkpoint"
        )
    if found != MODEL_TYPE:
        raise UnsupportedFormat(f"model_type is {found!r}; this package reads {MODEL_TYPE!r}: choose a V4 checkpoint")
    for new, published in (("rope_parameters", "rope_scaling"), ("layer_types", "compress_ratios")):
        if new in d and published not in d:
            raise UnsupportedFormat(
                f"{new} found and {published} missing: this file was rewritten by a newer transformers; "
                f"use the config.json published with the weights, which has {published}"
            )


def _yarn(found: Any) -> YarnScaling | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"rope_scaling is {found!r}; an object with type 'yarn' (or null) is supported")
    d = dict(found)
    kinds = [d.pop(key) for key in ("type", "rope_type") if key in d]
    if not kinds or any(kind != "yarn" for kind in kinds):
        raise UnsupportedFormat(f"rope_scaling.type is {kinds[-1] if kinds else 'missing'!r}; 'yarn' is supported")
    names = [f.name for f in fields(YarnScaling)]
    if missing := [name for name in names if name not in d]:
        raise CheckpointError(f"rope_scaling.{missing[0]} missing; YaRN needs {', '.join(names)}")
    if unknown := sorted(set(d) - set(names)):
        raise UnsupportedFormat(
            f"rope_scaling.{unknown[0]} is {d[unknown[0]]!r}; this key would change the rotation and is not supported"
        )
    return YarnScaling(**d)


def _quantization(found: Any) -> QuantizationConfig | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"quantization_config is {found!r}; an object or null is supported")
    if "quant_method" not in found:
        raise CheckpointError(f"{_QUANT}quant_method missing; 'fp8' is supported")
    names = {f.name for f in fields(QuantizationConfig)} - {"extra"}
    known = {key: value for key, value in found.items() if key in names}
    return QuantizationConfig(**known, extra={key: value for key, value in found.items() if key not in names})


def _dspark(d: dict[str, Any]) -> DSparkConfig | None:
    found = {name: d.pop(key) for name, key in _DSPARK.items() if key in d}
    if not found:
        return None
    if missing := [key for name, key in _DSPARK.items() if name not in found]:
        raise CheckpointError(f"{', '.join(missing)} missing beside other dspark_ keys; a DSpark head needs all four")
    return DSparkConfig(**found)


def _check_agreement(c: ModelConfig) -> None:
    """Relations between widths and counts."""

    def need(holds: bool, found: str, supported: str) -> None:
        if not holds:
            raise CheckpointError(f"{found}; {supported}: use the config.json published with the weights")

    need(
        c.num_attention_heads % c.o_groups == 0,
        f"num_attention_heads is {c.num_attention_heads} and o_groups is {c.o_groups}",
        "heads are cut into o_groups equal groups, so it must divide them",
    )
    need(
        c.qk_rope_head_dim % 2 == 0 and c.head_dim % 2 == 0 and c.qk_rope_head_dim <= c.head_dim,
        f"qk_rope_head_dim is {c.qk_rope_head_dim} and head_dim is {c.head_dim}",
        "rotation works on pairs of a head's last channels, so both must be even and the first no larger",
    )
    need(
        c.num_experts_per_tok <= c.n_routed_experts,
        f"num_experts_per_tok is {c.num_experts_per_tok} and n_routed_experts is {c.n_routed_experts}",
        "a token cannot be sent to more experts than there are",
    )
    need(
        c.num_hash_layers <= c.num_hidden_layers,
        f"num_hash_layers is {c.num_hash_layers} and num_hidden_layers is {c.num_hidden_layers}",
        "hash layers are the first ones of the trunk",
    )
    for key in ("bos_token_id", "eos_token_id"):
        need(
            getattr(c, key) < c.vocab_size,
            f"{key} is {getattr(c, key)} and vocab_size is {c.vocab_size}",
            "a token id is below vocab_size",
        )
    if c.expert_dtype is not None and not (isinstance(c.expert_dtype, str) and c.expert_dtype in ("fp4", "fp8")):
        raise UnsupportedFormat(f"expert_dtype is {c.expert_dtype!r}; 'fp4', 'fp8' or none is supported")
    for key, kind in (("rope_scaling", YarnScaling), ("quantization", QuantizationConfig), ("dspark", DSparkConfig)):
        value = getattr(c, key)
        need(value is None or isinstance(value, kind), f"{key} is {value!r}", f"a {kind.__name__} or None is expected")


def _check_ratios(c: ModelConfig) -> None:
    for at, ratio in enumerate(c.compress_ratios):
        if ratio in (0, CSA_RATIO):
            continue
        if ratio < 2 or BLOCK_TOKENS % ratio:
            raise CheckpointError(
                f"compress_ratios[{at}] is {ratio}; supported are 0 (window only), {CSA_RATIO} (CSA) and other "
                f"divisors of {BLOCK_TOKENS} from 2 on (HCA)"
            )
    if len(c.layer_ratios) < c.num_hidden_layers:
        raise CheckpointError(
            f"compress_ratios has {len(c.compress_ratios)} entries and num_hidden_layers is {c.num_hidden_layers}; "
            "one entry per layer is needed, then one per draft stage"
        )
    if CSA_RATIO not in c.layer_ratios:
        return
    width = c.index_head_dim
    if width & (width - 1) or width < c.qk_rope_head_dim:
        raise CheckpointError(
            f"index_head_dim is {width} and qk_rope_head_dim is {c.qk_rope_head_dim}; the indexer of a CSA layer needs "
            "a power of two that is at least the rotated width"
        )


def _check_drafts(c: ModelConfig) -> None:
    extra = len(c.draft_ratios)
    if any(c.draft_ratios):
        raise CheckpointError(
            f"compress_ratios ends in {list(c.draft_ratios)} after {c.num_hidden_layers} layers; draft stages attend "
            "to the window only, so their entries must be 0"
        )
    if c.dspark is None:
        if extra not in (0, c.num_nextn_predict_layers):
            raise CheckpointError(
                f"compress_ratios has {len(c.compress_ratios)} entries, num_hidden_layers is {c.num_hidden_layers}, "
                f"num_nextn_predict_layers is {c.num_nextn_predict_layers} and there are no dspark_ keys; "
                f"{extra} draft entries fit no release: use the config.json published with the weights"
            )
        return
    if c.dspark.noise_token_id >= c.vocab_size:
        raise CheckpointError(
            f"dspark_noise_token_id is {c.dspark.noise_token_id} and vocab_size is {c.vocab_size}; ids are below it"
        )
    if c.dspark.target_layer_ids[-1] >= c.num_hidden_layers or c.dspark.target_layer_ids[0] < 0:
        raise CheckpointError(
            f"dspark_target_layer_ids is {list(c.dspark.target_layer_ids)} and num_hidden_layers is "
            f"{c.num_hidden_layers}; layers are numbered from 0"
        )


def _integer(value: Any, key: str, low: int, high: int) -> int:
    if type(value) is not int:  # bool is a kind of int to Python; to a config.json it is a mistake
        raise CheckpointError(f"{key} is {value!r} ({type(value).__name__}); an integer is expected")
    if not low <= value <= high:
        supported = f"{low}" if low == high else f"{low} to {high}"
        raise CheckpointError(f"{key} is {value}; supported: {supported}")
    return value


def _positive(value: Any, key: str) -> float:
    if type(value) not in (int, float):
        raise CheckpointError(f"{key} is {value!r} ({type(value).__name__}); a number is expected")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number <= 0:
        raise CheckpointError(f"{key} is {number}; a finite number above 0 is expected")
    return number


def _integers(value: Any, key: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise CheckpointError(f"{key} is {value!r} ({type(value).__name__}); a list of integers is expected")
    return tuple(_integer(v, f"{key}[{at}]", -(2**31), 2**31 - 1) for at, v in enumerate(value))


def _only(found: Any, key: str, supported: Any) -> None:
    if type(found) is not type(supported) or found != supported:
        raise UnsupportedFormat(f"{key} is {found!r}; only {supported!r} is supported")


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    d: dict[str, Any] = {}
    for key, value in pairs:
        if key in d:
            raise ValueError(f"the key {key!r} appears twice")
        d[key] = value
    return d


_FLASH: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "num_hash_layers": 3,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "max_position_embeddings": 1048576,
    "vocab_size": 129280,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "compress_ratios": (0, 0, *(4, 128) * 20, 4, 0),
    "num_nextn_predict_layers": 1,
    "rope_scaling": YarnScaling(16.0, 32.0, 1.0, 65536),
    "expert_dtype": "fp4",
    "quantization": QuantizationConfig(),
}
_PRESETS: dict[str, dict[str, Any]] = {
    "flash": _FLASH,
    "flash-0731": {
        **_FLASH,
        "compress_ratios": (*_FLASH["compress_ratios"], 0, 0),
        "dspark": DSparkConfig(5, 128799, (40, 41, 42), 256),
    },
    "pro": {
        **_FLASH,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "index_topk": 1024,
        "n_routed_experts": 384,
        "moe_intermediate_size": 3072,
        "routed_scaling_factor": 2.5,
        "compress_ratios": (128, 128, *(4, 128) * 29, 4, 0),
    },
}
