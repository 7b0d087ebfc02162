"""The public face: load a model, generate from it, chat with it, keep sessions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyrosome.answer import ChatReader, chat_request, events_of
from pyrosome.cache.streams import CachePlan, plan_cache
from pyrosome.chat import Chat, Message, Tokenizer
from pyrosome.chat.events import Done, Event
from pyrosome.chat.prompt import Prompt
from pyrosome.engine.loaded import LoadedModel as LoadedModel  # part of this face too
from pyrosome.engine.loaded import check_length
from pyrosome.engine.loaded import load_model as load_model
from pyrosome.engine.request import Ended, Request
from pyrosome.engine.runner import check_ids
from pyrosome.engine.stats import Stats
from pyrosome.engine.worker import EngineThread, EventStream
from pyrosome.errors import RequestError
from pyrosome.options import EngineOptions, SamplingParams
from pyrosome.output import Output, Piece, collect, pieces, raise_failed
from pyrosome.session import Session


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
        experts: str = "resident",
        lock_memory: bool = False,
        numa: str = "auto",
        options: EngineOptions | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        **changes: Any,
    ) -> None:
        self.options = dataclasses.replace(options or EngineOptions(), **_known(changes))
        self.model = load_model(
            path_or_name,
            device,
            numerics,
            kv_format,
            experts=experts,
            lock_memory=lock_memory,
            numa=numa,
            progress=progress,
        )
        self.tokenizer = Tokenizer.from_dir(self.model.path)
        self._numbers = itertools.count()

    @functools.cached_property
    def engine(self) -> EngineThread:
        """The engine, in a thread of its own; made when it is first needed."""
        thread = EngineThread(self.model.engine(self.options))
        weakref.finalize(self, thread.close)
        return thread

    def close(self) -> None:
        """End what runs and free the cache; a trace is written out.  Also at the end of a `with` block."""
        if "engine" in self.__dict__:
            self.engine.close()
            del self.__dict__["engine"]

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Continue every prompt (text, or ids); one `SamplingParams` for all, or one each.

        With `n` completions a prompt has so many outputs, one after the other.  A request that fails on the way has
        `finish_reason` "error"; the others are not affected.

        Raises:
            RequestError: an empty prompt, an id outside the vocabulary, or a number of params that fits no prompt.
            ContextTooLong: a prompt longer than the model's context.
        """
        requests = self._requests(prompts, params)
        with contextlib.ExitStack() as open_streams:
            streams = [open_streams.enter_context(self.submit(r)) for r in requests]
            return [o for r, s in zip(requests, streams, strict=True) for o in self._outputs(r, s)]

    def _outputs(self, request: Request, events: EventStream) -> list[Output]:
        outputs = collect(events, self.tokenizer, request.params)
        if request.params.prompt_logprobs is None:
            return outputs
        return [dataclasses.replace(o, prompt_logprobs=events.prompt_logprobs) for o in outputs]

    def submit(self, request: Request) -> EventStream:
        """A request's events as they come; closing the stream ends it."""
        return self.engine.submit(request)

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[Piece]:
        """Continue one prompt, yielding text as soon as no later token can change it.

        Raises:
            RequestError: as `generate`; or more than one completion was asked for.
            EngineError: the generation failed on the way.
        """
        (request,) = self._requests([prompt], params)
        if request.params.n > 1:
            raise RequestError(f"stream gives one completion and n is {request.params.n}; use generate")
        return self._pieces(request)

    def _pieces(self, request: Request) -> Iterator[Piece]:
        with self.submit(request) as events:
            yield from pieces(events, self.tokenizer, request.params)

    def session(self, prompt: str | Sequence[int] = ()) -> Session:
        """An empty session, or one that begins with `prompt`: a sequence that stays, to be gone on with and forked."""
        session = Session(self, self.engine.call("session_open"))
        if len(prompt):
            session.extend(self.encode(prompt) if isinstance(prompt, str) else prompt)
        return session

    def restore(self, path: str | Path) -> Session:
        """A session saved by `Session.save`, by this or another process or machine.

        Raises:
            CheckpointError: the file is damaged, of another version, or of another model or numerics.
            ContextTooLong: it holds more tokens than this engine's cache.
        """
        session = Session(self, self.engine.call("session_restore", path=str(Path(path).absolute())))
        session.messages = list(self.engine.call("session_notes", session=session.id).get("messages", []))
        return session

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
        """As `chat`, event by event, `Done` last; closing the iterator stops the generation.

        Raises:
            EngineError: the generation failed on the way.
        """
        prompt = self.chat_template.conversation(messages, thinking, tools, stop=params.stop if params else ())
        return self.answer(prompt, self.request(prompt, params))

    def request(self, prompt: Prompt, params: SamplingParams | None = None, **changes: Any) -> Request:
        """A rendered prompt as the engine takes it: what binds its answer, and where the next turn parts from it.

        `changes` are fields of `Request`, and go before these.
        """
        context = self.model.config.max_position_embeddings
        request = chat_request(str(next(self._numbers)), prompt, self.chat_template, params, context=context, **changes)
        check_ids(list(prompt.ids), self.model.config.vocab_size)
        check_length(len(prompt.ids), self.model.config)
        return request

    def answer(self, prompt: Prompt, request: Request) -> Iterator[Event]:
        """The events of a request made by `request`: parts of the answer, then `Done`."""
        reader = ChatReader(self.chat_template, prompt, self.model.config.eos_token_id)
        with self.submit(request) as events:
            for event in events:
                if isinstance(event, Ended):
                    raise_failed(event)
                    yield from events_of(reader.end(event.reason))
                    break
                yield from events_of(reader.feed(event))
                if reader.is_over:
                    break
        yield from events_of(reader.end("stop"))
        yield reader.done()

    def stats(self) -> Stats:
        """What the engine has done so far."""
        return self.engine.call("stats")  # type: ignore[no-any-return]

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
            requests.append(Request(str(next(self._numbers)), tuple(ids), p))
        return requests

    def encode(self, text: str) -> list[int]:
        """Ids of a text prompt, with the beginning-of-sentence id in front, as the model was trained."""
        return [self.model.config.bos_token_id, *self.tokenizer.encode(text)]


def _known(changes: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(EngineOptions)]
    if unknown := [name for name in changes if name not in names]:
        raise RequestError(f"LLM was given {', '.join(unknown)}; its engine options are {', '.join(names)}")
    return changes
