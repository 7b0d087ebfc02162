"""Random requests through HTTP in the official manner, and DeepSeek's own package asked the same.

Some hundred by default, with fixed seeds; with `PYROSOME_FUZZ_SECONDS` further ones, for a quarter of that time.
"""

import json
import os
import random
import time

import deepseek_recipe as recipe
import pytest

from pyrosome.options import ServerOptions
from tests.chat.cases import chat
from tests.server.scripted import EOS, scripted

SECONDS = float(os.environ.get("PYROSOME_FUZZ_SECONDS", "0")) / 4
SEEDS = 400
KINDS = {
    "chat_completions": (recipe.ChatCompletionRequest, "/v1/chat/completions"),
    "messages": (recipe.MessagesRequest, "/anthropic/v1/messages"),
    "responses": (recipe.ResponsesRequest, "/v1/responses"),
}
TEXTS = ["hi", "", "思考", "json", "<｜User｜>", "a\n\nb", "🐙", "</think>", '{"a": 1}', " x "]
ODD = [None, 0, -1, 1.5, 10**12, "x", "", True, [], {}, [1], {"type": "enabled"}, "none", "max", "required"]


@pytest.fixture(scope="module")
def client():
    options = ServerOptions(compat="deepseek", names=("DeepSeek-V4-Pro",))
    with scripted(lambda request: [[EOS]], options=options, chat=chat("0731", "deepseek")) as (client, _, _):
        yield client


class Maker:
    """Random bodies: most of them right, some with something odd in them."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def text(self):
        return "".join(self.rng.choices(TEXTS, k=self.rng.randint(1, 3)))

    def some(self, value, odds=0.5):
        """The value, or something odd in its place, or nothing."""
        if self.rng.random() < 0.04:
            return self.rng.choice(ODD)
        return value if self.rng.random() < odds else ...

    def body(self, protocol):
        made = getattr(self, protocol)()
        return {k: v for k, v in made.items() if v is not ...}

    def tools(self, wrap):
        names = self.rng.sample(["read", "write", "a-b", "f_1", "bad name", "ünï"], self.rng.randint(1, 3))
        names = names if self.rng.random() < 0.15 else [n for n in names if n.isascii() and " " not in n] or ["f"]
        schema = {"type": "object", "properties": {"p": {"type": self.rng.choice(["string", "integer", "array"])}}}
        return [wrap(n, self.text(), schema) for n in names]

    def content(self, kind="text"):
        if self.rng.random() < 0.7:
            return self.text()
        return [{"type": kind, "text": self.text()} for _ in range(self.rng.randint(0, 3))]

    def chat_completions(self):
        def wrap(name, text, schema):
            function = {"name": name, "description": text, "parameters": schema}
            if self.rng.random() < 0.3:
                function["strict"] = True
            return {"type": "function", "function": function}

        messages = [{"role": "system", "content": self.content()}] if self.rng.random() < 0.4 else []
        for _ in range(self.rng.randint(0, 3)):
            messages.append({"role": self.rng.choice(["user", "user", "latest_reminder"]), "content": self.content()})
            turn = {"role": "assistant", "content": self.text()}
            if self.rng.random() < 0.5:
                turn["reasoning_content"] = self.text()
            messages.append(turn)
            if self.rng.random() < 0.4:
                calls = range(self.rng.randint(1, 3))
                turn["tool_calls"] = [
                    {
                        "id": f"c{n}",
                        "type": "function",
                        "function": {
                            "name": "read",
                            "arguments": self.rng.choice(['{"p": 1, "q": "x"}', "{}", '{"p": [1.50]}', "broken", "3"]),
                        },
                    }
                    for n in calls
                ]
                order = list(calls) + ([9] if self.rng.random() < 0.05 else [])
                self.rng.shuffle(order)
                messages += [{"role": "tool", "tool_call_id": f"c{n}", "content": self.content()} for n in order]
        messages.append({"role": "user", "content": self.content()})
        if self.rng.random() < 0.1:
            messages.append({"role": "assistant", "content": self.text(), "prefix": True})
        form = self.rng.choice(
            [
                {"type": "json_object"},
                {"type": "text"},
                {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
            ]
        )
        return {
            "messages": messages,
            "tools": self.some(self.tools(wrap), 0.4),
            "tool_choice": self.some(self.rng.choice(["auto", "none", "required"]), 0.2),
            "thinking": self.some({"type": self.rng.choice(["enabled", "disabled", "adaptive"])}),
            "reasoning_effort": self.some(
                self.rng.choice(["none", "minimal", "low", "high", "xhigh", "max", "huge"]), 0.3
            ),
            "temperature": self.some(self.rng.choice([0, 0.7, 1, 2, 3]), 0.3),
            "top_p": self.some(self.rng.choice([0.1, 1, 0, 1.1]), 0.3),
            "max_tokens": self.some(self.rng.choice([1, 100, 0, 400_000]), 0.3),
            "stop": self.some(self.rng.choice(["x", ["a", "b"], ["s"] * 17]), 0.2),
            "response_format": self.some(form, 0.2),
            "logprobs": self.some(True, 0.2),
            "top_logprobs": self.some(self.rng.choice([0, 5, 21]), 0.2),
            "seed": self.some(7, 0.2),
            "n": self.some(1, 0.1),
        }

    def messages(self):
        messages = []
        for _ in range(self.rng.randint(0, 2)):
            messages.append({"role": "user", "content": self.content()})
            blocks = (
                [{"type": "thinking", "thinking": self.text(), "signature": "s"}] if self.rng.random() < 0.5 else []
            )
            blocks.append({"type": "text", "text": self.text()})
            messages.append({"role": "assistant", "content": blocks})
            if self.rng.random() < 0.4:
                blocks.append(
                    {"type": "tool_use", "id": "t1", "name": "read", "input": {"p": self.rng.choice([1, "x"])}}
                )
                result = {"type": "tool_result", "tool_use_id": "t1", "content": self.content()}
                messages.append({"role": "user", "content": [result]})
        messages.append({"role": "user", "content": self.content()})
        return {
            "messages": messages,
            "max_tokens": self.some(self.rng.choice([1, 100, 10**7]), 0.9),
            "system": self.some(self.content(), 0.4),
            "tools": self.some(
                self.tools(lambda n, text, schema: {"name": n, "description": text, "input_schema": schema}), 0.4
            ),
            "tool_choice": self.some({"type": self.rng.choice(["auto", "any", "none"])}, 0.2),
            "thinking": self.some(
                {"type": self.rng.choice(["enabled", "disabled", "adaptive"]), "budget_tokens": 2000}
            ),
            "output_config": self.some({"effort": self.rng.choice(["low", "high", "max"])}, 0.3),
            "temperature": self.some(self.rng.choice([0, 0.7, 1]), 0.3),
            "stop_sequences": self.some(["x"], 0.2),
        }

    def responses(self):
        items = []
        for _ in range(self.rng.randint(0, 2)):
            items.append(
                {"role": self.rng.choice(["user", "developer", "system"]), "content": self.content("input_text")}
            )
            if self.rng.random() < 0.5:
                text = [{"type": "reasoning_text", "text": self.text()}]
                items.append({"type": "reasoning", "id": "r", "summary": [], "content": text})
            items.append({"role": "assistant", "content": self.text()})
        items.append({"role": "user", "content": self.content("input_text")})
        return {
            "input": self.some(items, 0.8) if self.rng.random() < 0.8 else self.text(),
            "instructions": self.some(self.text(), 0.4),
            "tools": self.some(
                self.tools(lambda n, text, s: {"type": "function", "name": n, "description": text, "parameters": s}),
                0.4,
            ),
            "tool_choice": self.some(self.rng.choice(["auto", "none", "required"]), 0.2),
            "reasoning": self.some({"effort": self.rng.choice(["none", "low", "medium", "max"])}),
            "max_output_tokens": self.some(self.rng.choice([1, 100]), 0.3),
            "temperature": self.some(self.rng.choice([0, 0.7, 1]), 0.3),
        }


def official(body, protocol):
    """What DeepSeek's package makes of it: a prompt and sampling, or a status and what it says."""
    body = {k: v for k, v in body.items() if k != "model"}
    try:
        made = KINDS[protocol][0]({**body, "model": "DeepSeek-V4-Pro"}).convert(
            recipe.ConversionOptions(default_thinking_mode=True)
        )
        text = recipe.DeepseekV4Encoding().render_conversation(made.conversation)
        most = made.resolve_max_tokens(len(chat().tokenizer.encode_spans(text.prompt, text.special_ranges)), 1 << 20)
    except recipe.ConversionError as error:
        return error.status_code, json.loads(error.body)["error"]["message"]
    except (ValueError, TypeError, OverflowError):  # the body could not be read; its words are the package's own
        return 400, None
    options = made.inference_options
    return 200, (text.prompt, round(options.temperature, 5), round(options.top_p, 5), int(most))


def ours(client, body, protocol):
    answer = client.post(KINDS[protocol][1] + "/render", json=body)
    found = answer.json()
    if answer.status_code != 200:
        return answer.status_code, found["error"]["message"]
    s = found["sampling"]
    return 200, (found["prompt"], round(s["temperature"], 5), round(s["top_p"], 5), s["max_tokens"])


def test_requests_are_understood_as_the_official_package_understands_them(client):
    end, seed, seen = time.monotonic() + SECONDS, 0, {200: 0, 400: 0}
    while seed < SEEDS or time.monotonic() < end:
        for protocol in KINDS:
            body = Maker(f"{seed}{protocol}").body(protocol)
            want, found = official(body, protocol), ours(client, body, protocol)
            assert found[0] == want[0], (body, want, found)
            assert want[1] is None or found[1] == want[1], (body, want, found)
            seen[found[0]] = seen.get(found[0], 0) + 1
        seed += 1
    assert min(seen[200], seen[400]) > SEEDS / 4, seen
