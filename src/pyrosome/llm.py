"""The public face: load a model, read its logits, generate from it.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrosome.cache.streams import CachePlan, plan_cache
from pyrosome.chat import Chat, Detokenizer, Message, Tokenizer
from pyrosome.chat.events import Done, Event, Usage
from pyrosome.chat.prompt import Prompt
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.config import ModelConfig
from pyrosome.engine.generate import Request, TokenEvent, generate
from pyrosome.engine.runner import Runner, check_ids
from pyrosome.errors import ContextTooLong, RequestError
from pyrosome.model.build import Network, build
from pyrosome.model.numerics import numerics_named
from pyrosome.options import SamplingParams, require_integer


@dataclasses.dataclass(eq=False)
class LoadedModel:
    """A network with its weights, and the row format its caches are opened in."""

    network: Network
    config: ModelConfig
    numerics: str
    kv_format: str
    path: Path

    @property
    def has_drafts(self) -> bool:
        """Whether an MTP stage was loaded with the trunk."""
        return len(self.network.mtp) > 0

    def runner(self, max_sequences: int = 4, max_context: int = 4096, *, num_drafts: int = 0) -> Runner:
        """Open a cache for up to `max_sequences` sequences of up to `max_context` tokens each."""
        return Runner(self.network, self.kv_format, max_sequences, max_context, num_drafts=num_drafts)

    def logits(self, ids: Sequence[int], cuts: Iterable[int] | None = None) -> Tensor:
        """Logits after each token, float32 [T, V], computed through the cache.

        Args:
            cuts: positions where a span ends and the next begins, ascending, each in 1..T-1;
                `range(1, len(ids))` is token by token, None is one span.

        Raises:
            RequestError: no ids, an id outside the vocabulary, cuts out of order.
            ContextTooLong: more ids than the model has positions for.
        """
        ids = self._checked(ids)
        runner = self.runner(1, len(ids))
        sequence = runner.open()
        rows = [runner.step([(sequence, ids[a:b])], every_row=True)[0] for a, b in _pieces(len(ids), cuts)]
        return torch.cat(rows).float()

    def draft_logits(self, ids: Sequence[int], cuts: Iterable[int] | None = None) -> Tensor:
        """Logits of the MTP stage, float32 [T - 1, V]: row t reads token t + 1 and is about token t + 2.

        Raises:
            RequestError: as `logits`; or this checkpoint has no MTP stage.
        """
        if not self.has_drafts:
            release = "a DSpark head, which this version does not run yet" if self.config.dspark else "no MTP tensors"
            raise RequestError(f"draft logits were asked for and {self.path} has {release}; use `logits`")
        ids = self._checked(ids)
        runner = self.runner(1, len(ids))
        sequence = runner.open()
        rows = [runner.step_with_drafts(sequence, ids[a:b]) for a, b in _pieces(len(ids), cuts)]
        return torch.cat(rows).float()

    def _checked(self, ids: Sequence[int]) -> list[int]:
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        check_ids(ids, self.config.vocab_size)
        check_length(len(ids), self.config)
        return ids


def check_length(num_tokens: int, config: ModelConfig) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        ContextTooLong
    """
    if num_tokens > config.max_position_embeddings:
        raise ContextTooLong(
            num_tokens, config.max_position_embeddings, "shorten the prompt (max_position_embeddings is the limit)"
        )


def _pieces(length: int, cuts: Iterable[int] | None) -> list[tuple[int, int]]:
    cuts = list(cuts) if cuts is not None else []
    if cuts != sorted(set(cuts)) or any(not 0 < c < length for c in cuts):
        raise RequestError(f"cuts must ascend within 1..{length - 1} for {length} tokens; {cuts} were given")
    edges = [0, *cuts, length]
    return list(pairwise(edges))


def load_model(
    path_or_name: str | Path,
    device: str = "cpu",
    numerics: str = "exact",
    kv_format: str | None = None,
    *,
    unpack: bool | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> LoadedModel:
    """Load a checkpoint in the official layout: a directory, a single file, or a built-in name.

    Args:
        numerics: "exact" (no rounding simulated) or "trained" (every rounding the weights were trained with).
        kv_format: stored cache rows: "f32", "bf16" or "fp8"; None takes the numerics' own (exact f32, trained fp8).
        unpack: hold float32 copies of the weights (True), hold them as stored (False), or decide by size (None).
        progress: called with (bytes read, bytes in all, shard name).

    Raises:
        CheckpointError: the files are not what they claim to be, or the shape cannot be stored in `kv_format`.
        RequestError: unknown numerics, or a device that is not there.
    """
    arithmetic = numerics_named(numerics)
    _check_device(device)
    kv_format = kv_format or arithmetic.default_kv_format
    index = open_checkpoint(path_or_name)
    plan_cache(index.config, kv_format, 1, 1)  # a format that cannot store this shape is refused before the load
    network = build(index, arithmetic, device=device, unpack=unpack, progress=progress)
    return LoadedModel(network, index.config, numerics, kv_format, index.path)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"device {device!r} was asked for and torch cannot use it ({str(error).splitlines()[0]}); "
            "'cpu' always works"
        ) from None


@dataclasses.dataclass(frozen=True)
class Output:
    """One finished generation."""

    token_ids: list[int]
    text: str
    logprobs: list[dict[int, float]] | None  # per token: its own and the top ones asked for; raw model distribution
    finish_reason: str  # "stop" or "length"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A streamed part of a generation: text that no later token can change."""

    text: str
    token_ids: list[int]
    finish_reason: str | None


class LLM:
    """A model with its tokenizer, for offline use.

        llm = LLM("builtin:nano")
        llm.generate(["Hello"], SamplingParams(max_tokens=16, temperature=0))[0].text

    Raises:
        CheckpointError: as `load_model`; or there is no tokenizer beside the weights.
    """

    def __init__(
        self,
        path_or_name: str | Path,
        numerics: str = "trained",
        kv_format: str | None = None,
        device: str = "cpu",
        *,
        max_sequences: int = 8,
        step_tokens: int = 2048,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        require_integer("max_sequences", max_sequences, 1)
        require_integer("step_tokens", step_tokens, 1)
        self.model = load_model(path_or_name, device, numerics, kv_format, progress=progress)
        self.tokenizer = Tokenizer.from_dir(self.model.path)
        self.max_sequences, self.step_tokens = max_sequences, step_tokens

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Continue every prompt (text, or ids); one `SamplingParams` for all, or one each.

        Raises:
            RequestError: an empty prompt, an id outside the vocabulary, or a number of params that fits no prompt.
            ContextTooLong: a prompt longer than the model's context.
        """
        requests = self._requests(prompts, params)
        texts = [_Text(self.tokenizer, r.params) for r in requests]
        events: list[list[TokenEvent]] = [[] for _ in requests]
        for event in self._run(requests, texts):
            events[event.request].append(event)
        return [_output(texts[i], events[i], requests[i].params) for i in range(len(requests))]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[Piece]:
        """Continue one prompt, yielding text as soon as no later token can change it."""
        requests = self._requests([prompt], params)
        text = _Text(self.tokenizer, requests[0].params)
        for event in self._run(requests, [text]):
            yield Piece(text.take(), [event.token], event.finish_reason)

    @functools.cached_property
    def chat_template(self) -> Chat:
        """How this checkpoint's conversations are written, and its answers read."""
        return Chat(self.model.path, tokenizer=self.tokenizer)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        thinking: str = "high",
        tools: Sequence[dict[str, Any]] | None = None,
        params: SamplingParams | None = None,
    ) -> Message:
        """Answer a conversation: messages and tools as in chat completions, thinking "off", "low", "high" or "max".

        Without `params` it samples as DeepSeek's API does, up to 8,192 tokens (thinking 65,536, "max" 131,072).

        Raises:
            RequestError: a message, tool or mode that cannot be rendered; the message says which.
            ContextTooLong: the conversation is longer than the model's context.
        """
        (done,) = (e for e in self.chat_stream(messages, thinking, tools, params) if isinstance(e, Done))
        return done.message

    def chat_stream(
        self,
        messages: Sequence[dict[str, Any]],
        thinking: str = "high",
        tools: Sequence[dict[str, Any]] | None = None,
        params: SamplingParams | None = None,
    ) -> Iterator[Event]:
        """As `chat`, event by event, `Done` last; closing the iterator stops the generation."""
        prompt = self.chat_template.conversation(messages, thinking, tools, stop=params.stop if params else ())
        limit = min(prompt.max_tokens, max(1, self.model.config.max_position_embeddings - len(prompt.ids)))
        params = dataclasses.replace(params, stop=()) if params else prompt.sampling_params(max_tokens=limit)
        (request,) = self._requests([prompt.ids], params)
        return self._answer(prompt, request)

    def _answer(self, prompt: Prompt, request: Request) -> Iterator[Event]:
        parser = self.chat_template.parser(prompt)
        eos = self.model.config.eos_token_id
        with contextlib.closing(self._events([request], set())) as events:
            for event in events:
                if event.token == eos if event.is_end_token else event.token != eos:
                    yield from parser.feed([event.token])  # the client's own end tokens are no part of the answer
                # Whatever follows complete tool calls is dropped, so it need not be computed.
                if parser.finished or parser.calls_closed:
                    break
                if event.finish_reason:
                    yield from parser.flush(event.finish_reason)
        yield from parser.flush("stop")
        usage = Usage(len(prompt.ids), parser.completion_tokens, parser.reasoning_tokens)
        yield Done(parser.close(), usage)

    def kv_bytes(self, context: int = 0) -> dict[str, float]:
        """Cache bytes: growth per token, and one sequence of `context` tokens with its state."""
        plan = self.plan_cache(max(context, 1))
        return {"per_token": plan.bytes_per_token, "sequence": plan.sequence_bytes(context)}

    def plan_cache(self, max_context: int, max_sequences: int = 1) -> CachePlan:
        """What a cache for so many sequences of so many tokens will allocate."""
        m = self.model
        return plan_cache(m.config, m.kv_format, max_sequences, max_context, drafts=m.has_drafts)

    def _requests(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise RequestError("generate takes a list of prompts; a single string was given: pass [prompt]")
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts and {len(each)} SamplingParams were given; give one, or one each"
            )
        requests = []
        for prompt, p in zip(prompts, each, strict=True):
            ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
            check_ids(ids, self.model.config.vocab_size)
            check_length(len(ids), self.model.config)
            requests.append(Request(ids, p))
        return requests

    def encode(self, text: str) -> list[int]:
        """Ids of a text prompt, with the beginning-of-sentence id in front, as the model was trained."""
        return [self.model.config.bos_token_id, *self.tokenizer.encode(text)]

    def _events(self, requests: list[Request], stopped: set[int]) -> Generator[TokenEvent, None, None]:
        config = self.model.config
        context = max((len(r.ids) + r.params.max_tokens for r in requests), default=1)
        runner = self.model.runner(
            max(1, min(len(requests), self.max_sequences)), min(context, config.max_position_embeddings)
        )
        yield from generate(runner, requests, eos_id=config.eos_token_id, step_tokens=self.step_tokens, stopped=stopped)

    def _run(self, requests: list[Request], texts: list[_Text]) -> Iterator[TokenEvent]:
        stopped: set[int] = set()
        for event in self._events(requests, stopped):
            if texts[event.request].feed(event):  # a stop string: end this request, and only it
                event = dataclasses.replace(event, finish_reason="stop")
                stopped.add(event.request)
            yield event


class _Text:
    """One request's text: detokenised as it grows, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.detokenizer = Detokenizer(tokenizer)
        self.stop = params.stop
        self.hold = max((len(s) for s in params.stop), default=1) - 1
        self.text, self.taken, self.done = "", 0, False
        self.searched = 0  # no stop string begins before this

    def feed(self, event: TokenEvent) -> bool:
        """Take a token; True where its text completes a stop string."""
        if not event.is_end_token:
            self.text += self.detokenizer.feed([event.token])
        if event.finish_reason:
            self.text += self.detokenizer.close()
            self.done = True
        found = [at for s in self.stop if (at := self.text.find(s, self.searched)) >= 0]
        self.searched = max(0, len(self.text) - self.hold)
        if found:
            self.text, self.done = self.text[: min(found)], True
        return bool(found)

    def take(self) -> str:
        """Text that can no longer change: all but what may be the beginning of a stop string."""
        end = len(self.text) if self.done else max(self.taken, len(self.text) - self.hold)
        piece, self.taken = self.text[self.taken : end], end
        return piece


def _output(text: _Text, events: list[TokenEvent], params: SamplingParams) -> Output:
    logprobs = None if params.logprobs is None else [e.logprobs for e in events]
    reason = events[-1].finish_reason if events else "length"
    return Output([e.token for e in events], text.text, logprobs, reason or "length")
