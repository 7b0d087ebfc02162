"""The table of metrics: names, kinds, meanings, and every value a label may have.

A label's value is never a client's text: what is not in the table here is counted as `other`, so that the number of
series has a bound.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

PREFIX, VLLM = "pyrosome:", "vllm:"
OTHER = "other"

COUNTER, GAUGE, HISTOGRAM, INFO = "counter", "gauge", "histogram", "info"

# vLLM's bounds, so that its dashboards and alerts read the same.
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
TOKENS = (*(digit * 10**power for power in range(6) for digit in (1, 2, 5)), 1_000_000)

LABELS: dict[str, tuple[str, ...]] = {
    "protocol": ("chat_completions", "completions", "responses", "messages"),
    "mode": ("off", "low", "high", "max", "text"),
    "end": ("stop", "length", "tool_calls", "repetition", "abort", "error"),
    "finished_reason": ("stop", "length", "repetition", "abort", "error"),
    "status": tuple(
        map(str, (400, 401, 402, 403, 404, 405, 408, 409, 410, 413, 415, 421, 422, 429, 431, 500, 503, 504))
    ),
    "phase": ("queue", "prompt", "output"),
    "by": ("client", "server"),
    "kind": (
        "left_in_text", "spelled_in_text", "text_dropped", "not_closed", "undeclared_tool", "no_call", "cut_short",
        "not_json", "given_twice",
    ),
    "limit": ("all", "no common prefix", "evicted", "no snapshot", "not wanted"),
    "pool": ("window", "csa", "hca", "index", "state", "draft"),
    "type": (
        "EngineError", "CacheInvariantBroken", "DoesNotFit", "RequestError", "ContextTooLong", "CheckpointError",
        "KernelUnavailable", "drafter",
    ),
    "process": ("server", "engine"),
}  # fmt: skip

# What `Message.malformed` says, by its kind.  An empty answer has a counter of its own.
EMPTY = "the answer is empty"
_KINDS = {
    "left_in_text": r"markup of tool calls was left in the text",
    "spelled_in_text": r"markup of tool calls was spelled out in the text",
    "text_dropped": r"text (after|between the tags of) .* was dropped",
    "not_closed": r"(the tool calls were|a value of .* was|an invoke tag was) not closed",
    "undeclared_tool": r"the tool .* was not declared",
    "no_call": r"a block of tool calls held no call",
    "cut_short": r"cut short within a tool call",
    "not_json": r"the (value of .* is|arguments of .* are) not JSON",
    "given_twice": r"the parameter .* was given twice",
}
_PATTERNS = [(kind, re.compile(pattern, re.DOTALL)) for kind, pattern in _KINDS.items()]

# Streams of the cache as the engine names them.
POOLS = {
    "window_kv": "window", "csa_kv": "csa", "hca_kv": "hca", "index_k": "index", "tail": "state", "draft": "draft",
}  # fmt: skip
HISTORY = ("csa", "hca", "index")  # pools of pages, which prefixes are kept in


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """One metric, its name without the prefix."""

    name: str
    kind: str
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    is_vllm: bool = False  # also exported under vLLM's prefix


def _vllm(
    name: str, kind: str, unit: str, meaning: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = ()
) -> Metric:
    return Metric(name, kind, unit, meaning, labels, buckets, is_vllm=True)


METRICS = (
    # vLLM's
    _vllm("num_requests_running", GAUGE, "completions", "Completions in the cache, that are being computed"),
    _vllm("num_requests_waiting", GAUGE, "completions", "Completions that wait for room in the cache, or for it again"),
    _vllm(
        "kv_cache_usage_perc", GAUGE, "share, 0 to 1",
        "History pages in use, as a share of all; those of prefixes kept for reuse are in use",
    ),
    _vllm("prompt_tokens_total", COUNTER, "tokens", "Tokens of admitted prompts, reused ones included"),
    _vllm("generation_tokens_total", COUNTER, "tokens", "Tokens generated, whether or not the client got them"),
    _vllm("prefix_cache_queries_total", COUNTER, "tokens", "Tokens looked up in the prefix tree"),
    _vllm("prefix_cache_hits_total", COUNTER, "tokens", "Tokens found in the prefix tree and not computed again"),
    _vllm("num_preemptions_total", COUNTER, "times", "Times a sequence was set aside for want of memory"),
    _vllm("request_success_total", COUNTER, "completions", "Completions that ended, by why", ("finished_reason",)),
    _vllm("spec_decode_num_drafts_total", COUNTER, "drafts", "Drafts that were checked, each of one or more tokens"),
    _vllm("spec_decode_num_draft_tokens_total", COUNTER, "tokens", "Tokens in drafts that were checked"),
    _vllm("spec_decode_num_accepted_tokens_total", COUNTER, "tokens", "Tokens of drafts that were accepted"),
    _vllm(
        "spec_decode_num_accepted_tokens_per_pos_total", COUNTER, "tokens",
        "Tokens of drafts that were accepted, by position in the draft from 0", ("position",),
    ),
    _vllm(
        "time_to_first_token_seconds", HISTOGRAM, "s", "From when a request was read to its first token in the server",
        buckets=FIRST_TOKEN_S,
    ),
    _vllm(
        "inter_token_latency_seconds", HISTOGRAM, "s",
        "Between a completion's tokens; those that come together share the time since the last that came before them",
        buckets=TOKEN_S,
    ),
    _vllm(
        "request_time_per_output_token_seconds", HISTOGRAM, "s",
        "A request's decode time over its tokens after the first", buckets=TOKEN_S,
    ),
    _vllm("e2e_request_latency_seconds", HISTOGRAM, "s", "From when a request was read to its end", buckets=REQUEST_S),
    _vllm(
        "request_queue_time_seconds", HISTOGRAM, "s", "From when the engine took a request until it had room for it",
        buckets=REQUEST_S,
    ),
    _vllm(
        "request_prefill_time_seconds", HISTOGRAM, "s", "From when a request had room to its first token",
        buckets=REQUEST_S,
    ),
    _vllm(
        "request_decode_time_seconds", HISTOGRAM, "s", "From a request's first token to its end", buckets=REQUEST_S
    ),
    _vllm(
        "request_inference_time_seconds", HISTOGRAM, "s", "A request's prefill and decode time together",
        buckets=REQUEST_S,
    ),
    _vllm("request_prompt_tokens", HISTOGRAM, "tokens", "Tokens of a request's prompt", buckets=TOKENS),
    _vllm(
        "request_generation_tokens", HISTOGRAM, "tokens", "Tokens of all completions of a request together",
        buckets=TOKENS,
    ),
    _vllm(
        "request_params_max_tokens", HISTOGRAM, "tokens", "Tokens a completion may have, defaults filled in",
        buckets=TOKENS,
    ),
    _vllm("iteration_tokens_total", HISTOGRAM, "tokens", "Tokens computed in a step of the engine, drafts included"),
    _vllm("cache_config_info", INFO, "", "How the cache is set up, as labels"),
    # Requests
    Metric("requests_total", COUNTER, "requests", "Requests that ended, by what they asked for and why they ended",
           ("protocol", "mode", "end")),
    Metric("refusals_total", COUNTER, "requests", "Requests answered with an error, be it in the middle of a stream",
           ("status",)),
    Metric("gate_refusals_total", COUNTER, "requests", "Requests answered 429 because all places were taken"),
    Metric(
        "cancelled_total", COUNTER, "requests",
        "Requests whose client left, or that a closing server ended; by how far they were", ("phase", "by"),
    ),
    Metric("requests_inside", GAUGE, "requests", "Requests that were admitted and have not ended"),
    Metric("queue_length", GAUGE, "requests", "Requests inside beyond those the engine computes at once"),
    Metric("queue_limit", GAUGE, "requests", "Requests that may wait so; one more is answered 429"),
    # Answers
    Metric("reasoning_tokens_total", COUNTER, "tokens", "Tokens of thoughts in answers"),
    Metric("tool_calls_total", COUNTER, "calls", "Tool calls in answers"),
    Metric("dsml_leaks_total", COUNTER, "times", "Times DSML markup stood in content though tools were declared"),
    Metric("malformed_total", COUNTER, "notes", "What in answers was not as it should be, by kind", ("kind",)),
    Metric("empty_answers_total", COUNTER, "answers", "Answers that ended by themselves and said nothing"),
    # The cache
    Metric("pool_used_bytes", GAUGE, "bytes", "Bytes of the cache in use, by kind of stream", ("pool",)),
    Metric("pool_total_bytes", GAUGE, "bytes", "Bytes of the cache, by kind of stream", ("pool",)),
    Metric("prefix_blocks", GAUGE, "blocks of 128 tokens", "Blocks the prefix tree knows"),
    Metric("snapshot_bytes", GAUGE, "bytes", "Host memory of copies of state at boundaries"),
    Metric("host_cache_bytes", GAUGE, "bytes", "Host memory of history that had to leave the cache"),
    Metric("disk_cache_bytes", GAUGE, "bytes", "Disk space of history that had to leave the cache"),
    Metric("lookups_total", COUNTER, "prompts", "Prompts looked up, by what kept more of them from being reused",
           ("limit",)),
    Metric("replayed_tokens_total", COUNTER, "tokens", "Tokens computed to rebuild state behind a prefix hit"),
    Metric("evicted_blocks_total", COUNTER, "blocks of 128 tokens", "Blocks that had to leave the cache"),
    Metric("spilled_blocks_total", COUNTER, "blocks of 128 tokens", "Evicted blocks kept in host memory or on disk"),
    Metric("restored_blocks_total", COUNTER, "blocks of 128 tokens", "Blocks brought back from there"),
    # The engine
    Metric("computed_tokens_total", COUNTER, "tokens", "Tokens through the network in steps, drafts included"),
    Metric(
        "spec_decode_num_draft_tokens_per_pos_total", COUNTER, "tokens",
        "Tokens in drafts that were checked, by position in the draft from 0", ("position",),
    ),
    Metric("step_seconds", HISTOGRAM, "s", "Time a step of the engine took"),
    Metric("parks_total", COUNTER, "times", "Times a sequence or an idle session was set aside for want of memory"),
    Metric("resumes_total", COUNTER, "times", "Times one that was set aside came back"),
    Metric("self_checks_total", COUNTER, "prefix hits", "Prefix hits recomputed and compared, bit for bit"),
    Metric("self_check_failures_total", COUNTER, "prefix hits", "Prefix hits that were not the same as recomputed"),
    Metric("engine_faults_total", COUNTER, "faults", "Faults that ended one request, or spared it drafts, by class",
           ("type",)),
    Metric("sessions_open", GAUGE, "sessions", "Sessions in the engine, those set aside included"),
    Metric("engine_up", GAUGE, "0 or 1", "Whether the engine answered when it was asked last"),
    Metric("engine_stats_age_seconds", GAUGE, "s", "Since the engine told its numbers, as it does between two steps"),
    Metric("engine_restarts_total", COUNTER, "times", "Times the engine's process died and was started again"),
    # The server
    Metric("ready", GAUGE, "0 or 1", "Whether requests are answered, as /health says"),
    Metric("process_resident_memory_bytes", GAUGE, "bytes", "Resident memory of a process, on Linux", ("process",)),
    Metric("build_info", INFO, "", "Version, and fingerprint of weights, numerics and cache format, as labels"),
)  # fmt: skip

BY_NAME = {m.name: m for m in METRICS}


def bounded(label: str, value: object) -> str:
    """A label's value, `other` where the table has it not."""
    text = str(value)
    return text if text in LABELS[label] else OTHER


def kind_of(note: str) -> str:
    """The kind of a note in `Message.malformed`."""
    return next((kind for kind, pattern in _PATTERNS if pattern.fullmatch(note)), OTHER)


def table() -> str:
    """The metrics and the values of their labels as tables in Markdown, as docs/metrics.md has them."""
    rows = ["| metric | kind | unit | labels | meaning |", "| --- | --- | --- | --- | --- |"]
    for m in METRICS:
        mark = " †" if m.is_vllm else ""
        labels = ", ".join(f"`{label}`" for label in m.labels)
        rows.append(f"| `{m.name}`{mark} | {m.kind} | {m.unit} | {labels} | {m.meaning} |")
    rows += ["", "| label | values |", "| --- | --- |"]
    rows += [f"| `{label}` | {', '.join(f'`{value}`' for value in values)} |" for label, values in LABELS.items()]
    return "\n".join(rows) + "\n"


def _written(page: str) -> str:
    """The page with its tables as they are now."""
    before, _, rest = page.partition("<!-- METRICS -->\n")
    after = rest.partition("<!-- /METRICS -->")[2]
    return f"{before}<!-- METRICS -->\n{table()}<!-- /METRICS -->{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(_written(path.read_text(encoding="utf-8")), encoding="utf-8")
