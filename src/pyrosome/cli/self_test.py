"""Three prompts that show whether this installation computes what it should.

`python -m pyrosome.cli.self_test` records what builtin:nano answers, into recorded.py beside this file; run it when
the built-in weights change, and on no other occasion.
"""

from __future__ import annotations

import contextlib
import hashlib
import pprint
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrosome.cli.first_contact import BUILTIN

if TYPE_CHECKING:
    from torch import Tensor

    from pyrosome.llm import LoadedModel

PROMPTS = ("Once upon a time", '{"name": ', "深海")  # of any model but the built-in, whose prompts are recorded too
# What the built-in model is asked when it is recorded: a task it was taught, tokens, and how it thinks.  The ledger is
# longer than 128 tokens and than all the rows that an indexer keeps.
ASKED = (("ledger", 160, "high"), ("copy", 48, "off"), ("sums", 36, "high"))
NUM_TRIED = 16  # samples of each
SHOWN = 48  # characters of a prompt
NEW_TOKENS = 8
LOGPROB_ATOL = 1e-3  # arithmetic is float32 throughout; orders of summation differ between machines
ROUTE_ATOL = 1e-4  # of the largest logit (or of 1, if that is more): whole against token by token
SAFE_MARGIN = 5e-2  # between the best two logprobs when recording: far above what a machine can change


def self_test(model: LoadedModel, name: str) -> list[dict[str, Any]]:
    """Run the prompts; one finding per prompt and check: {"check", "prompt", "ok", "detail"}.

    A long prompt is told by its end.  Checks: every logit finite; the whole prompt at once equals token by token; for
    builtin:nano, the tokens it takes greedily and their logprobs equal the recorded ones.
    """
    from pyrosome.cli.recorded import CASES

    findings = []
    for at, prompt in enumerate([c["prompt"] for c in CASES] if name == BUILTIN else PROMPTS):
        ids = prompt_ids(model, prompt)
        answer, logprobs, rows_TV = greedy(model, ids)
        single_TV = model.logits(ids, cuts=range(1, len(ids)))
        findings += [_finite(rows_TV), _same_route(rows_TV[: len(ids)], single_TV)]
        if name == BUILTIN:
            findings.append(_as_recorded(model, at, ids, answer, logprobs))
        for finding in findings:
            finding.setdefault("prompt", prompt if len(prompt) <= SHOWN else f"... {prompt[-SHOWN:]}")
    return findings


def prompt_ids(model: LoadedModel, prompt: str) -> list[int]:
    """Ids of a prompt, the names of control tokens read as such; where a checkpoint has no tokenizer, its bytes, which
    any vocabulary has ids for."""
    from pyrosome.chat import Tokenizer
    from pyrosome.errors import CheckpointError

    c = model.config
    try:
        ids = Tokenizer.from_dir(model.path).encode(prompt, allow_special=True)
    except CheckpointError:
        ids = [b % c.vocab_size for b in prompt.encode()]
    return [c.bos_token_id, *(i for i in ids if i < c.vocab_size)]


def greedy(model: LoadedModel, ids: list[int]) -> tuple[list[int], list[float], Tensor]:
    """The most probable continuation of NEW_TOKENS tokens, their logprobs, and the logits [T, V] it was read from."""
    import torch

    runner = model.runner(1, len(ids) + NEW_TOKENS)
    sequence = runner.open()
    rows = [runner.step([(sequence, ids)], every_row=True)[0]]
    answer: list[int] = []
    logprobs: list[float] = []
    for _ in range(NEW_TOKENS):
        best, token = rows[-1][-1].float().log_softmax(-1).max(-1)
        answer.append(int(token))
        logprobs.append(float(best))
        if len(answer) < NEW_TOKENS:
            rows.append(runner.step([(sequence, answer[-1:])], every_row=True)[0])
    return answer, logprobs, torch.cat(rows).float()


def _finite(rows_TV: Tensor) -> dict[str, Any]:
    bad = int((~rows_TV.isfinite()).sum())
    return {"check": "finite", "ok": bad == 0, "detail": f"{bad} of {rows_TV.numel():,} logits are not finite"}


def _same_route(whole_TV: Tensor, single_TV: Tensor) -> dict[str, Any]:
    apart = float((whole_TV - single_TV).abs().max())
    bound = ROUTE_ATOL * max(1.0, float(whole_TV.abs().max()))
    detail = f"whole and token by token differ by {apart:.1e} at most, {bound:.1e} is allowed"
    return {"check": "whole = token by token", "ok": apart <= bound, "detail": detail}


def _as_recorded(
    model: LoadedModel, at: int, ids: list[int], answer: list[int], logprobs: list[float]
) -> dict[str, Any]:
    from pyrosome.cli.recorded import CASES, WEIGHTS

    finding = {"check": "as recorded", "ok": False}
    if fingerprint(model.path) != WEIGHTS:
        return finding | {"detail": "the built-in weights are not those the answers were recorded with; reinstall"}
    want = CASES[at]
    if ids != want["ids"] or answer != want["answer"]:
        return finding | {"detail": f"tokens {ids} -> {answer}; recorded are {want['ids']} -> {want['answer']}"}
    apart = max(abs(a - b) for a, b in zip(logprobs, want["logprobs"], strict=True))
    detail = f"{NEW_TOKENS} tokens equal, logprobs within {apart:.1e}, {LOGPROB_ATOL:.1e} is allowed"
    return finding | {"ok": apart <= LOGPROB_ATOL, "detail": detail}


def fingerprint(path: Path) -> str:
    """SHA-256 of a small checkpoint's shards."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def record(target: Path) -> None:
    """Write what builtin:nano answers on this machine, by the ops' definitions.

    Of the samples of each task the one it is surest of is asked.

    Raises:
        RuntimeError: of none are its choices so clear that no other machine could make others; change what is asked.
    """
    from pyrosome.llm import load_model
    from pyrosome.ops.seam import OPS, use

    model = load_model(BUILTIN, numerics="exact")
    with contextlib.ExitStack() as definitions:
        for op in OPS.values():
            definitions.enter_context(use(op, "torch"))
        cases = [_surest(model, *asked) for asked in ASKED]
    table = ",\n".join(pprint.pformat(c, width=110, compact=True, sort_dicts=False) for c in cases)
    text = (
        f'"""What {BUILTIN} answers to the prompts of self_test.py.  Written by `python -m pyrosome.cli.self_test`."""'
        "\n\n"
        "from __future__ import annotations\n\nfrom typing import Any\n\n"
        f'WEIGHTS = "{fingerprint(model.path)}"\n'
        f"# fmt: off\nCASES: list[dict[str, Any]] = [\n{table},\n]\n"
    )
    target.write_text(text, encoding="utf-8")


def _surest(model: LoadedModel, kind: str, length: int, thinking: str) -> dict[str, Any]:
    """The case, as it is recorded, whose least margin between the best two tokens is the widest."""
    widest, surest = -1.0, {}
    for seed in range(NUM_TRIED):
        prompt = _question(model, kind, length, thinking, seed)
        ids = prompt_ids(model, prompt)
        answer, logprobs, rows_TV = greedy(model, ids)
        best = rows_TV[len(ids) - 1 :].log_softmax(-1).topk(2).values
        margin = float((best[:, 0] - best[:, 1]).min())
        if margin > widest:
            rounded = [round(v, 6) for v in logprobs]
            widest, surest = margin, {"prompt": prompt, "ids": ids, "answer": answer, "logprobs": rounded}
    if widest < SAFE_MARGIN:
        raise RuntimeError(
            f"asked for {kind}, the model is nowhere surer than by {widest:.1e} (of a logprob; {SAFE_MARGIN:.1e} is "
            f"needed) in {NUM_TRIED} samples; ask for another task"
        )
    return surest


def _question(model: LoadedModel, kind: str, length: int, thinking: str, seed: int) -> str:
    """A sample of a task up to the answer, as the chat template writes it, without the token that begins it."""
    from pyrosome.chat import Chat, Tokenizer
    from pyrosome.tasks import make

    knobs: dict[str, Any] = {"thinking": thinking} if thinking != "off" else {}
    sample = make(kind, random.Random(seed), length, **knobs)
    text = Chat(model.path).conversation(sample.messages[:1], thinking).text
    return text.removeprefix(Tokenizer.from_dir(model.path).decode([model.config.bos_token_id]))


if __name__ == "__main__":
    record(Path(__file__).with_name("recorded.py"))
