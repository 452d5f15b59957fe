"""What one process counts, under Prometheus's rules: the families, their labels, their buckets.

Owns the registry of the process and every family of ours; those of vLLM keep vLLM's own names,
because dashboards for them exist. Does not own how processes are brought together
(`redis_metrics`). Invariant: every label has a bounded set of values, none of which names a tenant,
a key, an execution or a request.
"""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from serve_app.core.inference import FinishReason, Measured

REGISTRY = CollectorRegistry()
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_REQUEST_BUCKETS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
_STORE_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5, 10)
_MODEL_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

_REQUESTS = Counter(
    "inferpipe_http_requests",
    "HTTP requests answered, by route template.",
    ["method", "route", "status"],
    registry=REGISTRY,
)
_REQUEST_SECONDS = Histogram(
    "inferpipe_http_request_seconds",
    "From a request to the first byte of its answer.",
    ["route"],
    buckets=_REQUEST_BUCKETS_S,
    registry=REGISTRY,
)
_STREAMS = Gauge("inferpipe_open_streams", "Event streams being read.", registry=REGISTRY)
_ENDED = Counter(
    "inferpipe_executions_ended",
    "Executions that reached a terminal state.",
    ["status"],
    registry=REGISTRY,
)
_STORE_SECONDS = Histogram(
    "inferpipe_store_batch_seconds",
    "One batch of calls to the store, there and back.",
    buckets=_STORE_BUCKETS_S,
    registry=REGISTRY,
)
_STORE_CALLS = Counter("inferpipe_store_calls", "Calls to the store.", registry=REGISTRY)
_WEBHOOK_ATTEMPTS = Counter(
    "inferpipe_webhook_attempts",
    "Tries to deliver a webhook, by what became of the delivery.",
    ["outcome"],
    registry=REGISTRY,
)
_WEBHOOK_SECONDS = Histogram(
    "inferpipe_webhook_attempt_seconds",
    "One try to deliver a webhook, from the name look-up to the end of the answer.",
    buckets=_REQUEST_BUCKETS_S,
    registry=REGISTRY,
)
_LINKS = Gauge("inferpipe_links_open", "Open links to model replicas.", registry=REGISTRY)


class ProcessMetrics:
    """`ports.RequestMetrics`: what the ingress counts."""

    def request_answered(
        self, method: str, route: str, status: int, first_byte_s: float | None
    ) -> None:
        """See `ports.RequestMetrics`."""
        shown = method if method in _METHODS else "other"
        _REQUESTS.labels(shown, route, f"{status // 100}xx" if status else "none").inc()
        if first_byte_s is not None:
            _REQUEST_SECONDS.labels(route).observe(first_byte_s)

    def stream_opened(self) -> None:
        """See `ports.RequestMetrics`."""
        _STREAMS.inc()

    def stream_closed(self) -> None:
        """See `ports.RequestMetrics`."""
        _STREAMS.dec()


def execution_ended(status: str) -> None:
    """A commit that ended an execution is in."""
    _ENDED.labels(status).inc()


def store_answered(call_count: int, duration_s: float) -> None:
    """A batch of calls came back."""
    _STORE_CALLS.inc(call_count)
    _STORE_SECONDS.observe(duration_s)


def webhook_tried(outcome: str, duration_s: float) -> None:
    """A try to deliver a webhook was recorded."""
    _WEBHOOK_ATTEMPTS.labels(outcome).inc()
    _WEBHOOK_SECONDS.observe(duration_s)


def links_changed(open_count: int) -> None:
    """The links of this process are now so many."""
    _LINKS.set(open_count)


def own_page() -> str:
    """This process's metrics in the text format."""
    return generate_latest(REGISTRY).decode()


class EngineMetrics:
    """The engine's families, under vLLM's names, meanings and labels.

    vLLM's own logger costs more per step than the step's tokens (see `vllm_engine`), so the same
    numbers are taken where they pass anyway: a few per step, the rest once per request.
    """

    def __init__(self, model_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        labels = ["model_name", "engine"]
        values = (model_name, "0")

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, labels, registry=registry).labels(*values)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, labels, registry=registry).labels(*values)

        def histogram(name: str, text: str) -> Histogram:
            family = Histogram(
                f"vllm:{name}", text, labels, buckets=_MODEL_BUCKETS_S, registry=registry
            )
            return family.labels(*values)

        self._running = gauge("num_requests_running", "Requests in the engine's batches.")
        self._waiting = gauge("num_requests_waiting", "Requests waiting for a batch.")
        self._kv_usage = gauge("kv_cache_usage_perc", "Used part of the KV cache, 0 to 1.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found in the cache.")
        self._prompt = counter("prompt_tokens", "Prompt tokens of ended requests.")
        self._generated = counter("generation_tokens", "Tokens generated for ended requests.")
        self._ttft = histogram("time_to_first_token_seconds", "From submission to a first token.")
        self._e2e = histogram("e2e_request_latency_seconds", "From submission to the last token.")
        ends = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            [*labels, "finished_reason"],
            registry=registry,
        )
        self._ends = {
            reason: ends.labels(*values, "abort" if reason is FinishReason.CANCELLED else reason)
            for reason in FinishReason
        }
        self._failed = ends.labels(*values, "error")

    def step_ended(self, scheduler_stats: Any) -> None:
        """One engine step, as vLLM's scheduler tells it."""
        self._running.set(scheduler_stats.num_running_reqs)
        self._waiting.set(scheduler_stats.num_waiting_reqs)
        self._kv_usage.set(scheduler_stats.kv_cache_usage)
        cache = scheduler_stats.prefix_cache_stats
        if cache is not None and cache.queries:
            self._queries.inc(cache.queries)
            self._hits.inc(cache.hits)

    def request_ended(self, measured: Measured) -> None:
        """One request, however it ended."""
        self._prompt.inc(measured.usage.prompt_tokens)
        self._generated.inc(measured.usage.completion_tokens)
        if measured.ttft_s is not None:
            self._ttft.observe(measured.ttft_s)
        self._e2e.observe(measured.duration_s)
        reason = measured.finish_reason
        (self._failed if reason is None else self._ends[reason]).inc()
