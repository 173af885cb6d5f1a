"""What Prometheus reads: our metrics (`funnel_*`), and those of text-embeddings-inference (`te_*`) for its dashboards.

Every series exists before the first request, with labels from closed sets. Times are in seconds.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from funnel_serving.answers import Timing
from funnel_serving.refusals import KINDS

METHODS = ("embed", "classify", "tag", "hidden_states")
STATUSES = ("2xx", "4xx", "5xx")
SECONDS = [1e-5 * 1.5**power for power in range(35)]  # TEI's: up to 10 s
SIZES = [2**power for power in range(25)]
# TEI's labels of failures, by our kinds. What is not here is "validation".
TEI_FAILURES = {
    "too_large": "batch_size",
    "tokenization": "tokenization",
    "inference": "inference",
    "overloaded": "overloaded",
    "unsupported": "model_type",
    "timeout": "dropped",
}
# The engine's counters, see `funnel_engine.programs.COUNTERS`, as Prometheus names them.
ENGINE = {
    "sequences": "sequences that were run",
    "tokens": "tokens that were run",
    "batches": "batches that were run",
    "padding_rows": "rows that were computed but contain no token",
    "compilations": "programs that were compiled",
    "compilations_after_warmup": "programs that were compiled after the warm-up",
    "compile_seconds": "time of the compilations",
}


disable_created_metrics()  # they double the number of series, and nobody reads them


class TeiRequests:
    """TEI's metrics of requests under one prefix, e.g. `te_embed`. Its counters have no suffix `_total`, as gauges."""

    def __init__(self, prefix: str, registry: CollectorRegistry):
        def histogram(name: str, about: str) -> Histogram:
            return Histogram(f"{prefix}_{name}", about, buckets=SECONDS, registry=registry)

        self.count = Gauge(f"{prefix}_count", "requests", ["method"], registry=registry)
        self.success = Gauge(f"{prefix}_success", "requests with a result", ["method"], registry=registry)
        for method in ("single", "batch"):
            self.count.labels(method)
            self.success.labels(method)
        self.seconds = histogram("duration", "time of a request")
        self.parts = [
            histogram(f"{part}_duration", f"time of a request in {part}")
            for part in ("tokenization", "queue", "inference")
        ]

    def observe(self, method: str, seconds: float, timing: Timing) -> None:
        self.success.labels(method).inc()
        self.seconds.observe(seconds)
        for part, value in zip(self.parts, (timing.tokenization, timing.queue, timing.inference), strict=True):
            part.observe(value)


class EngineCollector(Collector):
    """The engine's own counters, read when Prometheus asks; 0 as long as the model is not loaded."""

    def __init__(self) -> None:
        self.stats: Callable[[], Mapping[str, Any]] = dict

    def collect(self) -> Iterator[Metric]:
        values = self.stats()
        for name, about in ENGINE.items():
            yield CounterMetricFamily(f"funnel_{name}", about, value=values.get(name, 0))


class Metrics:
    """All metrics of a server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, about: str, **labels: Iterable[str]) -> Counter:
            made = Counter(f"funnel_{name}", about, list(labels), registry=registry)
            for label, values in labels.items():
                for value in values:
                    made.labels(**{label: value})
            return made

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(name, about, registry=registry)

        def histogram(name: str, about: str, buckets: list[Any]) -> Histogram:
            return Histogram(name, about, buckets=buckets, registry=registry)

        self.responses = counter("http_responses", "replies, by class of status", status=STATUSES)
        self.requests = counter("requests", "requests to the engine, by its method", method=METHODS)
        self.failures = counter("failures", "requests that were refused, by reason", kind=KINDS)
        self.dropped = counter("dropped_requests", "requests whose client left, or whose deadline passed, in the queue")
        self.nonfinite = counter("nonfinite_results", "requests whose result had NaN or infinity")
        self.truncated = counter("truncated_inputs", "inputs that were cut")
        self.waiting_rows = gauge("funnel_waiting_rows", "rows in the queue")
        self.waiting_requests = gauge("funnel_waiting_requests", "requests in the queue")
        self.request_seconds = histogram("funnel_request_seconds", "from the request to its results", SECONDS)
        self.parts = [
            histogram("funnel_tokenization_seconds", "time of a request with the tokenizer", SECONDS),
            histogram("funnel_queue_seconds", "time of a request in the queue", SECONDS),
            histogram("funnel_inference_seconds", "time of a request in batches", SECONDS),
        ]
        self.batch_sequences = histogram("funnel_batch_sequences", "sequences in a batch", SIZES)
        self.batch_rows = histogram("funnel_batch_rows", "rows of a batch that its sequences take", SIZES)
        self.engine = EngineCollector()
        registry.register(self.engine)

        self.te_all = TeiRequests("te_request", registry)
        self.te_by_method = {
            "embed": TeiRequests("te_embed", registry),
            "classify": TeiRequests("te_predict", registry),
        }
        self.te_failures = Gauge("te_request_failure", "requests that were refused", ["err"], registry=registry)
        for err in {"validation", *TEI_FAILURES.values()}:
            self.te_failures.labels(err)
        self.te_input_length = histogram("te_request_input_length", "tokens of an input", SIZES)
        self.te_queue_size = gauge("te_queue_size", "requests in the queue")
        self.te_batch_size = histogram("te_batch_next_size", "sequences in a batch", SIZES)
        self.te_batch_tokens = histogram("te_batch_next_tokens", "tokens in a batch", SIZES)

    def _tei(self, method: str) -> list[TeiRequests]:
        return [self.te_all, *([self.te_by_method[method]] if method in self.te_by_method else [])]

    def observe_request(self, method: str, inputs: int) -> None:
        """A request for the engine arrived."""
        self.requests.labels(method).inc()
        for tei in self._tei(method):
            tei.count.labels("single" if inputs == 1 else "batch").inc()

    def observe_answer(self, method: str, token_counts: list[int], truncated: int, timing: Timing) -> None:
        """It got its results."""
        seconds = timing.tokenization + timing.queue + timing.inference
        self.request_seconds.observe(seconds)
        for part, value in zip(self.parts, (timing.tokenization, timing.queue, timing.inference), strict=True):
            part.observe(value)
        self.truncated.inc(truncated)
        for tei in self._tei(method):
            tei.observe("single" if len(token_counts) == 1 else "batch", seconds, timing)
        for tokens in token_counts:
            self.te_input_length.observe(tokens)

    def observe_refusal(self, kind: str) -> None:
        self.failures.labels(kind).inc()
        self.te_failures.labels(TEI_FAILURES.get(kind, "validation")).inc()

    def observe_queue(self, rows: int, requests: int) -> None:
        self.waiting_rows.set(rows)
        self.waiting_requests.set(requests)
        self.te_queue_size.set(requests)

    def observe_batch(self, sequences: int, rows: int, tokens: int) -> None:
        for histogram, value in (
            (self.batch_sequences, sequences),
            (self.batch_rows, rows),
            (self.te_batch_size, sequences),
            (self.te_batch_tokens, tokens),
        ):
            histogram.observe(value)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)
