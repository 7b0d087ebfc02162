"""What the user wants of a generation."""

from __future__ import annotations

import dataclasses
import math

from pyrosome.errors import RequestError


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Raises:
        RequestError: a field is of a wrong type or outside its range; the message names it.
    """

    max_tokens: int = 256
    temperature: float = 1.0  # 0: the most probable token
    top_p: float = 1.0  # smallest set of tokens with this much probability
    top_k: int = 0  # the k most probable; 0: all
    min_p: float = 0.0  # tokens of at least this share of the most probable one's probability
    presence_penalty: float = 0.0  # subtracted once from tokens already generated
    frequency_penalty: float = 0.0  # subtracted for each time a token was generated
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or output, multiplies negative ones
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # report this many top tokens besides the chosen one
    ignore_eos: bool = False
    n: int = 1  # completions of one prompt, which is computed once
    max_thinking_tokens: int | None = None  # then reasoning is closed; None: no limit of its own
    max_repeats: int | None = None  # end when the last tokens are one passage so many times over; None: never
    # Report the prompt's own tokens from the second on, and this many top ones beside each; all of it is computed then.
    prompt_logprobs: int | None = None
    min_tokens: int = 0  # it does not end by itself before so many, unless a grammar has nothing more to say

    def __post_init__(self) -> None:
        require_integer("max_tokens", self.max_tokens, 1)
        require_integer("min_tokens", self.min_tokens, 0)
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1, open_below=True)
        require_integer("top_k", self.top_k, 0)
        _number("min_p", self.min_p, 0, 1)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, open_below=True)
        if self.seed is not None:
            require_integer("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), 0, 100)
        require_integer("n", self.n, 1, 128)
        if self.max_thinking_tokens is not None:
            require_integer("max_thinking_tokens", self.max_thinking_tokens, 0)
        if self.max_repeats is not None:
            require_integer("max_repeats", self.max_repeats, 2)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; true or false was expected")
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids, int))
        object.__setattr__(self, "stop", _items("stop", (self.stop,) if isinstance(self.stop, str) else self.stop, str))
        if "" in self.stop:
            raise RequestError("stop holds an empty string, which every text contains; leave it out")


@dataclasses.dataclass(frozen=True, slots=True)
class Constraint:
    """What the answer must be, as text: a grammar is built from it where the tokens are chosen.

    `kind` is "json", "regex", "lark", "tool_call" (calls are optional, but when made must fit) or
    "tool_call_required"; `schema` the JSON Schema, the expression, the grammar, or the tools as a JSON list; "" is
    any JSON object.  With `after_reasoning` it begins to hold after `</think>`.
    """

    kind: str
    schema: str
    after_reasoning: bool = False
    parallel: bool = True  # several calls in one answer are allowed
    answer: str | None = None  # for "tool_call": the JSON Schema of an answer that makes none; None: free text


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine may use, and how it spends it.

    Raises:
        RequestError: a field is of a wrong type or outside its range; the message names it.
    """

    max_sequences: int = 8  # that are computed at once; more wait
    max_context: int = 0  # tokens of one sequence; 0: as many as the model has positions for and the cache holds
    cache_bytes: int = 1 << 30  # history of all sequences together, prefixes kept for reuse included
    snapshot_bytes: int = 256 << 20  # copies of state at boundaries, in host memory
    host_bytes: int = 0  # history that had to leave the cache, in host memory
    disk_path: str = ""  # a folder for what does not fit there either; "": none
    disk_bytes: int = 16 << 30
    step_tokens: int = 2048  # computed per step at most
    drafter: str = "auto"  # "auto" (the checkpoint's own head, where it has one), "mtp", "lookup" or "off"
    max_drafts: int = 3  # tokens drafted per sequence and step at most; how many depends on what was accepted
    self_check: float = 0.0  # share of prefix hits that are recomputed and compared, bit for bit
    log_every: int = 0  # steps between log lines; 0: none
    trace_path: str = ""  # a Chrome trace is written there when the engine closes; "": none

    def __post_init__(self) -> None:
        for name, low in (
            ("max_sequences", 1), ("max_context", 0), ("cache_bytes", 1), ("snapshot_bytes", 0), ("host_bytes", 0),
            ("disk_bytes", 0), ("step_tokens", 1), ("log_every", 0),
        ):  # fmt: skip
            require_integer(name, getattr(self, name), low)
        require_integer("max_drafts", self.max_drafts, 0, 8)
        _number("self_check", self.self_check, 0, 1)
        if self.drafter not in DRAFTERS:
            raise RequestError(f"drafter is {self.drafter!r}; it is one of {', '.join(DRAFTERS)}")
        for name in ("disk_path", "trace_path"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(f"{name} is {getattr(self, name)!r}; a path as text was expected")


@dataclasses.dataclass(frozen=True, slots=True)
class LoadOptions:
    """Where a model's weights are held.

    Raises:
        RequestError: a field is of a wrong type or none of its values; the message names it.
    """

    # "resident": in memory; "mapped": routed experts stay in the checkpoint's files and are read from there, for a
    # machine whose memory is smaller than they are.  The files must not change meanwhile.
    experts: str = "resident"
    lock_memory: bool = False  # quantised weights that are held in memory are never swapped out
    numa: str = "auto"  # "auto": weights are spread over all memory nodes, where there are several; "off": not

    def __post_init__(self) -> None:
        for name, values in (("experts", EXPERTS), ("numa", NUMA)):
            if getattr(self, name) not in values:
                raise RequestError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(values)}")
        if not isinstance(self.lock_memory, bool):
            raise RequestError(f"lock_memory is {self.lock_memory!r}; true or false was expected")

    def check_device(self, device: str) -> None:
        """Refuse what cannot be held so on a device.

        Raises:
            RequestError
        """
        if self.experts == "mapped" and device.partition(":")[0] != "cpu":
            raise RequestError(
                f"mapped experts were asked for on {device}, and only the CPU reads files in place; use cpu"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server offers, to whom, and what it bears.

    Raises:
        RequestError: a field is of a wrong type or outside its range; the message names it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()  # the model's names in requests and answers, the first is its own; (): its directory's
    any_name: bool = True  # requests for other models are answered too, by this one
    compat: str = ""  # "deepseek": the official API to the letter, refusals included; "": what the client asked for
    thinking: bool = True  # whether a request that says nothing about it is thought about
    effort: str = "high"  # and how hard: "low", "high" or "max"
    reasoning_field: bool = False  # thoughts are given as `reasoning` too, beside `reasoning_content`
    max_queue: int = 256  # requests that wait for their turn; one more is answered 429
    max_body_bytes: int = 64 << 20
    max_header_bytes: int = 64 << 10
    header_s: float = 20.0  # a client may take so long to send its request's head
    body_s: float = 120.0  # and its body
    write_s: float = 60.0  # and may so long not read what is sent to it
    keep_alive_s: float = 10.0  # between two signs of life while nothing is said yet
    deadline_s: float = 0.0  # a request may take so long from its arrival to its end; 0: as long as it takes
    drain_s: float = 60.0  # at shutdown, what runs may go on so long
    cors: tuple[str, ...] = ()  # origins whose pages may call from a browser
    hosts: tuple[str, ...] = ()  # names it may be called by where no key is needed, besides addresses and its own
    keys: str = "auto"  # "auto" (asked for on any address but loopback), "required" or "off"
    sign_up: bool = False  # whoever has an invite code may make an account
    state_path: str = ""  # a folder for keys, usage and saved sessions; "": the user's own
    database_url: str = ""  # where keys and usage are kept instead of a file in that folder
    prices: tuple[int, int, int] = (0, 0, 0)  # micro-units per million tokens of prompt, of cached prompt, of output
    usage_days: int = 0  # lines of the usage ledger are kept so long, daily sums always; 0: for ever
    tls_certificate: str = ""
    tls_key: str = ""

    def __post_init__(self) -> None:
        require_integer("port", self.port, 0, 65535)
        for name, low in (("max_queue", 0), ("max_body_bytes", 1 << 10), ("max_header_bytes", 1 << 10)):
            require_integer(name, getattr(self, name), low)
        for name in ("header_s", "body_s", "write_s", "keep_alive_s"):
            _number(name, getattr(self, name), 0, 86400, open_below=True)
        for name in ("deadline_s", "drain_s"):
            _number(name, getattr(self, name), 0, 86400)
        for name, values in (("compat", ("", "deepseek")), ("keys", KEYS), ("effort", ("low", "high", "max"))):
            if getattr(self, name) not in values:
                raise RequestError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(map(repr, values))}")
        object.__setattr__(self, "prices", _items("prices", self.prices, int))
        if len(self.prices) != 3 or not all(0 <= p <= MAX_PRICE for p in self.prices):
            raise RequestError(f"prices is {self.prices!r}; three integers from 0 to {MAX_PRICE} were expected")
        require_integer("usage_days", self.usage_days, 0)
        for name in ("names", "cors", "hosts"):
            object.__setattr__(self, name, _items(name, getattr(self, name), str))
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise RequestError("TLS needs both a certificate and its key; give tls_certificate and tls_key")


MAX_PRICE = 10**12  # micro-units of money per million tokens
KEYS = ("auto", "required", "off")
EXPERTS = ("resident", "mapped")
NUMA = ("auto", "off")
DRAFTERS = ("auto", "mtp", "lookup", "off")


def require_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse what is no integer from `low` to `high`.

    Raises:
        RequestError: naming `name`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        upper = "" if high is None else f" to {high}"
        raise RequestError(f"{name} is {value!r}; an integer from {low}{upper} was expected")


def _number(name: str, value: object, low: float, high: float, *, open_below: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (open_below and value == low):  # type: ignore[operator]
        lowest = f"above {low}" if open_below else f"from {low}"
        raise RequestError(f"{name} is {value!r}; a number {lowest} to {high} was expected")


def _items(name: str, values: object, kind: type) -> tuple[object, ...]:
    if not isinstance(values, list | tuple) or any(isinstance(v, bool) or not isinstance(v, kind) for v in values):
        raise RequestError(f"{name} is {values!r}; a list of {kind.__name__} was expected")
    return tuple(values)
