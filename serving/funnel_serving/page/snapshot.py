"""What the page shows of a server at one moment. Counters only grow: the page itself computes rates and quantiles."""

import time
from collections.abc import Iterable
from typing import Any, Protocol

from prometheus_client import Metric

from funnel_engine import Engine
from funnel_serving.metrics import ENGINE, SECONDS
from funnel_serving.service import Service
from funnel_serving.wire.model import engine_version, model_name


class Collector(Protocol):
    def collect(self) -> Iterable[Metric]: ...


def snapshot(service: Service) -> dict[str, Any]:
    """The state, the model once it is loaded, and numbers."""
    is_loaded = service.batcher is not None
    return {
        "status": service.health.facts(),
        "model": describe_model(service, service.engine) if is_loaded else None,
        "numbers": numbers(service),
    }


def describe_model(service: Service, engine: Engine) -> dict[str, Any]:
    settings, backends = service.settings, engine.backends()
    others = {name: fact for name, fact in engine.facts().items() if name not in (*backends, "limits")}
    return {
        "name": model_name(settings),
        "funnel": str(engine.funnel),
        "facts": {**others, "vectors": f"{engine.embedding_size} dimensions", "version": engine_version()},
        "backends": backends,
        "limits": {
            "input": f"{engine.max_length:,} tokens; longer ones are {'cut' if settings.truncate else 'refused'}",
            "batch": f"{engine.batch_rows:,} rows",
            "queue": f"{settings.max_waiting_rows:,} rows, {settings.max_waiting_requests:,} requests",
            "body": f"{settings.max_body_bytes:,} bytes",
            "request": f"{settings.request_seconds:g} s",
        },
        "no_comparison": service.no_comparison,
    }


def numbers(service: Service) -> dict[str, Any]:
    """Counters since the start, the queue now, and how many requests took at most each of `bounds`, and in all."""
    metrics = service.metrics
    stats = metrics.engine.stats()
    parts = zip(("tokenization", "queue", "inference"), metrics.parts, strict=True)
    return {
        "seconds": time.monotonic(),
        "requests": total(metrics.requests),
        "failures": total(metrics.failures),
        "waiting_rows": total(metrics.waiting_rows),
        "waiting_requests": total(metrics.waiting_requests),
        **{name: stats.get(name, 0) for name in ENGINE},
        "bounds": SECONDS,
        "latency": {"total": counts(metrics.request_seconds), **{name: counts(part) for name, part in parts}},
    }


def total(collector: Collector) -> float:
    """The value of a counter or a gauge, summed over its labels."""
    return sum(sample.value for metric in collector.collect() for sample in metric.samples)


def counts(histogram: Collector) -> list[float]:
    samples = [sample for metric in histogram.collect() for sample in metric.samples]
    return [sample.value for sample in samples if sample.name.endswith("_bucket")]
