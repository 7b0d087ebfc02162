"""The built-in model's own recipe, cut to a minute: every stage, the decay, the rounding, the checkpoints."""

from pyrosome.llm import LLM
from pyrosome.options import SamplingParams
from pyrosome.train.curves import read
from pyrosome.train.recipe import Recipe
from pyrosome.train.trainer import train

NUM_STAGES = len(Recipe.load("nano").stages)


def test_the_recipe_and_its_finish_turn(tmp_path):
    stages = [f"stages.{i}.max_tokens=12_000" for i in range(NUM_STAGES - 1)]
    short = ["run.max_tokens=100_000", "run.decay_tokens=30_000", "run.quantize_tokens=10_000"]
    less = ["run.evaluate_steps=3", "run.evaluate_samples=1", f"stages.{NUM_STAGES - 1}.evaluate_steps=4"]
    recipe = Recipe.load("nano", [*stages, *short, *less])
    result = train(recipe, tmp_path, threads=1)
    assert result.finished
    rows = read(tmp_path / "curves.jsonl")
    assert list(dict.fromkeys(r["stage"] for r in rows)) == [s.name for s in recipe.stages]
    # Values are one of 90: what a first step gives is above ln 90, and soon it is known that values follow names.
    assert rows[0]["loss"] > 6 and min(r["loss"] for r in rows) < 4.7
    seen = {kind for r in rows for kind in r.get("accuracy", {})}
    assert {m.label for s in recipe.stages for m in s.mix if m.kind != "text"} == seen
    for layout in ("bf16", "fp8fp4"):
        with LLM(tmp_path / layout) as llm:
            message = llm.chat(
                [{"role": "user", "content": "river falcon 37 ; stone\n? falcon"}], "off",
                params=SamplingParams(max_tokens=4, temperature=0),
            )  # fmt: skip
            assert message.finish_reason in ("stop", "length")

    short = ["run.max_tokens=20_000", "run.decay_tokens=10_000", "run.quantize_tokens=20_000"]
    finish = Recipe.load("nano-finish", short)
    result = train(finish, tmp_path / "finish", threads=1, start_from=tmp_path / "bf16")
    first = read(tmp_path / "finish" / "curves.jsonl")[0]
    assert result.finished and first["loss"] < rows[0]["loss"]  # it began from those weights
