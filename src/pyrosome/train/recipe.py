"""What a training run is to do, read from a TOML file: the model, how it is optimised, and the stages of its data.

A recipe is checked whole before anything runs, and written beside the run it described.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pyrosome.config import MODEL_TYPE, ModelConfig
from pyrosome.errors import CheckpointError, RequestError
from pyrosome.train.strict import Allowed, Table, listed, nearest, override, plain, read, to_toml, value

RECIPES = Path(__file__).parent / "recipes"
BOS, EOS = 0, 1  # token ids in every tokenizer trained here
TEXT = "text"  # the kind of sample that is a passage of a corpus and not made by a generator
_FROM_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id")
_WITHOUT_EFFECT = ("name", "run.checkpoint_seconds")  # keys that change nothing in what is trained


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerRecipe:
    """The tokenizer to be trained; `vocab_size` in tokens, control tokens included."""

    vocab_size: int = value(int, low=320, high=1 << 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRecipe:
    """Muon for matrices, AdamW for the rest.  `clip` bounds the norm of all gradients together."""

    muon_lr: float = value(float, 0.02, above=0)
    adamw_lr: float = value(float, 5e-3, above=0)
    weight_decay: float = value(float, 0.02, low=0, below=1)
    momentum: float = value(float, 0.95, low=0, below=1)
    beta1: float = value(float, 0.9, low=0, below=1)
    beta2: float = value(float, 0.95, low=0, below=1)
    clip: float = value(float, 1.0, above=0)
    warmup_steps: int = value(int, 20, low=0)
    update_rms: float = value(float, 0.18, above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRecipe:
    """Weights of the loss's parts.  `background` is that of a token which nothing before it tells, `text` that of a
    corpus's; an answer's is 1."""

    background: float = value(float, 0.1, low=0, high=1)
    text: float = value(float, 1.0, low=0, high=1)
    mtp: float = value(float, 0.3, low=0)
    mtp_final: float = value(float, 0.1, low=0)  # of the MTP loss, from where the learning rate falls
    indexer: float = value(float, 1.0, low=0)
    balance: float = value(float, 1e-4, low=0)
    bias_speed: float = value(float, 1e-3, low=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecipe:
    """How long to run, and what happens on the way.  Lengths are in tokens of training data."""

    max_tokens: int = value(int, low=1)
    step_tokens: int = value(int, 4096, low=1)
    dtype: str = value(str, "float32", one_of=("float32", "bfloat16"))
    checkpoint_seconds: float = value(float, 60.0, above=0)
    evaluate_steps: int = value(int, 50, low=1)
    evaluate_samples: int = value(int, 64, low=1)
    decay_tokens: int = value(int, 0, low=0)  # the learning rate falls linearly to 0 over the last so many
    quantize_tokens: int = value(int, 0, low=0)  # the last so many run with FP8 and FP4 rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A stage ends as soon as held-out accuracy of this kind (a `Mix.label`) reaches this."""

    kind: str = value(str)
    accuracy: float = value(float, above=0, high=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """One source of samples: `share` relative to the others of its stage, `length` (lowest, highest) in tokens.

    `knobs` are further arguments of the generator; arrays of the file are tuples.
    """

    kind: str = value(str)
    share: float = value(float, 1.0, above=0)
    length: tuple[int, int]
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Under which name accuracy is told and gated: the kind, and how its answers are thought about, if they are."""
        thinking = self.knobs.get("thinking", "off")
        return self.kind if thinking == "off" else f"{self.kind}/{thinking}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the curriculum; ends at `max_tokens`, or at its gate but not before `min_tokens`.

    `evaluate_steps` replaces the run's, where it is not 0.
    """

    name: str = value(str)
    selection: str = value(str, one_of=("dense", "warmup", "sparse"))
    max_tokens: int = value(int, low=1)
    min_tokens: int = value(int, 0, low=0)
    evaluate_steps: int = value(int, 0, low=0)
    gate: Gate | None = None
    mix: tuple[Mix, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training run.  `model` holds keys of `config.json`; `config` is the configuration they make."""

    name: str = value(str)
    seed: int = value(int, 1, low=0, below=1 << 63)
    model: dict[str, Any]
    tokenizer: TokenizerRecipe
    optimizer: OptimizerRecipe
    loss: LossRecipe
    run: RunRecipe
    stages: tuple[Stage, ...]

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe's file, or one this package has by name ("nano", "smoke", ...).

        Args:
            overrides: "dotted.key=value" each, put in place of what the file says: "stages.0.max_tokens=100".

        Raises:
            RequestError: no such file, not TOML, an unknown key, a value of the wrong type or out of range, or two
                that contradict each other.
        """
        file = RECIPES / f"{path}.toml" if str(path) in builtin_names() else Path(path).expanduser()
        try:
            found = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError):
                raise RequestError(f"{file} is not TOML: {error}") from None
            raise RequestError(
                f"recipe {str(path)!r} cannot be read ({error.strerror}); give a .toml file, or one of "
                f"{', '.join(builtin_names())}"
            ) from None
        replaced = {override(found, text): text for text in overrides}
        return cls.from_dict(found, str(file), replaced)

    @classmethod
    def from_dict(
        cls, found: Mapping[str, Any], source: str = "recipe", replaced: Mapping[str, str] | None = None
    ) -> Recipe:
        """Check and build; `source` begins every message, or the override in `replaced` ({key: its text}) does.

        Raises:
            RequestError: as `load`.
        """

        def origin(key: str) -> str:
            said = [text for k, text in (replaced or {}).items() if f"{key}.".startswith(f"{k}.")]
            return f"override {said[-1]!r}" if said else source

        whole = Table(found, "", origin)
        whole.only(f.name for f in fields(cls))
        recipe = cls(
            **read(cls, whole),
            model=listed(plain(whole.table("model").found, lambda problem: whole.error("model", problem))),
            tokenizer=_section(TokenizerRecipe, whole.table("tokenizer")),
            optimizer=_section(OptimizerRecipe, whole.table("optimizer")),
            loss=_section(LossRecipe, whole.table("loss")),
            run=_section(RunRecipe, whole.table("run")),
            stages=tuple(_stage(t) for t in whole.tables("stages")),
        )
        _check(recipe, whole)
        return recipe

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The configuration of the network to be trained."""
        ids = dict(zip(_FROM_TOKENIZER, (self.tokenizer.vocab_size, BOS, EOS), strict=True))
        return ModelConfig.from_dict({"model_type": MODEL_TYPE, **self.model, **ids}, source="[model]")

    @property
    def max_length(self) -> int:
        """Tokens of the longest samples asked for; a generator may go a tenth beyond."""
        return max(mix.length[1] for stage in self.stages for mix in stage.mix)

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, defaults included: `Recipe.from_dict(r.to_dict()) == r`."""
        d = asdict(self)
        for stage in d["stages"]:
            if stage["gate"] is None:
                del stage["gate"]
            stage["mix"] = [{**{k: x for k, x in m.items() if k != "knobs"}, **m["knobs"]} for m in stage["mix"]]
        whole: dict[str, Any] = listed(d)
        return whole

    def to_toml(self) -> str:
        """`to_dict` as the text of a file that `load` reads."""
        return to_toml(self.to_dict())

    def fingerprint(self) -> str:
        """32 hex digits, the same for recipes that train the same: of every key but those without effect on it."""
        whole = {k: x for k, x in flat(self.to_dict()).items() if k not in _WITHOUT_EFFECT}
        return hashlib.blake2b(json.dumps(whole, sort_keys=True).encode(), digest_size=16).hexdigest()

    def check_samples(self) -> None:
        """Make samples of every source, so that a wrong knob of the last stage is said at the start.

        Raises:
            RequestError: an unknown kind or knob, or a knob's value that its generator refuses.
        """
        from pyrosome import tasks

        for at, stage in enumerate(self.stages):
            for number, mix in enumerate(stage.mix):
                if mix.kind == TEXT:
                    continue
                try:
                    for length in mix.length:
                        tasks.make(mix.kind, random.Random(0), length, **mix.knobs)
                except RequestError as error:
                    raise RequestError(f"stages.{at}.mix.{number} of recipe {self.name!r}: {error}") from None


def builtin_names() -> list[str]:
    """Recipes that come with this package."""
    return sorted(p.stem for p in RECIPES.glob("*.toml"))


def flat(found: Any, path: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested tables; an array of tables is counted from 0, any other array is one value."""
    if isinstance(found, Mapping):
        items = [(str(k), x) for k, x in found.items()]
    elif isinstance(found, list) and any(isinstance(x, Mapping) for x in found):
        items = [(str(at), x) for at, x in enumerate(found)]
    else:
        return {path: found}
    return {k: x for name, item in items for k, x in flat(item, f"{path}.{name}" if path else name).items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Where two recipes' dicts differ in what they train, one "key: before -> now" each."""
    a, b = flat(before), flat(now)
    keys = [k for k in dict.fromkeys([*a, *b]) if k not in _WITHOUT_EFFECT and a.get(k) != b.get(k)]
    return [f"{k}: {a.get(k, 'absent')!r} -> {b.get(k, 'absent')!r}" for k in keys]


def _section(cls: type, table: Table) -> Any:
    table.only(f.name for f in fields(cls))
    return cls(**read(cls, table))


def _stage(table: Table) -> Stage:
    table.only(f.name for f in fields(Stage))
    stage = Stage(
        **read(Stage, table),
        gate=_section(Gate, table.table("gate")) if "gate" in table.found else None,
        mix=tuple(_mix(t) for t in table.tables("mix")),
    )
    if stage.min_tokens > stage.max_tokens:
        raise table.error("min_tokens", f"is {stage.min_tokens} and max_tokens is {stage.max_tokens}; lower the first")
    labels = sorted({m.label for m in stage.mix if m.kind != TEXT})  # a passage has no answers to be right
    if stage.gate and stage.gate.kind not in labels:
        advice = nearest(stage.gate.kind, labels)
        raise table.error("gate.kind", f"is {stage.gate.kind!r}, of which this stage has no answers; {advice}")
    return stage


def _kinds(stage: Stage, kinds: Sequence[str]) -> str:
    assert stage.gate
    return nearest(stage.gate.kind, kinds)


def _mix(table: Table) -> Mix:
    named = read(Mix, table)
    found = table.found.get("length")
    ends: list[Any] = found if isinstance(found, list) else [found, found]
    allowed = Allowed(int, low=1)
    if len(ends) != 2 or not all(map(allowed.holds, ends)) or ends[0] > ends[1]:
        what = "is missing" if found is None else f"is {found!r}"
        raise table.error("length", f"{what}; allowed: a number of tokens, or [lowest, highest]")
    knobs = {
        k: plain(x, functools.partial(table.error, k)) for k, x in table.found.items() if k not in (*named, "length")
    }
    return Mix(**named, length=(ends[0], ends[1]), knobs=knobs)


def _no_network(model: Table, problem: str) -> RequestError:
    """What is wrong with a configuration, said of the key it begins with, without advice on checkpoints."""
    problem = problem.removeprefix("[model]: ").removesuffix(": use the config.json published with the weights")
    key = f"model.{re.split(r'[^a-z_]', problem, maxsplit=1)[0]}"
    return RequestError(f"{model.origin(key)}: [model] {problem}")


def _check(recipe: Recipe, whole: Table) -> None:
    """What single values cannot tell."""
    model, run = whole.table("model"), whole.table("run")
    if not re.fullmatch(r"\w[\w.-]*", recipe.name):
        raise whole.error("name", f"is {recipe.name!r}; allowed: letters, digits, and '_', '.' or '-' after the first")
    for name in _FROM_TOKENIZER:
        if name in recipe.model:
            raise model.error(name, "is not set here: it is the tokenizer's; set tokenizer.vocab_size")
    try:
        config = recipe.config
    except CheckpointError as error:
        raise _no_network(model, str(error)) from None
    if config.unknown_keys:
        known = sorted({*config.to_dict(), "rope_scaling"} - set(config.unknown_keys) - set(_FROM_TOKENIZER))
        raise model.error(config.unknown_keys[0], f"is not known; {nearest(config.unknown_keys[0], known)}")
    for name in ("decay_tokens", "quantize_tokens"):
        if getattr(recipe.run, name) > recipe.run.max_tokens:
            found = f"is {getattr(recipe.run, name)} and run.max_tokens is {recipe.run.max_tokens}"
            raise run.error(name, f"{found}; lower the first or raise the second")
    names = [stage.name for stage in recipe.stages]
    if len(set(names)) < len(names):
        raise whole.error("stages", f"are named {', '.join(names)}; give each its own name")
    if recipe.max_length > config.max_position_embeddings:
        longest = f"{recipe.max_length} tokens are the longest samples asked for"
        raise model.error("max_position_embeddings", f"is {config.max_position_embeddings} and {longest}; raise it")
