"""What Prometheus is told: requests as they end, the server as it is, and the engine's own numbers.

Nothing here is global: a service has one `Metrics`, and two services in one process do not meet.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, product
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from pyrosome import __version__
from pyrosome.answer import ChatReader
from pyrosome.chat.events import Message
from pyrosome.config import BLOCK_TOKENS
from pyrosome.engine.stats import STEP_BUCKETS, TOKEN_BUCKETS, Stats
from pyrosome.server.engine_numbers import EngineNumbers
from pyrosome.server.exchange import Exchange, Outcome
from pyrosome.server.metrics_names import (
    BY_NAME,
    COUNTER,
    EMPTY,
    HISTOGRAM,
    HISTORY,
    INFO,
    LABELS,
    OTHER,
    POOLS,
    PREFIX,
    VLLM,
    bounded,
    kind_of,
)
from pyrosome.server.problems import Problem
from pyrosome.server.service import READY, Service

_LEAK = re.compile(r"[｜‖|]{1,2} ?DSML ?[｜‖|]{1,2}")

# Those counted here as they happen; all others are read from the engine and the service when they are asked for.
_COUNTED = (
    "requests_total", "request_success_total", "refusals_total", "cancelled_total", "reasoning_tokens_total",
    "tool_calls_total", "dsml_leaks_total", "malformed_total", "empty_answers_total",
)  # fmt: skip


class Metrics:
    """Watches a service; `collect` gives all there is to tell, as `prometheus_client` wants it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.engine = EngineNumbers(service)
        registry = self._registry = CollectorRegistry()
        self._counters = {
            name: Counter(PREFIX + name, BY_NAME[name].meaning, BY_NAME[name].labels, registry=registry)
            for name in _COUNTED
        }
        self._histograms = {
            name: Histogram(PREFIX + name, metric.meaning, buckets=metric.buckets, registry=registry)
            for name, metric in BY_NAME.items()
            if metric.kind == HISTOGRAM and metric.buckets
        }
        # Shown from the start, so that a rate knows the first time something happens; not every protocol is used.
        for name in set(_COUNTED) - {"requests_total"}:
            if names := BY_NAME[name].labels:
                for values in product(*(LABELS[label] for label in names)):
                    self._counters[name].labels(*values)
        self._exchanges: dict[str, Exchange] = {}  # that were taken and have not ended

    # What happens, as a `Watcher` is told

    def taken(self, exchange: Exchange) -> None:
        """A request was admitted."""
        self._exchanges[exchange.id] = exchange

    def waited(self, num_tokens: int, seconds: float) -> None:
        """Tokens came together, and each waited for its share of that time."""
        for _ in range(num_tokens):
            self._observe("inter_token_latency_seconds", seconds / num_tokens)

    def refused(self, path: str, problem: Problem) -> None:
        """A request got an error for an answer."""
        self._counters["refusals_total"].labels(bounded("status", problem.status)).inc()

    def ended(self, outcome: Outcome) -> None:
        """A request has ended."""
        exchange = self._exchanges.pop(outcome.id, None)
        asked = outcome.asked
        self._counters["requests_total"].labels(
            bounded("protocol", asked.protocol), bounded("mode", asked.mode), bounded("end", outcome.status)
        ).inc()
        if outcome.status == "abort":
            by = "server" if exchange and exchange.is_shutting_down else "client"
            self._counters["cancelled_total"].labels(_phase(outcome), by).inc()
        if outcome.first_token is not None:
            self._observe("time_to_first_token_seconds", outcome.first_token - outcome.arrived)
        if outcome.status not in ("abort", "error"):
            self._completed(outcome)
        self._counters["reasoning_tokens_total"].inc(outcome.usage.reasoning_tokens)
        for reader, done in zip(asked.readers, outcome.dones, strict=True):
            if done:
                reads_calls = isinstance(reader, ChatReader) and reader.reads_calls
                self._answered(done.message, outcome.status, reads_calls=reads_calls)

    def _completed(self, outcome: Outcome) -> None:
        """Times and sizes of a request that was answered to its end."""
        usage = outcome.usage
        self._observe("e2e_request_latency_seconds", outcome.ended - outcome.arrived)
        self._observe("request_prompt_tokens", usage.prompt_tokens)
        self._observe("request_generation_tokens", usage.completion_tokens)
        self._observe("request_params_max_tokens", outcome.asked.request.params.max_tokens)
        if outcome.first_token is None:
            return
        queued = outcome.reuse.waited_s
        prefill = max(0.0, outcome.first_token - outcome.arrived - queued)
        decode = outcome.ended - outcome.first_token
        self._observe("request_queue_time_seconds", queued)
        self._observe("request_prefill_time_seconds", prefill)
        self._observe("request_decode_time_seconds", decode)
        self._observe("request_inference_time_seconds", prefill + decode)
        longest = max((d.usage.completion_tokens for d in outcome.dones if d), default=0)
        if longest > 1:
            self._observe("request_time_per_output_token_seconds", decode / (longest - 1))

    def _answered(self, message: Message, status: str, *, reads_calls: bool) -> None:
        reason = message.finish_reason
        # A completion that its request's end cut off ended as the request did; calls are one way to stop.
        reason = status if reason == "abort" else "stop" if reason == "tool_calls" else reason
        self._counters["request_success_total"].labels(bounded("finished_reason", reason)).inc()
        self._counters["tool_calls_total"].inc(len(message.tool_calls))
        if reads_calls:
            self._counters["dsml_leaks_total"].inc(len(_LEAK.findall(message.content)))
        for note in message.malformed if reason not in ("abort", "error") else ():
            if note == EMPTY:
                self._counters["empty_answers_total"].inc()
            else:
                self._counters["malformed_total"].labels(kind_of(note)).inc()

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    # What is told

    def collect(self) -> Iterator[Metric]:
        """Every metric, and after each one that vLLM has too, the same under its prefix."""
        constant = {"model_name": self._service.card.name, "engine": "0"}
        for metric in (*self._registry.collect(), *self._server(), *self._of_engine(), *self._infos()):
            metric.samples = [
                s._replace(labels={**constant, **s.labels}) for s in metric.samples if not s.name.endswith("_created")
            ]
            yield metric
            short = metric.name.removeprefix(PREFIX)
            if BY_NAME[_full(short, metric.type)].is_vllm:
                alias = Metric(VLLM + short, metric.documentation, metric.type)
                alias.samples = [s._replace(name=VLLM + s.name.removeprefix(PREFIX)) for s in metric.samples]
                yield alias

    def _server(self) -> Iterator[Metric]:
        service, gate = self._service, self._service.gate
        yield _one("gate_refusals_total", gate.num_refused)
        yield _one("requests_inside", gate.num_inside)
        yield _one("queue_length", max(0, gate.num_inside - gate.num_places))
        yield _one("queue_limit", gate.max_queue)
        yield _one("ready", service.state == READY)
        yield _one("engine_up", self.engine.is_up)
        yield _one("engine_restarts_total", self.engine.num_restarts)
        age = self.engine.age_s
        yield _labelled("engine_stats_age_seconds", [((), age)] if age is not None else [])
        sizes = {"server": resident_bytes(os.getpid()), "engine": resident_bytes(self.engine.pid)}
        yield _labelled("process_resident_memory_bytes", [((k,), v) for k, v in sizes.items() if v is not None])

    def _of_engine(self) -> Iterator[Metric]:
        s = self.engine.stats
        pools = _pools(s)
        used, total = (sum(pools[p][i] for p in HISTORY if p in pools) for i in (0, 1))
        for name, value in {
            "num_requests_running": s.running,
            "num_requests_waiting": s.waiting,
            "kv_cache_usage_perc": used / total if total else 0.0,
            "prompt_tokens_total": s.prompt_tokens,
            "generation_tokens_total": s.output_tokens,
            "prefix_cache_queries_total": s.prompt_tokens,
            "prefix_cache_hits_total": s.reused_tokens,
            "num_preemptions_total": s.parks,
            "spec_decode_num_drafts_total": s.drafted[0] if s.drafted else 0,
            "spec_decode_num_draft_tokens_total": sum(s.drafted),
            "spec_decode_num_accepted_tokens_total": sum(s.accepted),
            "prefix_blocks": s.tree_blocks,
            "snapshot_bytes": s.snapshot_bytes,
            "host_cache_bytes": s.host_bytes,
            "disk_cache_bytes": s.disk_bytes,
            "replayed_tokens_total": s.replayed_tokens,
            "evicted_blocks_total": s.evicted_blocks,
            "spilled_blocks_total": s.spilled_blocks,
            "restored_blocks_total": s.restored_blocks,
            "computed_tokens_total": s.computed_tokens,
            "parks_total": s.parks,
            "resumes_total": s.resumes,
            "self_checks_total": s.self_checks,
            "self_check_failures_total": s.self_check_failures,
            "sessions_open": s.sessions,
        }.items():
            yield _one(name, value)
        yield _labelled("pool_used_bytes", [((pool,), both[0]) for pool, both in pools.items()])
        yield _labelled("pool_total_bytes", [((pool,), both[1]) for pool, both in pools.items()])
        yield _labelled("spec_decode_num_draft_tokens_per_pos_total", _by_position(s.drafted))
        yield _labelled("spec_decode_num_accepted_tokens_per_pos_total", _by_position(s.accepted))
        yield _labelled("lookups_total", _by_label("limit", s.lookups_by_limit))
        yield _labelled("engine_faults_total", _by_label("type", s.errors_by_type))
        yield _histogram("step_seconds", STEP_BUCKETS, s.steps_by_seconds, s.step_seconds)
        yield _histogram("iteration_tokens_total", TOKEN_BUCKETS, s.steps_by_tokens, s.computed_tokens)

    def _infos(self) -> Iterator[Metric]:
        options, about = self._service.engine_options, self.engine.about
        cache = {"block_size": BLOCK_TOKENS} | {
            name: getattr(options, name)
            for name in ("cache_bytes", "snapshot_bytes", "host_bytes", "disk_bytes", "max_sequences", "step_tokens")
        }
        cache |= {name: about.get(name, "") for name in ("max_context", "kv_format", "drafter", "max_drafts")}
        yield _info("cache_config_info", cache)
        yield _info("build_info", {"version": __version__, "fingerprint": self._service.card.fingerprint})


def resident_bytes(pid: int | None) -> int | None:
    """A process's memory, in bytes; None where it cannot be known."""
    if not pid or sys.platform != "linux":
        return None
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # it has just ended
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _phase(outcome: Outcome) -> str:
    if outcome.first_token is not None:
        return "output"
    return "prompt" if outcome.progress else "queue"


def _pools(stats: Stats) -> dict[str, tuple[int, int]]:
    """(bytes in use, bytes in all) of each pool."""
    found: dict[str, tuple[int, int]] = {}
    for stream, (used, total) in stats.pool_bytes.items():
        pool = POOLS.get(stream, OTHER)
        before = found.get(pool, (0, 0))
        found[pool] = before[0] + used, before[1] + total
    return found


def _full(short: str, kind: str) -> str:
    """The table's name of a family: `prometheus_client` leaves the ends of counters and infos out."""
    return short + {COUNTER: "_total", INFO: "_info"}.get(kind, "")


def _one(name: str, value: float) -> Metric:
    return _labelled(name, [((), float(value))])


def _labelled(name: str, values: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    metric = BY_NAME[name]
    family = CounterMetricFamily if metric.kind == COUNTER else GaugeMetricFamily
    found = family(PREFIX + name, metric.meaning, labels=metric.labels)
    for labels, value in values:
        found.add_metric(labels, value)
    return found


def _by_position(counts: Sequence[int]) -> list[tuple[tuple[str, ...], float]]:
    return [((str(position),), n) for position, n in enumerate(counts)]


def _by_label(label: str, counts: dict[str, int]) -> list[tuple[tuple[str, ...], float]]:
    found = dict.fromkeys(LABELS[label], 0)
    for value, n in counts.items():
        found[bounded(label, value)] = found.get(bounded(label, value), 0) + n
    return [((value,), n) for value, n in found.items()]


def _histogram(name: str, bounds: Sequence[float], counts: Sequence[int], total: float) -> Metric:
    """A histogram of counts by bucket, the last of which has no bound."""
    ends = [*map(floatToGoString, bounds), "+Inf"]
    buckets = list(zip(ends, accumulate(counts), strict=True))
    return HistogramMetricFamily(PREFIX + name, BY_NAME[name].meaning, buckets=buckets, sum_value=total)


def _info(name: str, labels: dict[str, object]) -> Metric:
    values = {key: str(value) for key, value in labels.items()}
    return InfoMetricFamily(PREFIX + name.removesuffix("_info"), BY_NAME[name].meaning, value=values)
