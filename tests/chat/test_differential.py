"""Our parser and DeepSeek's own, on generated answers.

A few seconds by default, with fixed seeds.  `PYROSOME_FUZZ_SECONDS=60 pytest tests/chat/test_differential.py` goes on
for so long with further ones (as CI does).  Compared is all that the two are meant to agree on: answers written as
trained, whole or cut short between two tags, with any text around them; the improvements of docs/chat.md lie outside of
that.
"""

import functools
import json
import os
import random
import time

import pytest

from tests.chat.cases import OFFICIAL, prompt_for, read, tokenizer

SECONDS = float(os.environ.get("PYROSOME_FUZZ_SECONDS", "0"))
SEEDS = 1200
WORDS = ["hello", "x", "5", " ", "\n", "\n\n", "[1, 2]", '{"k": "v"}', '"s"', "</think>", "<think>", "思考", "🌤️", "é"]
WORDS += ["STOP", "<b>", "</b>", "> ", 'a "q" \\ b', "```", "\t", "tool_calls", "</invoke>", "<｜User｜>", "name="]
JSON = ["5", "-1.5", "1E5", "true", "null", '[1, "x"]', '{"a": {"b": null}}', '"s"', " 7 ", '""']
TAG = "<｜DSML｜"
CLOSE = "</｜DSML｜"


def words(rng, most=4):
    text = "".join(rng.choice(WORDS) for _ in range(rng.randrange(most + 1)))
    # The official parser keeps one newline too many behind a lone bracket.
    return text.replace("<\n", "\n")


def calls(rng):
    out = [f"{TAG}tool_calls>", rng.choice(["\n", ""])]
    for _ in range(rng.randrange(1, 4)):
        out += [f'{TAG}invoke name="{rng.choice(["f", "get-w", "h_1"])}">', rng.choice(["\n", "", "\n  "])]
        for n in range(rng.randrange(3)):
            kind = rng.choice(["true", "false"])
            value = words(rng, 3) if kind == "true" else rng.choice(JSON)
            out += [f'{TAG}parameter name="p{n}" string="{kind}">', value]
            out += [f"{CLOSE}parameter>", rng.choice(["\n", ""])]
        out += [f"{CLOSE}invoke>", rng.choice(["\n", ""])]
    return [*out, f"{CLOSE}tool_calls>"]


def sample(seed):
    """An answer: its ids, whether it thinks, and the stop strings."""
    rng = random.Random(seed)
    thinking, parts = rng.random() < 0.5, []
    if thinking:
        parts += [words(rng).replace("</think>", ""), "</think>"]
    # In fences and on a line with text ours asks that a block be closed; right behind a backtick it is a quotation.
    text = words(rng)
    has_calls = rng.random() < 0.7
    cut = has_calls and rng.random() < 0.3 and "```" not in text
    lead = rng.choice(
        ["\n\n", "\n"] if (cut and text.strip("\n")) or text.rstrip("\n").endswith("`") else ["\n\n", "\n", ""]
    )
    parts.append(text.rstrip("\n") + lead if has_calls else text)
    if has_calls:
        block = calls(rng)
        if cut:
            closers = [n for n, p in enumerate(block) if p.startswith(CLOSE) and n > 3]
            block = block[: rng.choice(closers) + 1]
            parts += block
            parts[-1] += "\n"
            return ids_of(parts), thinking, []
        parts += [*block, rng.choice(["", "\n", " tail"])]
    stops = ["STOP"] if rng.random() < 0.3 else []
    return [*ids_of(parts), *([1] if rng.random() < 0.7 else [])], thinking, stops


def ids_of(parts):
    return tokenizer().encode("".join(parts), allow_special=True)


@functools.cache
def recipe():
    module = pytest.importorskip("deepseek_recipe")
    return module, module.Tokenizer.from_file(str(OFFICIAL / "tokenizer.json"))


def official(ids, thinking, stops):
    """What DeepSeek's parser makes of it, one token a piece."""
    r, tokens = recipe()
    request = r.ConversationRequest(
        r.Conversation([r.UserMessage("q")], thinking_mode=thinking), r.ModelVersion.DeepseekV4Pro
    )
    stage = r.ThinkingInitialStage.ReasoningStart if thinking else None
    options = r.ParsingOptions(thinking_initial_stage=stage, stop_sequences=stops)
    stream = r.StreamProcessor(r.ChatCompletionRequest.chunk_generator(request, "i", "m"), options, tokens)
    response = r.ChatCompletionResponse("i", "m", 0, 0, 0)
    ended = ids[-1:] == [1]
    chunks = [r.InferenceChunk.ready(), *(r.InferenceChunk.tokens([i]) for i in (ids[:-1] if ended else ids))]
    reason = r.InferenceFinishReason.Stop if ended else r.InferenceFinishReason.Length
    for chunk in [*chunks, r.InferenceChunk.finish(reason)]:
        if not stream.finished:
            for piece in stream.push(chunk):
                response.accumulate(piece)
    for piece in stream.finish():
        response.accumulate(piece)
    body = json.loads(response.to_json())
    choice, message = body["choices"][0], body["choices"][0]["message"]
    made = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or []]
    return message.get("reasoning_content") or "", message["content"], made, choice["finish_reason"]


def ours(ids, thinking, stops, cuts):
    prompt = prompt_for(tools=None, start="reasoning" if thinking else "content", stop=tuple(stops))
    m = read(ids, prompt, cuts)[0]
    return m.reasoning, m.content, [(c.name, c.arguments) for c in m.tool_calls], m.finish_reason


def test_both_parsers_agree_on_answers_written_as_trained():
    recipe()
    end, seed, num_calls = time.monotonic() + SECONDS, 0, 0
    while seed < SEEDS or time.monotonic() < end:
        ids, thinking, stops = sample(seed)
        want = official(ids, thinking, stops)
        for cuts in (range(1, len(ids)), ()):
            assert ours(ids, thinking, stops, cuts) == want, (seed, tokenizer().decode(ids))
        num_calls += len(want[2])
        seed += 1
    assert num_calls > SEEDS / 2
